"""What the compose files ask for, where no container is needed to see it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parents[3]


def services(file: str) -> dict[str, dict[str, Any]]:
    """The services of a file; a required variable without what its error says."""
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", r"${\1}", (PROJECT / file).read_text())
    return yaml.safe_load(text)["services"]


def test_the_worker_of_another_machine_is_the_one_of_the_whole_stack() -> None:
    here, there = services("docker-compose.yml")["worker-gpu"], services("docker-compose.worker.yml")
    assert there == {"worker-gpu": {k: v for k, v in here.items() if k not in ("build", "depends_on", "networks")}}


def test_no_container_gains_privileges() -> None:
    for name, service in services("docker-compose.yml").items():
        assert service["security_opt"] == ["no-new-privileges:true"], name
