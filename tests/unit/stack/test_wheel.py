"""The package as others install it: a wheel, without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(PROJECT)]
    subprocess.run(build, check=True, capture_output=True, timeout=240)
    (wheel,) = folder.glob("mlpipe-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_it_holds_the_dags_the_plugins_and_its_types(installed: Path) -> None:
    for name in ("dags/image_classification.py", "py.typed", "stack/commands.py", "stack/airflow.cfg"):
        assert (installed / "mlpipe" / name).is_file()
    assert {path.stem for path in installed.glob("*.py")} == {path.stem for path in (PROJECT / "plugins").glob("*.py")}
    assert not list(installed.rglob("__pycache__"))


def test_the_stack_finds_them_and_keeps_its_state_in_the_current_folder(installed: Path, tmp_path: Path) -> None:
    code = (
        "from mlpipe.stack.local import StackSettings; settings = StackSettings.load(); "
        "print(settings.home, settings.dags, sep='\\n')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MLPIPE_HOME"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [tmp_path / ".mlpipe", installed / "mlpipe" / "dags"]
    assert [Path(line) for line in done.stdout.splitlines()] == expected
