"""Nodes and workers as flags, SLURM, `torchrun` or dl7 itself name them. Needs nothing that is slow to import."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dl7cli.errors import UserError

NODE_RANK = "DL7_NODE_RANK"
"""Set for workers by dl7: which node theirs is. An elastic rendezvous numbers nodes as it likes."""
ATTEMPT = "DL7_ATTEMPT"
"""Set for workers by dl7: a name of the attempt that all of them are part of."""
MEMORY = "DL7_MEMORY"
"""Set for workers by dl7: a folder of their node in which they leave what those in their place need to know."""
LOST = 75
"""Exit code of a worker that cannot go on where all may try again."""
LOSING = "has lost the others"
"""How it says so where that is another worker's doing."""
FULL = "is out of memory"
"""How it says so where the next attempt takes less of it."""

_PORTS = range(20_000, 30_000)


@dataclass(frozen=True)
class Nodes:
    """The nodes that train together."""

    count: int = 1
    rank: int = 0
    """Of this one, from 0; the first has the run folder."""
    rendezvous: str = "127.0.0.1:0"
    """HOST:PORT on the first node where they meet."""
    name: str = "dl7"
    """Of the training, among others whose nodes meet there."""


@dataclass(frozen=True)
class Place:
    """Which worker a process is that a launcher has started."""

    rank: int
    count: int
    local_rank: int
    """Among those of its node."""
    one_machine: bool
    """Whether all are of its node."""
    attempt: str
    memory: Path | None
    """As `MEMORY`."""


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Where a launcher has put this process; None where there is none. Raises UserError where nodes differ in size."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        return None
    rank, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    if NODE_RANK in environment:
        here, nodes = int(environment["LOCAL_WORLD_SIZE"]), int(environment["GROUP_WORLD_SIZE"])
        if count != here * nodes:
            raise UserError(
                f"this node starts {here} of {count} workers, which is not one {nodes}th of them",
                hint="start as many workers on each node",
            )
        rank = int(environment[NODE_RANK]) * here + local_rank
    attempt = environment.get(ATTEMPT, environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    memory = Path(environment[MEMORY]) if MEMORY in environment else None
    one_machine = environment.get("LOCAL_WORLD_SIZE") == str(count)
    return Place(rank, count, local_rank, one_machine, attempt, memory)


def nodes(
    count: int | None, rank: int | None, rendezvous: str | None, environment: Mapping[str, str] = os.environ
) -> Nodes:
    """The nodes that the flags name, or else the step of a SLURM job that this process is the only task of on its node.

    Raises UserError for flags that do not go together and for a step of several tasks on a node.
    """
    if count is None and rank is None and rendezvous is None:
        return _slurm(environment)
    if count is None:
        raise UserError("`--node-rank` and `--rendezvous` are for several nodes", hint="add `--nodes N`")
    if count < 2:
        raise UserError(f"`--nodes {count}`: there must be 2 or more", hint="leave it out on one machine")
    if rank is None or rendezvous is None:
        raise UserError(
            f"`--nodes {count}` needs to know which node this is and where they meet",
            hint="add `--node-rank R`, from 0, and `--rendezvous HOST:PORT` of the first node",
        )
    if not 0 <= rank < count:
        raise UserError(f"there is no node {rank} of {count}", hint=f"`--node-rank` is from 0 to {count - 1}")
    if not re.fullmatch(r".+:\d{1,5}", rendezvous):
        raise UserError(f"`--rendezvous {rendezvous}` has no port", hint="give HOST:PORT, such as `node1:29400`")
    return Nodes(count, rank, rendezvous)


def _slurm(environment: Mapping[str, str]) -> Nodes:
    # What is set for a step, by srun: a batch script is on one node, and yet sees the nodes of its job.
    count = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    if count == 1:
        return Nodes()
    refuse_other_tasks(environment)
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    # Steps of one job may run side by side.
    port = _PORTS[(job + 101 * step) % len(_PORTS)]
    where = f"{first_host(environment['SLURM_STEP_NODELIST'])}:{port}"
    return Nodes(count, int(environment["SLURM_NODEID"]), where, f"dl7-{job}.{step}")


def refuse_other_tasks(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError where SLURM starts several processes on a node, each of which would start all its workers."""
    count = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", str(count)))
    if tasks != count:
        on = "1 node" if count == 1 else f"{count} nodes"
        raise UserError(
            f"SLURM starts {tasks} tasks on {on}; dl7 starts the workers of a node itself",
            hint="use `srun --ntasks-per-node=1 dl7 train … --gpus all`",
        )


def first_host(hosts: str) -> str:
    """The first of SLURM's list of hosts: `gpu07` of `gpu[07-09,12],login1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    assert first is not None
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
