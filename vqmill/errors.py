"""The errors that users see."""


class CodesError(ValueError):
    """Something a user can mend: a bad path, option, store or checkpoint.

    The message says what was expected, what was found, where, and what to do.
    """


class UsageError(CodesError):
    """What was asked for cannot be done as asked: a wrong path, option or output place. Nothing was started."""
