"""The tree of a beam search: all that it has considered and nothing else, and how it is drawn."""

import math
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import dl7, succeed
from tables import BOS, EOS, Model, Sentence, coarse_table, random_table, random_weights, together

from dl7cli.cli import figures
from dl7cli.errors import UserError
from dl7cli.search import Extension, beam_search
from dl7cli.tasks.translation import Branch


@given(
    st.integers(0, 2**32),
    st.integers(1, 5),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
)
def test_a_tree_has_the_best_extensions_of_every_step(
    seed: int, beam: int, penalty: float, prefix: int, coarse: bool, covered: bool
) -> None:
    """Among them many of the same probability, and impossible ones, in `coarse` tables."""
    one = Sentence(
        coarse_table(6, seed, 3) if coarse else random_table(6, seed),
        6,
        prefix=[2] * prefix,
        length_penalty=penalty,
        coverage_penalty=0.2 if covered else 0.0,
        weights=random_weights(6, 3, 4, seed),
        source_length=3,
        forbidden=[BOS],
    )
    tree: list[list[Extension]] = []
    context, state, rules = together([one])
    (outputs,) = beam_search(Model(), context, state, rules, beam=beam, tree=tree)
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    endings: dict[tuple[int, ...], float] = {}
    for number, step in enumerate(tree, start=1):
        candidates = []
        for ids, before in live:  # of each no more than beam + 1 can matter
            row = one.table[(BOS, BOS, *ids)[-2:]].tolist()
            possible = [id_ for id_ in one.ids if row[id_] > -math.inf and one.allowed(ids, id_)]
            following = sorted(possible, key=lambda id_: -row[id_])[: beam + 1]
            candidates += [(before + row[id_], ids, id_) for id_ in following]
        candidates.sort(key=lambda each: -each[0])
        found = [(live[each.parent][0], each.id) for each in step]
        assert found == [(ids, following) for _, ids, following in candidates[: 2 * beam]]
        totals = [each.log_probability for each in step]
        assert totals == pytest.approx([total for total, _, _ in candidates[: 2 * beam]])
        for rank, (each, (ids, following)) in enumerate(zip(step, found, strict=True)):
            assert (each.score is not None) == (following == EOS and rank < beam)
            if each.score is not None:
                assert each.score == pytest.approx(one.score(each.log_probability, ids))
                endings[ids] = each.score
        growing = [rank for rank, each in enumerate(step) if each.id != EOS][:beam]
        kept = sorted((each.place, rank) for rank, each in enumerate(step) if each.place is not None)
        # After the last step none goes on, unless nothing can follow.
        assert kept == list(enumerate(growing)) or (number == len(tree) and kept == [])
        live = [((*found[rank][0], found[rank][1]), candidates[rank][0]) for rank in growing]
    assert bool(outputs) == bool(endings)
    if outputs:
        assert endings[outputs[0].ids] == pytest.approx(outputs[0].score)
        assert max(endings.values()) == pytest.approx(outputs[0].score)


def test_a_tree_is_of_one_sentence() -> None:
    two = [Sentence(random_table(5, seed), 3) for seed in (1, 2)]
    with pytest.raises(ValueError, match="a tree is of one sentence, not of 2"):
        beam_search(Model(), *together(two), beam=2, tree=[])


@pytest.mark.parametrize("prefix", ["", "1 2"])
def test_the_best_ending_is_the_translation(prefix: str, build: Callable[..., Any]) -> None:
    task = build("seq2seq")
    decoding = task.recipe.decoding.updated(beam=3, length_penalty=1.0)
    branches: list[Branch] = []
    lines = ["", "1 2 3 4", " "]
    _, translated, _ = task.translate(lines, decoding, n_best=3, prefixes=[prefix] * 3, tree=branches)
    best = translated.alternatives[0]
    ended = [number for number, branch in enumerate(branches) if branch.score is not None]
    at: int | None = max(ended, key=lambda number: branches[number].score or 0.0)
    assert branches[at].score == pytest.approx(best.score, abs=1e-5)
    assert branches[at].log_probability == pytest.approx(best.log_probability, abs=1e-5)
    path: list[str] = []
    while at is not None:
        path.append(branches[at].token)
        assert branches[at].step + len(path) - 1 == len(best.tokens)
        at = branches[at].parent
    assert path[::-1] == best.tokens
    with pytest.raises(ValueError, match="a tree is of one sentence, not of 2"):
        task.translate(["1", "2"], decoding, tree=[])


BRANCHES = [
    Branch(None, 1, "▁ein", -0.5, None, True),
    Branch(None, 1, "▁$x_1$", -2.0, None, True),
    Branch(None, 1, "</s>", -3.0, None, False),
    Branch(0, 2, "</s>", -0.75, -0.25, False),
    Branch(0, 2, "er", -1.5, None, True),
]


def test_every_hypothesis_is_drawn_with_its_numbers(tmp_path: Path) -> None:
    figure, notes = figures.search_tree(BRANCHES, "runs/猫 <a>, beam 2", suffix=".svg")
    figures.save(figure, tmp_path / "x.svg")
    assert notes == []
    tree = xml.etree.ElementTree.parse(tmp_path / "x.svg")
    drawn = ["".join(one.itertext()).strip() for one in tree.iter("{http://www.w3.org/2000/svg}text")]
    expected = ["ein  -0.50", "$x_1$  -2.00", "(end)  -3.00", "(end)  -0.75 → -0.25", "·er  -1.50"]
    assert set(expected) < {" ".join(text.split()).replace(" ", "  ", 1) for text in drawn}
    (axes,) = figure.axes
    colours = {text.get_text(): text.get_color() for text in axes.texts}
    assert [colours[label] for label in expected] == ["C0", "black", "0.6", "C0", "black"]
    assert len(axes.lines) == len(BRANCHES)
    begins = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines[3:]}  # type: ignore[index]
    assert len(begins) == 1, "both go on from the same"


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_nothing_is_cut_off(steps: int) -> None:
    branches = [
        Branch(None if step == 1 else step - 2, step, "▁Wort", -0.5 * step, None, True) for step in range(1, steps + 1)
    ]
    branches.append(Branch(steps - 1, steps + 1, "</s>", -0.5 * steps, -0.25, False))
    figure, _ = figures.search_tree(branches, "runs/of-a-long-name-1 + runs/of-another-2, beam 5: title", suffix=".png")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    for text in (*axes.texts, axes._left_title):  # type: ignore[attr-defined]
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width + 1
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height + 1


def test_a_tree_too_wide_is_refused() -> None:
    branches = [Branch(step - 2 if step > 1 else None, step, "x", -1.0, -1.0, True) for step in range(1, 102)]
    with pytest.raises(UserError, match="a tree of 101 steps is too wide to be drawn"):
        figures.search_tree(branches, "title", suffix=".png")


def test_a_token_that_no_font_can_draw_is_a_number() -> None:
    figure, notes = figures.search_tree([BRANCHES[0]._replace(token="\U0010fffd"), *BRANCHES[1:]], "x", suffix=".png")
    assert len(notes) == 1
    assert figure.axes[0].texts[0].get_text() == "0  -0.50"


def test_what_a_beam_tried_is_drawn(translator: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.svg"):
        shown = succeed("translate", "red blue", "--beam", "3", "--tree", str(tmp_path / name), cwd=translator)
        assert shown.out == succeed("translate", "red blue", "--beam", "3", cwd=translator).out
        assert shown.err.endswith(f"drawn: {tmp_path / name}\n")
    with PIL.Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
    both = succeed("translate", "red", "--tree", "c.svg", "--attention", "d.svg", cwd=translator)
    assert both.err.endswith("drawn: d.svg\ndrawn: c.svg\n")
    told = succeed("translate", "red", "--tree", "c.svg", "--json", cwd=translator).document
    assert len(told["translations"]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("red", "blue"), 1, "`--tree` draws one sentence, and there are more"),
        (("red", "--beam", "21"), 1, "`--tree` draws a beam of at most 20"),
        (("red", "--sample"), 2, "--tree is of a beam"),
        ((" ",), 1, "there is no sentence that could be drawn"),
        (("red", "--attention", "./x.svg"), 2, "name another file for each"),
        (("red", "--output", "x.svg"), 2, "name another file for each"),
    ],
)
def test_what_has_no_tree_is_not_drawn(arguments: tuple[str, ...], code: int, told: str, translator: Path) -> None:
    failed = dl7("translate", *arguments, "--tree", "x.svg", cwd=translator)
    assert failed.code == code
    assert told in " ".join(failed.err.replace("│", " ").split())
    assert not (translator / "x.svg").exists()
