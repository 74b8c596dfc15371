"""Errors that the user or a later attempt can fix."""

from __future__ import annotations

import unicodedata


class UserError(ValueError):
    """A mistake in the user's input: a parameter, a file, an address.

    The message is one line. It names the value, what is allowed and what to do next.
    The CLI and the DAG print it without a traceback and do not retry.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        # The message quotes user input, which must not send control characters to a terminal.
        super().__init__("".join(c if unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in line))


class ServiceUnavailableError(ConnectionError):
    """A service that this project needs does not answer; a later attempt may succeed.

    The message is one line. It names the service and says what to do if it stays down.
    """


class StoppedError(BaseException):
    """A person or the task runner stops the task.

    Like `KeyboardInterrupt`, it is not an `Exception`, so no handler mistakes it for a failure of the work itself.
    """


class SupersededError(StoppedError):
    """A later attempt of this task has taken over, so this one must write nothing more."""
