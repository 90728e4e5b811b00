"""What a user is meant to read."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something a user can put right: printed as `error: …` and `hint: …` without a traceback, exit code 1.

    `message` says what was seen, `hint` what to do about it; both lower-case and without a full stop.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return what to add to a message of a name that is not known: the one of those `known` that it is nearest to."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean `{near[0]}`?)" if near else ""


class NoSplitError(UserError):
    """The data has no training split, or none at all."""
