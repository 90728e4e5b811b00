"""Beam search against enumeration, a greedy loop and a slow search written without tensors."""

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import BOS, EOS, Model, Sentence, Table, coarse_table, random_table, random_weights, together
from torch import Tensor

from dl7cli import search
from dl7cli.search import Hypothesis, Rules, State, beam_search, best_ids

NORMALISATIONS = st.sampled_from(["gnmt", "average"])


def find(
    sentences: Sequence[Sentence], beam: int, n_best: int = 1, *, attention: bool = False, device: str = "cpu"
) -> list[list[Hypothesis]]:
    context, state, rules = together(sentences, device)
    return beam_search(Model(), context, state, rules, beam=beam, n_best=n_best, attention=attention)


def ids_of(found: Sequence[Hypothesis]) -> list[tuple[int, ...]]:
    return [hypothesis.ids for hypothesis in found]


@st.composite
def sentences(draw: st.DrawFn, vocabulary: int, longest: int, number: int = 1) -> list[Sentence]:
    """Random models under random rules; lengths, prefixes and what they look at differ from sentence to sentence."""
    seed = draw(st.integers(0, 2**32))
    shared: dict[str, Any] = {
        "min_length": draw(st.integers(0, 3)),
        "forbidden": draw(st.sampled_from([[BOS], [BOS, 2], []])),
        "no_repeat_ngram": draw(st.integers(0, 3)),
        "normalisation": draw(NORMALISATIONS),
        "length_penalty": draw(st.sampled_from([0.0, 0.6, 1.0, 2.5])),
        "coverage_penalty": draw(st.sampled_from([0.0, 0.2, 1.0])),
    }
    found = []
    for more in range(number):
        limit, source = draw(st.integers(0, longest)), draw(st.integers(1, 4))
        found.append(
            Sentence(
                random_table(vocabulary, seed + more),
                limit,
                prefix=draw(st.lists(st.integers(2, vocabulary - 1), max_size=min(limit, 2))),
                weights=random_weights(vocabulary, source, 4, seed + more),
                source_length=source,
                **shared,
            )
        )
    return found


@given(sentences(vocabulary=5, longest=3), st.sampled_from([1, 3, 85]))
def test_a_beam_wide_enough_equals_enumeration(one: list[Sentence], n_best: int) -> None:
    # Four ids besides eos: at most 1 + 4 + 16 + 64 = 85 outputs of up to three ids.
    expected = one[0].enumerated()[:n_best]
    (found,) = find(one, 85, n_best)
    assert ids_of(found) == [ids for ids, _ in expected]
    assert [one.score for one in found] == pytest.approx([score for _, score in expected], abs=1e-9)


@given(sentences(vocabulary=6, longest=12))
def test_beam_1_equals_greedy(one: list[Sentence]) -> None:
    sentence, ids = one[0], []
    while True:
        row = sentence.table[(BOS, BOS, *ids)[-2:]].tolist()
        following = max(filter(lambda id_: sentence.allowed(ids, id_), sentence.ids), key=row.__getitem__)
        if following == EOS:
            break
        ids.append(following)
    (found,) = find(one, 1)
    assert ids_of(found) == [tuple(ids)]


@given(sentences(vocabulary=6, longest=7), st.integers(1, 6), st.data())
def test_every_rule_is_followed_and_stopping_early_changes_nothing(
    one: list[Sentence], beam: int, data: st.DataObject
) -> None:
    n_best = data.draw(st.integers(1, beam))
    expected = one[0].searched(beam, n_best)
    (found,) = find(one, beam, n_best)
    assert ids_of(found) == [ids for ids, _ in expected]
    assert [one.score for one in found] == pytest.approx([score for _, score in expected])


@given(
    seed=st.integers(0, 2**32),
    vocabulary=st.sampled_from([2, 3, 5, 40]),
    levels=st.sampled_from([1, 2, 12]),
    beam=st.integers(1, 6),
    max_length=st.integers(0, 7),
    min_length=st.integers(0, 4),
    no_repeat_ngram=st.integers(0, 3),
    length_penalty=st.sampled_from([0.0, 0.7, 1.0, 3.0]),
    data=st.data(),
)
def test_ties_and_impossible_ids_follow_the_rules(
    seed: int, vocabulary: int, levels: int, beam: int, data: st.DataObject, **rules: Any
) -> None:
    # 40 ids of one or two values: more ties than there are candidates.
    n_best = data.draw(st.integers(1, beam))
    forbidden = data.draw(st.sets(st.sampled_from([one for one in range(vocabulary) if one != EOS])))
    sentence = Sentence(coarse_table(vocabulary, seed, levels), forbidden=sorted(forbidden), **rules)
    expected = sentence.searched(beam, n_best)
    (found,) = find([sentence], beam, n_best)
    assert ids_of(found) == [ids for ids, _ in expected]
    assert [one.score for one in found] == pytest.approx([score for _, score in expected])


@pytest.mark.parametrize("beam", [1, 4])
def test_ties_among_high_ids(beam: int) -> None:
    # Half of the ids are equally good, one is better, and the low ones are all worse.
    table = torch.full((600, 600), -3.0)
    table[:, 300:] = -1.0
    table[:, 500] = -0.5
    sentence = Sentence(table.expand(600, 600, 600), 4)
    context, state, rules = (table[None],), (torch.zeros(1),), together([Sentence(random_table(3, 0), 4)])[2]

    def step(previous: Tensor, context: State, state: State) -> tuple[Tensor, State, None]:
        return table[previous], state, None

    (found,) = beam_search(step, context, state, rules, beam=beam, n_best=beam)
    assert ids_of(found) == [ids for ids, _ in sentence.searched(beam, beam)]


@given(
    rows=st.integers(1, 4),
    vocabulary=st.integers(2, 300),
    number=st.integers(1, 12),
    levels=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 2**32),
)
def test_the_best_ids_are_those_of_a_stable_sort(
    rows: int, vocabulary: int, number: int, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = -torch.randint(0, levels, (rows, vocabulary), generator=generator).float()
    values = values.masked_fill(torch.rand(rows, vocabulary, generator=generator) < 0.2, -math.inf)
    expected = values.sort(dim=1, descending=True, stable=True)
    found, ids = best_ids(values, number)
    assert torch.equal(found, expected.values[:, :number])
    possible = found > -math.inf
    assert torch.equal(ids[possible], expected.indices[:, :number][possible])
    for nan in (math.nan, -math.nan):
        values[-1, -1] = nan
        assert best_ids(values, number)[0][-1, 0].isnan()


RULES = {
    "none": {},
    "lengths": {"min_length": 3, "normalisation": "average", "length_penalty": 1.0},
    "coverage": {"coverage_penalty": 0.4, "length_penalty": 0.6},
    "n-grams": {"no_repeat_ngram": 2, "length_penalty": 1.5},
}


def many(vocabulary: int, **rules: Any) -> list[Sentence]:
    """Sentences that end at different times, some of them with a prefix."""
    return [
        Sentence(
            random_table(vocabulary, seed),
            seed % 9,
            forbidden=[BOS],
            prefix=[2, 4, 3][: min(seed % 9, seed % 4)],
            weights=random_weights(vocabulary, 1 + seed % 5, 5, seed),
            source_length=1 + seed % 5,
            **rules,
        )
        for seed in range(25)
    ]


def same(found: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> bool:
    for one, other in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert one.attention is not None
        assert other.attention is not None
        if one[:4] != other[:4] or not np.array_equal(one.attention, other.attention):
            return False
    return [len(one) for one in found] == [len(one) for one in expected]


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("vocabulary", [6, 60])
def test_batch_order_and_when_sentences_leave_do_not_matter(
    vocabulary: int, rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_of_them = many(vocabulary, **rules)
    expected = find(all_of_them, 4, 3, attention=True)
    assert len({len(found[0].ids) for found in expected}) > 3, "they do leave at different times"
    assert same([find([sentence], 4, 3, attention=True)[0] for sentence in all_of_them], expected)
    order = list(range(25))
    random.Random(1).shuffle(order)
    assert same(find([all_of_them[at] for at in order], 4, 3, attention=True), [expected[at] for at in order])
    for steps in (3, 1000):
        monkeypatch.setitem(search.STEPS_BETWEEN_LOOKS, "cpu", steps)
        assert same(find(all_of_them, 4, 3, attention=True), expected)


@given(sentences(vocabulary=9, longest=12, number=3))
@settings(max_examples=50)
def test_n_best_does_not_change_the_first(three: list[Sentence]) -> None:
    lists = [find(three, 5, n_best) for n_best in range(1, 6)]
    for found, longer in itertools.pairwise(lists):
        for few, more in zip(found, longer, strict=True):
            assert more[: len(few)] == few


@given(sentences(vocabulary=7, longest=10, number=3), st.integers(1, 8))
def test_what_is_reported_is_what_teacher_forcing_gives(three: list[Sentence], beam: int) -> None:
    for sentence, found in zip(three, find(three, beam, beam, attention=True), strict=True):
        assert found
        assert len(set(ids_of(found))) == len(found)
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        for one in found:
            assert len(one.ids) <= sentence.max_length
            assert all(sentence.allowed(one.ids[:at], following) for at, following in enumerate((*one.ids, EOS)))
            assert one.token_log_probabilities == tuple(sentence.steps(one.ids))
            assert one.log_probability == pytest.approx(math.fsum(one.token_log_probabilities), abs=1e-9)
            assert one.score == pytest.approx(sentence.score(one.log_probability, one.ids))
            assert one.attention is not None
            assert np.array_equal(one.attention, torch.stack(sentence.attention(one.ids)))


def two_outputs() -> Table:
    """(), of probability 0.5, and (2,), of 0.45."""
    table = torch.full((3, 3, 3), -math.inf)
    table[BOS, BOS, EOS], table[BOS, BOS, 2] = math.log(0.5), math.log(0.45)
    table[BOS, 2, EOS] = 0.0
    return table


@pytest.mark.parametrize(
    ("rules", "expected", "score"),
    [
        ({}, (), math.log(0.5)),
        ({"length_penalty": 1.0}, (2,), math.log(0.45) * 6 / 7),
        ({"length_penalty": 1.0, "normalisation": "average"}, (2,), math.log(0.45) / 2),
        ({"length_penalty": 0.1, "normalisation": "average"}, (), math.log(0.5)),
        ({"length_penalty": 0.0, "normalisation": "average"}, (), math.log(0.5)),
        ({"min_length": 1}, (2,), math.log(0.45)),
        ({"prefix": [2]}, (2,), math.log(0.45)),
        ({"prefix": [2], "forbidden": [2]}, (2,), math.log(0.45)),
        ({"forbidden": [2], "length_penalty": 1.0}, (), math.log(0.5)),
    ],
)
def test_rules_by_hand(rules: dict[str, Any], expected: tuple[int, ...], score: float) -> None:
    ((found,),) = find([Sentence(two_outputs(), 1, **rules)], 2)
    assert found.ids == expected
    assert found.score == pytest.approx(score)


def test_coverage_by_hand() -> None:
    # Both look at the first of two source steps first; only the longer output then looks at the second.
    weights = torch.zeros(3, 3, 3)
    weights[BOS, BOS, :2] = torch.tensor([0.75, 0.25])
    weights[BOS, 2, :2] = torch.tensor([0.5, 0.5])
    one = Sentence(two_outputs(), 1, coverage_penalty=0.1, weights=weights, source_length=2)
    first, second = find([one], 2, 2)[0]
    assert (first.ids, second.ids) == ((2,), ())
    assert first.score == pytest.approx(math.log(0.45) + 0.1 * (math.log(1) + math.log(0.75)))
    assert second.score == pytest.approx(math.log(0.5) + 0.1 * (math.log(0.75) + math.log(0.25)))


@pytest.mark.parametrize("beam", [1, 5])
def test_forbidden_ids_never_appear_however_probable(beam: int) -> None:
    table = torch.full((30, 30, 30), -5.0)
    table[:, :, [0, 2, 3]] = -0.1
    (found,) = find([Sentence(table, 6, forbidden=[0, 2, 3])], beam, beam)
    assert found
    assert not {0, 2, 3} & {one for hypothesis in found for one in hypothesis.ids}


def test_max_length_0_gives_the_empty_output() -> None:
    three = [Sentence(random_table(8, seed), limit, min_length=2) for seed, limit in enumerate([0, 4, 0])]
    results = find(three, 3, 3)
    for index in (0, 2):
        (only,) = results[index]
        assert only.ids == ()
        assert only.log_probability == pytest.approx(float(three[index].table[BOS, BOS, EOS]))


def test_gives_what_there_is_where_little_is_possible() -> None:
    # bos is forbidden, so `2` is all there is: (), (2,) and (2, 2), with a beam of 10 over 3 ids.
    table = random_table(3, 1)
    dead_end = table.clone()
    dead_end[:, :, EOS] = -math.inf
    results = find([Sentence(one, 2, forbidden=[BOS]) for one in (table, dead_end)], 10, 10)
    assert sorted(ids_of(results[0])) == [(), (2,), (2, 2)]
    assert results[1] == []


def test_a_prefix_that_cannot_be_gives_nothing() -> None:
    table = random_table(4, 1)
    table[BOS, 2, 3] = -math.inf
    results = find([Sentence(table, 5, prefix=[2, 3]), Sentence(table, 5, prefix=[2, 2])], 3, 3)
    assert results[0] == []
    assert len(results[1]) == 3


def test_a_sentence_leaves_the_batch_when_nothing_can_beat_what_it_has() -> None:
    ends_at_once = torch.full((6, 6, 6), -20.0)
    ends_at_once[:, :, EOS] = -1e-6
    goes_on = torch.full((6, 6, 6), -math.inf)
    for previous, following in itertools.pairwise([BOS, 2, 3, 4, 5, EOS]):
        goes_on[:, previous, following] = -0.5
    model = Model()
    context, state, rules = together([Sentence(ends_at_once, 50), Sentence(goes_on, 50)])
    results = beam_search(model, context, state, rules, beam=3)
    assert [found[0].ids for found in results] == [(), (2, 3, 4, 5)]
    assert model.rows == [2, 3, 3, 3, 3], "the first step is of one hypothesis each"


def test_the_tables_of_the_network_are_left_alone() -> None:
    table = random_table(6, 3)
    before = table.clone()
    find([Sentence(table, 4, forbidden=[BOS, 2], prefix=[3])], 3)
    assert torch.equal(table, before)


def test_no_sentences_and_no_context() -> None:
    assert search_constant([-1.0, -1.0], sentences=0) == []
    ((found,),) = search_constant([-1.0, -0.5], sentences=1)
    assert found == Hypothesis((), -0.5, -0.5, (-0.5,))


def search_constant(log_probabilities: list[float], sentences: int = 1) -> list[list[Hypothesis]]:
    """Search with a network that always says the same and needs neither context nor state."""

    def step(previous: Tensor, context: State, state: State) -> tuple[Tensor, State, None]:
        return torch.tensor(log_probabilities).repeat(len(previous), 1), state, None

    return beam_search(step, (), (), Rules(bos=BOS, eos=EOS, max_length=[3] * sentences), beam=2)


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_nan_is_an_error_that_says_so(nan: float) -> None:
    table = random_table(6, 1)
    table[:, 3, 4] = nan
    with pytest.raises(FloatingPointError, match="NaN"):
        find([Sentence(random_table(6, 0), 5), Sentence(table, 5)], 6)


def test_nan_after_an_impossible_id_is_nobodys_business() -> None:
    # What log_softmax makes of a row of -inf; no live hypothesis ever gets there.
    table = random_table(4, 1)
    table[:, :, 3] = -math.inf
    expected = find([Sentence(table, 3)], 8, 8)
    table[:, 3] = table[3] = math.nan
    assert find([Sentence(table, 3)], 8, 8) == expected


def test_logits_in_place_of_log_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"above 0: 2\.5"):
        search_constant([1.0, 2.5, -1.0])


def test_misshapen_results_are_refused() -> None:
    def step(previous: Tensor, context: State, state: State) -> tuple[Tensor, State, None]:
        return torch.zeros(len(previous) + 1, 5), state, None

    with pytest.raises(ValueError, match=r"must return \(1, V >= 2\) numbers, got \(2, 5\)"):
        beam_search(step, (), (), Rules(bos=BOS, eos=EOS, max_length=[3]), beam=2)


def test_a_coverage_penalty_needs_attention() -> None:
    one = Sentence(random_table(4, 0), 3, coverage_penalty=0.2, source_length=2)
    with pytest.raises(ValueError, match="needs attention"):
        find([one], 2)
    with pytest.raises(ValueError, match="needs source_lengths"):
        dataclasses.replace(together([one])[2], source_lengths=None)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"beam": 0}, "n_best <= beam"),
        ({"n_best": 0}, "n_best <= beam"),
        ({"n_best": 3}, "n_best <= beam"),
        ({"length_penalty": -0.1}, "length_penalty"),
        ({"length_penalty": math.nan}, "length_penalty"),
        ({"length_penalty": math.inf}, "length_penalty"),
        ({"coverage_penalty": -1}, "coverage_penalty"),
        ({"min_length": -1}, "min_length"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram"),
        ({"max_length": [2, -1]}, "max_length must not be negative, got -1"),
        ({"max_length": [2]}, "max_length has 1 sentences"),
        ({"prefixes": [[2]]}, "max_length has 2 sentences, another rule has 1"),
        ({"prefixes": [[2], [2, 3, 2]]}, "a prefix is longer than max_length"),
        ({"forbidden": [0, EOS]}, "eos"),
    ],
)
def test_arguments_out_of_range(changed: dict[str, Any], reason: str) -> None:
    arguments = {"beam": 2, "n_best": 1} | {key: value for key, value in changed.items() if key in ("beam", "n_best")}
    rules = {key: value for key, value in changed.items() if key not in arguments}
    tables = torch.stack([random_table(4, 0)] * 2)
    with pytest.raises(ValueError, match=reason):
        beam_search(
            Model(),
            (tables,),
            (torch.tensor([BOS, BOS]),),
            Rules(**({"bos": BOS, "eos": EOS, "max_length": [2, 2]} | rules)),
            **arguments,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
def test_a_gpu_finds_the_same(rules: dict[str, Any]) -> None:
    all_of_them = many(60, **rules)
    all_of_them += [dataclasses.replace(one, table=coarse_table(60, at, 2)) for at, one in enumerate(all_of_them)]
    on_cpu, on_gpu = (find(all_of_them, 5, 5, attention=True, device=device) for device in ("cpu", "cuda"))
    assert [ids_of(found) for found in on_gpu] == [ids_of(found) for found in on_cpu]
    for one, other in zip(itertools.chain(*on_gpu), itertools.chain(*on_cpu), strict=True):
        assert one.score == pytest.approx(other.score)
