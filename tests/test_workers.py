"""What part of the work each of several workers has, and where a process stands among them. No process is started."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed import HashStore

from dl7cli import cluster, metrics
from dl7cli.cluster import Nodes
from dl7cli.distributed import ALONE, Lost, Workers
from dl7cli.errors import UserError
from dl7cli.metrics import Scores
from dl7cli.models.normalisation import SharedBatchNorm, share_statistics
from dl7cli.tasks import classification

# Parts


@given(st.integers(0, 300), st.integers(1, 9))
def test_every_item_is_one_workers_and_all_have_about_as_many(items: int, count: int) -> None:
    workers = [Workers(rank, count) for rank in range(count)]
    parts = [list(range(items))[one.part(items)] for one in workers]
    assert [item for part in parts for item in part] == list(range(items))
    hands = [one.dealt(range(items)) for one in workers]
    assert sorted(item for hand in hands for item in hand) == list(range(items))
    for shares in (parts, hands):
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 5))
def test_what_is_dealt_in_order_is_equal_work(lengths: list[int], count: int) -> None:
    """However many there are, no two workers differ by more than two of the longest."""
    lengths.sort()
    sums = [sum(Workers(rank, count).dealt(lengths)) for rank in range(count)]
    assert max(sums) - min(sums) <= 2 * max(lengths, default=0)


def test_one_process_alone_has_everything_and_asks_nobody() -> None:
    tensor = torch.tensor([1.0, 2.0])
    assert ALONE.first
    assert ALONE.part(7) == slice(0, 7)
    assert ALONE.dealt([3, 1, 2]) == [3, 1, 2]
    assert ALONE.add(tensor) is tensor
    assert torch.equal(ALONE.stack(tensor), tensor[None])
    assert ALONE.greatest(3) == 3
    assert ALONE.gathered({"a": 1}) == [{"a": 1}]
    assert ALONE.shared([1, None]) == [1, None]
    assert ALONE.shared_tensors({"a": tensor})["a"] is tensor
    assert ALONE.recall("run") is None


def test_workers_wait_for_one_that_prepares_as_long_as_it_lives() -> None:
    store = HashStore()
    quick, slow = (Workers(rank, 2, store=store, timeout=0.5) for rank in range(2))
    done = []

    def prepare() -> None:
        with slow.preparing("data"):
            time.sleep(1.5)
            done.append(True)

    with ThreadPoolExecutor() as pool:
        prepared = pool.submit(prepare)
        with quick.preparing("data"):
            pass
        assert done
        prepared.result()
    silent = pytest.raises(Lost, match="has lost the others: worker 1 has not been heard of for 0 s")
    with silent, quick.preparing("more"):
        pass
    with pytest.raises(ZeroDivisionError), slow.preparing("most"):
        raise ZeroDivisionError
    with pytest.raises(Lost, match="has lost the others: worker 1 has failed"), quick.preparing("most"):
        pass


# Batches


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("data.random_erasing=0.5", "data.cutout=2", "data.flip=alternating"),
        ("training.mixup=1", "training.cutmix=1"),
    ],
    ids=["plain", "erased", "mixed"],
)
def test_the_workers_images_are_those_of_one_process(
    count: int, changes: tuple[str, ...], build: Callable[..., Any]
) -> None:
    task = build("resnet", *changes)
    alone = list(task.batches(1))
    task.images._workers = Workers(0, count)
    parts = []
    for rank in range(count):
        task.images._workers = Workers(rank, count)
        parts.append(list(task.batches(1)))
    for batch, *shares in zip(alone, *parts, strict=True):
        assert [share.whole for share in shares] == [len(batch.labels)] * count
        for name in ("images", "labels", "other_labels"):
            if getattr(batch, name) is not None:
                assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(batch, name))
        assert all(share.weight == batch.weight for share in shares)


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("changes", [(), ("data.subword_sampling=0.2",)], ids=["plain", "sampled"])
def test_the_workers_pairs_are_those_of_one_process_and_give_its_gradient(
    count: int, changes: tuple[str, ...], build: Callable[..., Any]
) -> None:
    """Some batches have fewer pairs than there are workers."""
    task = build("seq2seq", "model.dropout=0.0", *changes)
    task.model.train()
    alone = list(task.batches(1))
    assert min(len(batch.lengths) for batch in alone) < 7
    for number, batch in enumerate(alone):
        shares = []
        for rank in range(count):
            task.pairs._workers = Workers(rank, count)
            shares.append(next(task.batches(1, number)))
        rows = [row for share in shares if len(share.real) for row in _rows(share)]
        assert sorted(rows) == sorted(_rows(batch))
        assert [share.whole for share in shares] == [len(batch.real)] * count
        work = [len(share.real) for share in shares]
        assert max(work) - min(work) <= 2 * batch.target.shape[1]
        expected = _gradient(task, [batch])
        torch.testing.assert_close(_gradient(task, shares), expected, rtol=1e-4, atol=1e-6)


def _rows(batch: Any) -> list[tuple[list[int], list[int]]]:
    return [
        ([one for one in source if one], [one for one in target if one])
        for source, target in zip(batch.source.tolist(), batch.target.tolist(), strict=True)
    ]


def _gradient(task: Any, batches: list[Any]) -> list[Tensor]:
    """Of the sum of the losses, each through the number of subwords of the whole batch."""
    task.model.zero_grad()
    for batch in batches:
        total, whole = task.loss(batch)
        (total / whole).backward()
    return [parameter.grad.clone() for parameter in task.model.parameters()]


# Evaluation


@dataclass(frozen=True)
class Recording(Workers):
    """Keeps what it would have exchanged with the others, of which there are none."""

    said: list[Any] = field(default_factory=list)

    def add(self, tensor: Tensor) -> Tensor:
        self.said.append(tensor)
        return tensor

    def gathered(self, value: Any) -> list[Any]:
        self.said.append(value)
        return [value]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_image_is_evaluated_once_whatever_the_remainder(
    count: int, build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(classification.EVALUATION_BATCH, "cpu", 2)
    seen = []
    monkeypatch.setattr(
        metrics, "classification", lambda logits, labels, classes: seen.append(logits) or Scores("accuracy", {}, 7)
    )
    task = build("resnet")
    task.evaluate("test")
    said: list[Any] = []
    for rank in range(count):
        task.runtime = replace(task.runtime, workers=Recording(rank, count, said=said))
        task.evaluate("test")
    assert len(seen[0]) == 7
    assert torch.equal(sum(said), seen[0])


@pytest.mark.parametrize("count", [2, 4, 9])
def test_every_sentence_is_translated_once_in_the_order_of_the_data(count: int, build: Callable[..., Any]) -> None:
    task = build("seq2seq", "decoding.method=sample", "decoding.max_length_ratio=1.0")
    expected = task.translations("test")
    said: list[Any] = []
    for rank in range(count):
        task.runtime = replace(task.runtime, workers=Recording(rank, count, said=said))
        task.translations("test")
    assert [text for part in said for text in part] == expected


# Batch normalisation


@dataclass(frozen=True)
class Threaded(Workers):
    """Workers that are threads of this process."""

    board: list[Any] = field(default_factory=list)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def stack(self, tensor: Tensor) -> Tensor:
        self.board[self.rank] = tensor
        self.barrier.wait(30)
        stacked = torch.stack(self.board)
        self.barrier.wait(30)
        return stacked

    def add(self, tensor: Tensor) -> Tensor:
        return self.stack(tensor).sum(dim=0)


def threaded(count: int) -> Iterator[Threaded]:
    board, barrier = [None] * count, threading.Barrier(count)
    return (Threaded(rank, count, board=board, barrier=barrier) for rank in range(count))


@pytest.mark.parametrize("sizes", [[5, 3], [1, 0, 4], [2, 2, 2, 1]])
def test_shared_batch_norm_is_batch_norm_of_the_whole_batch(sizes: list[int]) -> None:
    """The outputs, the gradients of inputs and parameters, and the running statistics; of an empty part, too."""
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 3, 4, 5) * torch.tensor([1.0, 30.0, 0.1])[:, None, None] + 10
    weights = torch.randn_like(x)
    plain = nn.BatchNorm2d(3, momentum=0.3)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    layers = []
    for workers in threaded(len(sizes)):
        model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3))
        model.load_state_dict({f"0.{name}": value for name, value in plain.state_dict().items()})
        share_statistics(model, workers)
        assert isinstance(model[0], SharedBatchNorm)
        layers.append(model[0])
    inputs = [part.clone().requires_grad_() for part in x.split(sizes)]

    def run(rank: int) -> Tensor:
        y: Tensor = layers[rank](inputs[rank])
        (y * weights.split(sizes)[rank]).sum().backward()
        return y

    with ThreadPoolExecutor(len(sizes)) as pool:
        outputs = list(pool.map(run, range(len(sizes))))
    whole = x.double().requires_grad_()
    plain = plain.double()
    expected = plain(whole)
    (expected * weights).sum().backward()
    assert plain.weight.grad is not None
    assert plain.bias.grad is not None
    torch.testing.assert_close(torch.cat(outputs).double(), expected, rtol=1e-4, atol=1e-4)
    gradients = [one.grad for one in inputs if one.grad is not None]
    torch.testing.assert_close(torch.cat(gradients).double(), whole.grad, rtol=1e-3, atol=1e-3)
    for name in ("weight", "bias"):
        total = sum(getattr(layer, name).grad.double() for layer in layers)
        torch.testing.assert_close(total, getattr(plain, name).grad, rtol=1e-3, atol=1e-3)
    for layer in layers:
        for name, value in plain.named_buffers():
            torch.testing.assert_close(dict(layer.named_buffers())[name].double(), value.double(), rtol=1e-5, atol=1e-5)
    layers[0].eval(), plain.eval()
    torch.testing.assert_close(layers[0](x).double(), plain(x.double()), rtol=1e-4, atol=1e-4)


def test_more_workers_than_images_of_a_batch_are_refused(tiny: dict[str, Any], build: Callable[..., Any]) -> None:
    """The running statistics are those of the first, which would have none of them."""
    from dl7cli import tasks
    from dl7cli.recipe import resolve

    runtime = replace(build("resnet").runtime, workers=Workers(0, 9))
    with pytest.raises(UserError, match=r"`training\.batch_size` is 8, less than the 9 workers"):
        tasks.build(resolve(str(tiny["resnet"])).recipe, runtime=runtime)


def test_statistics_are_not_shared_where_workers_leave_out_different_blocks(
    tiny: dict[str, Any], build: Callable[..., Any]
) -> None:
    from dl7cli import tasks
    from dl7cli.recipe import resolve

    runtime = replace(build("resnet").runtime, workers=Workers(0, 2))
    changes = ["training.batch_norm=sync", "model.survival=0.5"]
    with pytest.raises(UserError, match="do not all come to the same blocks"):
        tasks.build(resolve(str(tiny["resnet"]), changes).recipe, runtime=runtime)


# Nodes


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu8", "gpu7"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("rack[2,4]-node[1-3]", "rack2-node1"),
        ("a-b.example.org,c[1-2]", "a-b.example.org"),
    ],
)
def test_the_first_host_of_a_slurm_list(hosts: str, first: str) -> None:
    assert cluster.first_host(hosts) == first


def test_a_slurm_step_on_several_nodes_is_read_from_its_environment() -> None:
    step = {
        "SLURM_STEP_NUM_NODES": "3",
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_NODEID": "2",
        "SLURM_STEP_NODELIST": "n[4-6]",
        "SLURM_JOB_ID": "1234567",
    }
    assert cluster.nodes(None, None, None, step) == Nodes(3, 2, "n4:24567", "dl7-1234567.0")
    beside = cluster.nodes(None, None, None, {**step, "SLURM_STEP_ID": "1"})
    assert (beside.rendezvous, beside.name) == ("n4:24668", "dl7-1234567.1"), "a step of the same job meets elsewhere"
    assert cluster.nodes(2, 1, "host:5", step) == Nodes(2, 1, "host:5")  # flags go before it
    with pytest.raises(UserError, match="SLURM starts 12 tasks on 3 nodes"):
        cluster.nodes(None, None, None, {**step, "SLURM_STEP_NUM_TASKS": "12"})
    with pytest.raises(UserError, match="SLURM starts 4 tasks on 1 node;"):
        cluster.refuse_other_tasks({"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "4"})
    cluster.refuse_other_tasks({"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"})
    cluster.refuse_other_tasks({})
    batch_script = {"SLURM_JOB_NUM_NODES": "3", "SLURM_NNODES": "3", "SLURM_NODEID": "0", "SLURM_JOB_ID": "1"}
    assert cluster.nodes(None, None, None, batch_script) == Nodes()
    assert cluster.nodes(None, None, None, {}) == Nodes()


@pytest.mark.parametrize(
    ("count", "rank", "rendezvous", "message"),
    [
        (None, 1, None, "are for several nodes"),
        (1, 0, "a:1", "`--nodes 1`: there must be 2 or more"),
        (1, None, None, "`--nodes 1`: there must be 2 or more"),
        (2, None, "a:1", "which node this is"),
        (2, 0, None, "which node this is"),
        (2, 2, "a:1", "there is no node 2 of 2"),
        (2, -1, "a:1", "there is no node -1 of 2"),
        (2, 0, "a", "has no port"),
    ],
)
def test_flags_of_nodes_that_do_not_go_together(
    count: int | None, rank: int | None, rendezvous: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        cluster.nodes(count, rank, rendezvous, {})


def test_the_place_of_a_worker_is_what_its_launcher_says() -> None:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    torchrun = {**address, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert cluster.place(torchrun) == cluster.Place(3, 4, 1, False, "2", None)
    assert cluster.place({**torchrun, "LOCAL_WORLD_SIZE": "4"}) == cluster.Place(3, 4, 1, True, "2", None)
    own = {
        **torchrun,
        **{"LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"},
        **{cluster.NODE_RANK: "0", cluster.ATTEMPT: "a", cluster.MEMORY: "/m"},
    }
    assert cluster.place(own) == cluster.Place(
        1, 4, 1, False, "a", Path("/m")
    )  # whatever number the rendezvous gave this node
    assert cluster.place({}) is None
    assert cluster.place(address) is None
    with pytest.raises(UserError, match="starts 2 of 5 workers"):
        cluster.place({**own, "WORLD_SIZE": "5"})
