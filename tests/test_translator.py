"""What holds for every translation model, however it is made: the promises of `dl7cli.models.translator`."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from running import Silent
from torch import Tensor
from waiting import Waits

from dl7cli import recipe as recipes
from dl7cli import tasks, training
from dl7cli.data.vocabulary import BOS, EOS
from dl7cli.device import Runtime
from dl7cli.models.seq2seq import Seq2Seq
from dl7cli.models.translator import Translator
from dl7cli.recipe import ConvS2SModel, Seq2SeqModel, TransformerModel
from dl7cli.runs import Run
from dl7cli.search import LEAST_COVERAGE, STEPS_BETWEEN_LOOKS, Hypothesis, Rules, beam_search
from dl7cli.tasks.decoding import search
from dl7cli.tasks.translation import translator

CPU = Runtime(torch.device("cpu"), "fp32", "cpu", "as asked")
WORDS = 11
PREVIOUS = torch.tensor([[BOS, 5, 6, 4, 7, 7], [BOS, 9, 1, 4, 10, 5], [BOS, 7, 8, 10, 4, 4]])
SOURCE, LENGTHS = torch.tensor([[4, 5, 6, 7, 3], [8, 9, 3, 0, 0], [10, 3, 0, 0, 0]]), torch.tensor([5, 3, 2])

RECURRENT: Any = {"kind": "seq2seq", "embedding_width": 6, "encoder_width": 5, "decoder_width": 7, "dropout": 0.2}

MODELS: dict[str, Seq2SeqModel | TransformerModel | ConvS2SModel] = {
    "seq2seq": Seq2SeqModel(**RECURRENT),
    "seq2seq-copying": Seq2SeqModel(
        **RECURRENT, cell="gru", attention="additive", decoder="bahdanau", coverage=True, copying=True, readout="maxout"
    ),
    "seq2seq-fed": Seq2SeqModel(
        **RECURRENT, attention="concat", decoder="luong", decoder_layers=2, input_feeding=True, tied="output"
    ),
    "transformer": TransformerModel(
        kind="transformer", width=8, heads=2, feedforward_width=12, encoder_layers=2, decoder_layers=3, dropout=0.2
    ),
    "transformer-output": TransformerModel(
        kind="transformer", width=6, heads=3, feedforward_width=5, encoder_layers=1, decoder_layers=1, tied="output"
    ),
    "transformer-post": TransformerModel(
        kind="transformer", width=8, heads=2, feedforward_width=5, encoder_layers=2, decoder_layers=2, norm="post"
    ),
    "convs2s": ConvS2SModel(
        kind="convs2s", embedding_width=6, width=8, encoder_layers=2, decoder_layers=3, positions=4, dropout=0.2
    ),
    "convs2s-even": ConvS2SModel(
        kind="convs2s", embedding_width=5, width=4, encoder_layers=1, decoder_layers=1, kernel=4, tied="output"
    ),
    "convs2s-pointwise": ConvS2SModel(
        kind="convs2s", embedding_width=5, width=4, encoder_layers=1, decoder_layers=2, kernel=1, tied="none"
    ),
}
BLIND = {
    "seq2seq-blind": Seq2SeqModel(**RECURRENT, attention="none", cell="rnn"),
    "seq2seq-blind-deep": Seq2SeqModel(**RECURRENT, attention="none", encoder_layers=2, decoder_layers=2),
}
"""Without attention, for what does not ask for any."""
every_model = pytest.mark.parametrize("name", MODELS)


def model(name: str, seed: int = 3) -> Translator:
    """In float64 with weights large enough to tell words apart, and not training."""
    torch.manual_seed(seed)
    made = translator({**MODELS, **BLIND}[name], WORDS, WORDS).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return made


def rows(tensors: tuple[Tensor, ...], chosen: list[int]) -> tuple[Tensor, ...]:
    return tuple(one[chosen] for one in tensors)


@every_model
def test_step_by_step_or_in_pieces_is_the_whole_sequence(name: str) -> None:
    net = model(name)
    whole, context = net(SOURCE, LENGTHS, PREVIOUS)
    expected = net.logits(whole, context).float().log_softmax(dim=1).unflatten(0, PREVIOUS.shape)
    assert whole.readout.shape[:2] == PREVIOUS.shape
    own, state = net.begin(SOURCE, LENGTHS, 3)
    for step in range(PREVIOUS.size(1)):
        found, state, attention = net.step(PREVIOUS[:, step], own, state)
        torch.testing.assert_close(found, expected[:, step])
        torch.testing.assert_close(attention, whole.attention[:, step])
    for one, same in zip(state, whole.state, strict=True):
        torch.testing.assert_close(one, same)
    for pieces in ((1, 5), (2, 1, 3), (4, 2)):
        _, state = net.encode(SOURCE, LENGTHS)
        readouts = []
        for piece in PREVIOUS.split(pieces, dim=1):
            decoded = net.decode(piece, context, state)
            readouts.append(decoded.readout)
            state = decoded.state
        torch.testing.assert_close(torch.cat(readouts, dim=1), whole.readout)


@pytest.mark.bf16
@every_model
def test_steps_in_bfloat16_say_nearly_the_same(name: str) -> None:
    net = model(name).float()
    context, state = net.begin(SOURCE, LENGTHS, 3)
    with Runtime(torch.device("cpu"), "fp32", "", "", search_precision="bf16").autocast_search():
        rough_context, rough_state = net.begin(SOURCE, LENGTHS, 3)
        whole, whole_context = net(SOURCE, LENGTHS, PREVIOUS)
        together = net.logits(whole, whole_context).float().log_softmax(dim=1).unflatten(0, PREVIOUS.shape)
    furthest = 0.0
    for step in range(PREVIOUS.size(1)):
        exact, state, _ = net.step(PREVIOUS[:, step], context, state)
        with torch.autocast("cpu", torch.bfloat16):
            found, rough_state, _ = net.step(PREVIOUS[:, step], rough_context, rough_state)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, atol=0.15, rtol=0)
        torch.testing.assert_close(found, together[:, step], atol=0.15, rtol=0)
        furthest = max(furthest, (found - exact).abs().max().item())
    assert furthest > 1e-4, "it was in float32 after all"


@pytest.mark.parametrize("name", ["seq2seq-copying", pytest.param("seq2seq-fed", marks=pytest.mark.bf16)])
def test_the_state_of_a_decoder_that_goes_step_by_step_keeps_all_digits(name: str) -> None:
    net = model(name).float()
    assert isinstance(net, Seq2Seq)
    with torch.autocast("cpu", torch.bfloat16):
        context, state = net.encode(SOURCE, LENGTHS)
        decoded = net.decode(PREVIOUS, context, state)
    layers, _ = net._unpacked(decoded.state)
    assert {part.dtype for one in layers for part in one} == {torch.float32}


@every_model
def test_the_hypotheses_of_a_sentence_share_its_context(name: str) -> None:
    net = model(name)
    context, state = net.encode(SOURCE, LENGTHS)
    words = torch.randint(4, WORDS, (6, 4), generator=torch.Generator().manual_seed(1))
    together = net.decode(words, context, tuple(one.repeat_interleave(2, dim=0) for one in state))
    for row in range(6):
        alone = net.decode(words[row : row + 1], rows(context, [row // 2]), rows(state, [row // 2]))
        torch.testing.assert_close(together.readout[row], alone.readout[0])
        torch.testing.assert_close(together.attention[row], alone.attention[0])
        for one, same in zip(together.state, alone.state, strict=True):
            torch.testing.assert_close(one[row], same[0])


@every_model
def test_neither_padding_nor_batch_nor_order_changes_anything(name: str) -> None:
    net = model(name)
    together, context = net(SOURCE, LENGTHS, PREVIOUS)
    logits = net.logits(together, context).unflatten(0, PREVIOUS.shape)
    order = [2, 0, 1]
    wider = torch.nn.functional.pad(SOURCE, (0, 3))[order]
    turned, other = net(wider, LENGTHS[order], PREVIOUS[order])
    torch.testing.assert_close(net.logits(turned, other).unflatten(0, PREVIOUS.shape), logits[order])
    for row, length in enumerate(LENGTHS.tolist()):
        alone, own = net(SOURCE[row : row + 1, :length], LENGTHS[row : row + 1], PREVIOUS[row : row + 1])
        torch.testing.assert_close(net.logits(alone, own), logits[row])
        torch.testing.assert_close(together.attention[row, :, :length], alone.attention[0])


@every_model
def test_attention_sums_to_one_over_real_steps_and_is_zero_on_padding(name: str) -> None:
    attention = model(name)(SOURCE, LENGTHS, PREVIOUS)[0].attention
    assert attention.shape == (*PREVIOUS.shape, SOURCE.size(1))
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(PREVIOUS.shape, dtype=attention.dtype))
    assert not attention.masked_select(torch.arange(5) >= LENGTHS[:, None, None]).any()
    assert attention[0].max() > 0.201, "it looks at one word more than at another"


@every_model
def test_a_word_changes_what_follows_and_nothing_before(name: str) -> None:
    net = model(name)
    first = net(SOURCE, LENGTHS, PREVIOUS)[0].readout
    for at in range(1, PREVIOUS.size(1)):
        changed = PREVIOUS.clone()
        changed[:, at] = 8
        second = net(SOURCE, LENGTHS, changed)[0].readout
        torch.testing.assert_close(second[:, :at], first[:, :at])
        assert (second[:, at] - first[:, at]).abs().amax(dim=1)[PREVIOUS[:, at] != 8].min() > 1e-3


@every_model
def test_logits_of_some_steps_are_those_of_all(name: str) -> None:
    net = model(name)
    decoded, context = net(SOURCE, LENGTHS, PREVIOUS)
    at = torch.tensor([0, 3, 4, 17])
    torch.testing.assert_close(net.logits(decoded, context, at), net.logits(decoded, context)[at])


@pytest.mark.parametrize("name", [*MODELS, *BLIND])
@given(
    seed=st.integers(0, 2**32),
    order=st.permutations(range(3)),
    length_penalty=st.sampled_from([0.0, 0.6]),
    min_length=st.integers(0, 4),
    no_repeat_ngram=st.integers(0, 2),
    coverage_penalty=st.sampled_from([0.0, 0.3]),
    prefixes=st.tuples(*[st.lists(st.integers(4, WORDS - 1), max_size=2)] * 3),
)
@settings(max_examples=8)
def test_search_in_a_batch_is_search_alone_and_scores_as_teacher_forcing(
    name: str,
    seed: int,
    order: list[int],
    length_penalty: float,
    coverage_penalty: float,
    prefixes: tuple[list[int], ...],
    **more: Any,
) -> None:
    """And the best of three is the one that is found where no other is wanted."""
    net = model(name, seed)
    looks = name in MODELS
    limits = [9, 12, 7]

    def rules(sentences: list[int]) -> Rules:
        return Rules(
            bos=BOS,
            eos=EOS,
            max_length=[limits[row] for row in sentences],
            forbidden=(0, 1, BOS),
            prefixes=[prefixes[row] for row in sentences],
            length_penalty=length_penalty,
            coverage_penalty=coverage_penalty if looks else 0.0,
            source_lengths=[int(LENGTHS[row]) for row in sentences] if looks and coverage_penalty else None,
            **more,
        )

    with torch.inference_mode():
        context, state = net.begin(SOURCE[order], LENGTHS[order], 3)
        together = beam_search(net.step, context, state, rules(order), beam=3, n_best=3, attention=looks)
        for at, row in enumerate(order):
            given = SOURCE[row : row + 1, : LENGTHS[row]], LENGTHS[row : row + 1]
            own, begin = net.begin(*given, 3)
            alone = beam_search(net.step, own, begin, rules([row]), beam=3, n_best=3)[0]
            assert [one.ids for one in alone] == [one.ids for one in together[at]]
            assert beam_search(net.step, own, begin, rules([row]), beam=3, n_best=1)[0] == alone[:1]
            for hypothesis, same in zip(together[at], alone, strict=True):
                assert hypothesis.score == pytest.approx(same.score, abs=1e-6)
                assert hypothesis.ids[: len(prefixes[row])] == tuple(prefixes[row])
                previous = torch.tensor([[BOS, *hypothesis.ids]])
                decoded, context = net(*given, previous)
                scores = net.logits(decoded, context).log_softmax(dim=1)
                total = sum(scores[step, word].item() for step, word in enumerate((*hypothesis.ids, EOS)))
                assert hypothesis.log_probability == pytest.approx(total, abs=1e-4)
                score = total / ((6 + len(hypothesis.ids)) / 6) ** length_penalty
                if looks:
                    paid = decoded.attention[0].sum(dim=0).double().clamp(LEAST_COVERAGE, 1)
                    score += coverage_penalty * paid.log().sum().item()
                assert hypothesis.score == pytest.approx(score, abs=1e-4)
                if looks:
                    seen = torch.tensor(hypothesis.attention)[:, : LENGTHS[row]]
                    torch.testing.assert_close(seen, decoded.attention[0].float())


@pytest.mark.parametrize("name", [*MODELS, *BLIND])
@given(
    seed=st.integers(0, 2**32),
    normalisation=st.sampled_from(["gnmt", "average"]),
    length_penalty=st.sampled_from([0.0, 0.6, 1.0]),
    source=st.lists(st.integers(4, WORDS - 1), min_size=1, max_size=4),
)
@settings(max_examples=10)
def test_a_wide_beam_is_enumeration_and_beam_1_a_greedy_loop(
    name: str, seed: int, normalisation: Any, length_penalty: float, source: list[int]
) -> None:
    """Of four words besides eos: at most 1 + 4 + 16 + 64 = 85 outputs of up to three."""
    net, words = model(name, seed), range(4, 8)
    encoded, length = torch.tensor([[*source, EOS]]), torch.tensor([len(source) + 1])
    rules = Rules(
        bos=BOS,
        eos=EOS,
        max_length=[3],
        forbidden=[one for one in range(WORDS) if one not in (*words, EOS)],
        normalisation=normalisation,
        length_penalty=length_penalty,
    )

    def find(beam: int, n_best: int) -> list[Hypothesis]:
        return beam_search(net.step, *net.begin(encoded, length, beam), rules, beam=beam, n_best=n_best)[0]

    def scores(ids: tuple[int, ...]) -> Tensor:
        """Log-probabilities (len(ids) + 1, WORDS) of what may follow, of the whole at once."""
        decoded, context = net(encoded, length, torch.tensor([[BOS, *ids]]))
        return net.logits(decoded, context).log_softmax(dim=1)

    with torch.inference_mode():
        found, best = find(85, 85), find(85, 1)
        expected = {}
        for ids in (ids for count in range(4) for ids in itertools.product(words, repeat=count)):
            penalty = {"gnmt": (6 + len(ids)) / 6, "average": len(ids) + 1}[normalisation] ** length_penalty
            following = scores(ids)
            expected[ids] = sum(following[at, word].item() for at, word in enumerate((*ids, EOS))) / penalty
        assert {one.ids: one.score for one in found} == pytest.approx(expected, abs=1e-4)
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        assert best == found[:1]
        ids = ()
        while len(ids) < 3:
            likeliest = scores(ids)[-1, [*words, EOS]].topk(2)
            assume(likeliest.values[0] - likeliest.values[1] > 1e-4)
            if likeliest.indices[0] == len(words):
                break
            ids = (*ids, words[int(likeliest.indices[0])])
        assert find(1, 1)[0].ids == ids


@every_model
def test_gradients_reach_every_parameter_through_dropout(name: str) -> None:
    net = model(name).train()
    net.logits(*net(SOURCE, LENGTHS, PREVIOUS)).logsumexp(dim=1).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.bf16
@every_model
def test_bfloat16_is_close_to_float32(name: str) -> None:
    net = model(name).float()
    exact = net.logits(*net(SOURCE, LENGTHS, PREVIOUS)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        context, state = net.encode(SOURCE, LENGTHS)
        whole = net.logits(net.decode(PREVIOUS, context, state), context)
        context, state = net.begin(SOURCE, LENGTHS, 3)
        first, state, _ = net.step(PREVIOUS[:, 0], context, state)
        second, _, _ = net.step(PREVIOUS[:, 1], context, state)
    assert (whole - exact).abs().mean() < 0.03 * exact.std()
    stepwise = torch.stack([first, second], dim=1)
    expected = exact.log_softmax(dim=1).unflatten(0, PREVIOUS.shape)[:, :2]
    assert (stepwise - expected).abs().mean() < 0.03 * exact.std()


@every_model
def test_a_step_reads_no_number_back_from_the_device(name: str) -> None:
    """The device `meta` has shapes and no numbers: what asks it for one raises."""
    with torch.device("meta"):
        net = translator(MODELS[name], WORDS, WORDS).train()
        words = torch.zeros(3, 6, dtype=torch.int64)
        decoded, context = net(words, torch.ones(3, dtype=torch.int64), words)
        assert net.logits(decoded, context, torch.zeros(7, dtype=torch.int64)).shape == (7, WORDS)


@pytest.mark.parametrize("ngram", [0, 3])
@pytest.mark.parametrize("name", [*MODELS, *BLIND])
def test_a_search_reads_no_number_back_from_the_device_but_at_its_looks(
    name: str, ngram: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = model(name)
    context, state = net.begin(SOURCE, LENGTHS, 3)
    coverage = {"coverage_penalty": 0.2, "source_lengths": LENGTHS.tolist()} if name in MODELS else {}

    def waits(longest: int, between: int) -> int:
        monkeypatch.setitem(STEPS_BETWEEN_LOOKS, "cpu", between)
        limits = [longest, longest - 1, longest]
        more: Any = {**coverage, "prefixes": [[5, 6], [], [7]], "no_repeat_ngram": ngram}
        rules = Rules(bos=BOS, eos=EOS, max_length=limits, min_length=longest, forbidden=(0, 1), **more)
        with Waits() as seen, torch.inference_mode():
            assert all(beam_search(net.step, context, state, rules, beam=3, attention=True)) or ngram
        return len(seen.seen)

    assert waits(30, 1000) == waits(5, 1000)
    assert waits(30, 1) > waits(30, 8) > waits(30, 1000)


@pytest.mark.parametrize("tied", ["all", "output", "none"])
@pytest.mark.parametrize("name", ["transformer", "convs2s"])
def test_a_trained_run_scores_the_same_when_loaded(name: str, tied: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    document = recipes.to_document(recipes.resolve(str(tiny["seq2seq"]), ["training.epochs=2"]).recipe)
    document["model"] = {**MODELS[name].model_dump(), "tied": tied}
    document["data"]["joint"] = tied == "all"
    recipe = recipes.from_document(document, origin="test")
    result = training.train(recipe, out=tmp_path / "run", runtime=CPU, listener=Silent())
    loaded = tasks.load(Run(tmp_path / "run").best, runtime=CPU)
    assert isinstance(loaded, tasks.Translation)
    assert loaded.evaluate("test").values == result["scores"]
    assert loaded.parameters == result["parameters"]
    shapes = [tuple(parameter.shape) for parameter in loaded.model.parameters()]
    width = loaded.model.words.target.embedding_dim
    words = {len(loaded.pairs.source_vocabulary), len(loaded.pairs.target_vocabulary)}
    assert sum(shapes.count((count, width)) for count in words) == {"all": 1, "output": 2, "none": 3}[tied]


def test_an_ensemble_of_other_kinds_of_models_has_the_mean_of_their_probabilities() -> None:
    """Each keeps its own context and state, whichever hypotheses go on and whichever sentences leave."""
    members = [model(name, seed) for seed, name in enumerate(("seq2seq-copying", "transformer", "seq2seq-blind"))]
    for method in ("beam", "sample"):
        decoding = recipes.Decoding(method=method, beam=3, max_length_ratio=2, max_length_offset=1, length_penalty=0)
        found = search(
            members,
            SOURCE,
            LENGTHS,
            decoding,
            subwords=[5, 3, 2],
            prefixes=[(), (), ()],
            numbers=[1, 2, 3],
            n_best=3,
            attention=True,
        )
        lengths = {len(hypothesis.ids) for hypotheses in found for hypothesis in hypotheses}
        assert len(lengths) > 1, "they leave at different steps"
        for row, hypotheses in enumerate(found):
            source, length = SOURCE[row : row + 1, : LENGTHS[row]], LENGTHS[row : row + 1]
            for hypothesis in hypotheses:
                ids = (*hypothesis.ids, EOS)
                probabilities = torch.zeros(len(ids), dtype=torch.float64)
                looked = []
                for member in members:
                    decoded, context = member(source, length, torch.tensor([[BOS, *hypothesis.ids]]))
                    scores = member.logits(decoded, context).softmax(dim=1)
                    probabilities += scores[range(len(ids)), ids] / len(members)
                    looked += [] if decoded.attention is None else [decoded.attention[0].float()]
                assert hypothesis.log_probability == pytest.approx(probabilities.log().sum().item(), abs=1e-4)
                torch.testing.assert_close(
                    torch.tensor(hypothesis.attention)[:, : LENGTHS[row]], torch.stack(looked).mean(dim=0)
                )
