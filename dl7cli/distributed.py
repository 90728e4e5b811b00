"""The workers of one training: which of them this process is, what part of the work is its own, how they agree.

A process that trains alone is the only worker: everything is its own part, and agreeing costs nothing.
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dl7cli import files
from dl7cli.cluster import LOSING, place

Item = TypeVar("Item")

_BEATS, _FAILED = "beats", "failed"
_OF_CONNECTION = re.compile("gloo|NCCL|pair closure|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


class Lost(Exception):
    """This worker cannot go on, but all of them can from the last checkpoint. The message is of it: `has lost …`."""


@dataclass(frozen=True)
class Workers:
    """This process among those that train together, one for each device."""

    rank: int = 0
    """From 0; the first alone writes and shows."""
    count: int = 1
    group: distributed.ProcessGroup | None = None
    """Connects them for what is in main memory; the default group is for what is on devices."""
    one_machine: bool = False
    """Whether a launcher has started all of them on the same node."""
    memory: Path | None = None
    """A folder of this node that stays while workers come and go."""
    store: Store | None = None
    """What all of them read and write, where they have met."""
    timeout: float = 0.0
    """Seconds that they wait for one of which they hear nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Workers":
        """Itself: a copy of a model that knows its workers knows the same ones."""
        return self

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, items: int) -> slice:
        """This worker's of so many items: a run of them, of all workers' runs no two differing by more than one."""
        return slice(items * self.rank // self.count, items * (self.rank + 1) // self.count)

    def dealt(self, items: Sequence[Item]) -> list[Item]:
        """This worker's of items in the order of their size, dealt forth and back so that all get about as much."""
        turns = (self.rank, 2 * self.count - 1 - self.rank)
        return [item for at, item in enumerate(items) if at % (2 * self.count) in turns]

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all workers, in its place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Until all workers have come here."""
        if self.count > 1:
            distributed.barrier(self.group)

    def stack(self, tensor: Tensor) -> Tensor:
        """The tensors of all workers, of one shape, on a new first axis."""
        if self.count == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def greatest(self, number: int) -> int:
        """Of the workers' numbers, without waiting for a device."""
        return self.greatest_later(number)()

    def greatest_later(self, number: int) -> Callable[[], int]:
        """As `greatest`, but no other worker is waited for until what this gives is called."""
        if self.count == 1:
            return lambda: number
        tensor = torch.tensor(number)
        work = distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self.group, async_op=True)
        assert work is not None

        def answer() -> int:
            work.wait()
            return int(tensor)

        return answer

    def gathered(self, value: Any) -> list[Any]:
        """The values of all workers, in their order: what JSON can hold."""
        if self.count == 1:
            return [value]
        content = _bytes(json.dumps(value).encode())
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        distributed.all_gather(sizes, torch.tensor([len(content)]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(content)] = content
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded, group=self.group)
        return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def shared(self, value: Any) -> Any:
        """The first worker's value, which JSON can hold."""
        return json.loads(self._sent(json.dumps(value).encode())) if self.count > 1 else value

    def shared_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first worker's tensors by name, on the CPU."""
        if self.count == 1:
            return tensors
        # Copies, as tensors that share memory are refused.
        own = {
            name: value.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, value in tensors.items()
        }
        return safetensors.torch.load(self._sent(safetensors.torch.save(own)))

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every worker's tensors the first one's values."""
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    @contextmanager
    def preparing(self, what: str) -> Iterator[None]:
        """Do something that may take one worker much longer than the others, and go on when all have done it.

        Every worker enters it, by the same name and once, and waits at the end for each that has not done it yet, as
        long as that shows that it is alive. Raises Lost where one has failed, or has not for the time-out.
        """
        if self.store is None:
            yield
            return
        pause = min(1.0, self.timeout / 10)
        done = threading.Event()
        beat = threading.Thread(target=_beat, args=(self.store, self.rank, pause, done), name="beat", daemon=True)
        beat.start()
        try:
            yield
        except BaseException:
            self.store.set(_FAILED, str(self.rank))
            raise
        finally:
            done.set()
            beat.join()
        self.store.set(f"{what} {self.rank}", "")
        heard = {rank: (-1, time.monotonic()) for rank in range(self.count)}
        while waiting := [rank for rank in heard if not self.store.check([f"{what} {rank}"])]:
            if self.store.check([_FAILED]):
                raise Lost(f"{LOSING}: worker {self.store.get(_FAILED).decode()} has failed")
            for rank in waiting:
                beats, since = self.store.add(f"{_BEATS} {rank}", 0), time.monotonic()
                if beats != heard[rank][0]:
                    heard[rank] = beats, since
                elif since - heard[rank][1] > self.timeout:
                    raise Lost(f"{LOSING}: worker {rank} has not been heard of for {self.timeout:.0f} s")
            time.sleep(pause / 10)

    def remember(self, name: str, value: str) -> None:
        """Let workers started after these, in their place, recall a value on this node."""
        if self.memory is not None:
            with files.replacing(self.memory / name) as file:
                file.write(value.encode())

    def recall(self, name: str) -> str | None:
        """What a worker before these remembered on this node."""
        if self.memory is None or not (self.memory / name).exists():
            return None
        return (self.memory / name).read_text(encoding="utf-8")

    def _sent(self, content: bytes) -> bytes:
        size = torch.tensor([len(content)])
        distributed.broadcast(size, 0, group=self.group)
        data = _bytes(content) if self.first else torch.empty(int(size), dtype=torch.uint8)
        distributed.broadcast(data, 0, group=self.group)
        return data.numpy().tobytes()


ALONE = Workers()


@contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[Workers]:
    """Meet the other workers that a launcher has started, each with a device of its own; alone where there is none.

    Whatever fails within because another worker has gone, or does not answer for `timeout` seconds, comes out as Lost.
    """
    here = place()
    if here is None:
        yield ALONE
        return
    waiting = timedelta(seconds=timeout)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    with _losing():
        attempt = PrefixStore(f"dl7/{here.attempt}", _store(waiting))
        distributed.init_process_group(backend, store=attempt, timeout=waiting, world_size=here.count, rank=here.rank)
        group = distributed.new_group(backend="gloo", timeout=waiting) if backend != "gloo" else None
    try:
        with _losing():
            yield Workers(here.rank, here.count, group, here.one_machine, here.memory, attempt, timeout)
    except Exception:
        raise  # to be told first: as soon as this worker leaves, the others fail, too
    except BaseException:
        distributed.destroy_process_group()
        raise
    distributed.destroy_process_group()


def _beat(store: Store, rank: int, pause: float, done: threading.Event) -> None:
    """Count up every `pause` seconds, for others to see, until it is `done` or nobody can see it any more."""
    with suppress(RuntimeError):  # which the worker meets, too
        while not done.wait(pause):
            store.add(f"{_BEATS} {rank}", 1)


@contextmanager
def _losing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as problem:
        # From talking to other workers: torch has a type for some of these, gloo has none.
        if not isinstance(problem, distributed.DistError) and not _OF_CONNECTION.search(str(problem)):
            raise
        # Gloo begins with a place in its source and ends with advice.
        reason = re.sub(r"^\[\S+\] ", "", str(problem).splitlines()[0]).partition(". ")[0]
        raise Lost(f"{LOSING}: {reason}") from problem


def _store(timeout: timedelta) -> TCPStore:
    """Where workers find one another: the launcher's, which stays while they come and go, or the first one's own."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and os.environ["RANK"] == "0"
    return TCPStore(address, port, is_master=own, timeout=timeout, multi_tenant=True)


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
