"""The two ways a command can end badly."""


class UsageError(ValueError):
    """Bad usage or bad input: the message is one line that says what was wrong, where, and what would be right.

    The command line prints it and exits with status 2.
    """


class RunError(RuntimeError):
    """The work itself failed (a full disk, a diverged run): one line, exit status 1."""
