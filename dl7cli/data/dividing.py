"""Which training examples are kept for validation, and which are used.

The same for every seed, so that runs can be compared.
"""

import numpy as np

from dl7cli.errors import UserError


def kept_back(examples: int, fraction: float, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, in order, of the training examples that stay and of those kept for validation, at least one.

    Raises UserError where none would stay; `what` are the examples.
    """
    kept = max(1, round(examples * fraction))
    if kept >= examples:
        raise UserError(f"{examples} training {what} are too few to keep some for validation", hint=f"add {what}")
    order = np.random.default_rng(0).permutation(examples)
    return np.sort(order[kept:]), np.sort(order[:kept])


def part_of(examples: int, wanted: int) -> np.ndarray:
    """Numbers, in order, of so many of the training examples, or of all where there are no more.

    A smaller part is a part of a larger one.
    """
    return np.sort(np.random.default_rng(1).permutation(examples)[:wanted])
