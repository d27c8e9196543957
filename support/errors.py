"""Errors that a user can act on, and the one function that makes text safe to print."""


def printable(text: str) -> str:
    """`text` on one line, safe for a terminal. A model, a file name or a column may hold escapes.

    Line breaks become \\n; other characters that do not print become \\x.. or \\u.....
    """
    return "".join(
        char if char.isprintable() else "\\n" if char == "\n"
        else char.encode("unicode_escape").decode() for char in text)


class UserError(Exception):
    """Something the user can put right: one sentence that says what is wrong and what to do.

    train.py prints the sentence and exits with `status`.
    """
    status = 2


class RowFailed(UserError):
    """A row that proves unusable during training, on one process alone."""
    status = 4


class Stopped(UserError):
    """A signal ended the run, after the run saved what it had."""
    status = 3


class RunFailed(UserError):
    """The run can't go on: a full disk, no finite step any more, or another process is gone."""
    status = 4


def error_text(error: BaseException) -> str:
    """The first line of another library's error message."""
    first_line = str(error).strip().split("\n")[0]
    return getattr(error, "strerror", None) or first_line or type(error).__name__
