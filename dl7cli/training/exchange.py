"""How the gradients of several workers meet: by DistributedDataParallel, and on one machine's CPU in shared memory."""

import mmap
import os
import secrets
import warnings
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from dl7cli.distributed import Workers
from dl7cli.tasks import Task

_AT_ONCE = 1 << 23
"""Numbers of a gradient in shared memory at a time: 32 MiB a worker."""


class _Loss(nn.Module):
    """The task's loss as the forward pass of a module, which is where gradients are told to meet."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._loss = task.loss

    def forward(self, batch: Any) -> tuple[Tensor, int]:
        return self._loss(batch)


def meeting(task: Task) -> DistributedDataParallel:
    """The task's loss, of which a backward pass leaves the mean of the workers' gradients on each.

    All begin with the first one's weights. As parameters may be unused, those that are added up together stay the same
    from the first step on: a resumed training adds in the same order. On a GPU they meet in parts, while the backward
    pass goes on; a CPU that computes is not free for that, so there all meet at once.
    """
    workers, on_cpu = task.runtime.workers, task.runtime.device.type == "cpu"
    parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    mebibytes = 1 + sum(p.numel() * p.element_size() for p in parameters) // 2**20 if on_cpu else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of an argument that is to be called by another name
        module = DistributedDataParallel(
            _Loss(task),
            broadcast_buffers=False,
            bucket_cap_mb=mebibytes,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )
    if on_cpu and workers.one_machine and {parameter.dtype for parameter in parameters} == {torch.float32}:
        memory = shared_memory(workers, min(sum(parameter.numel() for parameter in parameters), _AT_ONCE))
        if memory is not None:
            module.register_comm_hook(SharedMean(workers, memory), _mean)
    return module


class SharedMean:
    """Takes the mean of all workers' tensors over memory (workers + 1, some numbers) that they share.

    Every worker leaves its own in a row of it and adds up its part of all rows in the last one, from where all take it,
    so many numbers at a time as a row has. That is a few copies of the tensor, where a network on the machine itself
    has the kernel make many more; and as each number is made by one worker, it is the same on all.
    """

    def __init__(self, workers: Workers, memory: Tensor) -> None:
        self._workers = workers
        self._rows, self._mean = memory[:-1], memory[-1]

    def __call__(self, tensor: Tensor) -> Tensor:
        """The mean in place of `tensor` (N,), float32. Raises what waiting for a worker that has gone does."""
        for some in torch.split(tensor, len(self._mean)):
            count = len(some)
            self._rows[self._workers.rank, :count].copy_(some)
            self._workers.wait()
            part = self._workers.part(count)
            torch.mean(self._rows[:, part], dim=0, out=self._mean[part])
            # Who goes on writes to its own row, which nobody reads any more, and waits for all before it adds.
            self._workers.wait()
            some.copy_(self._mean[:count])
        return tensor


def _mean(mean: SharedMean, bucket: GradBucket) -> Future[Tensor]:
    met: Future[Tensor] = Future()
    met.set_result(mean(bucket.buffer()))
    return met


def shared_memory(workers: Workers, numbers: int) -> Tensor | None:
    """Memory (workers + 1, numbers) in float32 that all workers see, or None where one of them does not.

    It has no name in any folder: it is gone with the last of them, however they end.
    """
    size, token = (workers.count + 1) * numbers * 4, secrets.token_hex()
    with ExitStack() as held:
        where, token = workers.shared([_created(size, token, held) if workers.first else None, token])
        memory = None if where is None else _opened(where, size, token)
        if workers.greatest(int(memory is None)) or memory is None:
            return None
    return torch.frombuffer(memory, dtype=torch.float32, count=size // 4).view(-1, numbers)


def _created(size: int, token: str, held: ExitStack) -> str | None:
    """A path by which others open new memory of `size` bytes, which ends with `token`, as long as it is `held`."""
    if not hasattr(os, "memfd_create"):  # it is Linux's
        return None
    with suppress(OSError):
        memory = os.memfd_create("dl7")
        held.callback(os.close, memory)
        # Taken now: where there is not so much, using it would end the process.
        os.posix_fallocate(memory, 0, size + len(token))
        os.pwrite(memory, token.encode(), size)
        return f"/proc/{os.getpid()}/fd/{memory}"
    return None


def _opened(where: str, size: int, token: str) -> mmap.mmap | None:
    """Such memory, unless it cannot be seen from here or is another's, of a process of this number elsewhere."""
    with suppress(OSError, ValueError), open(where, "r+b", buffering=0) as file:
        memory = mmap.mmap(file.fileno(), size + len(token))
        if memory[size:] == token.encode():
            return memory
    return None
