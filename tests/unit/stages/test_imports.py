"""Importing is most of what a task costs beside its work."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mlpipe.models.architectures import KNOWN
from mlpipe.models.registry import check_architecture

HEAVY = ("lightning", "matplotlib", "sklearn", "torch", "torchvision")


@pytest.mark.parametrize(
    ("stage", "needed"),
    [
        ("download", set()),
        ("preprocess", {"matplotlib"}),
        ("train", {"torch"}),
        ("evaluate", {"matplotlib", "sklearn"}),
    ],
)
def test_a_stage_imports_what_it_needs(stage: str, needed: set[str]) -> None:
    code = f"import json, sys, mlpipe.stages.{stage}; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) == needed


@pytest.mark.parametrize("architecture", [each.name for each in KNOWN if each.takes_any_image_size])
@pytest.mark.parametrize("image_size", [8, 9, 31, 32, 224, 512])
def test_architectures_that_need_no_check(architecture: str, image_size: int) -> None:
    check_architecture(architecture, image_size)
