"""Install what requirements.lock pins into a virtual environment, by several pips side by side.

    python3.11 scripts/install.py .venv training airflow local-stack   # mlpipe with these extras
    python3.11 scripts/install.py .venv all

pip unpacks one wheel after the other; several of them use all cores. Files are compiled when they are first imported:
most never are. What is already there in the wanted version is left as it is. The lock names who needs each package
("via"), and so says what the extras need.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK, PROJECT = ROOT / "requirements.lock", ROOT / "pyproject.toml"
HEAVY = re.compile(r"(nvidia|torch|triton|pyarrow|scipy|playwright|mlflow|pandas)")
"""Wheels that get a pip of their own, and are begun first."""
PACKAGES_OF_A_PIP = 15
MAX_PIPS = 4


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.partition("[")[0]).lower()


def read_lock() -> dict[str, list[str]]:
    """Entries by package; one that depends on the platform or on Python's version has several."""
    entries: dict[str, list[str]] = {}
    for block in re.split(r"\n(?=[A-Za-z0-9])", LOCK.read_text().strip()):
        entries.setdefault(canonical(re.split(r"[=\s]", block, maxsplit=1)[0]), []).append(block)
    return entries


def needed_by(extras: Iterable[str], entries: dict[str, list[str]]) -> set[str]:
    """The packages that the project needs with these extras, and what those need."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    wanted = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    needs: dict[str, set[str]] = {}
    for name, blocks in entries.items():
        for line in (line for block in blocks for line in block.splitlines() if line.lstrip().startswith("#")):
            parent = line.strip("# ").removeprefix("via").strip()
            if parent:
                needs.setdefault(canonical(parent), set()).add(name)
    found: set[str] = set()
    left = [canonical(re.split(r"[\[<>=! ]", each, maxsplit=1)[0]) for each in wanted]
    while left:
        if (name := left.pop()) in entries and name not in found:
            found.add(name)
            left += needs.get(name, ())
    return found


def batches(entries: dict[str, list[str]], names: Iterable[str], present: set[str]) -> list[list[str]]:
    """Entries for a pip each; without those whose version is there."""
    missing = [
        (name, block)
        for name in sorted(names)
        for block in entries[name]
        if f"{name}=={re.split(r'[=; ]+', block)[1]}" not in present
    ]
    alone = [[block] for name, block in missing if HEAVY.match(name)]
    rest = [block for name, block in missing if not HEAVY.match(name)]
    parts = [rest[start : start + PACKAGES_OF_A_PIP] for start in range(0, len(rest), PACKAGES_OF_A_PIP)]
    return sorted(alone, key=lambda part: not part[0].startswith("torch")) + parts


def install(python: Path, part: list[str]) -> int:
    """Run one pip; the number of its packages."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(part))
        file.flush()
        options = ["--disable-pip-version-check", "--quiet", "--no-deps", "--no-compile", "--require-hashes"]
        subprocess.run([python, "-m", "pip", "install", *options, "-r", file.name], check=True)
    return len(part)


def main() -> None:
    environment, extras = Path(sys.argv[1]), sys.argv[2:]
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python3*/site-packages")
    present = {f"{canonical(each.name)}=={each.version}" for each in distributions(path=[str(site)])}
    entries = read_lock()
    names = set(entries) if extras == ["all"] else needed_by(extras, entries)
    parts = batches(entries, names, present)
    total, done = sum(map(len, parts)), 0
    with ThreadPoolExecutor(min(MAX_PIPS, os.cpu_count() or 1)) as pool:
        running = [pool.submit(install, python, part) for part in parts]
        for each in as_completed(running):
            try:
                done += each.result()
            except subprocess.CalledProcessError as error:
                for other in running:
                    other.cancel()
                sys.exit(f"pip failed with exit code {error.returncode}; see its message above")
            end = "\n" if done == total or not sys.stderr.isatty() else "\r"
            print(f"installed {done} of {total} packages", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
