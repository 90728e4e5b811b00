"""How the gradients of workers on one machine meet in memory that they share."""

import json
import os
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ENVIRONMENT

from dl7cli.training import exchange

WORKERS = 3
ROW = 700
"""Numbers that the workers share at a time: a tensor of 1,001 takes two turns."""

WORKER = """
    import json, sys, time
    from types import SimpleNamespace

    import torch
    from torch import distributed, nn
    from dl7cli.distributed import Workers
    from dl7cli.training import exchange

    rank, count, row, store, what = *map(int, sys.argv[1:4]), *sys.argv[4:6]
    distributed.init_process_group("gloo", init_method=f"file://{store}", world_size=count, rank=rank)
    workers = Workers(rank, count, one_machine=True)

    def means():
        memory = exchange.shared_memory(workers, row)
        if memory is None:
            return None
        mean = exchange.SharedMean(workers, memory)
        random = torch.Generator().manual_seed(rank)
        met = []
        for turn in range(6):  # each time another one is late
            time.sleep(0.1 * (rank == turn % count))
            met.append(mean(torch.randn(1_001, generator=random)).tolist())
        few = mean(torch.tensor([float(rank)]))  # fewer numbers than workers
        return [*met, few.tolist()]

    def gradients():
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.used, self.large = nn.Linear(9, 1), nn.Linear(9, 40_000)
                self.unused, self.frozen = nn.Linear(9, 2), nn.Linear(9, 3).requires_grad_(False)

        model = Model()
        for parameter in model.parameters():  # all begin with the first one's
            parameter.data += rank * parameter.requires_grad
        taken = []
        own = exchange.SharedMean.__call__
        exchange.SharedMean.__call__ = lambda self, tensor: taken.append(len(tensor)) or own(self, tensor)

        def loss(batch):
            x = model.used(batch) + model.large(batch).square().mean() if rank else model.used(batch)
            return x.sum(), len(batch)

        runtime = SimpleNamespace(workers=workers, device=torch.device("cpu"))
        met = exchange.meeting(SimpleNamespace(model=model, loss=loss, runtime=runtime))
        random = torch.Generator().manual_seed(rank)
        for _ in range(2):  # as for a batch in two parts
            met(torch.randn(4, 9, generator=random))[0].backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        return {
            "taken": taken,
            "begin": float(model.used.bias.detach()),
            "used": gradients["used.weight"].tolist(),
            "large": gradients["large.weight"].flatten().tolist(),
            "others": [gradients[name] is None for name in ("unused.weight", "frozen.weight")],
        }

    if what == "blind":
        if rank == 1:
            exchange._opened = lambda *arguments: None
        what = "means"
    answer = {"means": means, "gradients": gradients}[what]()
    distributed.destroy_process_group()
    print(json.dumps(answer))
"""


def among_workers(folder: Path, what: str) -> list[Any]:
    """What each of several processes has got."""
    script = folder / "worker.py"
    script.write_text(textwrap.dedent(WORKER), encoding="utf-8")
    command = [sys.executable, str(script)]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, str(rank), str(WORKERS), str(ROW), str(folder / "store"), what],
                    env=ENVIRONMENT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in range(WORKERS)
        ]
        for worker in workers:  # before the with statement waits for them
            stack.callback(worker.kill)
        told = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORKERS, told
    return [json.loads(out) for out, _ in told]


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is Linux's")


@needs_linux
def test_all_workers_get_the_mean_of_each_ones_numbers(tmp_path: Path) -> None:
    """Time after time, so that one who is early would meet numbers of the time before. The slow way is exact."""
    met = among_workers(tmp_path, "means")
    streams = [torch.Generator().manual_seed(rank) for rank in range(WORKERS)]
    for turn in range(6):
        rows = torch.stack([torch.randn(1_001, generator=stream) for stream in streams]).double()
        for one in met:
            torch.testing.assert_close(torch.tensor(one[turn]).double(), rows.mean(dim=0), rtol=1e-6, atol=1e-7)
    assert met[0][-1] == [1.0]
    assert met[0] == met[1] == met[2], "the same bits on all"


@needs_linux
def test_gradients_meet_there_once_in_a_backward_pass(tmp_path: Path) -> None:
    """Of parameters that all use, that some use, that none uses and that are not trained; two passes add up."""
    met = among_workers(tmp_path, "gradients")
    trained = 10 + 10 * 40_000 + 20
    batches = [torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(rank)) for rank in range(WORKERS)]
    # Drawn in two parts, as there.
    for rank, batch in enumerate(batches):
        stream = torch.Generator().manual_seed(rank)
        batch.copy_(torch.stack([torch.randn(4, 9, generator=stream) for _ in range(2)]))
    torch.manual_seed(0)
    used, large = torch.nn.Linear(9, 1), torch.nn.Linear(9, 40_000)
    losses = [used(batch).sum() for batch in batches]
    # There the mean is added to each of four answers.
    losses += [4 * large(part).square().mean() for batch in batches[1:] for part in batch]
    (torch.stack(losses).sum() / WORKERS).backward()  # type: ignore[no-untyped-call]
    for one in met:
        assert one["taken"] == [trained, trained]
        assert one["begin"] == used.bias.item()
        torch.testing.assert_close(torch.tensor(one["used"]), used.weight.grad)
        torch.testing.assert_close(torch.tensor(one["large"]), large.weight.grad.flatten(), rtol=1e-5, atol=1e-9)
        assert one["others"] == [True, True]
    assert met[0]["large"] == met[1]["large"] == met[2]["large"]


@needs_linux
def test_where_one_worker_cannot_see_the_memory_none_uses_it(tmp_path: Path) -> None:
    assert among_workers(tmp_path, "blind") == [None] * WORKERS


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
