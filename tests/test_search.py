"""Beam search against enumeration, a greedy loop and a slow search written without tensors."""

import itertools
import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dl7cli.search import Hypothesis, State, beam_search

BOS, EOS = 0, 1

# A model of the second order: the row [before, previous] holds the log-probabilities of what comes next.
Table = Tensor  # (V, V, V)


def random_table(vocabulary: int, seed: int) -> Table:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(vocabulary, vocabulary, vocabulary, generator=generator)).log_softmax(dim=2)


def coarse_table(vocabulary: int, seed: int, levels: int) -> Table:
    """Few different values, all sums of which are exact: ties wherever one looks, and some impossible ids."""
    generator = torch.Generator().manual_seed(seed)
    shape = (vocabulary, vocabulary, vocabulary)
    table = -torch.randint(1, levels + 1, shape, generator=generator) / 4
    return table.masked_fill(torch.rand(shape, generator=generator) < 0.1, -math.inf)


class Model:
    """The step function of one table per sentence; counts the rows it was asked for."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, previous: Tensor, context: State, state: State) -> tuple[Tensor, State, None]:
        (tables,), (before,) = context, state
        assert len(previous) == len(before)
        self.rows.append(len(previous))
        sentence = torch.arange(len(tables), device=previous.device)
        sentence = sentence.repeat_interleave(len(previous) // len(tables))
        return tables[sentence, before, previous], (previous,), None


def search(
    tables: Sequence[Table],
    beam: int,
    max_length: Sequence[int],
    *,
    length_penalty: float = 0.0,
    n_best: int = 1,
    forbidden: Sequence[int] = (),
    device: str = "cpu",
) -> list[list[Hypothesis]]:
    context = torch.stack(list(tables)).to(device)
    start = torch.full((len(tables),), BOS, device=device)
    return beam_search(
        Model(),
        (context,),
        (start,),
        beam=beam,
        max_length=max_length,
        bos=BOS,
        eos=EOS,
        length_penalty=length_penalty,
        n_best=n_best,
        forbidden=forbidden,
    )


def forced(table: Table, ids: Sequence[int]) -> float:
    """The log-probability of `ids` and eos, by walking along them."""
    before, previous, total = BOS, BOS, 0.0
    for following in (*ids, EOS):
        total += float(table[before, previous, following])
        before, previous = previous, following
    return total


def penalised(log_probability: float, ids: Sequence[int], length_penalty: float) -> float:
    return log_probability / math.pow((5 + len(ids) + 1) / 6, length_penalty)


def enumerated(
    table: Table, max_length: int, length_penalty: float, forbidden: Sequence[int] = ()
) -> list[tuple[tuple[int, ...], float]]:
    """Every possible output with its score, best first."""
    allowed = [one for one in range(len(table)) if one != EOS and one not in forbidden]
    outputs = []
    for length in range(max_length + 1):
        for ids in itertools.product(allowed, repeat=length):
            score = penalised(forced(table, ids), ids, length_penalty)
            if score > -math.inf:
                outputs.append((ids, score))
    return sorted(outputs, key=lambda output: -output[1])


def slow_search(
    table: Table,
    beam: int,
    max_length: int,
    length_penalty: float = 0.0,
    n_best: int = 1,
    forbidden: Sequence[int] = (),
) -> list[tuple[tuple[int, ...], float]]:
    """The rules of the module, one candidate at a time and without any early end but `beam` finished."""
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: list[tuple[tuple[int, ...], float]] = []
    for length in range(max_length + 1):
        candidates = []
        for ids, total in live:
            before, previous = (BOS, BOS, *ids)[-2:] if ids else (BOS, BOS)
            for following, value in enumerate(table[before, previous].tolist()):
                banned = following in forbidden or (length == max_length and following != EOS)
                if value > -math.inf and not banned:
                    candidates.append((ids, following, total + value))
        candidates.sort(key=lambda candidate: -candidate[2])  # stable, and they come in order of their index
        for ids, following, total in candidates[:beam]:
            if following == EOS:
                finished.append((ids, penalised(total, ids, length_penalty)))
        live = [((*ids, following), total) for ids, following, total in candidates if following != EOS][:beam]
        if len(finished) >= beam or not live:
            break
    return sorted(finished, key=lambda output: -output[1])[:n_best]


def ids_of(found: Sequence[Hypothesis]) -> list[tuple[int, ...]]:
    return [hypothesis.ids for hypothesis in found]


@given(
    seed=st.integers(0, 2**32),
    max_length=st.integers(0, 3),
    length_penalty=st.sampled_from([0.0, 0.6, 1.0, 2.5]),
    n_best=st.sampled_from([1, 3, 40]),
)
def test_a_beam_wide_enough_equals_enumeration(seed: int, max_length: int, length_penalty: float, n_best: int) -> None:
    # Three ids besides bos and eos: 1 + 3 + 9 + 27 = 40 outputs of up to three ids.
    table = random_table(5, seed)
    expected = enumerated(table, max_length, length_penalty, forbidden=[BOS])[:n_best]
    (found,) = search([table], 40, [max_length], length_penalty=length_penalty, n_best=n_best, forbidden=[BOS])
    assert ids_of(found) == [ids for ids, _ in expected]
    assert [one.score for one in found] == pytest.approx([score for _, score in expected], abs=1e-9)


@given(seed=st.integers(0, 2**32), max_length=st.integers(0, 12), forbidden=st.sets(st.integers(2, 5)))
def test_beam_1_equals_greedy(seed: int, max_length: int, forbidden: set[int]) -> None:
    table = random_table(12, seed)
    ids: list[int] = []
    before = previous = BOS
    while len(ids) < max_length:
        scores = table[before, previous].clone()
        scores[list(forbidden)] = -math.inf
        following = int(scores.argmax())
        if following == EOS:
            break
        ids.append(following)
        before, previous = previous, following
    (found,) = search([table], 1, [max_length], forbidden=sorted(forbidden))
    assert ids_of(found) == [tuple(ids)]


@given(
    seed=st.integers(0, 2**32),
    vocabulary=st.sampled_from([2, 3, 5, 40]),
    levels=st.sampled_from([1, 2, 12]),
    beam=st.integers(1, 6),
    max_length=st.integers(0, 7),
    length_penalty=st.sampled_from([0.0, 0.7, 1.0, 3.0]),
    data=st.data(),
)
def test_ties_impossible_ids_and_stopping_early_follow_the_rules(
    seed: int,
    vocabulary: int,
    levels: int,
    beam: int,
    max_length: int,
    length_penalty: float,
    data: st.DataObject,
) -> None:
    # 40 ids of one or two values: more ties than the spare candidates settle.
    table = coarse_table(vocabulary, seed, levels)
    n_best = data.draw(st.integers(1, beam))
    forbidden = data.draw(st.sets(st.sampled_from([one for one in range(vocabulary) if one != EOS])))
    expected = slow_search(table, beam, max_length, length_penalty, n_best, sorted(forbidden))
    (found,) = search(
        [table],
        beam,
        [max_length],
        length_penalty=length_penalty,
        n_best=n_best,
        forbidden=sorted(forbidden),
    )
    assert ids_of(found) == [ids for ids, _ in expected]
    assert [one.score for one in found] == pytest.approx([score for _, score in expected])


@pytest.mark.parametrize("beam", [1, 4])
def test_ties_among_high_ids(beam: int) -> None:
    # Half of the ids are equally good, one is better, and the low ones are all worse.
    table = torch.full((60, 60, 60), -3.0)
    table[:, :, 30:] = -1.0
    table[:, :, 50] = -0.5
    expected = slow_search(table, beam, 4, n_best=beam)
    (found,) = search([table], beam, [4], n_best=beam)
    assert ids_of(found) == [ids for ids, _ in expected]


@pytest.mark.parametrize("seed", range(5))
def test_many_of_the_best_ids_forbidden(seed: int) -> None:
    table = random_table(60, seed)
    table[:, :, 20:] += 10  # all that is allowed, eos too, comes far behind
    table = table.log_softmax(dim=2)
    forbidden = range(20, 60)
    expected = slow_search(table, 4, 4, n_best=4, forbidden=forbidden)
    (found,) = search([table], 4, [4], n_best=4, forbidden=forbidden)
    assert ids_of(found) == [ids for ids, _ in expected]


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.5])
@pytest.mark.parametrize("vocabulary", [6, 30])
def test_batch_and_order_do_not_matter(vocabulary: int, length_penalty: float) -> None:
    tables = [random_table(vocabulary, seed) for seed in range(25)]
    limits = [seed % 9 for seed in range(25)]

    def run(chosen: Sequence[int]) -> list[list[Hypothesis]]:
        return search(
            [tables[index] for index in chosen],
            4,
            [limits[index] for index in chosen],
            length_penalty=length_penalty,
            n_best=3,
            forbidden=[BOS],
        )

    together = run(range(25))
    assert together == [run([index])[0] for index in range(25)]
    order = list(range(25))
    random.Random(1).shuffle(order)
    assert run(order) == [together[index] for index in order]
    # Sentences did leave the batch at different times.
    assert len({len(found[0].ids) for found in together}) > 3


@given(
    seed=st.integers(0, 2**32),
    length_penalty=st.sampled_from([0.0, 0.6, 1.0, 2.0]),
    max_length=st.integers(0, 15),
)
def test_n_best_does_not_change_the_first(seed: int, length_penalty: float, max_length: int) -> None:
    tables = [random_table(9, seed + more) for more in range(4)]
    lists = [
        search(tables, 5, [max_length] * 4, length_penalty=length_penalty, n_best=n_best) for n_best in range(1, 6)
    ]
    for found, longer in itertools.pairwise(lists):
        for few, many in zip(found, longer, strict=True):
            assert many[: len(few)] == few


@given(
    seed=st.integers(0, 2**32),
    length_penalty=st.floats(0, 3),
    beam=st.integers(1, 8),
    limit=st.integers(0, 10),
)
def test_scores_are_those_of_teacher_forcing(seed: int, length_penalty: float, beam: int, limit: int) -> None:
    tables = [random_table(7, seed + more) for more in range(3)]
    limits = [limit, limit + 1, limit + 2]
    results = search(tables, beam, limits, length_penalty=length_penalty, n_best=beam)
    for table, longest, found in zip(tables, limits, results, strict=True):
        assert found
        assert len(set(ids_of(found))) == len(found)
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        for one in found:
            assert len(one.ids) <= longest
            assert EOS not in one.ids
            assert one.log_probability == pytest.approx(forced(table, one.ids), abs=1e-9)
            assert one.score == pytest.approx(penalised(one.log_probability, one.ids, length_penalty))


def test_the_length_penalty_is_that_of_gnmt() -> None:
    # Two outputs: (), of probability 0.5, and (2,), of 0.45. Their penalties at alpha = 1 are 6/6 and 7/6.
    table = torch.full((3, 3, 3), -math.inf)
    table[BOS, BOS, EOS], table[BOS, BOS, 2] = math.log(0.5), math.log(0.45)
    table[BOS, 2, EOS] = 0.0
    ((plain,),) = search([table], 2, [1])
    assert plain.ids == ()
    assert plain.score == pytest.approx(math.log(0.5))
    ((penalty,),) = search([table], 2, [1], length_penalty=1.0)
    assert penalty.ids == (2,)
    assert penalty.score == pytest.approx(math.log(0.45) * 6 / 7)
    assert penalty.log_probability == pytest.approx(math.log(0.45))


@pytest.mark.parametrize("beam", [1, 5])
def test_forbidden_ids_never_appear_however_probable(beam: int) -> None:
    table = torch.full((30, 30, 30), -5.0)
    table[:, :, [0, 2, 3]] = -0.1
    (found,) = search([table], beam, [6], n_best=beam, forbidden=[0, 2, 3])
    assert found
    assert not {0, 2, 3} & {one for hypothesis in found for one in hypothesis.ids}


def test_max_length_0_gives_the_empty_output() -> None:
    tables = [random_table(8, seed) for seed in range(3)]
    results = search(tables, 3, [0, 4, 0], n_best=3)
    for index in (0, 2):
        (only,) = results[index]
        assert only.ids == ()
        assert only.log_probability == pytest.approx(float(tables[index][BOS, BOS, EOS]))


def test_gives_what_there_is_where_little_is_possible() -> None:
    # bos is forbidden, so `2` is all there is: (), (2,) and (2, 2), with a beam of 10 over 3 ids.
    table = random_table(3, 1)
    dead_end = table.clone()
    dead_end[:, :, EOS] = -math.inf
    results = search([table, dead_end], 10, [2, 2], n_best=10, forbidden=[BOS])
    assert sorted(ids_of(results[0])) == [(), (2,), (2, 2)]
    assert results[1] == []


def test_a_sentence_leaves_the_batch_when_nothing_can_beat_what_it_has() -> None:
    ends_at_once = torch.full((6, 6, 6), -20.0)
    ends_at_once[:, :, EOS] = -1e-6
    goes_on = torch.full((6, 6, 6), -math.inf)
    for previous, following in itertools.pairwise([BOS, 2, 3, 4, 5, EOS]):
        goes_on[:, previous, following] = -0.5
    model = Model()
    results = beam_search(
        model,
        (torch.stack([ends_at_once, goes_on]),),
        (torch.tensor([BOS, BOS]),),
        beam=3,
        max_length=[50, 50],
        bos=BOS,
        eos=EOS,
    )
    assert [found[0].ids for found in results] == [(), (2, 3, 4, 5)]
    assert model.rows == [6, 3, 3, 3, 3]


def test_the_tables_of_the_network_are_left_alone() -> None:
    table = random_table(6, 3)
    before = table.clone()
    search([table], 3, [4], forbidden=[BOS, 2])
    assert torch.equal(table, before)


def test_no_sentences_and_no_context() -> None:
    assert search_constant([-1.0, -1.0], sentences=0) == []
    ((found,),) = search_constant([-1.0, -0.5], sentences=1)
    assert found == Hypothesis((), -0.5, -0.5, (-0.5,))


def search_constant(log_probabilities: list[float], sentences: int = 1) -> list[list[Hypothesis]]:
    """Search with a network that always says the same and needs neither context nor state."""

    def step(previous: Tensor, context: State, state: State) -> tuple[Tensor, State, None]:
        return torch.tensor(log_probabilities).repeat(len(previous), 1), state, None

    return beam_search(step, (), (), beam=2, max_length=[3] * sentences, bos=BOS, eos=EOS)


def test_nan_is_an_error_that_says_so() -> None:
    table = random_table(6, 1)
    table[:, 3, 4] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        search([random_table(6, 0), table], 6, [5, 5])


def test_nan_after_an_impossible_id_is_nobodys_business() -> None:
    # What log_softmax makes of a row of -inf; no live hypothesis ever gets there.
    table = random_table(4, 1)
    table[:, :, 3] = -math.inf
    expected = search([table], 8, [3], n_best=8)
    table[:, 3] = table[3] = math.nan
    assert search([table], 8, [3], n_best=8) == expected


def test_logits_in_place_of_log_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"above 0: 2\.5"):
        search_constant([1.0, 2.5, -1.0])


def test_misshapen_results_are_refused() -> None:
    def step(previous: Tensor, context: State, state: State) -> tuple[Tensor, State, None]:
        return torch.zeros(len(previous) + 1, 5), state, None

    with pytest.raises(ValueError, match=r"must return \(2, V >= 2\) numbers, got \(3, 5\)"):
        beam_search(step, (), (), beam=2, max_length=[3], bos=BOS, eos=EOS)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"beam": 0}, "n_best <= beam"),
        ({"n_best": 0}, "n_best <= beam"),
        ({"n_best": 3}, "n_best <= beam"),
        ({"length_penalty": -0.1}, "length_penalty"),
        ({"length_penalty": math.nan}, "length_penalty"),
        ({"length_penalty": math.inf}, "length_penalty"),
        ({"max_length": [2, -1]}, "max_length must not be negative, got -1"),
        ({"max_length": [2]}, "max_length has 1 sentences"),
        ({"forbidden": [0, EOS]}, "eos"),
    ],
)
def test_arguments_out_of_range(changed: dict[str, object], reason: str) -> None:
    arguments: dict[str, object] = {"beam": 2, "max_length": [2, 2], "bos": BOS, "eos": EOS} | changed
    tables = torch.stack([random_table(4, 0)] * 2)
    with pytest.raises(ValueError, match=reason):
        beam_search(Model(), (tables,), (torch.tensor([BOS, BOS]),), **arguments)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_gpu_finds_the_same() -> None:
    tables = [random_table(30, seed) for seed in range(10)]
    tables += [coarse_table(30, seed, levels=2) for seed in range(10)]
    limits = [seed % 9 for seed in range(20)]
    on_cpu, on_gpu = (
        search(tables, 5, limits, n_best=5, length_penalty=0.6, forbidden=[BOS], device=device)
        for device in ("cpu", "cuda")
    )
    assert on_gpu == on_cpu
