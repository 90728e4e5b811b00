"""Figures: what the files hold, in pixels and in text, whatever classes and tokens are called."""

import itertools
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from matplotlib.font_manager import FontEntry

from dl7cli.cli import console, figures
from dl7cli.errors import UserError

NAMES = ["猫", "ein sehr langer Klassenname mit Umlauten", "$x_1^2$", "a\nb", "<&>", "", "\udcff", "x" * 60, "Ω", "_^"]


def draw(path: Path, counts: list[list[int]], names: list[str], title: str = "title") -> list[str]:
    figure, notes = figures.confusion_matrix(counts, names, title, suffix=path.suffix)
    figures.save(figure, path)
    return notes


def diagonal(number: int) -> list[list[int]]:
    return (9 * np.eye(number, dtype=int)).tolist()


def look(path: Path, weights: np.ndarray, source: list[str], target: list[str]) -> list[str]:
    figure, notes = figures.attention_map(weights, source, target, "title", suffix=path.suffix)
    figures.save(figure, path)
    return notes


def texts(path: Path) -> list[str]:
    tree = xml.etree.ElementTree.parse(path)
    return ["".join(element.itertext()).strip() for element in tree.iter("{http://www.w3.org/2000/svg}text")]


def test_rows_are_labels_and_columns_what_they_were_taken_for(tmp_path: Path) -> None:
    """Of three classes all images of the first were taken for the third: the cell on the right in the top row."""
    draw(tmp_path / "x.png", [[0, 0, 7], [0, 5, 0], [0, 0, 6]], ["a", "b", "c"])
    with PIL.Image.open(tmp_path / "x.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    dark = (pixels[:, :, 2] - pixels[:, :, 0] > 60) & (pixels[:, :, 2] < 130)  # the darkest blue
    dark[:, int(0.8 * dark.shape[1]) :] = False  # the colour bar
    rows, columns = np.nonzero(dark)
    height, width = np.ptp(rows) / 3, np.ptp(columns) / 2
    seen = [
        [
            dark[
                int(rows.min() + row * height) : int(rows.min() + (row + 1) * height),
                int(columns.min() + column * width) : int(columns.min() + (column + 1) * width),
            ].mean()
            > 0.5
            for column in range(2)  # nothing is in the first
        ]
        for row in range(3)
    ]
    assert seen == [[False, True], [True, False], [False, True]]


def test_every_name_and_number_is_in_the_file_as_text(tmp_path: Path) -> None:
    counts = [[100 * row + column + 1 for column in range(10)] for row in range(10)]
    assert draw(tmp_path / "x.svg", counts, NAMES, "runs/猫 & <dog>") == []
    found = texts(tmp_path / "x.svg")
    assert set(map(str, itertools.chain(*counts))) <= set(found)
    shown = ["猫", "ein sehr langer Klassen…", "$x_1^2$", "a\\nb", "<&>", "\\udcff", "x" * 23 + "…", "Ω", "_^"]
    for name in shown:
        assert found.count(name) == 2, name
        assert console.width(name) <= figures.LONGEST_NAME


def test_a_name_that_no_font_can_draw_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["cat", "\U0010fffd", "dog"]  # the last private character, which is in no font
    notes = draw(tmp_path / "x.png", diagonal(3), names)
    assert len(notes) == 1
    assert notes[0].startswith("no installed font can draw 1 class name: numbers stand for them, from 0")
    assert figures.drawable(names, ".png", "class name").labels == ["cat", "1", "dog"]
    assert figures.drawable(names, ".svg", "class name").labels == names
    assert figures.drawable(["cat", "Ω"], ".png", "class name") == figures.Names(
        ["cat", "Ω"], ["DejaVu Sans"], False, []
    )


def test_another_font_helps_out() -> None:
    from matplotlib import font_manager

    own = figures._characters(font_manager.findfont("DejaVu Sans"))
    other = figures._characters(font_manager.findfont("STIXGeneral"))  # comes with matplotlib as well
    character = min(other - own)
    found = figures.drawable(["a", character], ".png", "class name")
    assert found.labels == ["a", character]
    assert found.families[0] == "DejaVu Sans"
    assert len(found.families) == 2
    assert character in figures._characters(font_manager.findfont(found.families[1]))


@pytest.mark.parametrize("number", [1, 2, 21, 58, 300])
def test_names_do_not_overlap(number: int, tmp_path: Path) -> None:
    figure, _ = figures.confusion_matrix(
        diagonal(number), [f"class number {number}" for number in range(number)], "title", suffix=".png"
    )
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    for upper, lower in itertools.pairwise(boxes):
        assert upper.y0 >= lower.y1
    assert all(box.x0 >= 0 for box in boxes)
    points = {label.get_fontsize() for label in [*axes.get_yticklabels(), *axes.get_xticklabels()]}
    assert min(points) >= 6, "readable"
    assert all(box.y0 >= 0 for box in (label.get_window_extent() for label in axes.get_xticklabels()))
    assert len(boxes) == number or number > 200


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    for suffix in figures.SUFFIXES:
        for name in ("one", "two"):
            draw(tmp_path / f"{name}{suffix}", diagonal(3), ["a", "b", "c"])
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_a_file_stays_as_it_was_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    file = tmp_path / "x.png"
    file.write_text("as it was", encoding="utf-8")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"x.png` cannot be written: no space left on device"):
        draw(file, diagonal(2), ["a", "b"])
    assert file.read_text(encoding="utf-8") == "as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures.refuse_unwritable(tmp_path / "x.png")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whoever may write anywhere, as root, is never refused
    with pytest.raises(UserError, match="permission denied"):
        figures.refuse_unwritable(tmp_path / "x.png")


def test_rows_are_the_translation_and_columns_the_source(tmp_path: Path) -> None:
    """Of two target tokens the first looked at the third source token alone, the second at the first."""
    look(tmp_path / "x.png", np.array([[0, 0, 1.0], [1.0, 0, 0]]), ["▁a", "▁b", "</s>"], ["▁A", "</s>"])
    with PIL.Image.open(tmp_path / "x.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    dark = (pixels[:, :, 2] - pixels[:, :, 0] > 60) & (pixels[:, :, 2] < 130)
    dark[:, int(0.8 * dark.shape[1]) :] = False
    rows, columns = np.nonzero(dark)
    upper = rows < (rows.min() + rows.max()) / 2
    assert columns[upper].min() > columns[~upper].max() + np.ptp(columns) / 4, "a column lies between them"


def test_tokens_are_drawn_as_a_reader_wants_them(tmp_path: Path) -> None:
    source = ["▁Schnee", "mann", "▁", "猫", ",", "▁cafe\u0301", "▁x▁y", "</s>"]
    target = ["雪", "人", "</s>"]
    assert look(tmp_path / "x.svg", np.full((3, 8), 1 / 8), source, target) == []
    found = texts(tmp_path / "x.svg")
    for name in ("Schnee", "·mann", "␣", "·猫", ",", "café", "x y", "雪", "人"):
        assert found.count(name) == 1, name
    assert found.count("(end)") == 2
    assert not [text for text in found if "▁" in text]
    assert {"source", "translation", "attention weight", "title"} <= set(found)
    assert figures.readable(["a", "b", "▁", "c", "</s>"]) == ["a", "b", "␣", "c", "(end)"], "characters are no pieces"


def test_a_token_that_no_font_can_draw_is_a_number(tmp_path: Path) -> None:
    notes = look(tmp_path / "x.png", np.full((2, 3), 1 / 3), ["▁a", "\U0010fffd", "</s>"], ["\U0010fffd", "</s>"])
    assert [note.split(":")[0] for note in notes] == [
        "no installed font can draw 1 source token",
        "no installed font can draw 1 target token",
    ]
    assert look(tmp_path / "x.svg", np.full((1, 1), 1.0), ["\U0010fffd"], ["</s>"]) == []


def test_fonts_of_plain_weight_come_before_others() -> None:
    fonts = [
        FontEntry(name=name, style=style, weight=weight)
        for name, style, weight in (
            ("Sans", "normal", 900),
            ("Serif", "italic", 400),
            ("Heavy", "normal", 500),
            ("Sans", "normal", 400),
            ("Last Resort", "normal", 400),
        )
    ]
    assert [(one.name, one.weight) for one in figures._regular(fonts)] == [("Sans", 400), ("Heavy", 500)]


@pytest.mark.parametrize(("target", "source"), [(1, 1), (1, 30), (30, 1), (20, 40)])
def test_tokens_do_not_overlap_and_nothing_is_cut_off(target: int, source: int) -> None:
    names = [f"▁{'Donaudampfschiff'[: 1 + number % 16]}" for number in range(40)]
    weights = np.full((target, source), 1 / source)
    figure, _ = figures.attention_map(weights, names[:source], names[:target], "a title of words " * 3, suffix=".png")
    figure.draw_without_rendering()
    axes, bar = figure.axes
    above = [label.get_window_extent() for label in axes.get_xticklabels()]
    beside = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert (len(above), len(beside)) == (source, target)
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(above))
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(beside))
    assert min(label.get_fontsize() for label in (*axes.get_xticklabels(), *axes.get_yticklabels())) >= 6
    title = axes._left_title
    assert title.get_text().startswith("a title")
    for box in (*above, *beside, title.get_window_extent(), bar.yaxis.label.get_window_extent()):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
