"""Figures: the curves are the functions, the file is of the kind its name says, and never half of one."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import matplotlib.figure
import PIL.Image
import pytest
import typer
from running import dl7, succeed

from dl7cli import runs
from dl7cli.cli import plot
from dl7cli.errors import UserError
from dl7cli.runs import Run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that are saved."""
    figures: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def seen(figure: matplotlib.figure.Figure, *args: object, **options: object) -> None:
        figures.append(figure)
        save(figure, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", seen)
    return figures


def test_the_default_is_swish_against_sus_function_as_the_article_draws_them(
    tmp_path: Path, drawn: list[matplotlib.figure.Figure]
) -> None:
    plot.activations(output=tmp_path / "figure.png")
    with PIL.Image.open(tmp_path / "figure.png") as image:
        assert image.format == "PNG"
        assert image.width > image.height > 400
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]
    values, slopes = drawn[0].axes
    assert [line.get_label() for line in values.lines[:2]] == ["swish", "su"]
    swish, su = (dict(line.get_xydata().tolist()) for line in values.lines[:2])
    assert len(swish) == len(su) > 500
    assert all(math.isclose(y, x / (1 + math.exp(-x)), abs_tol=1e-12) for x, y in swish.items())
    assert all(math.isclose(y, max(x, x * math.exp(-abs(x))), abs_tol=1e-12) for x, y in su.items())
    for function, line in zip((swish, su), slopes.lines[:2], strict=False):
        points = sorted(function)
        slope = dict(line.get_xydata().tolist())
        for left, here, right in zip(points, points[1:], points[2:], strict=False):
            if abs(here) > 0.02:  # across a bend the difference is that of neither side
                difference = (function[right] - function[left]) / (right - left)
                assert math.isclose(slope[here], difference, abs_tol=1e-3)


def test_all_are_drawn_into_an_svg_with_their_names(tmp_path: Path) -> None:
    plot.activations(every=True, output=tmp_path / "all.SVG")
    text = (tmp_path / "all.SVG").read_text(encoding="utf-8")
    assert "<svg" in text
    for name in ("relu", "softsign", "glu", "maxout", "leaky_relu"):
        assert f">{name}</text>" in text


def test_the_curves_of_runs_are_what_they_have_recorded(
    small_runs: Path, tmp_path: Path, drawn: list[matplotlib.figure.Figure]
) -> None:
    for name in ("one", "$x^2$ <b>"):
        shutil.copytree(small_runs / "resnet", tmp_path / name)
    torn = {"step": 99, "epoch": 9, "loss": None}
    with (tmp_path / "one" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(torn) + '\n{"step": 100, "lo')
    succeed("plot", "curves", "one", "$x^2$ <b>", "one", "--output", "curves.svg", cwd=tmp_path)
    text = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert text.count(">one</text>") == 1
    assert text.count(">$x^2$ &lt;b&gt;</text>") == 1
    assert "accuracy on validation of …" in text
    records = runs.metrics(Run(small_runs / "resnet"))
    losses, scores = drawn[0].axes
    for axes, key, kept in (
        (losses, "step", [record for record in records if record["loss"] is not None]),
        (scores, "epoch", [record for record in records if "scores" in record]),
    ):
        solid = [line for line in axes.lines if line.get_linestyle() != ":"]
        assert len(solid) == 2
        for line in solid:
            expected = [[one[key], one["loss"] if key == "step" else one["scores"]["accuracy"]] for one in kept]
            assert line.get_xydata().tolist() == expected
    dotted = [line.get_xydata().tolist() for line in losses.lines if line.get_linestyle() == ":"]
    closed = [record for record in records if "scores" in record]
    assert dotted == [[[one["step"], one["negative_log_likelihood"]] for one in closed]] * 2
    assert scores.get_title().startswith("accuracy on validation of")
    assert losses.get_title() == "training loss; dotted: on validation"
    # Foreign records, and runs that have one name.
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "one", tmp_path / "elsewhere" / "one")
    with (tmp_path / "elsewhere" / "one" / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 1}\n{"primary": "accuracy", "scores": {"accuracy": 0.5}}\n')
    succeed("plot", "curves", "one", "elsewhere/one", "--output", "curves.svg", cwd=tmp_path)
    text = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert text.count(">one</text>") == text.count(">elsewhere/one</text>") == 1
    with_other = (tmp_path / "elsewhere" / "one" / "recipe.toml").read_text(encoding="utf-8")
    source = f'source = "{runs.read_recipe(Run(tmp_path / "one")).data.source}"'
    (tmp_path / "elsewhere" / "one" / "recipe.toml").write_text(with_other.replace(source, 'source = "builtin:shapes"'))
    succeed("plot", "curves", "one", "elsewhere/one", "--output", "curves.svg", cwd=tmp_path)
    text = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert ">accuracy on validation</text>" in text
    assert ">elsewhere/one on builtin:shapes</text>" in text
    refused = dl7("plot", "curves", "one", str(small_runs / "seq2seq"), cwd=tmp_path)
    assert refused.code == 1
    assert "`one` is chosen by accuracy and " in refused.err


def two_runs(small_runs: Path, folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Make `1` and `2`, which has a loss greater by one and half the accuracy; with its file of records, and these."""
    for number in (1, 2):
        shutil.copytree(small_runs / "resnet", folder / str(number))
    file = folder / "2" / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        record["loss"] += 1
        if "scores" in record:
            record["scores"]["accuracy"] /= 2
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file, records


def test_runs_together_are_their_mean_and_a_band(
    small_runs: Path, tmp_path: Path, drawn: list[matplotlib.figure.Figure]
) -> None:
    file, records = two_runs(small_runs, tmp_path)
    last = {**records[-1], "step": 1000, "epoch": 1000}  # which the other has not come to
    file.write_text("".join(json.dumps(record) + "\n" for record in [*records, last]))
    succeed("plot", "curves", "1,2", "1", "--output", "curves.svg", cwd=tmp_path)
    assert ">1 … (2 runs)</text>" in (tmp_path / "curves.svg").read_text(encoding="utf-8")
    losses, scores = drawn[0].axes
    for axes in (losses, scores):
        together, alone = (line.get_ydata() for line in axes.lines if line.get_linestyle() != ":")
        bands = [band.get_paths()[0].get_extents() for band in axes.collections]
        if axes is losses:
            assert together == pytest.approx(alone + 0.5)
            assert [(band.y0, band.y1) for band in bands[:1]] == [pytest.approx((alone.min(), alone.max() + 1))]
        else:
            assert together == pytest.approx(0.75 * alone)
            assert [(band.y0, band.y1) for band in bands] == [pytest.approx((alone.min() / 2, alone.max()))]
    records.insert(1, {**records[0], "loss": 100.0})  # of one step, as an epoch's end has it
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    succeed("plot", "curves", "1,2", "--output", "curves.svg", cwd=tmp_path)
    assert drawn[1].axes[0].lines[0].get_ydata().max() < 50
    recipe = tmp_path / "2" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("seed = 1", "seed = 2").replace("batch_size = ", "batch_size = 1"))
    refused = dl7("plot", "curves", "1,2", cwd=tmp_path)
    assert (refused.code, "`1` and `2` differ in more than their seeds" in refused.err) == (1, True)
    for names in ("1,", ",1", "1,,2"):
        refused = dl7("plot", "curves", names, cwd=tmp_path)
        assert (refused.code, "a comma with no run before or after it" in refused.err) == (2, True)


def test_long_names_keep_their_ends_and_every_run_is_in_the_legend(
    small_runs: Path, tmp_path: Path, drawn: list[matplotlib.figure.Figure]
) -> None:
    names = [
        "a-very-long-name-of-a-run-1",
        "a-very-long-name-of-a-run-2",
        "_baseline",
        "很长很长很长的一个名字的训练一",
    ]
    for name in names:
        shutil.copytree(small_runs / "resnet", tmp_path / name)
    succeed("plot", "curves", *names, f"{names[0]},{names[1]}", "--output", "curves.png", cwd=tmp_path)
    (legend,) = drawn[0].legends
    shown = [text.get_text() for text in legend.get_texts()]
    ends = ["…ry-long-name-of-a-run-1", "…ry-long-name-of-a-run-2"]
    assert [*shown[:3], shown[4]] == [*ends, " _baseline", "…e-of-a-run-1 … (2 runs)"]
    assert shown[3] in ("…长很长的一个名字的训练一", "3"), "the number where no font is installed"


def test_a_curve_of_one_place_can_be_seen(
    small_runs: Path, tmp_path: Path, drawn: list[matplotlib.figure.Figure]
) -> None:
    """As of a run of one epoch: a line has no length there, and a band no area."""
    two_runs(small_runs, tmp_path)
    succeed("plot", "curves", "1", "1,2", "--output", "curves.png", cwd=tmp_path)
    scores = drawn[0].axes[1]
    alone, together = scores.lines
    assert [len(line.get_xdata()) for line in (alone, together)] == [1, 1]
    assert [line.get_marker() for line in (alone, together)] == ["o", "o"]
    (band,) = scores.collections
    ((_, least), (_, greatest)) = band.get_segments()[0]
    assert [least, greatest] == pytest.approx([alone.get_ydata()[0] / 2, alone.get_ydata()[0]])


def test_a_name_given_twice_is_drawn_once(tmp_path: Path) -> None:
    plot.activations(["relu", "tanh", "relu"], output=tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text(encoding="utf-8").count(">relu</text>") == 1


def test_maxout_and_glu_are_drawn_over_what_the_help_says() -> None:
    x = [-2.0, -0.5, 1.0, 3.0]
    assert plot.curve("maxout", x) == ([2.0, 0.5, 1.0, 3.0], [-1.0, -1.0, 1.0, 1.0])
    for ours, swish in zip(plot.curve("glu", x), plot.curve("swish", x), strict=True):
        assert ours == pytest.approx(swish)


def test_a_folder_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        plot.activations(output=tmp_path / "a.png")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(b"before")
    (tmp_path / "a.png").symlink_to("old.png")
    plot.activations(["relu"], output=tmp_path / "a.png")
    assert (tmp_path / "a.png").is_symlink()
    assert (tmp_path / "old.png").read_bytes().startswith(b"\x89PNG")


def test_names_and_all_do_not_go_together() -> None:
    with pytest.raises(typer.BadParameter):
        plot.activations(["relu"], every=True)
