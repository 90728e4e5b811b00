"""Checkpoints, runs and recipes made to do harm: nothing in them is run, memory is bounded, the error is clear.

Nothing outside is written. All commands run in a process that has a gigabyte of memory above what it starts with.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import pytest
import safetensors.torch
import torch
from hostile import Payload, Run


def test_the_payload_would_work(watched: Path) -> None:
    pickle.loads(pickle.dumps(Payload(watched)))
    assert (watched.parent / "executed").exists()


# Checkpoints


def sign(checkpoint: Path, change: Callable[[dict[str, Any]], Any] = lambda document: None) -> None:
    """Change a `checkpoint.json` and make all digests right again."""
    document = json.loads((checkpoint / "checkpoint.json").read_bytes())
    for name, entry in document["files"].items():
        file = checkpoint / name
        if file.is_file() and file.stat().st_size < 1 << 30:
            entry |= {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    change(document)
    (checkpoint / "checkpoint.json").write_bytes(fuzzing.signed(document))


def pickled(best: Path) -> None:
    (best / "model.safetensors").write_bytes(pickle.dumps(Payload(best.parents[1])))
    sign(best)


def saved_by_torch(best: Path) -> None:
    torch.save({"weight": Payload(best.parents[1])}, best / "model.safetensors")
    sign(best)


def long_header(best: Path) -> None:
    (best / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    sign(best)


def header(shape: list[int], offsets: list[int]) -> bytes:
    text = json.dumps({"weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return len(text).to_bytes(8, "little") + text


def large_shape(best: Path) -> None:
    (best / "model.safetensors").write_bytes(header([10**9, 10**9], [0, 4 * 10**18]))
    sign(best)


def large_shape_of_nothing(best: Path) -> None:
    (best / "model.safetensors").write_bytes(header([0, 1 << 40, 1 << 40], [0, 0]))
    sign(best)


def not_a_number(best: Path) -> None:
    weights = safetensors.torch.load((best / "model.safetensors").read_bytes())
    weights[max(weights)].flatten()[0] = torch.nan
    (best / "model.safetensors").write_bytes(safetensors.torch.save(weights))
    sign(best)


def other_names(best: Path) -> None:
    weights = safetensors.torch.load((best / "model.safetensors").read_bytes())
    (best / "model.safetensors").write_bytes(
        safetensors.torch.save({f"../../{name}": weights[name] for name in weights})
    )
    sign(best)


def a_terabyte(best: Path) -> None:
    os.truncate(best / "model.safetensors", 1 << 40)
    sign(best, lambda document: document["files"]["model.safetensors"].update(size=1 << 40))


def a_device(best: Path) -> None:
    (best / "model.safetensors").unlink()
    (best / "model.safetensors").symlink_to("/dev/zero")
    sign(best)


def a_pipe(best: Path) -> None:
    (best / "model.safetensors").unlink()
    os.mkfifo(best / "model.safetensors")
    sign(best)


def a_long_index(best: Path) -> None:
    with (best / "checkpoint.json").open("ab") as file:
        file.truncate(1 << 34)


def a_giant(best: Path) -> None:
    sign(best, lambda document: document["recipe"]["model"].update(width=4096, widening=64))


def huge_images(best: Path) -> None:
    sign(best, lambda document: document["assets"].update(image_size=1_000_000))


def no_text(best: Path) -> None:
    sign(best, lambda document: document["assets"].update(classes=[["a"], 1]))


def nested(best: Path) -> None:
    (best / "checkpoint.json").write_text('{"dl7": 1, "format": 1, "a": ' + "[" * 1_000_000)


def before_the_first(best: Path) -> None:
    sign(best, lambda document: document["progress"].update(step=-1))


def many_digits(best: Path) -> None:
    text = (best / "checkpoint.json").read_text().replace('"epoch": 1', '"epoch": ' + "9" * 100_000)
    (best / "checkpoint.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (pickled, "is not a whole safetensors file"),
        (saved_by_torch, "is not a whole safetensors file"),
        (long_header, "is not a whole safetensors file"),
        (large_shape, "is not a whole safetensors file"),
        (large_shape_of_nothing, "is not a whole safetensors file"),
        (not_a_number, "the weights of the checkpoint are not all numbers: `"),
        (other_names, "do not fit its recipe: `"),
        (a_terabyte, "does not fit in memory: it has 1099511627776 bytes"),
        (a_device, "cannot be read: it is not a file"),
        (a_pipe, "cannot be read: it is not a file"),
        (a_long_index, "checkpoint.json` is damaged: it has 17179869184 bytes"),
        (a_giant, "do not fit its recipe: `"),
        (huge_images, "`image_size` of the checkpoint's assets is wrong: "),
        (no_text, "`classes.0` of the checkpoint's assets is wrong: "),
        (nested, "is damaged: it is not whole JSON"),
        (many_digits, "is damaged: it is not whole JSON"),
        (before_the_first, "`progress.step` is wrong"),
    ],
)
def test_checkpoints(
    change: Callable[[Path], None], expected: str, confined: Run, small_runs: Path, watched: Path
) -> None:
    shutil.copytree(small_runs / "resnet", watched / "run")
    change(watched / "run" / "best")
    (watched / "image.png").write_bytes(fuzzing.IMAGES[0])
    failed = confined("classify", "--run", "run", "image.png")
    assert (failed.code, failed.out) == (1, "")
    assert failed.err.startswith("error: ")
    assert expected in failed.err.splitlines()[0]


@pytest.mark.parametrize(
    "vocabulary",
    [
        {"kind": "word", "words": [1, 2]},
        {"kind": "character", "words": {"a": 1}},
        {"kind": "word", "words": ["\ud83d"]},
        {"kind": "sentencepiece", "model": ""},
        {"kind": "sentencepiece", "model": "AAAA"},
        {"kind": "os.system"},
    ],
)
def test_vocabularies(vocabulary: dict[str, Any], confined: Run, small_runs: Path, watched: Path) -> None:
    shutil.copytree(small_runs / "seq2seq", watched / "run")
    sign(watched / "run" / "best", lambda document: document["assets"].update(vocabulary=vocabulary))
    failed = confined("translate", "--run", "run", "1 2")
    assert (failed.code, failed.out) == (1, "")
    assert failed.err.startswith("error: the vocabulary of the checkpoint is ")


def test_an_optimiser_is_not_given_tensors_of_other_shapes(confined: Run, small_runs: Path, watched: Path) -> None:
    """Fused ones read and write as many numbers as the weights have, whether they are there or not."""
    shutil.copytree(small_runs / "resnet", watched / "run")
    (watched / "run" / "result.json").unlink()
    last = watched / "run" / "last"
    original = safetensors.torch.load((last / "training.safetensors").read_bytes())
    buffers = sorted(name for name in original if name.startswith("optimiser."))
    for changed in (
        {buffers[0]: torch.zeros(())},
        {buffers[0]: original[buffers[0]].half()},
        {buffers[0]: original[buffers[0]] * torch.nan},
        {"optimiser.99.momentum_buffer": torch.zeros(3)},
        {"random.cpu": torch.zeros(9, dtype=torch.uint8)},
    ):
        (last / "training.safetensors").write_bytes(safetensors.torch.save({**original, **changed}))
        sign(last, lambda document: document["progress"].update(epoch=0))
        failed = confined("train", "--resume", "run")
        assert (failed.code, failed.out) == (1, "")
        assert "error: the training state of the checkpoint does not fit its recipe: " in failed.err


@pytest.mark.parametrize("name", ["lock", "environment.json", "metrics.jsonl", "evaluations.jsonl", "result.json"])
def test_what_a_run_links_to_is_not_written(name: str, confined: Run, small_runs: Path, watched: Path) -> None:
    shutil.copytree(small_runs / "resnet", watched / "run")
    for path in ("result.json", name):
        (watched / "run" / path).unlink(missing_ok=True)
    (watched / "run" / name).symlink_to("../../outside/file")
    sign(watched / "run" / "last", lambda document: document["progress"].update(epoch=0))
    command = ("eval", "run") if name == "evaluations.jsonl" else ("train", "--resume", "run")
    # What is read first is not what a run would have written there.
    expected = f"`run/{name}` is damaged" if name == "environment.json" else f"cannot write `run/{name}`"
    assert f"error: {expected}" in confined(*command).err


@pytest.mark.parametrize("name", ["lock", "environment.json", "metrics.jsonl", "evaluations.jsonl", "result.json"])
def test_no_pipe_is_waited_for_and_no_device_read_without_end(
    name: str, confined: Run, small_runs: Path, watched: Path
) -> None:
    run = watched / "runs" / "run"
    shutil.copytree(small_runs / "resnet", run)
    (run / "result.json").unlink()
    sign(run / "last", lambda document: document["progress"].update(epoch=0))
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    used = ("eval", "run") if name == "evaluations.jsonl" else ("train", "--resume", "run")
    failed = confined(*used)
    assert failed.code == 1
    assert failed.err.startswith(f"error: `runs/run/{name}` ") or f"error: cannot write `runs/run/{name}`" in failed.err
    for leads_to in (None, "/dev/zero"):
        if leads_to is not None:
            (run / name).unlink()
            (run / name).symlink_to(leads_to)
        for command in ("list", "show"):
            looked = confined("runs", command)
            assert looked.code == 0 or looked.err == f"error: `runs/run/{name}` cannot be read: it is not a file\n"


def test_a_checkpoint_that_is_a_link_is_taken_away_alone(tmp_path: Path) -> None:
    from dl7cli import checkpoint

    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "checkpoint.json").touch()
    (tmp_path / "epoch-0001").symlink_to("outside")
    checkpoint.remove(tmp_path / "epoch-0001")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["outside", "outside/checkpoint.json"]


# Recipes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = " + "[" * 30_000, "is not a TOML file: it is nested too deeply"),
        ("a = " + "[" * 20 + "]" * 20, "is not a TOML file: it is nested too deeply"),
        ("a" + ".a" * 30_000 + " = 1", "is not a TOML file: it is nested too deeply"),
        ('"#"' + ".a" * 30_000 + " = 1", "is not a TOML file: it is nested too deeply"),
        ("\n".join([*(f"k{n} = 1" for n in range(6000)), 'model.kind = "resnet"']), "\n  and 5,982 more"),
        ("a = " + "9" * 10_000, "is not a TOML file: an integer has more than 64 bits"),
        ("training.epochs = 0x" + "f" * 10_000, "is not a TOML file: an integer has more than 64 bits"),
        ("#" * (1 << 20), "is not a TOML file: it is longer than 65,536 bytes"),
        ("#" * ((1 << 16) - 1) + "é", "is not a TOML file: it is longer than 65,536 bytes"),
        (
            '[model]\nkind = "transformer"\nfeedforward_width = 10000000000',
            "`model.feedforward_width` is `10000000000`",
        ),
        ('name = "\\u001b]0;x\\u0007"\nmodel.kind = "resnet"', "`name` is "),
    ],
)
def test_recipes(text: str, expected: str, confined: Run, watched: Path) -> None:
    (watched / "mine.toml").write_text(text)
    failed = confined("train", "mine.toml")
    assert (failed.code, failed.out) == (1, "")
    assert expected in failed.err
    assert len(failed.err) < 10_000


def test_a_name_stays_below_the_folder_of_runs(confined: Run, watched: Path, tiny: dict[str, Path]) -> None:
    (watched / "mine.toml").write_text('name = "../../outside/x"\n' + tiny["resnet"].read_text())
    trained = confined("train", "mine.toml", "--set", "training.epochs=1", "--json")
    assert json.loads(trained.out)["run"] == "runs/outside-x-1"


def test_a_model_larger_than_the_memory(confined: Run, watched: Path, tiny: dict[str, Path]) -> None:
    keys = ('model={kind="transformer",width=4096,feedforward_width=1048576,encoder_layers=64}',)
    failed = confined("train", str(tiny["seq2seq"]), *(text for key in keys for text in ("--set", key)))
    assert failed.err.startswith("error: the weights of this model would take ")
