"""Several nodes, as processes on this machine or in networks of their own: together, lost, and with other data."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from launching import ALONE, LONGER, ended, greatest_difference, last, started, wait_for_step


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def node(rank: int, port: int, *, timeout: int) -> tuple[str, ...]:
    rendezvous = ("--rendezvous", f"127.0.0.1:{port}", "--timeout", str(timeout))
    return (*ALONE, "--nodes", "2", "--node-rank", str(rank), *rendezvous)


@pytest.mark.slow
def test_two_nodes_train_together_and_one_that_is_lost_may_come_back(
    undisturbed: Path, tiny: dict[str, Path], tmp_path: Path
) -> None:
    """The second has no recipe, no run folder, and is killed with all its processes in the middle."""
    port, second = free_port(), tmp_path / "second"
    second.mkdir()
    arguments = ("train", str(tiny["seq2seq"]), *LONGER, "--json", "--out", "run")
    with started(*arguments, *node(0, port, timeout=60), cwd=tmp_path) as one:
        with started("train", "of-the-first", *node(1, port, timeout=60), cwd=second) as two:
            wait_for_step(tmp_path / "run", 10, one)
            assert two.poll() is None
        with started("train", "of-the-first", *node(1, port, timeout=60), cwd=second) as two:
            other = ended(two)
        result = ended(one)
    assert (result.code, other.code) == (0, 0), result.err + other.err
    assert "worker 0 has lost the others" in result.err
    assert other.out == ""
    assert not list(second.iterdir())
    assert greatest_difference(last(tmp_path / "run").weights, last(undisturbed).weights) == 0


@pytest.mark.slow
def test_a_node_that_is_lost_for_good_ends_the_training_within_the_time_out(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    port = free_port()
    arguments = ("train", str(tiny["seq2seq"]), "--set", "training.epochs=50", "--out", "run")
    with started(*arguments, *node(0, port, timeout=10), cwd=tmp_path) as one:
        with started(*arguments, *node(1, port, timeout=10), cwd=tmp_path):
            wait_for_step(tmp_path / "run", 10, one)
        begin = time.monotonic()
        result = ended(one)
    assert time.monotonic() - begin < 60  # ten seconds twice, and a busy machine
    assert result.code == 1
    lost, gone = result.err.index("worker 0 has lost the others"), result.err.index("error: the 2 nodes do not meet")
    assert lost < gone
    assert last(tmp_path / "run").progress.step >= 10


@pytest.mark.slow
def test_the_nodes_of_a_slurm_step_train_together(undisturbed: Path, tiny: dict[str, Path], tmp_path: Path) -> None:
    """By what srun tells its tasks alone: two on this machine."""
    job = str(free_port() % 10_000)  # of which the port is made: about as free
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1"}
    arguments = ("train", str(tiny["seq2seq"]), *LONGER, *ALONE, "--out", "run")
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                started(*arguments, cwd=tmp_path, **step, SLURM_JOB_ID=job, SLURM_STEP_ID="0", SLURM_NODEID=str(rank))
            )
            for rank in range(2)
        ]
        results = [ended(process) for process in processes]
    assert [result.code for result in results] == [0, 0], results[0].err + results[1].err
    assert greatest_difference(last(tmp_path / "run").weights, last(undisturbed).weights) == 0


@pytest.mark.slow
def test_the_error_of_another_node_is_told_there_before_anything_else(tiny: dict[str, Path], tmp_path: Path) -> None:
    port = free_port()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.toml").write_text(
            tiny["seq2seq"].read_text().replace(str(tiny["seq2seq"].parent / "pairs"), "./pairs")
        )
    shutil.copytree(tiny["seq2seq"].parent / "pairs", tmp_path / "first" / "pairs")  # which the second lacks
    with (
        started("train", "recipe.toml", *node(0, port, timeout=30), cwd=tmp_path / "first") as one,
        started("train", "recipe.toml", *node(1, port, timeout=30), cwd=tmp_path / "second") as two,
    ):
        begin = time.monotonic()
        results = [ended(one), ended(two)]
    assert time.monotonic() - begin < 30, "at once, not when the time is out"
    assert [result.code for result in results] == [1, 1]
    assert results[1].err.startswith("error: ")
    assert "./pairs" in results[1].err.splitlines()[0]
    assert "so ended worker 1" in results[1].err
    assert "error: " in results[0].err


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_nodes_with_other_data_are_refused_by_the_reason(split: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    """The path is the same on both, what lies there is not."""
    port = free_port()
    for number, name in enumerate(("first", "second")):
        shutil.copytree(tiny["seq2seq"].parent / "pairs", tmp_path / name / "pairs")
        (tmp_path / name / "recipe.toml").write_text(
            tiny["seq2seq"].read_text().replace(str(tiny["seq2seq"].parent / "pairs"), "./pairs")
        )
        with (tmp_path / name / "pairs" / f"{split}.en").open("a") as file:
            file.write("1 2\n" * number)
        with (tmp_path / name / "pairs" / f"{split}.de").open("a") as file:
            file.write("2 1\n" * number)
    with (
        started("train", "recipe.toml", *node(0, port, timeout=30), cwd=tmp_path / "first") as one,
        started("train", "recipe.toml", *node(1, port, timeout=30), cwd=tmp_path / "second") as two,
    ):
        results = [ended(one), ended(two)]
    assert [result.code for result in results] == [1, 1]
    for result in results:
        assert "is not the same on workers 0 and 1" in result.err
    assert not list((tmp_path / "first").glob("runs/*/last"))


@contextmanager
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a wire between them: the first has the address 10.99.0.1."""
    names = [f"dl7-{os.getpid()}-{number}" for number in range(2)]
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("needs `ip` and the right to make network namespaces")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.99.0.{number}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.mark.slow
def test_nodes_between_which_the_wire_is_cut_both_end_within_the_time_out(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    """Nothing closes their connections: neither hears anything any more."""
    arguments = ("train", str(tiny["seq2seq"]), "--set", "training.epochs=200", *ALONE, "--out", "run")
    meeting = ("--nodes", "2", "--rendezvous", "10.99.0.1:29400", "--timeout", "15")
    with hosts() as names, ExitStack() as stack:
        one, two = (
            stack.enter_context(
                started(
                    *arguments, *meeting, "--node-rank", str(rank), cwd=tmp_path, inside=("ip", "netns", "exec", name)
                )
            )
            for rank, name in enumerate(names)
        )
        wait_for_step(tmp_path / "run", 5, one)
        ip("-n", names[1], "link", "set", "wire", "down")
        begin = time.monotonic()
        results = [ended(one), ended(two)]
    assert time.monotonic() - begin < 2 * 15 + 60 + 30  # the last for a busy machine
    assert [result.code for result in results] == [1, 1]
    for rank, result in enumerate(results):
        assert result.err.index(f"worker {rank} has lost the others: Timed out") < result.err.index("error: the ")
