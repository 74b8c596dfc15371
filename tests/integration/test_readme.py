"""The README's Python runs as printed, in a process that knows nothing of this project."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.integration

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = [
    textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE)
]
CHAMPION = "models:/digits-classifier@champion"
LOGIN = 'eval "$(mlpipe env)"'


@pytest.mark.parametrize("block", [block for block in BLOCKS if CHAMPION in block])
def test_a_block_that_loads_the_champion(
    block: str, demo: dict[str, Any], environment: dict[str, str], tmp_path: Path
) -> None:
    assert demo["champion"]
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "photo.jpg")
    given = (
        "import sys; sys.modules['mlpipe'] = None\nimport numpy; images = numpy.full((2, 8, 8, 3), 9, numpy.uint8)\n"
    )
    assert LOGIN in README
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/bash", "-c", f'{LOGIN}; exec python -c "$CODE"'],
        env={"PATH": path, "HOME": str(tmp_path), "MLPIPE_HOME": environment["MLPIPE_HOME"], "CODE": given + block},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", [block for block in BLOCKS if CHAMPION not in block])
def test_a_block_that_is_a_network(block: str) -> None:
    import torch

    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102 - the README's own code
    assert names["TinyNet"](7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_there_are_such_blocks() -> None:
    assert sum(CHAMPION in block for block in BLOCKS) >= 1
    assert len(BLOCKS) >= 2
