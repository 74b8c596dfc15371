"""`python -m mlpipe.stack.launch PID_FILE COMMAND…`: become the command, after clearing up behind its predecessor.

A component that is killed leaves children behind: a scheduler its task processes, which would hold devices that its
successor leases again. The supervisor stops a whole process group when asked to, not when its leader just died.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import psutil


def main(pid_file: Path, command: list[str]) -> None:
    """Kill what the last process of this name left, note the own process id, and run the command in this process."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        for process in left_by(int(pid_file.read_text())):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    pid_file.write_text(str(os.getpid()))
    os.execv(command[0], command)  # noqa: S606 - our own command


def left_by(leader: int) -> list[psutil.Process]:
    """Processes of a former group leader's group and their children, in this supervisor's session only."""
    session = os.getsid(0)
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == leader != os.getpgrp() and os.getsid(process.pid) == session:
                found |= {other.pid: other for other in (process, *process.children(recursive=True))}
    return list(found.values())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
