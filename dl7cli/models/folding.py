"""What is left of batch normalisation after training: a scale and a shift that convolutions can do themselves."""

import copy
from collections.abc import Mapping

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Foldable(nn.Module):
    """A module with convolutions whose outputs go to batch normalisation, at once or through a maximum."""

    def foldable(self) -> Mapping[str, str]:
        """The names of those convolutions, each with that of its normalisation.

        A maximum may be between them only where the scale is positive, as the order of the two is then the same.
        """
        raise NotImplementedError


def folded(model: nn.Module) -> nn.Module:
    """A copy for evaluation in which convolutions do what `Foldable` says is done to their outputs.

    With running statistics normalisation is a scale and a shift for each channel (Jacob et al. 2018, arXiv 1712.05877,
    eq. 14). The outputs are the same but for rounding, and go through memory once less.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, Foldable):
            for convolution, normalisation in module.foldable().items():
                fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, normalisation))
                setattr(module, convolution, fused)
                setattr(module, normalisation, nn.Identity())
    return model
