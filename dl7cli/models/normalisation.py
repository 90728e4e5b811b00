"""Batch normalisation over the parts of a batch that several workers have."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dl7cli.distributed import Workers


class _Normalised(torch.autograd.Function):
    """(x - mean) / √(variance + eps), by channel, with the mean and the variance of the images of all workers.

    One exchange in each direction: counts, means and sums of squared deviations, joined as in Chan et al. 1979, which
    loses nothing where the mean is large; and backwards the two sums of Ioffe & Szegedy 2015, §3.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, workers: Workers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, C, H, W) → the same normalised; mean and variance (C,) and the count of what they are of, (1,)."""
        axes, values = (0, 2, 3), x.float()
        own = x.numel() // x.shape[1]
        if own:
            variance, mean = torch.var_mean(values, axes, correction=0)
        else:
            variance = mean = torch.zeros(x.shape[1], device=x.device)
        size = torch.full((1,), float(own), device=x.device)
        parts = workers.stack(torch.cat([mean, variance * own, size]))
        means, squares, sizes = torch.split(parts, [x.shape[1], x.shape[1], 1], dim=1)
        count = sizes.sum(dim=0)
        mean = (sizes * means).sum(dim=0) / count
        variance = (squares + sizes * (means - mean).square()).sum(dim=0) / count
        y = functional.batch_norm(x, mean, variance, eps=eps)
        ctx.save_for_backward(y, (variance + eps).rsqrt(), count)
        ctx.workers = workers
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        y, scale, count = ctx.saved_tensors
        gradient, values = gradients[0].float(), y.float()
        sums = torch.cat([gradient.sum(dim=(0, 2, 3)), (gradient * values).sum(dim=(0, 2, 3))])
        mean, slope = (ctx.workers.add(sums) / count).view(2, -1, 1, 1)
        return (scale[:, None, None] * (gradient - mean - values * slope)).to(y.dtype), None, None


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose statistics, while training, are of the batch that all workers have parts of.

    Running statistics come out alike on all of them, and as on one. A part may be empty. torch.nn.SyncBatchNorm does
    the same on GPUs alone.
    """

    def __init__(self, own: nn.BatchNorm2d, workers: Workers) -> None:
        assert own.momentum is not None
        super().__init__(own.num_features, own.eps, own.momentum)
        self.weight, self.bias = own.weight, own.bias
        for name, value in own.named_buffers():
            self.register_buffer(name, value)
        self._workers = workers

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        y, mean, variance, count = _Normalised.apply(x, self.eps, self._workers)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        shared: Tensor = torch.addcmul(self.bias[:, None, None], y, self.weight[:, None, None]).to(x.dtype)
        return shared


def share_statistics(model: nn.Module, workers: Workers) -> None:
    """Put a SharedBatchNorm in the place of each BatchNorm2d of a model; its weights keep their names."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, SharedBatchNorm(layer, workers))
