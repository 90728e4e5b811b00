"""What a training tells whoever shows it to a person."""

from pathlib import Path
from typing import NamedTuple, Protocol

from dl7cli.metrics import Scores
from dl7cli.recipe import Recipe


class Plan(NamedTuple):
    """What a training is about to do."""

    recipe: Recipe
    run: Path
    data: str
    splits: dict[str, int]
    notes: list[str]
    parameters: int
    device: str
    workers: int
    precision: str
    reason: str
    steps: int
    epochs: int
    resumed_step: int


class Step(NamedTuple):
    """How a training stands, a few times a second at most."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    rate: float
    unit: str
    remaining_seconds: float


class Epoch(NamedTuple):
    """An epoch's end, with what validation has given."""

    epoch: int
    scores: Scores
    best: bool


class Listener(Protocol):
    """Whoever shows a training to a person."""

    def plan(self, plan: Plan) -> None: ...
    def step(self, step: Step) -> None: ...
    def epoch(self, epoch: Epoch) -> None: ...
    def note(self, text: str) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...
