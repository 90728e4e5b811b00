"""Attention by itself: what is the same for all kinds, and torch's own where there is one."""

import pytest
import torch
from torch import nn

from dl7cli.models.attention import AdditiveAttention, Attention, DotAttention, GeneralAttention, MultiHeadAttention

KINDS = {
    "dot": DotAttention(),
    "general": GeneralAttention(4, 4),
    "additive": AdditiveAttention(4, 4),
    "coverage": AdditiveAttention(4, 4, coverage=True),
    "multihead": MultiHeadAttention(4, 4, 2),
}


@pytest.mark.parametrize("attention", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_sum_to_one_over_real_steps_and_padding_is_not_seen(attention: Attention, dtype: torch.dtype) -> None:
    attention = attention.to(dtype)
    memory, queries = torch.randn(2, 5, 4, dtype=dtype), torch.randn(2, 6, 4, dtype=dtype)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    covered = torch.rand(2, 6, 5).to(dtype)
    found, weights = attention(queries, attention.keys(memory), memory, mask, covered)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones_like(weights[:, :, 0]))
    assert not weights[1, :, 2:].any()
    other = memory.clone()
    other[1, 2:] = 7
    again, _ = attention(queries, attention.keys(other), other, mask, covered)
    assert torch.equal(again, found)


def test_several_heads_are_torchs_own() -> None:
    torch.manual_seed(1)
    ours, theirs = MultiHeadAttention(4, 6, 3), nn.MultiheadAttention(6, 3, kdim=6, vdim=6, batch_first=True)
    with torch.no_grad():
        # Torch's queries are as wide as its memory.
        ours.query = nn.Linear(6, 6)
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.project.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.project.bias]))
        theirs.out_proj.load_state_dict(ours.join.state_dict())
    memory, queries = torch.randn(2, 5, 6), torch.randn(2, 3, 6)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    found, weights = ours(queries, ours.keys(memory), memory, mask)
    expected, expected_weights = theirs(queries, memory, memory, key_padding_mask=~mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weights, expected_weights)


def test_coverage_changes_where_attention_looks() -> None:
    torch.manual_seed(1)
    attention = AdditiveAttention(4, 4, coverage=True)
    memory, queries, mask = torch.randn(1, 3, 4), torch.randn(1, 1, 4), torch.ones(1, 3, dtype=torch.bool)
    keys = attention.keys(memory)
    _, before = attention(queries, keys, memory, mask, torch.zeros(1, 1, 3))
    _, after = attention(queries, keys, memory, mask, torch.tensor([[[0.0, 9.0, 0.0]]]))
    without = AdditiveAttention(4, 4)
    without.load_state_dict(attention.state_dict(), strict=False)
    torch.testing.assert_close(before, without(queries, without.keys(memory), memory, mask)[1])
    assert not torch.allclose(before, after, atol=0.01)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_additive_scores_and_their_gradients_are_those_of_the_formula(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    made = AdditiveAttention(6, 5).double()
    memory, queries = torch.randn(5, 7, 5).double().requires_grad_(), torch.randn(5, 4, 6).double().requires_grad_()
    inputs = (memory, queries, *made.parameters())
    outer = torch.randn(5, 4, 7).double()
    with torch.no_grad():
        made.project.weight.mul_(scale)
    inner = made.query(queries)[:, :, None] + made.project(memory)[:, None]
    expected = made.energy(inner.tanh())[..., 0]
    expected_gradients = torch.autograd.grad(expected, inputs, outer)
    # One pair of steps at a time, some steps, steps in halves, one sentence, two of them, all at once.
    for block in (1, 100, 150, 300, 400, 2**17):
        monkeypatch.setattr("dl7cli.models.attention._BLOCK", block)
        scores = made.scores(queries, made.keys(memory), None)
        torch.testing.assert_close(scores, expected)
        torch.testing.assert_close(torch.autograd.grad(scores, inputs, outer), expected_gradients)


def test_additive_scores_of_great_numbers_are_finite_and_right() -> None:
    made = AdditiveAttention(1, 1)
    with torch.no_grad():
        for parameter, value in ((made.query.weight, 1), (made.query.bias, 0), (made.project.weight, 1)):
            parameter.fill_(value)
    numbers = torch.tensor([-90.0, -29.0, -28.0, -9.0, -1.0, 0.0, 5.0, 9.5, 28.5, 29.9, 80.0]).requires_grad_()
    scores = made.scores(numbers[None, :, None], made.keys(numbers[None, :, None]), None)
    expected = made.energy.weight[0, 0] * torch.tanh(numbers.clamp(-30, 30)[:, None] + numbers.clamp(-30, 30))
    torch.testing.assert_close(scores[0], expected)
    scores.sum().backward()
    (gradient,) = torch.autograd.grad(expected.sum(), numbers)
    assert numbers.grad is not None
    torch.testing.assert_close(numbers.grad, gradient, rtol=1e-5, atol=1e-5)


def test_additive_scores_are_of_float32_under_autocast() -> None:
    """With queries that bfloat16 holds exactly, nothing is rounded."""
    torch.manual_seed(1)
    attention = AdditiveAttention(8, 5)
    with torch.no_grad():
        attention.query.weight.copy_(torch.eye(8))
        attention.query.bias.zero_()
        queries, keys = torch.randn(3, 4, 8).bfloat16().float(), attention.keys(torch.randn(3, 6, 5))
        expected = attention.scores(queries, keys, None)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(attention.scores(queries, keys, None), expected)
