"""How the gradients of workers on one machine meet in memory that they share."""

import json
import os
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from dl7cli.training import exchange

WORKERS = 3
NUMBERS = 1_001

WORKER = """
    import json, sys, torch
    from torch import distributed
    from dl7cli.distributed import Workers
    from dl7cli.training import exchange

    rank, count, numbers, store, blind = *map(int, sys.argv[1:4]), sys.argv[4], sys.argv[5]
    distributed.init_process_group("gloo", init_method=f"file://{store}", world_size=count, rank=rank)
    workers = Workers(rank, count, one_machine=True)
    if blind == str(rank):
        exchange._opened = lambda *arguments: None
    memory = exchange.shared_memory(workers, numbers)
    met = []
    if memory is not None:
        mean = exchange.SharedMean(workers, memory)
        random = torch.Generator().manual_seed(rank)
        for _ in range(20):
            met.append(mean(torch.randn(numbers, generator=random)).tolist())
    distributed.destroy_process_group()
    print(json.dumps(met))
"""


def among_workers(folder: Path, blind: str = "") -> list[list[list[float]]]:
    """What each of several processes has got, mean after mean."""
    script = folder / "worker.py"
    script.write_text(textwrap.dedent(WORKER), encoding="utf-8")
    command = [sys.executable, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(WORKERS), str(NUMBERS), str(folder / "store"), blind],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORKERS)
    ]
    told = [worker.communicate(timeout=60) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORKERS, told
    return [json.loads(out) for out, _ in told]


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is Linux's")


@needs_linux
def test_all_workers_get_the_mean_of_each_ones_numbers(tmp_path: Path) -> None:
    """Twenty times in turn, so that one who is early would meet numbers of the time before. The slow way is exact."""
    met = among_workers(tmp_path)
    streams = [torch.Generator().manual_seed(rank) for rank in range(WORKERS)]
    for turn in range(20):
        rows = torch.stack([torch.randn(NUMBERS, generator=stream) for stream in streams])
        for one in met:
            torch.testing.assert_close(
                torch.tensor(one[turn]).double(), rows.double().mean(dim=0), rtol=1e-6, atol=1e-7
            )
    assert met[0] == met[1] == met[2], "the same bits on all"


@needs_linux
def test_where_one_worker_cannot_see_the_memory_none_uses_it(tmp_path: Path) -> None:
    assert among_workers(tmp_path, blind="1") == [[]] * WORKERS


@needs_linux
def test_memory_of_another_process_is_not_taken_for_it(tmp_path: Path) -> None:
    with ExitStack() as held:
        where = exchange._created(4_000, "token", held)
        assert where is not None
        seen = exchange._opened(where, 4_000, "token")
        assert seen is not None
        seen[:4] = b"here"
        again = exchange._opened(where, 4_000, "token")
        assert again is not None
        assert again[:4] == b"here"
        assert exchange._opened(where, 4_000, "other") is None
        assert exchange._opened(where, 8_000, "token") is None, "it is not as long"
    assert exchange._opened(where, 4_000, "token") is None, "what was held is given back"


def test_a_system_without_such_memory_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    with ExitStack() as held:
        assert exchange._created(4_000, "token", held) is None
