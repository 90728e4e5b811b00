"""The recurrent models against slow loops in float64, and themselves step by step, in every combination of options."""

from itertools import cycle, product
from typing import Any

import pytest
import slow_seq2seq
import torch
from torch import Tensor

from dl7cli.models.seq2seq import Seq2Seq
from dl7cli.models.translator import Translator
from dl7cli.recipe import Seq2SeqModel
from dl7cli.tasks.translation import translator

PAD, BOS = 0, 2
WORDS = 11


def options(**keys: Any) -> Seq2SeqModel:
    """Small sizes that go together: encoder outputs 8 wide."""
    attention, layers = keys.get("attention"), keys.get("decoder_layers", 1)
    width = 8 // (1 if keys.get("encoder_direction") == "forward" else 2)
    sizes = {"embedding_width": 6, "encoder_width": width, "decoder_width": 8 if attention == "dot" else 7, "heads": 2}
    if attention == "none":
        sizes["encoder_layers"] = layers
    return Seq2SeqModel(kind="seq2seq", **{**sizes, "dropout": 0.0, **keys})


def model(**keys: Any) -> Seq2Seq:
    torch.manual_seed(3)
    described = options(**keys)
    made = translator(described, WORDS if described.tied == "all" else WORDS + 2, WORDS).double()
    assert isinstance(made, Seq2Seq)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)
        made.output_bias.normal_()
    return made


def every_combination() -> list[dict[str, Any]]:
    """Each cell with each attention, decoder, input feeding, coverage and copying that go together; what does not
    depend on these takes turns, in lengths that meet in every way.
    """
    attentions = ("none", "additive", "dot", "general", "multihead")
    decoders = (("conditional", False), ("luong", False), ("luong", True), ("bahdanau", False))
    readouts = cycle(["tanh", "maxout"])
    ties = cycle([{"tied": "all"}, {"tied": "output"}, {"tied": "none", "readout_width": 5}])
    layers = cycle([(1, False), (2, False), (1, False), (3, True), (1, False)])
    locked = cycle([False, False, True, True])
    encoders = cycle(
        [
            {},
            {"encoder_direction": "forward"},
            {"encoder_layers": 2},
            {"encoder_stack": "alternating", "encoder_layers": 3, "transition_depth": 2},
            {},
            {"transition_depth": 3, "encoder_direction": "forward"},
            {"encoder_stack": "alternating", "encoder_layers": 2},
        ]
    )
    found = []
    for attention, (decoder, fed), coverage, copying, cell in product(
        attentions, decoders, (False, True), (False, True), ("lstm", "gru", "rnn")
    ):
        if coverage and attention != "additive":
            continue
        if attention == "none" and (decoder, fed, copying) != ("conditional", False, False):
            continue
        keys = {"cell": cell, "attention": attention, "decoder": decoder, "input_feeding": fed, "coverage": coverage}
        number, residual = next(layers)
        keys |= {"copying": copying, "readout": next(readouts), "locked_dropout": next(locked), "dropout": 0.5}
        encoder = next(encoders)
        if attention == "none":
            encoder = {**encoder, "encoder_layers": number}
        found.append({**keys, **next(ties), **encoder, "decoder_layers": number, "residual": residual})
    return found


def name(keys: dict[str, Any]) -> str:
    return "-".join(key if value is True else str(value) for key, value in keys.items() if value is not False)


COMBINATIONS = pytest.mark.parametrize(
    "keys",
    [
        # In the quick run the cells take turns.
        pytest.param(keys, id=name(keys), marks=[] if (number + number // 3) % 3 == 0 else pytest.mark.slow)
        for number, keys in enumerate(every_combination())
    ],
)


def sources() -> tuple[Tensor, Tensor]:
    return torch.tensor([[4, 5, 6, 4, 3], [8, 9, 3, 0, 0], [10, 3, 0, 0, 0]]), torch.tensor([5, 3, 2])


def all_log_probabilities(net: Translator, source: Tensor, lengths: Tensor, previous: Tensor) -> Tensor:
    decoded, context = net(source, lengths, previous)
    return net.logits(decoded, context).log_softmax(dim=1).view(*previous.shape, -1)


@COMBINATIONS
def test_the_model_is_the_slow_loop(keys: dict[str, Any]) -> None:
    net = model(**keys).eval()
    source, lengths = sources()
    previous = torch.tensor([[BOS, 5, 6, 4], [BOS, 9, 0, 0], [BOS, 7, 8, 0]])
    with torch.no_grad():
        fast = all_log_probabilities(net, source, lengths, previous)
        looked = net(source, lengths, previous)[0].attention
        for row, steps in enumerate((4, 2, 3)):
            length = int(lengths[row])
            slow, slow_looked = slow_seq2seq.log_probabilities(
                net, source[row, :length].tolist(), previous[row, :steps].tolist()
            )
            torch.testing.assert_close(fast[row, :steps], slow)
            if looked is not None:
                torch.testing.assert_close(looked[row, :steps, :length], slow_looked)
                assert not looked[row, :, length:].any()


@COMBINATIONS
def test_step_by_step_is_the_whole_sequence_for_every_hypothesis(keys: dict[str, Any]) -> None:
    net = model(**keys).eval()
    source, lengths = sources()
    previous = torch.tensor(
        [[BOS, 5, 6, 4], [BOS, 9, 1, 4], [BOS, 7, 8, 10], [BOS, 4, 4, 9], [BOS] * 4, [BOS, 8, 3, 3]]
    )
    with torch.inference_mode():
        # Two hypotheses a sentence, decoded side by side and after being put in another order.
        whole = all_log_probabilities(net, source.repeat_interleave(2, 0), lengths.repeat_interleave(2, 0), previous)
        context, state = net.begin(source, lengths, 2)
        folds = keys["decoder"] == "conditional" and keys["attention"] not in ("none", "multihead")
        assert len(context) - len(net.encode(source, lengths)[0]) == (folds and not keys["copying"])
        assert len(net.begin(source, lengths, 1)[0]) == len(net.encode(source, lengths)[0])
        state = tuple(part.repeat_interleave(2, dim=0) for part in state)
        order = torch.arange(6)
        for step in range(4):
            found, state, looked = net.step(previous[order, step], context, state)
            torch.testing.assert_close(found, whole[order, step].float())
            assert (looked is None) == (keys["attention"] == "none")
            swap = torch.tensor([1, 0, 2, 3, 5, 4])
            state, order = tuple(part.index_select(0, swap) for part in state), order[swap]


@COMBINATIONS
def test_padding_and_other_sentences_change_nothing(keys: dict[str, Any]) -> None:
    net = model(**keys).eval()
    source, lengths = sources()
    previous = torch.tensor([[BOS, 5, 6], [BOS, 9, 4], [BOS, 7, 8]])
    with torch.inference_mode():
        together = all_log_probabilities(net, source, lengths, previous)
        for row, length in enumerate(lengths.tolist()):
            here = slice(row, row + 1)
            alone = all_log_probabilities(net, source[here, :length], lengths[here], previous[here])
            torch.testing.assert_close(together[here], alone)


@COMBINATIONS
def test_gradients_reach_every_parameter(keys: dict[str, Any]) -> None:
    net = model(**{**keys, "dropout": 0.2}).train()
    source, lengths = sources()
    previous = torch.tensor([[BOS, 5, 6], [BOS, 9, 4], [BOS, 7, 8]])
    all_log_probabilities(net, source, lengths, previous)[:, :, 5].sum().backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


def test_concat_is_additive_attention() -> None:
    """Luong et al. 2015, eq. 8: vᵀ tanh(W [q; m]), W being what Bahdanau et al. 2015 call W and U side by side."""
    source, lengths = sources()
    previous = torch.tensor([[BOS, 5, 6, 4], [BOS, 9, 0, 0], [BOS, 7, 8, 0]])
    found = [
        all_log_probabilities(model(attention=name, decoder="luong").eval(), source, lengths, previous)
        for name in ("concat", "additive")
    ]
    assert torch.equal(*found)


def test_what_is_locked_is_dropped_at_every_step_of_a_sentence() -> None:
    """Gal & Ghahramani 2016: one mask for a sentence, in whole sequences and step by step."""
    source, lengths = sources()
    previous = torch.tensor([[BOS, 5, 6, 4], [BOS, 9, 8, 7], [BOS, 7, 8, 5]])
    for locked, keys in product((False, True), ({}, {"decoder": "luong", "input_feeding": True, "decoder_layers": 2})):
        net = model(locked_dropout=locked, dropout=0.5, **keys).train()
        kept: list[Tensor] = []
        by_step: dict[int, list[Tensor]] = {}
        net.dropout.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output != 0))
        by_steps = net.dropout.by_steps

        def noted(by_steps: Any = by_steps, by_step: dict[int, list[Tensor]] = by_step) -> Any:
            drop = by_steps()

            def wrapped(place: int, x: Tensor) -> Tensor:
                answer: Tensor = drop(place, x)
                by_step.setdefault(place, []).append(answer != 0)
                return answer

            return wrapped

        net.dropout.by_steps = noted  # type: ignore[method-assign]
        net(source, lengths, previous)
        # Real steps: the embedding of padding is zero by itself.
        same = [bool((one[:1, :2] == one[:1, :1]).all()) for one in kept]
        assert len(kept) >= 2
        assert all(same) == locked
        assert bool(by_step) == bool(keys)
        assert by_step.keys() == ({-1, 0, 1} if keys else set())
        for masks in by_step.values():
            assert len(masks) == 4
            assert all(torch.equal(mask, masks[0]) for mask in masks[1:]) == locked
