"""How often a processor would have to wait for a device, seen on the processor itself."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ASKING = (
    torch.ops.aten._local_scalar_dense.default,
    # As which the same comes in inference mode.
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
)


class Waits(TorchDispatchMode):
    """Counts what would have a processor wait for a device: asking for a number, or for how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chosen = args[1] if func is torch.ops.aten.index.Tensor else ()
        if func in _ASKING or any(part is not None and part.dtype == torch.bool for part in chosen):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))
