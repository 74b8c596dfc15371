"""The package as others install it: a wheel, without the checkout."""

from __future__ import annotations

import importlib.metadata
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
    assert not list(installed.glob(".*"))  # they would lie among the packages of others


def test_an_airflow_beside_it_gains_the_plugins_and_the_executor(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    plugins = importlib.metadata.Distribution.at(info).entry_points.select(group="airflow.plugins")
    declaring = {path.stem for path in (PROJECT / "plugins").glob("*.py") if "(AirflowPlugin):" in path.read_text()}
    assert {plugin.module for plugin in plugins} == declaring
    code = (  # compared in there: Airflow may print warnings
        "import sys; from importlib.metadata import EntryPoint; from airflow.plugins_manager import AirflowPlugin; "
        "from gpu_executor import GpuExecutor; classes = [EntryPoint('', each, '').load() for each in sys.argv[2:]]; "
        "assert all(issubclass(each, AirflowPlugin) for each in classes); "
        "files = [sys.modules[each.__module__].__file__ for each in (GpuExecutor, *classes)]; "
        "assert all(file.startswith(sys.argv[1]) for file in files), files"
    )
    python(code, str(installed), *(plugin.value for plugin in plugins), PYTHONPATH=str(installed))


def python(code: str, *arguments: str, cwd: Path | None = None, **variables: str) -> list[str]:
    """Lines that a program prints in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "MLPIPE_HOME"} | variables
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_stack_finds_them_and_keeps_its_state_in_the_current_folder(installed: Path, tmp_path: Path) -> None:
    code = (
        "from mlpipe.stack.local import StackSettings; settings = StackSettings.load(); "
        "print(settings.home, settings.dags, sep='\\n')"
    )
    expected = [tmp_path / ".mlpipe", installed / "mlpipe" / "dags"]
    assert [Path(line) for line in python(code, cwd=tmp_path, PYTHONPATH=str(installed))] == expected
