"""Commands on tiny data: train and what comes after it, data, and what they print where."""

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
from running import KEYS, TINY_SEQ2SEQ, dl7, succeed


def draw_images(folder: Path, splits: dict[str, int]) -> Path:
    """Save images of 16x16 in two classes that differ in colour, below folders for splits."""
    random = np.random.default_rng(0)
    for split, count in splits.items():
        for label, channel in (("red", 0), ("blue", 2)):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 100, (16, 16, 3), dtype=np.uint8)
                pixels[:, :, channel] += 150
                PIL.Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"), {"train": 16, "test": 4})


TINY_RESNET = ("--set", "model.depth=8", "--set", "training.batch_size=8", "--set", "data.crop_padding=1")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, images: Path, pairs: Path) -> Path:
    """A folder with `runs/resnet-1` and `runs/seq2seq-1`; what their training printed is beside them."""
    work = tmp_path_factory.mktemp("work")
    for name, *arguments in (
        ("resnet", "--data", str(images), *TINY_RESNET, "--set", "training.epochs=2", "--json"),
        ("seq2seq", "--data", str(pairs), *TINY_SEQ2SEQ, "--set", "training.epochs=30"),
    ):
        trained = succeed("train", name, *arguments, cwd=work)
        (work / f"{name}.out").write_text(trained.out, encoding="utf-8")
        (work / f"{name}.err").write_text(trained.err, encoding="utf-8")
    return work


# Training and what comes after it


def test_train_prints_one_object_and_tells_the_rest_on_standard_error(work: Path, images: Path) -> None:
    result = json.loads((work / "resnet.out").read_text(encoding="utf-8"))
    assert set(result) == {
        *KEYS,
        *("steps", "training_seconds", "best_epoch", "parameters", "device", "precision", "rate", "peak_memory_bytes"),
    }
    assert result["run"] == "runs/resnet-1"
    assert (result["split"], result["examples"], result["primary"]) == ("test", 8, "accuracy")
    assert 0 <= result["scores"]["accuracy"] <= 1
    assert result["signature"] is None
    told = (work / "resnet.err").read_text(encoding="utf-8")
    assert f"{images}: 29 train, 3 validation, 8 test" in told
    assert f"{result['parameters']:,} parameters (depth 8)" in told
    assert "8 in 2 epochs, seed 1" in told
    assert re.search(r"^epoch 1  validation accuracy [01]\.\d{4}  \(best\)$", told, re.MULTILINE)
    assert "next: dl7 plot curves runs/resnet-1" in told
    assert "dl7 classify --run runs/resnet-1 IMAGE" in told


def test_train_names_score_split_and_data(work: Path, pairs: Path) -> None:
    score, signature, *_ = (work / "seq2seq.out").read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(rf"BLEU \d+\.\d\d on the test split of {pairs} \(6 sentence pairs, \d+s\), by .*", score)
    assert re.fullmatch(r"signature nrefs:1\|.*version:.*", signature)
    assert 'dl7 translate --run runs/seq2seq-1 --beam 5 "…"' in (work / "seq2seq.err").read_text(encoding="utf-8")


def test_eval_gives_the_score_of_training(work: Path) -> None:
    trained = json.loads((work / "resnet.out").read_text(encoding="utf-8"))
    result = succeed("eval", "runs/resnet-1", "--json", cwd=work).document
    assert set(result) == set(KEYS)
    assert {**result, "seconds": 0, "readings": 1} == {key: trained[key] for key in result} | {"seconds": 0}
    assert result["readings"] > 1
    shown = succeed("eval", "runs/resnet-1", "--split", "validation", cwd=work).out
    first, interval, views, details, blank, *table = shown.splitlines()
    assert re.fullmatch(r"accuracy \d\.\d{4} on the validation split of .* \(3 images, \d+s\), by .*", first)
    assert re.fullmatch(r"95 % interval \d\.\d{4} to \d\.\d{4} \(Wilson\)", interval)
    assert views == "scores are the mean of 2 views of each image (evaluation.flip, evaluation.shift)"
    number = r"\d\.\d{4}"
    assert re.fullmatch(
        rf"negative log-likelihood {number}, expected calibration error {number} \(15 bins\)", details
    ), "of two classes there is no top five"
    assert blank == ""
    assert [line.split()[0] for line in table] == ["CLASS", "blue", "red"]
    assert sum(int(line.split()[1]) for line in table[1:]) == 3


def result_of(confusion: list[list[int]], names: list[str]) -> dict[str, Any]:
    """What `training.evaluate` returns, as far as it is printed, for predictions counted by hand."""
    classes = [
        {"class": name, "examples": sum(row), "accuracy": row[number] / sum(row) if sum(row) else None}
        for number, (name, row) in enumerate(zip(names, confusion, strict=True))
    ]
    numbers = {"flip": True, "shift": 0, "accuracy_interval": [0.25, 0.75], "negative_log_likelihood": None}
    details = {**numbers, "expected_calibration_error": 0.125, "classes": classes, "confusion": confusion}
    return {
        **{"run": "r", "checkpoint": "best", "task": "classification", "recipe": "x", "data": "d", "split": "test"},
        **{"examples": 9},
        **{"primary": "accuracy", "scores": {"accuracy": 0.5, "top_5_accuracy": 0.875}, "signature": None},
        **{"details": details, "seconds": 1.0},
    }


def test_views_are_counted_as_they_are_weighted(capsys: pytest.CaptureFixture[str]) -> None:
    from dl7cli.cli.evaluate import print_result

    result = result_of([[1, 0], [0, 1]], ["cat", "dog"])
    result["details"]["shift"] = 1
    print_result(result, as_json=False)
    said = capsys.readouterr().out.splitlines()[2]
    assert said == "scores are the weighted mean of 6 views of each image (evaluation.flip, evaluation.shift)"


def test_classes_are_a_table_that_wide_characters_do_not_disturb(capsys: pytest.CaptureFixture[str]) -> None:
    from dl7cli.cli.evaluate import print_result

    print_result(result_of([[3, 1, 2], [0, 2, 0], [0, 0, 0]], ["犬", "cat", "none"]), as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "accuracy 0.5000 on the test split of d (9 images, 1s), by r",
        "95 % interval 0.2500 to 0.7500 (Wilson)",
        "scores are the mean of 2 views of each image (evaluation.flip, evaluation.shift)",
        "top-5 accuracy 0.8750, negative log-likelihood -, expected calibration error 0.1250 (15 bins)",
        "",
        "CLASS  IMAGES  ACCURACY  MOST OFTEN TAKEN FOR",
        "犬          6    0.5000  none (2)",
        "cat         2    1.0000",
        "none        0         -",
    ]


def test_of_many_classes_the_worst_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from dl7cli.cli.evaluate import print_result

    confusion = [[0] * 30 for _ in range(30)]
    for number in range(29):  # class 29 has no images, and is not the worst
        confusion[number][number] = 60 - number
        confusion[number][(number + 1) % 30] = 40 + number
    print_result(result_of(confusion, [f"c{number}" for number in range(30)]), as_json=False)
    *_, said, header = (lines := capsys.readouterr().out.splitlines())[:-10]
    assert (said, header.split()[0]) == ("the worst 10 of 30 classes (--json has all):", "CLASS")
    rows = [line.split() for line in lines[-10:]]
    assert [row[0] for row in rows] == [f"c{number}" for number in range(28, 18, -1)]
    assert rows[0] == ["c28", "100", "0.3200", "c29", "(68)"]


def test_eval_draws_the_confusion_matrix(work: Path, tmp_path: Path) -> None:
    for name in ("drawn.png", "drawn.SVG"):
        (tmp_path / name).write_text("as it was", encoding="utf-8")
        result = succeed("eval", "runs/resnet-1", "--plot", str(tmp_path / name), "--json", cwd=work)
        assert result.document["details"]["confusion"]
        assert f"drawn: {tmp_path / name}" in result.err
    with PIL.Image.open(tmp_path / "drawn.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
    assert "<svg" in (tmp_path / "drawn.SVG").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn.SVG", "drawn.png"]


def test_what_cannot_be_drawn_is_refused_before_anything_is_scored(work: Path, tmp_path: Path) -> None:
    readings = {run: (work / "runs" / run / "evaluations.jsonl").read_bytes() for run in ("resnet-1", "seq2seq-1")}
    (tmp_path / "folder.png").mkdir()
    for run, file, expected in (
        ("resnet-1", "x.pdf", "ends in neither `.png` nor `.svg`"),
        ("resnet-1", "png", "ends in neither `.png` nor `.svg`"),
        ("resnet-1", "missing/x.png", "there is no folder"),
        ("resnet-1", "folder.png", "it is a folder"),
        ("seq2seq-1", "x.png", "is a translator: it has no confusion matrix"),
    ):
        failed = dl7("eval", f"runs/{run}", "--plot", str(tmp_path / file), cwd=work)
        assert (failed.code, failed.out) == (1, "")
        assert expected in failed.err
        assert "\nhint: " in failed.err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]
    for run, content in readings.items():
        assert (work / "runs" / run / "evaluations.jsonl").read_bytes() == content


def test_eval_tells_what_was_done_to_the_data(work: Path, tmp_path: Path) -> None:
    other = draw_images(tmp_path / "other", {"train": 2, "test": 1})
    for file in other.rglob("*.png"):
        with PIL.Image.open(file) as image:
            small = image.resize((20, 10))
        small.save(file)
    told = succeed("eval", "runs/resnet-1", "--data", str(other), "--json", cwd=work).err
    assert "note: images of 20x10 resized and cropped to 16x16\n" in told
    assert told.count("resized") == 1, "not also of the size they would have had"


def test_eval_on_other_data(work: Path, tmp_path: Path) -> None:
    other = draw_images(tmp_path / "other", {"train": 2, "test": 1})
    result = succeed("eval", "runs/resnet-1", "--data", str(other), "--json", cwd=work).document
    assert (result["data"], result["examples"]) == (str(other), 2)


def test_eval_of_translation_takes_a_beam(work: Path) -> None:
    result = succeed("eval", "runs/seq2seq-1", "--beam", "2", "--length-penalty", "0.5", "--json", cwd=work).document
    assert result["primary"] == "bleu"
    assert result["signature"].startswith("nrefs:1|")
    failed = dl7("eval", "runs/resnet-1", "--beam", "2", cwd=work)
    assert (failed.code, failed.out) == (1, "")
    assert "classifier" in failed.err


def test_classify(work: Path, images: Path) -> None:
    files = [str(images / "test" / label / "0.png") for label in ("red", "blue")]
    shown = succeed("classify", *files, cwd=work)
    assert shown.err == "by runs/resnet-1\n", "it was not named"
    rows = [line.split("\t") for line in shown.out.splitlines()]
    assert [row[0] for row in rows] == [files[0], files[0], files[1], files[1]]
    for first, second in (rows[:2], rows[2:]):
        assert {first[1], second[1]} == {"red", "blue"}
        assert float(first[2]) >= float(second[2])
        assert float(first[2]) + float(second[2]) == pytest.approx(1, abs=1e-4)
    document = succeed("classify", *files, "--run", "runs/resnet-1/best", "--top", "1", "--json", cwd=work).document
    assert document["run"] == "runs/resnet-1"
    assert [image["classes"][0]["class"] for image in document["images"]] == [rows[0][1], rows[2][1]]
    assert [len(image["classes"]) for image in document["images"]] == [1, 1]


def test_a_checkpoint_of_another_task_out_of_its_run_is_refused(work: Path, images: Path, tmp_path: Path) -> None:
    """Nothing but its own contents says what it is for."""
    for name in ("resnet-1", "seq2seq-1"):
        shutil.copytree(work / "runs" / name / "best", tmp_path / name)
    with_translator = ("--run", str(tmp_path / "seq2seq-1"), "--run", "resnet-1")
    for arguments, told in (
        (("classify", str(images / "test/red/0.png"), "--run", "seq2seq-1"), "is for translation, not for class"),
        (("translate", "red", "--run", "resnet-1"), "is for classification, not for translation"),
        (("translate", "red", *with_translator), "is for classification, not for translation"),
        (("score", "--run", "resnet-1"), "is for classification, not for translation"),
        (("eval", "seq2seq-1", "--with", "resnet-1"), "is for classification, not for translation"),
    ):
        failed = dl7(*arguments, cwd=tmp_path)
        assert (failed.code, failed.out) == (1, "")
        assert failed.err.startswith("error: checkpoint `"), failed.err
        assert told in failed.err


def test_classify_names_a_file_that_is_no_image(work: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    failed = dl7("classify", str(images / "test/red/0.png"), str(tmp_path / "text.png"), cwd=work)
    assert (failed.code, failed.out) == (1, "")
    assert "text.png` is not an image that can be read\nhint: what can be read are PNG, JPEG, " in failed.err


def test_runs(work: Path, images: Path) -> None:
    header, first, second = succeed("runs", "list", cwd=work).out.splitlines()
    assert header.split() == ["RUN", "RECIPE", "DATA", "STATE", "EPOCHS", "VALIDATION", "TEST", "CHANGED"]
    assert first.split()[:5] == ["runs/resnet-1", "resnet", str(images), "finished", "2"]
    assert second.startswith("runs/seq2seq-1")
    listed = succeed("runs", "list", "--json", cwd=work).document["runs"]
    assert [run["name"] for run in listed] == ["resnet-1", "seq2seq-1"]
    assert set(listed[0]["changed"]) == {"model.depth", "training.batch_size", "data.crop_padding", "training.epochs"}
    assert listed[0]["changed"]["model.depth"] == [20, 8]
    told = [f"{key}={json.dumps(now)}" for key, (_, now) in listed[1]["changed"].items()]
    assert len(told) > 5
    assert second.endswith(f"  {' '.join(told[:5])} …")
    before = succeed("runs", "show", "runs/resnet-1", "--json", cwd=work).document
    succeed("eval", "runs/resnet-1", cwd=work)
    after = succeed("runs", "show", "runs/resnet-1", "--json", cwd=work).document
    assert after["readings"]["test"] == before["readings"]["test"] + 1
    assert (after["epochs"], after["epochs_planned"]) == (2, 2)
    shown = succeed("runs", "show", "runs/resnet-1", cwd=work).out
    assert re.search(
        rf"^test +read {after['readings']['test']} times, last 20..-..-..T.*: accuracy ", shown, re.MULTILINE
    )
    assert "by checkpoint" not in shown
    succeed("eval", "runs/resnet-1/last", cwd=work)
    shown = succeed("runs", "show", "runs/resnet-1", cwd=work).out
    assert re.search(r"^test .*: accuracy .* by checkpoint last$", shown, re.MULTILINE)


def test_only_readings_of_its_own_data_are_a_run_s_own(work: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "runs" / "resnet-1", tmp_path / "run")
    (tmp_path / "run" / "evaluations.jsonl").unlink()
    succeed("eval", "run", cwd=tmp_path)
    shutil.copytree(images, tmp_path / "moved")
    assert succeed("eval", "run", "--data", "moved", "--json", cwd=tmp_path).document["readings"] == 2
    shutil.copytree(images / "test", tmp_path / "other" / "test")
    next((tmp_path / "other" / "test" / "red").iterdir()).unlink()
    for times in (1, 2):
        found = succeed("eval", "run", "--data", "other", "--json", cwd=tmp_path).document
        assert found["readings"] == times
    assert succeed("runs", "show", "run", "--json", cwd=tmp_path).document["readings"] == {"test": 2}
    *_, own, others = succeed("runs", "show", "run", cwd=tmp_path).out.splitlines()
    assert re.fullmatch(rf"test +read 2 times, .* of {images}", own)
    assert re.fullmatch(r"test +read 2 times, .* of other", others)


def test_records_that_are_not_ones_of_dl7_cost_themselves_alone(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "runs", tmp_path / "runs")
    run = next((tmp_path / "runs").glob("resnet-*"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "epoch": 9, "primary": null, "scores": {"accuracy": 1.0}}\n')
    expected = succeed("runs", "show", str(run), "--json", cwd=work).document
    assert succeed("runs", "show", str(run), "--json", cwd=tmp_path).document["epochs"] == expected["epochs"] < 9
    (run / "evaluations.jsonl").unlink()
    os.mkfifo(run / "evaluations.jsonl")  # of a run that is not of dl7 either
    listed = succeed("runs", "list", "--json", cwd=tmp_path).document["runs"]
    assert len(listed) == len(succeed("runs", "list", "--json", cwd=work).document["runs"])


def test_a_test_split_that_nobody_has_read(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "runs" / "resnet-1", tmp_path / "run")
    (tmp_path / "run" / "evaluations.jsonl").unlink()
    assert succeed("runs", "show", "run", cwd=tmp_path).out.endswith("\ntest        never read\n")
    assert succeed("runs", "show", "run", "--json", cwd=tmp_path).document["readings"] == {"test": 0}


def interrupt_once_it_grows(file: Path, number: int) -> None:
    """Send this process a signal when a line is added to the file."""
    size = file.stat().st_size if file.exists() else 0

    def watch() -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if file.exists() and file.stat().st_size > size:
                os.kill(os.getpid(), number)
                return
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number: int, code: int, images: Path, tmp_path: Path) -> None:
    endless = ("--data", str(images), *TINY_RESNET, "--set", "training.epochs=5000", "--out", "my run")
    metrics = tmp_path / "my run" / "metrics.jsonl"
    for arguments in (("resnet", *endless), ("--resume", "my run")):
        interrupt_once_it_grows(metrics, number)
        stopped = dl7("train", *arguments, "--json", cwd=tmp_path)
        assert stopped.code == code
        assert stopped.out == ""
        assert stopped.err.endswith("stopped; saved in my run\ngo on with: dl7 train --resume 'my run'\n")
    assert "  resumed    after step " in stopped.err


def test_on_a_terminal_there_is_a_bar_and_standard_output_is_for_data(tmp_path: Path, images: Path) -> None:
    arguments = ("--data", str(images), *TINY_RESNET, "--set", "training.epochs=1", "--out", "[red]x", "--json")
    trained = succeed("train", "resnet", *arguments, cwd=tmp_path, terminal=True, TERM="xterm", COLUMNS="120")
    assert trained.document["run"] == "[red]x"
    assert "  run        [red]x" in trained.err, "names are not markup"
    assert "━" in trained.err
    assert trained.err.count("\x1b[?25l") == trained.err.count("\x1b[?25h"), "the cursor comes back"
    assert re.search(r"epoch 1  validation accuracy [01]\.\d{4}  \(best\)", trained.err)


# Data


def test_the_built_in_set_stands_in_and_that_is_said(tmp_path: Path, images: Path) -> None:
    """A recipe whose own data are on a hub that cannot be reached, and which names a small folder for that case."""
    recipe = succeed("recipes", "show", "resnet", cwd=tmp_path).out
    (tmp_path / "mine.toml").write_text(f'{recipe}\n[fallback]\n"data.source" = "{images}"\n', encoding="utf-8")
    arguments = ("train", "mine.toml", *TINY_RESNET, "--set", "training.epochs=1", "--json")
    for flags, environment, said in (
        ((), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "neither on disk nor reachable"),
        (("--offline",), {}, "neither on disk nor looked for, being offline"),
    ):
        begin = time.monotonic()
        trained = succeed(*arguments, *flags, cwd=tmp_path, **environment)
        assert trained.document["data"] == str(images)
        first, second, *_ = trained.err.splitlines()
        assert first == f"the data uoft-cs/cifar10 is {said}: training on the built-in set {images} instead"
        assert second == "  for scores on the real data: dl7 train mine.toml --data FOLDER"
        assert time.monotonic() - begin < 120
    asked = dl7(*arguments, "--data", "uoft-cs/cifar10", "--offline", cwd=tmp_path)
    assert (asked.code, asked.out) == (1, ""), "data asked for by name are not replaced"
    assert "uoft-cs/cifar10" in asked.err
    text = (tmp_path / "mine.toml").read_text(encoding="utf-8").replace("uoft-cs/cifar10", "./my-imgaes")
    (tmp_path / "own.toml").write_text(text, encoding="utf-8")
    for command in ("train", "bench"):
        missing = dl7(command, "own.toml", cwd=tmp_path)
        assert (missing.code, missing.out) == (1, ""), "nor is a folder that a recipe of one's own names"
        assert "error: there is no file or folder `./my-imgaes`" in missing.err


def test_shipped_recipes_fall_back_on_built_in_sets(tmp_path: Path) -> None:
    from dl7cli.cli.train import choose

    for name, source in (("resnet", "builtin:shapes"), ("seq2seq", "builtin:phrases")):
        assert choose(name, [], data=None, seed=None, offline=True).data.source == source


def test_data_list_looks_at_the_disk_only(tmp_path: Path) -> None:
    document = succeed("data", "list", "--json", cwd=tmp_path).document
    states = {entry["source"]: entry["state"] for entry in document["sources"]}
    assert states["builtin:shapes"] == states["builtin:phrases"] == "built in"
    assert states["uoft-cs/cifar10"] == states["bentrevett/multi30k"] == "not on disk"
    shown = succeed("data", "list", cwd=tmp_path).out.splitlines()
    assert len(shown) == 1 + len(states)


def test_data_info_finds_out_what_the_data_are(images: Path, pairs: Path, tmp_path: Path) -> None:
    about = succeed("data", "info", str(images), "--json", cwd=tmp_path).document
    assert about["task"] == "classification"
    assert about["classes"] == {"blue": 16, "red": 16}
    assert about["splits"] == {"train": 32, "test": 8}
    assert about["also_in_train"] == {"test": 0}
    about = succeed("data", "info", str(pairs), "--json", cwd=tmp_path).document
    assert about["task"] == "translation"
    assert (about["from"], about["to"], about["splits"]["train"]) == ("en", "de", 72)
    assert about["examples"][1] == ["red blue old big", "rot blau alt groß"]
    reversed_languages = ("--set", "data.source_language=de", "--set", "data.target_language=en")
    about = succeed("data", "info", str(pairs), *reversed_languages, "--json", cwd=tmp_path).document
    assert about["examples"][1] == ["rot blau alt groß", "red blue old big"]
    shown = succeed("data", "info", str(pairs), cwd=tmp_path).out
    assert "red blue old big → rot blau alt groß" in shown


def test_data_info_takes_keys_of_data_and_no_others(pairs: Path, tmp_path: Path) -> None:
    for change in ("training.epochs=3", "data.source=builtin:phrases", "data.train_examples=3"):
        failed = dl7("data", "info", str(pairs), "--set", change, cwd=tmp_path)
        assert (failed.code, failed.out) == (1, "")
        assert f"`--set {change.split('=')[0]}` does not change how `{pairs}` is read" in failed.err


def test_a_logo_does_not_make_a_corpus_one_of_images(pairs: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(pairs, tmp_path / "corpus")
    shutil.copy(images / "test" / "red" / "0.png", tmp_path / "corpus" / "logo.png")
    assert succeed("data", "info", "corpus", "--json", cwd=tmp_path).document["task"] == "translation"
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "notes.txt").write_text("x")
    assert succeed("data", "info", "images", "--json", cwd=tmp_path).document["task"] == "classification"


def test_data_info_counts_what_is_also_in_training(images: Path, pairs: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    seen = next((tmp_path / "images" / "train").rglob("*.png"))
    for number, label in enumerate(sorted((tmp_path / "images" / "test").iterdir())):
        shutil.copy(seen, label / f"again-{number}.png")
    about = succeed("data", "info", "images", "--json", cwd=tmp_path).document
    assert about["also_in_train"] == {"test": 2}, "whatever their labels"
    shutil.copytree(pairs, tmp_path / "pairs")
    for language, lines in (("en", "red\nnever seen\n"), ("de", "a new answer\nrot\n")):
        (tmp_path / "pairs" / f"test.{language}").write_text(lines, encoding="utf-8")
    about = succeed("data", "info", "pairs", "--json", cwd=tmp_path).document
    assert about["also_in_train"] == {"validation": 12, "test": 1}, "by the source alone"
    shown = succeed("data", "info", "pairs", cwd=tmp_path).out.splitlines()
    at = shown.index("also_in_train validation  12")
    assert shown[at + 1].split() == ["test", "1"]


def test_data_info_tells_of_odd_pairs(tmp_path: Path) -> None:
    given = [
        ("a dog", "ein Hund"),
        ("a dog", "ein Hund"),
        ("a dog", "der Hund"),
        ("Berlin", "Berlin"),
        ("no", "x" * 20),
    ]
    given += [("no", "x" * 23), ("y" * 30, "z" * 10), ("y" * 31, "z" * 10), ("a dog", "ein Hund")]
    for number, language in enumerate(("en", "de")):
        (tmp_path / f"train.{language}").write_text("".join(f"{pair[number]}\n" for pair in given), encoding="utf-8")
    about = succeed("data", "info", ".", "--json", cwd=tmp_path).document
    assert about["odd"] == {"repeated": 2, "copied": 1, "uneven": 2}
    lengths = {"source_median": 5, "source_longest": 31, "target_median": 8, "target_longest": 23}
    assert about["characters"] == lengths
    shown = succeed("data", "info", ".", cwd=tmp_path).out
    assert re.search(r"^characters +source_median  5\n", shown, re.MULTILINE)
    assert re.search(r"^odd +repeated  2\n +copied  1\n +uneven  2\n", shown, re.MULTILINE)


def test_finding_out_what_the_data_are_leaves_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("DL7_CACHE", str(cache))
    pyarrow.parquet.write_table(pyarrow.table({"en": ["one"], "de": ["eins"]}), tmp_path / "train.parquet")
    about = succeed("data", "info", str(tmp_path / "train.parquet"), "--json", cwd=tmp_path).document
    assert (about["task"], about["splits"]) == ("translation", {"train": 1})
    assert list(cache.iterdir()) == []


def test_data_get(images: Path, tmp_path: Path) -> None:
    assert succeed("data", "get", str(images), cwd=tmp_path).out == f"{images}: 32 train, 8 test\n"
    assert succeed("data", "get", str(images), "--json", cwd=tmp_path).document["splits"] == {"train": 32, "test": 8}
    failed = dl7("data", "get", str(images), "--task", "translation", cwd=tmp_path)
    assert (failed.code, failed.out) == (1, "")
