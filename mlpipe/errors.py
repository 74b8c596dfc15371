"""What can be mended from outside: by the user, or by time."""

from __future__ import annotations

import unicodedata


class UserError(ValueError):
    """A mistake in what the user gave: a parameter, a file, an address.

    The message is one line and says which value, what is allowed and what to do next.
    Callers at the edge (the CLI, the DAG) print it without a traceback and do not retry.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        # What the user gave is quoted in it, and must not steer a terminal.
        super().__init__("".join(c if unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in line))


class ServiceUnavailableError(ConnectionError):
    """A service that this project needs does not answer; trying again later may help.

    The message is one line and says which, and what to do when it stays away.
    """


class StoppedError(BaseException):
    """The task is told to end, by a person or by whatever runs it.

    No `Exception`, as `KeyboardInterrupt` is none: nothing may take it for a failure of the work itself.
    """
