"""Whatever is fed to the archive reader and the form's parser, it is read, or refused in one line."""

from __future__ import annotations

import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlpipe.config import RunConfig, RunParams
from mlpipe.data.archives.archive import open_archive
from mlpipe.data.archives.layout import resolve_layout
from mlpipe.errors import UserError
from mlpipe.recipes import resolve
from tests.unit.data.conftest import pack_tar, pack_zip

quiet = settings(max_examples=150, deadline=None, suppress_health_check=[*HealthCheck])
"""A busy machine is no failure."""

NAME_PARTS = st.sampled_from(
    ["a", "b", "A", "train", "test", "..", ".", "", "C:", "\\", "a\\..", "猫", "x\n", "e\u0301"]
)
NAMES = st.lists(NAME_PARTS, max_size=4).map("/".join) | st.text(max_size=20)
MEMBERS = st.dictionaries(NAMES.map(lambda name: f"{name}.png"), st.binary(max_size=8), max_size=6)


def read(path: Path) -> None:
    """All of an archive, as preprocessing does; its classes are then names that stay within."""
    with open_archive(path) as archive:
        for packed in archive.stream(4, 1 << 16):
            for file in packed.read():
                assert len(file) <= 1 << 20
        classes = resolve_layout(archive).classes
    assert len(classes) >= 2
    assert not any(name in ("", ".", "..") or "/" in name or "\\" in name for name in classes)


def read_or_refused(path: Path) -> None:
    try:
        read(path)
    except UserError as error:
        assert str(error)
        assert "\n" not in str(error)


@quiet
@given(members=MEMBERS, form=st.sampled_from(["zip", "w", "w:gz"]))
def test_any_members(members: dict[str, bytes], form: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pack_zip(path, members) if form == "zip" else pack_tar(path, members, form)
    except (ValueError, IndexError, tarfile.TarError):  # the packer itself does not take such a name
        return
    read_or_refused(path)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("samples")
    files = {f"c{i}/1.png": bytes(range(i, 200)) for i in range(3)}
    packed = [pack_zip(folder / "a", files), pack_zip(folder / "b", files, zipfile.ZIP_DEFLATED)]
    packed += [pack_tar(folder / mode.replace(":", ""), files, mode) for mode in ("w", "w:gz", "w:xz")]
    return [path.read_bytes() for path in packed]


@quiet
@given(data=st.data())
def test_any_damage(samples: list[bytes], tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(samples)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=4))
    (tmp_path / "a").write_bytes(content)
    read_or_refused(tmp_path / "a")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["images", "resnet18=a,b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@quiet
@given(form=st.dictionaries(st.sampled_from([*RunParams.json_schema(), "other"]), VALUES))
def test_any_form(form: dict[str, object]) -> None:
    try:
        config = resolve(RunParams.from_mapping(form))
    except UserError as error:
        assert str(error).partition(":")[0] in {*RunParams.json_schema(), "other"}
        assert "\n" not in str(error)
    else:
        assert isinstance(config, RunConfig)
        assert config.models
