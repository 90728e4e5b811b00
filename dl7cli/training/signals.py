"""The signals that stop a training, collected until it can save."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Protocol

from dl7cli.distributed import Workers

_LAUNCHER = os.getppid()
"""Of a worker, read before a training begins: it may be gone after that."""


class Stopping(Protocol):
    """As `signals` says."""

    def __call__(self, *, late: bool = False) -> int: ...


class Interrupted(Exception):
    """A signal ended the training; its state is saved and it can be resumed."""

    def __init__(self, run: Path, signal_number: int) -> None:
        super().__init__(f"interrupted by signal {signal_number}")
        self.run = run
        self.signal = signal_number


def stop_signals() -> list[signal.Signals]:
    """What stops a training: Ctrl-C, a scheduler, and the end of the terminal, unless `nohup` has that ignored."""
    ends = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *ends]


@contextmanager
def signals(workers: Workers) -> Iterator["Stopping"]:
    """Collect the signals that stop a training instead of stopping at once; a second one does stop at once.

    To one of several workers, the launcher says that by killing it: what comes to it twice comes from the launcher and
    from a scheduler, which tells every process. And SIGHUP is no second one: where a terminal is closed both it and the
    shell say so, and a service manager sends it after SIGTERM.

    Gives a function that all workers call after the same steps, and that tells all of them which signal one of them has
    got, or 0. A worker whose launcher has gone stops, too. Called with `late`, several workers do not wait for one
    another: it tells what had come by the call before.
    """
    received: list[int] = []
    asked: list[Callable[[], int]] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received and (workers.count > 1 or number == signal.SIGHUP):
            return
        if received:
            # Unwinds, so that the terminal is left as it was found; a checkpoint half-written does no harm.
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        received.append(number)
        if workers.count > 1:  # the launcher says it, and it may be the one to stop them
            return
        # Not by print, which may be what the signal has interrupted. Ctrl-C ends what reads a pipe, such as tee, too.
        with suppress(OSError):
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    def stopping(*, late: bool = False) -> int:
        if workers.count > 1 and os.getppid() != _LAUNCHER:
            received.append(signal.SIGTERM)
        before = asked.pop()() if asked else 0
        now = workers.greatest_later(received[0] if received else 0)
        if late and workers.count > 1 and not before:
            asked.append(now)
            return 0
        received_now = now()  # in any case: nothing is to be under way that nobody asks for any more
        return before or received_now

    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.signal(number, receive) for number in stop_signals()}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
