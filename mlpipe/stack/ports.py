"""Which TCP ports of this machine are free, and what holds those that are not."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
from collections.abc import Collection, Mapping

from mlpipe.errors import UserError

LOOPBACK = "127.0.0.1"
INTERNAL_RANGE = range(20_000, 22_700)
"""With `GRPC_OFFSET`, below what Linux (from 32768) and others (from 49152) give to outgoing connections."""
GRPC_OFFSET = 10_000
"""From SeaweedFS's admin port to its gRPC port; its own workers assume it, whatever the option says."""


def check_ports_free(ports: Mapping[str, int]) -> None:
    """Make sure that a server could listen on each of these ports.

    Args:
        ports: from the setting that chooses a port (such as `MLPIPE_S3_PORT`) to its value.

    Raises:
        UserError: a port is taken, not allowed or given twice; names the setting and, where it can be seen, the holder.
    """
    chosen: dict[int, str] = {}
    for setting, port in ports.items():
        if port in chosen:
            raise UserError(f"{setting}: {port} is also {chosen[port]}; give each its own port")
        chosen[port] = setting
        if error := _bind_error(port):
            reason = "needs rights that this user lacks" if error == errno.EACCES else f"is taken by {holder(port)}"
            raise UserError(f"{setting}: port {port} {reason}; stop that, or choose another with {_how(setting)}")


def free_block(count: int, avoid: Collection[int] = ()) -> tuple[int, ...]:
    """Consecutive free ports, and the last one's gRPC port, from a random place: stacks side by side differ.

    Args:
        count: how many in a row.
        avoid: ports that are kept for something else, which may not listen yet.

    Raises:
        OSError: no such block is free.
    """
    for _ in range(200):
        first = random.randrange(INTERNAL_RANGE.start, INTERNAL_RANGE.stop - count)  # noqa: S311 - no secret
        block = (*range(first, first + count), first + count - 1 + GRPC_OFFSET)
        if all_free(block) and not set(block) & set(avoid):
            return block
    raise OSError(errno.EADDRINUSE, f"no {count} consecutive free ports in {INTERNAL_RANGE}")


def all_free(ports: tuple[int, ...]) -> bool:
    """Whether a server could listen on every one of them."""
    return all(_bind_error(port) is None for port in ports)


def holder(port: int) -> str:
    """The process that listens on a port, in words; another user's process cannot be seen."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN and getattr(connection.laddr, "port", None) == port
            if listens and connection.pid:
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f"process {connection.pid} ({command[:80]})"
    return "another process"


def _bind_error(port: int) -> int | None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last connections are only being closed counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            return error.errno
    return None


def _how(setting: str) -> str:
    option = "--" + setting.removeprefix("MLPIPE_").lower().replace("_", "-")
    return f"`mlpipe up {option} PORT` or {setting}=PORT"
