"""Dropout by random bytes: how often, how much, and the same for the same seed."""

import pytest
import torch

from dl7cli.models.dropout import Dropout, dropout


@pytest.mark.parametrize(("probability", "nearest"), [(0.3, 77 / 256), (0.5, 0.5), (1e-4, 1 / 256), (0.999, 255 / 256)])
def test_so_many_are_dropped_and_the_rest_makes_up_for_them(probability: float, nearest: float) -> None:
    torch.manual_seed(1)
    x = torch.ones(601, 999, requires_grad=True)
    found = dropout(x, probability, training=True)
    error = (nearest * (1 - nearest) / x.numel()) ** 0.5
    assert (found == 0).double().mean().item() == pytest.approx(nearest, abs=5 * error)
    torch.testing.assert_close(found[found != 0].unique(), torch.tensor([1 / (1 - nearest)]))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, found)


def test_elements_are_dropped_independently() -> None:
    """Neighbours, which come from the bytes of one draw, no more often together than others."""
    torch.manual_seed(1)
    kept = (dropout(torch.ones(1 << 20), 0.5, training=True) != 0).double() - 0.5
    for distance in (1, 2, 3, 4, 7, 8, 64):
        correlation = 4 * (kept[distance:] * kept[:-distance]).mean().item()
        assert abs(correlation) < 5 / (1 << 10), distance


def test_the_seed_decides_and_the_type_stays() -> None:
    x = torch.ones(3, 5, 7, dtype=torch.bfloat16)
    torch.manual_seed(1)
    first, second = dropout(x, 0.3, True), dropout(x, 0.3, True)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.3, True), first)
    assert not torch.equal(first, second)
    assert first.dtype == torch.bfloat16
    assert first.shape == x.shape


def test_nothing_is_dropped_without_training_or_probability() -> None:
    x = torch.randn(4, 4)
    assert torch.equal(dropout(x, 0.3, training=False), x)
    assert torch.equal(dropout(x, 0.0, training=True), x)
    assert dropout(torch.empty(0, 3), 0.3, training=True).shape == (0, 3)


@pytest.mark.parametrize("by_steps", [False, True])
def test_locked_dropout_drops_the_same_values_at_every_step_and_others_in_each_row(by_steps: bool) -> None:
    torch.manual_seed(1)
    drop = Dropout(0.25, locked=True).train()
    x = torch.ones(400, 7, 10)
    one = drop.by_steps()
    dropped = torch.stack([one(1, part) for part in x.unbind(dim=1)], dim=1) if by_steps else drop(x)
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert len(dropped[:, 0].unique(dim=0)) > 100
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    if by_steps:
        assert not torch.equal(one(2, x[:, 0]), dropped[:, 0])


def test_as_a_module_it_is_the_same_by_sequence_and_by_steps_and_none_drops_in_evaluation() -> None:
    drop, x = Dropout(0.3), torch.ones(3, 4, 5)
    for forward, values in ((drop, x), (lambda part: drop.by_steps()(0, part), x[:, 0])):
        torch.manual_seed(1)
        found = forward(values)
        torch.manual_seed(1)
        assert torch.equal(found, dropout(values, 0.3, training=True))
    for locked in (False, True):
        drop = Dropout(0.3, locked=locked).eval()
        assert torch.equal(drop(x), x)
        assert torch.equal(drop.by_steps()(0, x[:, 0]), x[:, 0])
