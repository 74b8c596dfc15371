from __future__ import annotations

from pathlib import Path

import pytest

from mlpipe.stack.local import DEFAULT_PORTS, StackSettings


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", *(port.upper() for port in DEFAULT_PORTS)):
        monkeypatch.delenv(f"MLPIPE_{name}", raising=False)


@pytest.fixture
def settings(tmp_path: Path) -> StackSettings:
    """A stack that was never started."""
    return StackSettings.load(tmp_path / "state").with_storage_ports()
