"""What stops a training, and what stops it at once: real signals to this process."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import pytest

from dl7cli.distributed import ALONE, Workers
from dl7cli.training.signals import signals, stop_signals


@pytest.fixture(autouse=True)
def terminal() -> Iterator[None]:
    """Signals do what they do by default, also where these tests run under `nohup`."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
def test_the_end_of_the_terminal_never_stops_at_once(first: signal.Signals) -> None:
    """A closed terminal says so, and so does its shell; systemd says it after SIGTERM."""
    with signals(ALONE) as stopping:
        assert stopping() == 0
        for number in (first, signal.SIGHUP, signal.SIGHUP):
            signal.raise_signal(number)
            assert stopping() == first
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM


def test_a_second_signal_does_not_stop_one_of_several_workers() -> None:
    """Their launcher and a scheduler may both say it; whoever launched them kills those that do not end."""
    with signals(replace(ALONE, count=2)):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)


def test_what_nohup_has_ignored_does_not_stop() -> None:
    assert signal.SIGHUP in stop_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert signal.SIGHUP not in stop_signals()
    with signals(ALONE) as stopping:
        signal.raise_signal(signal.SIGHUP)
        assert stopping() == 0


class Answering:
    """Stands in for two workers, of which this is the first. What the other one has got comes with each request."""

    count = 2

    def __init__(self, *others: int) -> None:
        self.others = list(others)
        self.waited: list[bool] = []

    def greatest_later(self, number: int) -> Callable[[], int]:
        turn, other = len(self.waited), self.others[len(self.waited)]
        self.waited.append(False)

        def answer() -> int:
            self.waited[turn] = True
            return max(number, other)

        return answer


def test_late_is_told_one_call_later_and_leaves_nothing_unasked() -> None:
    workers = Answering(0, signal.SIGTERM, 0, 0)
    with signals(cast(Workers, workers)) as stopping:
        assert stopping(late=True) == 0
        assert workers.waited == [False]
        assert stopping(late=True) == 0, "the other worker's signal came with this call"
        assert workers.waited == [True, False]
        assert stopping(late=True) == signal.SIGTERM
        assert workers.waited == [True, True, True]
    workers = Answering(0, signal.SIGINT, 0)
    with signals(cast(Workers, workers)) as stopping:
        assert stopping(late=True) == 0
        assert stopping() == signal.SIGINT, "without it the call itself is waited for"
    workers = Answering(signal.SIGHUP, 0)
    with signals(cast(Workers, workers)) as stopping:
        assert stopping(late=True) == 0
        assert stopping() == signal.SIGHUP, "and what is told is not forgotten"
        assert workers.waited == [True, True]


def test_one_process_is_told_at_once() -> None:
    with signals(ALONE) as stopping:
        signal.raise_signal(signal.SIGTERM)
        assert stopping(late=True) == signal.SIGTERM
