"""Losses in pieces are torch's in one, values and gradients."""

import pytest
import torch
from torch.nn import functional

from dl7cli.models import losses
from dl7cli.models.losses import agreeing_cross_entropy, smoothed_cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 7, 8])
def test_it_is_torchs(smoothing: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_AT_ONCE", 4 * 9 + 5)  # four rows at once
    torch.manual_seed(1)
    logits = (5 * torch.randn(rows, 9, dtype=torch.float64)).requires_grad_()
    target = torch.randint(9, (rows,))
    own, theirs = (
        smoothed_cross_entropy(logits, target, smoothing),
        functional.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing),
    )
    torch.testing.assert_close(own, theirs)
    found, expected = (torch.autograd.grad(3 * total, logits)[0] for total in (own, theirs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_great_scores_are_scores(shift: float) -> None:
    logits, target = torch.randn(5, 9), torch.randint(9, (5,))
    expected = smoothed_cross_entropy(logits, target, 0.1)
    torch.testing.assert_close(smoothed_cross_entropy(logits + shift, target, 0.1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("more", [1, 4])
def test_rows_beyond_the_target_count_nothing(
    more: int, smoothing: float, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_AT_ONCE", 4 * 9)
    logits, target = torch.randn(7 + more, 9, dtype=kind, requires_grad=True), torch.randint(9, (7,))
    own, without = (smoothed_cross_entropy(x, target, smoothing) for x in (logits, logits[:7]))
    assert own == without
    found, expected = (torch.autograd.grad(total, logits)[0] for total in (own, without))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not found[7:].any()


def test_a_vocabulary_larger_than_a_piece() -> None:
    logits, target = torch.randn(3, (1 << 19) + 1), torch.tensor([0, 5, 1 << 19])
    expected = functional.cross_entropy(logits, target, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(smoothed_cross_entropy(logits, target, 0.1), expected)


def test_bfloat16_is_summed_in_float32_and_its_gradient_is_bfloat16() -> None:
    logits = torch.randn(300, 50, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(50, (300,))
    own = smoothed_cross_entropy(logits, target, 0.1)
    expected = functional.cross_entropy(logits.float(), target, reduction="sum", label_smoothing=0.1)
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, expected)
    found, theirs = (torch.autograd.grad(total, logits)[0] for total in (own, expected))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, theirs)


def test_words_without_probability_cost_nothing_unless_they_are_smoothed() -> None:
    """As in a model that copies, whose scores are logarithms of probabilities."""
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    total = smoothed_cross_entropy(logits, torch.tensor([2]), 0.0)
    torch.testing.assert_close(total, functional.cross_entropy(logits, torch.tensor([2])))
    (gradient,) = torch.autograd.grad(total, logits)
    assert gradient.isfinite().all()
    assert gradient[0, 1] == 0


def torchs(logits: torch.Tensor, target: torch.Tensor, smoothing: float, weight: float) -> torch.Tensor:
    one, two = logits.log_softmax(dim=1).chunk(2)
    losses = [functional.cross_entropy(x, target, reduction="sum", label_smoothing=smoothing) for x in (one, two)]
    apart = [functional.kl_div(x, y, reduction="sum", log_target=True) for x, y in ((one, two), (two, one))]
    return (sum(losses) + weight * sum(apart) / 2) / 2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_agreement_is_torchs(rows: int, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_AT_ONCE", 4 * 9 + 5)  # four rows at once
    torch.manual_seed(2)
    logits = (3 * torch.randn(2 * rows, 9, dtype=torch.float64)).requires_grad_()
    target = torch.randint(9, (rows,))
    own, theirs = (loss(logits, target, smoothing, 5.0) for loss in (agreeing_cross_entropy, torchs))
    assert own - agreeing_cross_entropy(logits, target, smoothing, 0.0) > 1
    torch.testing.assert_close(own, theirs)
    found, expected = (torch.autograd.grad(3 * total, logits)[0] for total in (own, theirs))
    torch.testing.assert_close(found, expected)


def test_agreement_of_bfloat16_is_summed_in_float32() -> None:
    logits = torch.randn(300, 50, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(50, (150,))
    own, theirs = agreeing_cross_entropy(logits, target, 0.1, 5.0), torchs(logits.float(), target, 0.1, 5.0)
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, theirs)
    found, expected = (torch.autograd.grad(total, logits)[0] for total in (own, theirs))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-3)


def test_agreement_of_nothing_and_of_no_number() -> None:
    """The former is the part of a worker for which no pair is left."""
    none, no_target = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    total = agreeing_cross_entropy(none, no_target, 0.1, 5.0)
    assert total == 0
    assert torch.autograd.grad(total, none)[0].shape == (0, 5)
    assert agreeing_cross_entropy(torch.tensor([[0.0, torch.nan], [0.0, 0.0]]), torch.tensor([0]), 0.1, 5.0).isnan()
