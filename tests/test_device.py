"""Devices and precisions: what is chosen, why, and what is said of those that are not to be had."""

import json
import os
import platform
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ENVIRONMENT

from dl7cli import device
from dl7cli.device import (
    Runtime,
    choose,
    evaluation_mode,
    for_workers,
    of_worker,
    out_of_memory,
    random_state,
    restore_random_state,
)
from dl7cli.errors import UserError


class Machine:
    """What torch and the kernel say of a machine; a test changes what it needs changed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.has(flags=set(), gpus=[])

    def has(
        self, *, flags: set[str] | None = None, gpus: list[tuple[int, int]] | None = None, mps: bool = False
    ) -> None:
        """CPU flags; the compute capability of each GPU; Apple's GPU."""
        if flags is not None:
            self.patch.setattr(device, "_cpu_flags", lambda: flags)
        if gpus is not None:
            self.patch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
            self.patch.setattr(torch.cuda, "device_count", lambda: len(gpus))
            names = {index: f"GPU {index}" for index in range(len(gpus))}
            names |= {torch.device("cuda", index): name for index, name in names.items()}
            self.patch.setattr(torch.cuda, "get_device_name", names.__getitem__)
            self.patch.setattr(torch.cuda, "get_device_capability", lambda which: gpus[torch.device(which).index])
        self.patch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def chosen(runtime: Runtime) -> tuple[str, str]:
    return str(runtime.device), runtime.precision


def test_auto_is_the_cpu_where_there_is_no_gpu(machine: Machine) -> None:
    runtime = choose()
    assert chosen(runtime) == ("cpu", "fp32")
    assert runtime.reason == "the CPU, as no CUDA GPU was seen; fp32 because this hardware has no fast bf16"
    assert runtime.device_name.startswith("cpu (")
    threads = torch.get_num_threads()
    assert runtime.device_name.endswith(f" {threads} thread)" if threads == 1 else f" {threads} threads)")


def test_auto_is_the_first_gpu(machine: Machine) -> None:
    machine.has(gpus=[(8, 0), (9, 0)])
    runtime = choose()
    assert chosen(runtime) == ("cuda:0", "bf16")
    assert runtime.reason == "the first CUDA GPU; bf16 because the GPU has compute capability 8.0"
    assert runtime.device_name == "cuda:0 (GPU 0)"


@pytest.mark.parametrize(
    ("flags", "precision", "reason"),
    [
        ({"avx512f", "avx512_bf16"}, "bf16", "the CPU has AVX512-BF16"),
        ({"avx512f", "amx_bf16", "avx512_bf16"}, "bf16", "the CPU has AMX"),
        ({"avx2", "avx512f"}, "fp32", "this hardware has no fast bf16"),
        (set(), "fp32", "this hardware has no fast bf16"),
    ],
)
def test_auto_precision_on_a_cpu(machine: Machine, flags: set[str], precision: str, reason: str) -> None:
    machine.has(flags=flags)
    runtime = choose("cpu")
    assert chosen(runtime) == ("cpu", precision)
    assert runtime.reason == f"cpu as asked; {precision} because {reason}"


@pytest.mark.parametrize(
    ("capability", "precision"), [((6, 1), "fp32"), ((7, 5), "fp32"), ((8, 0), "bf16"), ((12, 0), "bf16")]
)
def test_auto_precision_on_a_gpu(machine: Machine, capability: tuple[int, int], precision: str) -> None:
    machine.has(flags={"amx_bf16"}, gpus=[(8, 0), capability])
    assert chosen(choose("cuda:1")) == ("cuda:1", precision)


def test_auto_precision_on_mps(machine: Machine) -> None:
    machine.has(flags={"amx_bf16"}, mps=True)
    assert chosen(choose("mps")) == ("mps", "fp32")


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_a_precision_asked_for_is_used(machine: Machine, name: str) -> None:
    machine.has(gpus=[(7, 0)])
    runtime = choose("cuda", name)
    assert chosen(runtime) == ("cuda:0", name)
    assert runtime.reason == f"cuda as asked; {name} as asked"


@pytest.mark.parametrize(
    ("precision", "searches", "expected"), [("auto", True, "fp32"), ("bf16", True, "bf16"), ("bf16", False, "fp32")]
)
def test_search_is_in_float32_but_where_it_is_asked_for(
    machine: Machine, precision: str, searches: bool, expected: str
) -> None:
    machine.has(flags={"amx_bf16"})
    runtime = choose("cpu", precision, searches=searches)
    assert (runtime.precision, runtime.search_precision) == ("bf16", expected)


@pytest.mark.parametrize(
    ("arguments", "gpus", "device_chosen"),
    [
        (("auto", "auto", "1"), [(8, 0), (8, 0)], "cuda:1"),
        (("cuda", "auto", "0"), [(8, 0), (8, 0)], "cuda:0"),
        (("auto", "auto", "all"), [(8, 0)], "cuda:0"),
        (("cuda:1", "auto"), [(8, 0), (8, 0)], "cuda:1"),
    ],
)
def test_a_gpu_asked_for_is_used(
    machine: Machine, arguments: tuple[str, ...], gpus: list[tuple[int, int]], device_chosen: str
) -> None:
    machine.has(gpus=gpus)
    assert chosen(choose(*arguments)) == (device_chosen, "bf16")


NONE = "no CUDA GPU"
TWO = "cuda:0 (GPU 0), cuda:1 (GPU 1)"


@pytest.mark.parametrize(
    ("arguments", "gpus", "message", "hint"),
    [
        (("gpu",), 0, "there is no device `gpu`", "choose one of auto, cpu, cuda, cuda:N, mps"),
        (("",), 0, "there is no device ``", "choose one of auto, cpu, cuda, cuda:N, mps"),
        (("cpu:0",), 0, "there is no device `cpu:0`", "choose one of auto, cpu, cuda, cuda:N, mps"),
        (("cuda:",), 1, "there is no device `cuda:`", "choose one of auto, cpu, cuda, cuda:N, mps"),
        (("cuda:-1",), 1, "there is no device `cuda:-1`", "choose one of auto, cpu, cuda, cuda:N, mps"),
        (("cuda:²",), 1, "there is no device `cuda:²`", "choose one of auto, cpu, cuda, cuda:N, mps"),
        (("cuda",), 0, f"there is no device `cuda`; seen here: {NONE}", "use `--device cpu`"),
        (("cuda:2",), 2, f"there is no device `cuda:2`; seen here: {TWO}", "use `--device cpu`"),
        (("cuda:99999999999999999999",), 0, "there is no device `cuda:99999999999999999999`", "use `--device cpu`"),
        (("mps",), 0, "there is no device `mps` on this machine", "use `--device cpu`"),
        (("cpu", "fp8"), 0, "there is no precision `fp8`", "choose one of auto, fp32, bf16, fp16"),
        (("cpu", "fp16"), 0, "this CPU cannot compute in fp16", "use `--precision fp32` or `--precision bf16`"),
        (("auto", "fp16"), 0, "this CPU cannot compute in fp16", "use `--precision fp32` or `--precision bf16`"),
        (("auto", "auto", "0"), 0, f"there is no device `cuda:0`; seen here: {NONE}", "use `--device cpu`"),
        (("auto", "auto", "2"), 2, f"there is no device `cuda:2`; seen here: {TWO}", "use `--device cpu`"),
        (("auto", "auto", "all"), 0, f"`--gpus all`: these are not all to be had; seen here: {NONE}", "give numbers"),
        (("auto", "auto", "0,2"), 2, f"`--gpus 0,2`: these are not all to be had; seen here: {TWO}", "give numbers"),
        (("auto", "auto", ""), 2, "`--gpus `: these are not all to be had", "give numbers"),
        (("auto", "auto", "²"), 2, "`--gpus ²`: these are not all to be had", "give numbers"),
        (("auto", "auto", "0,00"), 2, "`--gpus 0,00` names a GPU twice", "each has one worker"),
        (("auto", "auto", "all"), 2, "`--gpus all`: only training runs on several GPUs", "give one number"),
        (("auto", "auto", "0,1"), 2, "`--gpus 0,1`: only training runs on several GPUs", "give one number"),
        (("cpu", "auto", "0"), 2, "`--gpus 0` and `--device cpu` contradict each other", "give one of them"),
        (("cuda:0", "auto", "0"), 2, "`--gpus 0` and `--device cuda:0` contradict each other", "give one of them"),
    ],
)
def test_what_is_not_to_be_had_is_refused(
    machine: Machine, arguments: tuple[str, ...], gpus: int, message: str, hint: str
) -> None:
    machine.has(gpus=[(8, 0)] * gpus)
    with pytest.raises(UserError) as refused:
        choose(*arguments)
    assert refused.value.message.startswith(message)
    assert refused.value.hint is not None
    assert refused.value.hint.startswith(hint)


def test_bf16_is_refused_where_a_cpu_would_imitate_it(machine: Machine) -> None:
    machine.has(flags={"avx", "avx2", "fma"})
    for precision in ("bf16", "fp16"):
        with pytest.raises(UserError, match=f"this CPU cannot compute in {precision}") as refused:
            choose("cpu", precision)
        assert refused.value.hint == "use `--precision fp32`"
    for flags in ({"avx2", "avx512bw"}, {"avx2", "amx_bf16"}, set()):
        machine.has(flags=flags)
        assert chosen(choose("cpu", "bf16")) == ("cpu", "bf16")


def test_what_onednn_does_not_know_is_no_lack_of_memory() -> None:
    assert out_of_memory(RuntimeError("could not create a primitive"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"))
    assert not out_of_memory(RuntimeError("could not create a primitive descriptor for the LSTM forward propagation"))


@pytest.mark.parametrize(
    ("arguments", "gpus", "devices"),
    [
        (("auto", None), 2, ["auto"]),
        (("auto", "all"), 2, ["cuda:0", "cuda:1"]),
        (("cuda", "1, 0"), 2, ["cuda:1", "cuda:0"]),
        (("auto", "1"), 2, ["cuda:1"]),
        (("cpu", None, 3), 2, ["cpu"] * 3),
        (("auto", None, 2), 0, ["cpu"] * 2),
    ],
)
def test_each_worker_has_a_device(machine: Machine, arguments: Any, gpus: int, devices: list[str]) -> None:
    machine.has(gpus=[(8, 0)] * gpus)
    assert for_workers(*arguments) == devices
    assert of_worker(devices, len(devices) - 1) == (devices[-1] if devices != ["auto"] else "cuda:0")


@pytest.mark.parametrize("arguments", [("cuda", None, 2), ("auto", "0,1", 2), ("auto", None, 2)])
def test_workers_without_a_gpu_of_their_own_are_refused(machine: Machine, arguments: Any) -> None:
    machine.has(gpus=[(8, 0)] * 2)
    with pytest.raises(UserError, match="`--workers` says how many share the CPU"):
        for_workers(*arguments)


def test_workers_of_another_launcher_take_the_gpus_in_turn(machine: Machine) -> None:
    machine.has(gpus=[(8, 0)] * 2)
    assert of_worker(["auto"], 1) == "cuda:1"
    assert of_worker(["cpu"], 1) == "cpu"
    assert of_worker(["cuda:0", "cuda:1"], 1) == "cuda:1"
    with pytest.raises(UserError, match="there is no device for worker 2"):
        of_worker(["cuda:0", "cuda:1"], 2)


def test_this_machine_is_reported_in_plain_json() -> None:
    told = device.report()
    assert json.loads(json.dumps(told)) == told
    assert told["torch"] == torch.__version__
    assert (told["cpu"]["cores"], told["cpu"]["threads"]) == (os.cpu_count(), torch.get_num_threads())
    assert len(told["gpus"]) == torch.cuda.device_count()
    runtime = choose()
    assert told["chosen"] == {
        "device": runtime.device_name,
        "precision": runtime.precision,
        "reason": runtime.reason,
    }


def test_products_are_made_in_the_precision_and_stored_in_float32() -> None:
    cpu = torch.device("cpu")
    layer = torch.nn.Linear(4, 4)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with Runtime(cpu, precision, "", "").autocast():
            assert layer(torch.ones(1, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_random_streams_go_on_where_they_were() -> None:
    torch.manual_seed(7)
    torch.rand(3)
    state = random_state(torch.device("cpu"))
    expected = torch.rand(5)
    torch.manual_seed(8)
    restore_random_state(state, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)


def test_an_apple_gpu_has_a_random_stream_too(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []
    own = torch.tensor([1, 2, 3], dtype=torch.uint8)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: own)
    monkeypatch.setattr(torch.mps, "set_rng_state", given.append)
    state = random_state(torch.device("mps"))
    restore_random_state(state, torch.device("cpu"))
    assert not given
    restore_random_state(state, torch.device("mps"))
    assert given == [own]
    restore_random_state({"random.cpu": state["random.cpu"]}, torch.device("mps"))
    assert len(given) == 1


@pytest.fixture
def tf32() -> Iterator[tuple[Any, ...]]:
    """What has a switch for it; each is put back as it was. Their modules have no attribute to be patched."""
    parts: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [part.allow_tf32 for part in parts]
    yield parts
    for part, allowed in zip(parts, before, strict=True):
        part.allow_tf32 = allowed


@pytest.mark.filterwarnings("ignore:Please use the new API")
@pytest.mark.parametrize("before", [True, False])
def test_search_in_float32_has_all_its_digits_on_a_gpu(before: bool, tf32: tuple[Any, ...]) -> None:
    for part in tf32:
        part.allow_tf32 = before
    for where, expected in (("cuda", False), ("cpu", before)):
        with Runtime(torch.device(where), "bf16", "", "").autocast_search():
            assert [part.allow_tf32 for part in tf32] == [expected] * 2
            assert not torch.is_autocast_enabled(where)
        assert [part.allow_tf32 for part in tf32] == [before] * 2


def test_evaluation_is_a_mode_that_passes() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4))
    mean = model[1].running_mean.clone()
    for before in (True, False):
        model.train(before)
        with evaluation_mode(model):
            assert not model.training
            assert not model(torch.ones(3, 4)).requires_grad
        assert model.training is before
        with suppress(ZeroDivisionError), evaluation_mode(model):
            raise ZeroDivisionError
        assert model.training is before
    assert torch.equal(model[1].running_mean, mean)


@pytest.mark.parametrize(("own", "kept"), [(None, "2048"), ("7", "7")])
def test_prepared_kernels_are_bounded_unless_the_user_says_otherwise(own: str | None, kept: str) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    environment = {key: value for key, value in os.environ.items() if key != name}
    if own is not None:
        environment[name] = own
    code = f"import os, dl7cli.device; print(os.environ['{name}'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == kept + "\n"


def test_the_peak_of_memory_is_in_bytes() -> None:
    before = device.peak_memory_bytes(torch.device("cpu"))
    assert before > 50e6, "importing torch takes as much"
    block = torch.zeros(64_000_000, dtype=torch.uint8) + 1
    assert before < 64e9
    assert device.peak_memory_bytes(torch.device("cpu")) >= max(before, len(block))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is kept")
@pytest.mark.parametrize("own", [{}, {"MALLOC_MMAP_THRESHOLD_": "131072"}])
def test_freed_memory_is_kept_for_the_next_step_unless_the_user_says_otherwise(own: dict[str, str]) -> None:
    code = """
        import resource, torch
        from dl7cli import device

        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        device.choose("cpu")
        for number in range(30):
            if number == 10:  # by then each has its place
                before = faults()
            tensors = [torch.ones(10_000_000) for _ in range(3)]
            del tensors
        print(faults() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env={**ENVIRONMENT, **own},
    )
    # Of 20 steps, each of 29,297 pages of 4 KiB or 60 of 2 MiB.
    assert (int(done.stdout) > 1000) == bool(own)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is trimmed")
def test_freed_memory_in_pieces_goes_back_to_the_system() -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    device.trim_heap()
    pieces = [bytes(50_000) for _ in range(2_000)]  # too small for maps of their own
    kept = pieces[::20]
    full = resident()
    del pieces
    device.trim_heap()
    assert resident() < full - 80_000_000
    assert len(kept) == 100


# Threads


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_on_a_cpu_as_many_items_are_worked_on_as_there_are_threads(two_threads: None) -> None:
    """Two meet in the middle of their work, and each computes by itself."""
    meeting = threading.Barrier(2, timeout=60)

    def work(item: int, check: Callable[[], None]) -> tuple[int, int]:
        check()
        meeting.wait()
        return 10 * item, torch.get_num_threads()

    found = dict(device.each_alone(work, [1, 2, 3, 4], torch.device("cpu")))
    assert found == {item: (10 * item, 1) for item in (1, 2, 3, 4)}
    assert torch.get_num_threads() == 2
    for items, kind in (([5], "cpu"), ([5, 6], "cuda"), ([], "cpu")):
        found = device.each_alone(lambda item, check: str(item), items, torch.device(kind))
        assert list(found) == [(item, str(item)) for item in items]


def test_what_goes_wrong_in_one_thread_ends_it_all(two_threads: None) -> None:
    """Also what another thread would go on with for long."""

    def work(item: int, check: Callable[[], None]) -> None:
        if item == 1:
            raise UserError("no more")
        for _ in range(10_000):
            check()
            time.sleep(0.01)

    begin = time.monotonic()
    with pytest.raises(UserError, match="no more"):
        list(device.each_alone(work, range(100), torch.device("cpu")))
    assert time.monotonic() - begin < 50
    assert torch.get_num_threads() == 2
