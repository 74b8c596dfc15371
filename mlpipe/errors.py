"""The one exception that a user can mend."""


class UserError(ValueError):
    """A mistake in what the user gave: a parameter, a file, an address.

    The message is one line and says which value, what is allowed and what to do next.
    Callers at the edge (the CLI, the DAG) print it without a traceback and do not retry.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
