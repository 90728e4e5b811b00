"""Where a model runs: device, precision, threads; and the random state that goes with it."""

import ctypes
import os
import platform
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dl7cli.distributed import ALONE, Workers
from dl7cli.errors import UserError

_NO_MEMORY = re.compile(
    "can(no|')t allocate memory|out of memory|could not create a primitive(?! desc)|start new thread|"
    r"CU[A-Z]+_STATUS_\w*ALLOC(ATION)?_FAILED",
    re.I,
)
"""Said by torch, the drivers of GPUs, oneDNN and Python in a RuntimeError of no type of its own."""
# Said once by some versions of torch, which ask for names that others do not know.
warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
# Those that torch knows; the first is also the one that makes cuDNN's recurrent layers repeatable.
_CUBLAS_REPEATABLE = (":16:8", ":4096:8")
# oneDNN keeps the code that it writes for each shape of a product or recurrent layer, 1,024 of these unless told
# otherwise before the first. The batches of a translator, few as their shapes are, want some 1,500 in an epoch, each of
# which takes milliseconds to write again; more are not kept, as each takes memory, megabytes for the output layer.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "2048")
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MALLOC_THRESHOLDS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
MOST_ALONE = 4
"""Threads that each work on something of their own: of more, each of which takes memory, nothing has been measured."""
Item = TypeVar("Item")
Made = TypeVar("Made")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """A device and the precision used on it, with the reason for both; and the workers that share the training."""

    device: torch.device
    precision: str
    device_name: str
    reason: str
    workers: Workers = ALONE
    deterministic: bool = False
    """Whether training again is to give the same bits on a GPU too; on a CPU it does anyway."""
    search_precision: str = "fp32"
    """In which translators search and score."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products and convolutions run in the precision chosen; weights and sums stay in float32."""
        return self._autocast(self.precision)

    def autocast_search(self) -> AbstractContextManager[Any]:
        """As `autocast`, of translators that search and score; float32 is that on a GPU too, and not TF32."""
        exact = self.device.type == "cuda" and self.search_precision == "fp32"
        return without_tf32() if exact else self._autocast(self.search_precision)

    def _autocast(self, precision: str) -> AbstractContextManager[Any]:
        return nullcontext() if precision == "fp32" else torch.autocast(self.device.type, DTYPES[precision])

    @contextmanager
    def repeatable(self) -> Iterator[None]:
        """Where that is asked for, have torch use deterministic operations only, in all the process, while this lasts.

        To be entered before anything is computed on a GPU: cuBLAS reads its setting once. Raises UserError with the
        operation's name where one is needed that is not to be had deterministic.
        """
        if not self.deterministic:
            yield
            return
        if os.environ.get(_CUBLAS) not in _CUBLAS_REPEATABLE:
            os.environ[_CUBLAS] = _CUBLAS_REPEATABLE[0]
        cudnn = torch.backends.cudnn
        before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        except RuntimeError as error:
            operation, found, _ = str(error).partition(" does not have a deterministic implementation")
            if not found:
                raise
            hint = "leave `--deterministic` out, or train with `--device cpu`, where every run gives the same bits"
            raise UserError(f"torch's `{operation}` is not deterministic on {self.device_name}", hint) from None
        finally:
            torch.use_deterministic_algorithms(before[0])
            cudnn.deterministic, cudnn.benchmark = before[1:]


def choose(
    device: str = "auto",
    precision: str = "auto",
    gpus: str | None = None,
    *,
    workers: Workers = ALONE,
    deterministic: bool = False,
    searches: bool = False,
) -> Runtime:
    """Turn the flags into a device that exists and a precision it can do, for one of `workers`.

    With `searches` a precision that is asked for is that of search and scores too, which are in float32 otherwise,
    where near ties do not depend on what else is in the batch. A CPU keeps what is freed (`keep_heap`).

    Raises UserError for a device or precision that is not to be had, saying what was seen.
    """
    if gpus is not None:
        named = for_workers(device, gpus)
        if len(named) > 1:
            raise UserError(f"`--gpus {gpus}`: only training runs on several GPUs", hint="give one number")
        device = named[0]
    chosen, why = _device(device)
    known = ("auto", *DTYPES)
    if precision not in known:
        raise UserError(f"there is no precision `{precision}`", hint=f"choose one of {', '.join(known)}")
    fast = _bf16_hardware(chosen)
    search_precision = precision if searches and precision != "auto" else "fp32"
    if precision == "auto":
        precision = "bf16" if fast else "fp32"
        why += f"; {precision} because {fast or 'this hardware has no fast bf16'}"
    elif chosen.type == "cpu" and precision not in precisions(chosen):
        can = " or ".join(f"`--precision {name}`" for name in precisions(chosen))
        raise UserError(f"this CPU cannot compute in {precision}", hint=f"use {can}")
    else:
        why += f"; {precision} as asked"
    if deterministic:
        why += "; deterministic as asked"
    if chosen.type == "cpu":
        keep_heap()
        # As `each_alone` leaves it, from the beginning: MKL may go by it in how it divides products.
        torch.set_num_threads(torch.get_num_threads())
    return Runtime(chosen, precision, _name(chosen), why, workers, deterministic, search_precision)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Keep all digits of float32, where torch or its user would have a GPU spare some for speed."""
    parts: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [part.allow_tf32 for part in parts]
    for part in parts:
        part.allow_tf32 = False
    try:
        yield
    finally:
        for part, allowed in zip(parts, before, strict=True):
            part.allow_tf32 = allowed


def for_workers(device: str, gpus: str | None, workers: int | None = None) -> list[str]:
    """The device of each worker on this machine, as the flags have them; one where they speak of one.

    Raises UserError for flags that contradict each other and for a GPU that does not exist, saying what was seen.
    """
    if workers is not None:
        if gpus is not None or device not in ("auto", "cpu") or (device == "auto" and torch.cuda.is_available()):
            raise UserError(
                "`--workers` says how many share the CPU", hint="`--gpus 0,1` or `--gpus all` gives each GPU a worker"
            )
        return ["cpu"] * workers
    if gpus is None:
        return [device]
    if device not in ("auto", "cuda"):
        raise UserError(f"`--gpus {gpus}` and `--device {device}` contradict each other", hint="give one of them")
    seen = torch.cuda.device_count()
    numbers = list(map(str, range(seen))) if gpus == "all" else [text.strip() for text in gpus.split(",")]
    alone = len(numbers) == 1 and numbers[0].isdecimal()  # which `choose` looks for
    if not numbers or not (alone or all(text.isdecimal() and int(text) < seen for text in numbers)):
        raise UserError(
            f"`--gpus {gpus}`: these are not all to be had; seen here: {_seen_gpus()}",
            hint="give numbers such as `0` or `0,1`, or `all`",
        )
    if len(set(map(int, numbers))) < len(numbers):
        raise UserError(f"`--gpus {gpus}` names a GPU twice", hint="each has one worker")
    return [f"cuda:{int(text)}" for text in numbers]


def of_worker(devices: Sequence[str], local_rank: int) -> str:
    """The device of a worker, of those that `for_workers` gave; where no number was named, the GPU of its own."""
    if len(devices) > 1:
        if local_rank >= len(devices):
            raise UserError(f"there is no device for worker {local_rank}", hint=f"start {len(devices)} workers")
        return devices[local_rank]
    several = devices[0] in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{local_rank}" if several else devices[0]


def precisions(device: torch.device) -> list[str]:
    """What the device can train in, whether fast or not."""
    match device.type:
        case "cuda":
            return ["fp32", "bf16", "fp16"] if _bf16_hardware(device) else ["fp32", "fp16"]
        case "cpu":
            return ["fp32", "bf16"] if _computes_bf16() else ["fp32"]
        case _:
            return ["fp32", "fp16"]


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seed_of(*numbers: int) -> int:
    """The seed of a random stream that is a pure function of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the random streams in use, as byte tensors for a checkpoint."""
    state = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["random.cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["random.mps"] = torch.mps.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `random_state` gave; a stream that was not saved (another kind of device) is left as it is."""
    torch.set_rng_state(state["random.cpu"])
    if device.type == "cuda" and "random.cuda" in state:
        torch.cuda.set_rng_state(state["random.cuda"], device)
    if device.type == "mps" and "random.mps" in state:
        torch.mps.set_rng_state(state["random.mps"])


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory the process has had on the GPU, or in main memory where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def out_of_memory(problem: BaseException) -> bool:
    """Whether this is what torch or Python raise where memory runs out, of the GPU or of the machine."""
    if isinstance(problem, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(problem, RuntimeError) and _NO_MEMORY.search(str(problem)) is not None


def release_memory(device: torch.device) -> None:
    """Give back the memory that is kept for tensors to come, whose pieces may be too small for those.

    A CPU keeps none from then on.
    """
    match device.type:
        case "cuda":
            torch.cuda.empty_cache()
        case "mps":
            torch.mps.empty_cache()
        case "cpu":
            _keep_in_heap(pieces=1 << 17, in_all=1 << 17)  # as glibc begins
            trim_heap()


def keep_heap() -> None:
    """Let glibc keep the main memory that is freed for what is asked for next; nothing where there is no glibc.

    Left alone it gives the large tensors of a step back to the system and is given them again in the next one, page by
    page and each filled with zeros: up to a quarter of the time of a step.
    """
    _keep_in_heap(pieces=1 << 30, in_all=(1 << 31) - 1)


def _keep_in_heap(*, pieces: int, in_all: int) -> None:
    """Take pieces of up to so many bytes from the heap, and give its end back where so many are free there.

    Where the environment has one of these thresholds, by glibc's names, both stay as they are.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None and not any(os.environ.get(name) for name in _MALLOC_THRESHOLDS):
        mallopt(_M_MMAP_THRESHOLD, pieces)
        mallopt(_M_TRIM_THRESHOLD, in_all)


def trim_heap() -> None:
    """Give back to the system the main memory that was freed and that glibc keeps; nothing where there is no glibc.

    Tensors of ever-changing shapes, as of translators, break the heap up: in time half of it is free, in pieces.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if platform.system() == "Linux" else None


@contextmanager
def evaluation_mode(*models: torch.nn.Module) -> Iterator[None]:
    """No gradients, no dropout, running statistics; the modes that the models were in come back at the end."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for model, was_training in zip(models, before, strict=True):
            model.train(was_training)


class Abandoned(Exception):
    """What was being worked on is not wanted any more."""


def each_alone(
    work: Callable[[Item, Callable[[], None]], Made], items: Sequence[Item], device: torch.device
) -> Iterator[tuple[Item, Made]]:
    """What `work` makes of each item, with it, as they are done: on a CPU with few cores one item to each of them.

    Small operations are done sooner so than by all cores together, one after the other. `work` is also given what it
    has to call now and then: where the rest is not wanted any more, after Ctrl-C or what another has raised, that
    raises Abandoned. What it shares must not change meanwhile; inference mode and autocast are as in a new thread.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if not 1 < threads <= MOST_ALONE or len(items) < threads:
        yield from ((item, work(item, lambda: None)) for item in items)
        return
    over = threading.Event()

    def check() -> None:
        if over.is_set():
            raise Abandoned

    pool = ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1))
    try:
        begun = {pool.submit(work, item, check): item for item in items}
        for done in as_completed(list(begun)):
            yield begun.pop(done), done.result()
    finally:
        over.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # parts of it are the whole process's


def report() -> dict[str, Any]:
    """What `dl7 doctor` prints: versions, processor, GPUs, threads and what `auto` would choose."""
    chosen = choose()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "cpu": {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "bf16": _bf16_hardware(torch.device("cpu")) or "no",
        },
        "gpus": [
            {
                "index": index,
                "name": torch.cuda.get_device_name(index),
                "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            }
            for index in range(torch.cuda.device_count())
        ],
        "mps": torch.backends.mps.is_available(),
        "chosen": {"device": chosen.device_name, "precision": chosen.precision, "reason": chosen.reason},
    }


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    return _cpu_information("model name") or platform.processor() or platform.machine()


def _cpu_information(field: str) -> str:
    """What Linux says of the first core, or an empty string."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(field):
                return line.partition(":")[2].strip()
    return ""


def _device(name: str) -> tuple[torch.device, str]:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0), "the first CUDA GPU"
        return torch.device("cpu"), "the CPU, as no CUDA GPU was seen"
    kind, separator, index = name.partition(":")
    wrong = UserError(f"there is no device `{name}`", hint="choose one of auto, cpu, cuda, cuda:N, mps")
    if kind not in ("cpu", "cuda", "mps") or (separator and (kind != "cuda" or not index.isdecimal())):
        raise wrong
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no device `{name}`; seen here: {_seen_gpus()}", hint="use `--device cpu`")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("there is no device `mps` on this machine", hint="use `--device cpu`")
    return torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device(kind), f"{name} as asked"


def _seen_gpus() -> str:
    names = [f"cuda:{n} ({torch.cuda.get_device_name(n)})" for n in range(torch.cuda.device_count())]
    return ", ".join(names) or "no CUDA GPU"


def _bf16_hardware(device: torch.device) -> str:
    """What makes bf16 fast on this device, or an empty string."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"the GPU has compute capability {major}.{minor}" if major >= 8 else ""
    if device.type == "cpu":
        # Torch's own questions are private and have changed between versions; the kernel's list of flags has not.
        flags = _cpu_flags()
        if "amx_bf16" in flags:
            return "the CPU has AMX"
        if "avx512_bf16" in flags:
            return "the CPU has AVX512-BF16"
    return ""


def _computes_bf16() -> bool:
    """Whether this CPU has what oneDNN needs for bf16; one whose flags are not known is taken at its word.

    Without, LSTMs cannot be trained in it, and all else takes many times as long as in float32.
    """
    flags = _cpu_flags()
    return not flags or not flags.isdisjoint({"avx512bw", "avx512_bf16", "amx_bf16"})


def _cpu_flags() -> set[str]:
    return set(_cpu_information("flags").split())


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({cpu_name()}, {threads} thread{'s' if threads > 1 else ''})"
    return device.type
