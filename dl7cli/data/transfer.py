"""The way of tensors from main memory to the device. Knows neither images nor text."""

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the processor does not wait for a GPU to take it.

    From ordinary memory a copy to a GPU is finished before the call returns, and starts after all that was asked of
    the GPU before; from pinned memory it is queued like everything else.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
