"""One real stack for all integration tests of a session. A test that breaks it mends it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlpipe.stack.local import StackSettings
from mlpipe.stack.temporary import running_stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackSettings]:
    """A running stack on free ports, with its state in a temporary folder."""
    with running_stack(Path(tmp_path_factory.mktemp("stack"))) as settings:
        yield settings


@pytest.fixture
def stack_environment(stack: StackSettings, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a client of the stack needs, set in this process for the time of a test."""
    variables = stack.client_environment()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables
