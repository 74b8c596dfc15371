"""Temporary folders of processes that were killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlpipe.data.storage.scratch import scratch_folder

HOLD = """
import time
from mlpipe.data.storage.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "pixels").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = [Path(holder.stdout.readline().strip()) for holder in holders if holder.stdout]
    try:
        holders[0].kill()
        holders[0].wait()
        an_hour_ago = time.time() - 3600
        for folder in folders:
            os.utime(folder, (an_hour_ago, an_hour_ago))
        with scratch_folder() as own:
            assert [folder.exists() for folder in (*folders, own)] == [False, True, True]
        assert not own.exists()
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
