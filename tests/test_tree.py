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
from tables import BOS, EOS, Model, Sentence, random_table, together

from dl7cli.cli import figures
from dl7cli.search import Extension, beam_search
from dl7cli.tasks.translation import Branch


@given(st.integers(0, 2**32), st.integers(1, 5), st.sampled_from([0.0, 1.0]), st.integers(0, 2))
def test_a_tree_has_the_best_extensions_of_every_step(seed: int, beam: int, penalty: float, prefix: int) -> None:
    one = Sentence(random_table(6, seed), 6, prefix=[2] * prefix, length_penalty=penalty, forbidden=[BOS])
    tree: list[list[Extension]] = []
    context, state, rules = together([one])
    ((best, *_),) = beam_search(Model(), context, state, rules, beam=beam, tree=tree) or [[None]]
    live: list[tuple[int, ...]] = [()]
    endings: dict[tuple[int, ...], float] = {}
    for step in tree:
        candidates = []
        for ids in live:  # of each no more than beam + 1 can matter
            row = one.table[(BOS, BOS, *ids)[-2:]].tolist()
            possible = [id_ for id_ in one.ids if row[id_] > -math.inf and one.allowed(ids, id_)]
            following = sorted(possible, key=lambda id_: -row[id_])[: beam + 1]
            candidates += [(math.fsum(one.steps(ids)[:-1]) + row[id_], ids, id_) for id_ in following]
        candidates.sort(key=lambda each: -each[0])
        found = [(live[each.parent], each.id) for each in step]
        assert found == [(ids, following) for _, ids, following in candidates[: 2 * beam]]
        totals = [each.log_probability for each in step]
        assert totals == pytest.approx([total for total, _, _ in candidates[: 2 * beam]])
        for rank, (each, (ids, following)) in enumerate(zip(step, found, strict=True)):
            assert (each.score is not None) == (following == EOS and rank < beam)
            if each.score is not None:
                assert each.score == pytest.approx(one.score(each.log_probability, ids))
                endings[ids] = each.score
        growing = [number for number, each in enumerate(step) if each.id != EOS][:beam]
        kept = sorted((each.place, number) for number, each in enumerate(step) if each.place is not None)
        assert kept == list(enumerate(growing))
        live = [(*found[number][0], found[number][1]) for number in growing]
    assert best is None or max(endings.values()) == pytest.approx(best.score)
    assert best is None or endings[best.ids] == pytest.approx(best.score)


def test_a_tree_is_of_one_sentence() -> None:
    two = [Sentence(random_table(5, seed), 3) for seed in (1, 2)]
    with pytest.raises(ValueError, match="a tree is of one sentence, not of 2"):
        beam_search(Model(), *together(two), beam=2, tree=[])


@pytest.mark.parametrize("prefix", ["", "1 2"])
def test_the_best_ending_is_the_translation(prefix: str, build: Callable[..., Any]) -> None:
    task = build("seq2seq")
    decoding = task.recipe.decoding.updated(beam=3, length_penalty=1.0)
    ((*_, (best, *_), _),) = task.translate(["1 2 3 4"], decoding, n_best=3, prefixes=[prefix])
    branches = task.tree("1 2 3 4", decoding, n_best=3, prefix=prefix)
    at: int | None = max(range(len(branches)), key=lambda number: branches[number].score or -math.inf)
    assert at is not None
    assert branches[at].score == pytest.approx(best.score, abs=1e-5)
    assert branches[at].log_probability == pytest.approx(best.log_probability, abs=1e-5)
    path: list[str] = []
    while at is not None:
        path.append(branches[at].token)
        assert branches[at].step + len(path) - 1 == len(best.tokens)
        at = branches[at].parent
    assert path[::-1] == best.tokens
    assert task.tree("  ", decoding) == []


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


def test_what_a_beam_tried_is_drawn(translator: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.svg"):
        shown = succeed("translate", "red blue", "--beam", "3", "--tree", str(tmp_path / name), cwd=translator)
        assert shown.out == succeed("translate", "red blue", "--beam", "3", cwd=translator).out
        assert shown.err.endswith(f"drawn: {tmp_path / name}\n")
    with PIL.Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
    both = succeed("translate", "red", "--tree", "c.svg", "--attention", "d.svg", cwd=translator)
    assert both.err.endswith("drawn: d.svg\ndrawn: c.svg\n")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("red", "blue"), 1, "`--tree` draws one sentence, and there are more"),
        (("red", "--beam", "21"), 1, "`--tree` draws a beam of at most 20"),
        (("red", "--sample"), 2, "--tree is of a beam"),
        ((" ",), 1, "there is no sentence that could be drawn"),
    ],
)
def test_what_has_no_tree_is_not_drawn(arguments: tuple[str, ...], code: int, told: str, translator: Path) -> None:
    failed = dl7("translate", *arguments, "--tree", "x.svg", cwd=translator)
    assert failed.code == code
    assert told in " ".join(failed.err.replace("│", " ").split())
    assert not (translator / "x.svg").exists()
