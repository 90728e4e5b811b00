"""What a user is meant to read."""


class UserError(Exception):
    """Something a user can put right: printed as `error: …` and `hint: …` without a traceback, exit code 1.

    `message` says what was seen, `hint` what to do about it; both lower-case and without a full stop.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class NoSplitError(UserError):
    """The data has no training split, or none at all."""
