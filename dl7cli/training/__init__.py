"""Training: the loop, its run folder, resuming and evaluation."""

from dl7cli.training.session import (
    Epoch,
    Interrupted,
    Listener,
    Plan,
    Step,
    evaluate,
    resume,
    train,
)

__all__ = ["Epoch", "Interrupted", "Listener", "Plan", "Step", "evaluate", "resume", "train"]
