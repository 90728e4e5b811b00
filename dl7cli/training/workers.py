"""Starting one worker for each device through torch's elastic engine, and what is done when one fails.

Each worker is this command once more, as under `torchrun`; its place is in its environment. The first inherits standard
output and error, what the others print is shown only where one of them fails by itself.
"""

import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import DistError, Store  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

import dl7cli
from dl7cli.cluster import ATTEMPT, FULL, LOSING, LOST, MEMORY, NODE_RANK, Nodes
from dl7cli.errors import UserError
from dl7cli.training.signals import stop_signals

RESTARTS = 3
"""How often all workers start again from the last checkpoint after one was killed or lost the others."""

_RESUME = "`dl7 train --resume RUN` goes on from the last checkpoint"
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP)
_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR
_SECONDS_TO_BE_SEEN = 5
"""In which the end of a worker is noticed, on a busy machine."""
_SECONDS_TO_LEAVE = 10.0
"""That nodes wait for each other at the end."""
_SECONDS_TO_STOP = 60.0
"""Enough to kill workers that do not leave when told to, for which torch gives them 30."""


def launch(arguments: Sequence[str], workers: int, *, nodes: Nodes, timeout: float, note: Callable[[str], None]) -> int:
    """Run `dl7` with these arguments in so many workers on this node and wait for them; returns the exit code.

    A worker that is killed, or loses the others, makes all start again, `RESTARTS` times at most; one that fails by
    itself ends them all, and `note` is told what it has printed. A signal that stops a training is handed on to the
    workers, which agree on where to stop; a second one kills them. Raises UserError where the nodes do not meet within
    `timeout` seconds, or no longer.
    """
    log = logging.getLogger("torch.distributed.elastic")
    log.propagate = False  # what matters of it is told here
    log.addHandler(logging.NullHandler())
    # Workers do not look for modules in the current folder, which may be data. This process may have found dl7 there.
    own = str(Path(dl7cli.__file__).resolve().parents[1])
    if os.path.realpath(sys.path[0]) == own:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), own)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
    os.environ[NODE_RANK] = str(nodes.rank)
    address = _own_address(nodes.rendezvous)
    if nodes.count > 1 and (interface := _interface(address)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=nodes.rendezvous,
        run_id=nodes.name,
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        local_addr=address,
        is_host=nodes.rank == 0,
        join_timeout=round(timeout),
        read_timeout=round(timeout),
    )
    with tempfile.TemporaryDirectory(prefix="dl7-workers-") as folder, ExitStack() as stack:
        os.environ[MEMORY] = str(Path(folder, "memory"))
        os.mkdir(os.environ[MEMORY])
        try:
            meeting = get_rendezvous_handler(parameters)
            stack.callback(meeting.shutdown)
            agent = _Agent(arguments, workers, nodes, meeting, Path(folder), note)
            agent.listen()
            if nodes.count > 1:
                agent.watch(timeout + _SECONDS_TO_STOP)
            result = agent.run()
        except SignalException as stop:
            return 128 + stop.sigval
        except RendezvousClosedError:
            raise UserError("another node has ended the training", hint="what it says there is the reason") from None
        except (RendezvousError, DistError) as problem:
            late = isinstance(problem, RendezvousTimeoutError)
            why = "not all are there in time" if late else problem.__cause__ or problem
            raise UserError(
                f"the {nodes.count} nodes do not meet, or no longer, at `{nodes.rendezvous}`: {why}",
                hint="start the same command on each of them, with a `--node-rank` of its own",
            ) from None
        return agent.exit_code(result)


class _Agent(LocalElasticAgent):
    """Torch's agent of a node, but that it knows which failures another attempt can mend, and passes signals on."""

    def __init__(
        self,
        arguments: Sequence[str],
        workers: int,
        nodes: Nodes,
        meeting: RendezvousHandler,
        folder: Path,
        note: Callable[[str], None],
    ) -> None:
        spec = WorkerSpec(
            role="worker",
            local_world_size=workers,
            entrypoint=sys.executable,
            args=("-P", "-m", "dl7cli", *arguments),
            rdzv_handler=meeting,
            max_restarts=RESTARTS,
            monitor_interval=0.1,
        )
        hidden = {rank: Std.ALL for rank in range(workers) if (nodes.rank, rank) != (0, 0)}
        logs = DefaultLogsSpecs(log_dir=str(folder), redirects=hidden)
        super().__init__(spec, logs, exit_barrier_timeout=_SECONDS_TO_LEAVE)
        self._first = nodes.rank * workers
        self._folder = folder
        self._note = note
        self._processes: list[int] = []
        self._signal = 0
        self._stops = stop_signals()
        self._logs = ""
        self._master = "", ""
        self._moved: float | None = None

    def watch(self, seconds: float) -> None:
        """End this process where it has not moved for so long since its workers have begun.

        What torch asks another node that cannot be reached any more, it may wait for as long as the system keeps the
        connection, which is a quarter of an hour on Linux.
        """

        def wait() -> None:
            while self._moved is None or time.monotonic() - self._moved < seconds:
                time.sleep(1)
            for file in sorted(self._folder.glob(f"{self._logs}/*/error.json")):
                self._note(f"worker {self._first + int(file.parent.name)} {json.loads(file.read_bytes())['message']}")
            self._note(f"error: the other nodes have not been heard of for {seconds:.0f} s\nhint: {_RESUME}")
            self._pass_on(signal.SIGKILL)
            shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(1)

        threading.Thread(target=wait, name="watch", daemon=True).start()

    def _assign_worker_ranks(self, store: Store, group_rank: int, *rest: Any) -> list[Worker]:
        # Torch says it at the first meeting alone, and a node that comes later waits for it.
        if group_rank == 0 and not store.check(["MASTER_ADDR"]):
            address, port = self._master
            store.set("MASTER_ADDR", address)
            store.set("MASTER_PORT", port)
        workers: list[Worker] = super()._assign_worker_ranks(store, group_rank, *rest)
        return workers

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        # The store is of this meeting of the nodes alone, so that all of them find the same there: not the place of a
        # meeting before, which torch may still have, and a name of their own.
        store = worker_group.store
        assert store is not None
        self._master = str(worker_group.master_addr), str(worker_group.master_port)
        worker_group.master_addr = store.get("MASTER_ADDR").decode()
        worker_group.master_port = int(store.get("MASTER_PORT"))
        os.environ[ATTEMPT] = store.compare_set("dl7/attempt", "", str(uuid.uuid4())).decode()
        self._logs = f"*/attempt_{RESTARTS - self._remaining_restarts}"
        started: dict[int, int] = super()._start_workers(worker_group)
        self._processes = list(started.values())
        self.listen()  # torch does now, too, and to SIGHUP even where `nohup` has it ignored
        if self._signal:
            self._pass_on(self._signal)
        return started

    def listen(self) -> None:
        """Take the signals that stop a training."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._receive if number in self._stops else signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._processes:
            raise SystemExit(128 + number)
        if self._signal:
            if number != signal.SIGHUP:  # see `signals`
                self._pass_on(signal.SIGKILL)
            return
        self._signal = number
        with suppress(OSError):
            os.write(2, b"\nstopping after this step; once more stops at once\n")
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._moved = time.monotonic()
        result: RunResult = super()._monitor_workers(worker_group)
        self._moved = time.monotonic()
        if result.is_failed():
            self._processes = []
            failures = list(result.failures.values())
            if self._signal or not _can_be_mended(failures):
                self._remaining_restarts = 0
            elif any(failure.message.startswith(FULL) for failure in failures):
                # A batch can only be halved so often: that is bound enough.
                self._remaining_restarts += 1
                self._note(f"{self._reason(failures)}; all start again from the last checkpoint")
            elif self._remaining_restarts:
                done = RESTARTS - self._remaining_restarts + 1
                again = f"all start again from the last checkpoint ({done} of {RESTARTS} times)"
                self._note(f"{self._reason(failures)}; {again}")
        return result

    def exit_code(self, result: RunResult | None) -> int:
        """Of the launcher; tells what a worker has printed that has failed by itself."""
        failures = [] if result is None else list(result.failures.values())
        own = [failure for failure in failures if failure.exitcode > 0 and not _is_consequence(failure)]
        if own:
            shown = [self._printed(failure.local_rank) for failure in own]
            if None not in shown:  # else the first worker's, which is the same or has been there before
                self._note(str(shown[0]))
            return own[0].exitcode
        if self._signal:
            return 128 + self._signal
        if not failures:
            return 0
        stopped = [failure.exitcode for failure in failures if failure.exitcode in _INTERRUPTED]
        if stopped and not any(_is_lost(failure) for failure in failures):
            return stopped[0]
        raise UserError(self._reason(failures), hint=_RESUME)

    def _reason(self, failures: Sequence[ProcessFailure]) -> str:
        """What has happened to the worker that was the first to fail."""
        lost = [failure for failure in failures if failure.exitcode == LOST]
        killed = [failure for failure in failures if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM]
        # Well after another has left, it is the agent that kills one that does not leave.
        if killed and not any(killed[0].timestamp - one.timestamp > _SECONDS_TO_BE_SEEN for one in lost):
            name = signal.Signals(-killed[0].exitcode).name
            return f"worker {self._first + killed[0].local_rank} was ended by {name}"
        first = next((one for one in lost if not one.message.startswith(LOSING)), (lost or list(failures))[0])
        return f"worker {self._first + first.local_rank} {first.message}"

    def _printed(self, local_rank: int) -> str | None:
        """What a worker has left on standard error in this attempt; None where it went to this process's own."""
        files = sorted(self._folder.glob(f"{self._logs}/{local_rank}/stderr.log"))
        if not files:
            return None
        text = files[-1].read_text(encoding="utf-8", errors="replace").strip()
        return f"{text}\nso ended worker {self._first + local_rank}"


def _can_be_mended(failures: Sequence[ProcessFailure]) -> bool:
    """Whether workers were killed or lost one another, and none failed by itself or was asked to stop."""
    return any(map(_is_lost, failures)) and all(map(_is_consequence, failures))


def _is_lost(failure: ProcessFailure) -> bool:
    return failure.exitcode < 0 or failure.exitcode == LOST


def _is_consequence(failure: ProcessFailure) -> bool:
    """Whether it may be of another worker's end, at which the agent stops the rest."""
    return _is_lost(failure) or failure.exitcode in _INTERRUPTED


def _own_address(rendezvous: str) -> str:
    """This node's address as seen from where the nodes meet: a host's name often stands for a loopback address."""
    host, _, port = rendezvous.rpartition(":")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port) or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # nothing is sent
            return str(probe.getsockname()[0])
    except OSError as problem:
        raise UserError(f"the host of `--rendezvous {rendezvous}` is not to be found: {problem}") from None


def _interface(address: str) -> str | None:
    """The network interface with this address; None where the system is not Linux or the address not of IPv4."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            answer = fcntl.ioctl(probe, _ADDRESS_OF_INTERFACE, struct.pack("256s", name.encode()))
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
