"""When a training counts as one that was done before."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from mlpipe.config import ModelConfig, RunParams
from mlpipe.recipes import resolve
from mlpipe.tracking import trained_before
from mlpipe.tracking.trained_before import training_key


@pytest.fixture(autouse=True)
def _commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_before, "git_sha", lambda: "1" * 40)


def model(**form: object) -> ModelConfig:
    return resolve(RunParams(**{"models": "custom_cnn", **form})).models[0]  # type: ignore[arg-type]


def test_only_the_same_data_settings_seed_and_code_count(monkeypatch: pytest.MonkeyPatch) -> None:
    key = training_key(model(), "digest", 0)
    assert key == training_key(model(promotion="disabled", name="other"), "digest", 0)
    assert key == training_key(replace(model(), name="custom_cnn_random"), "digest", 0)
    others = [model(seed=1), model(epochs=6), model(recipe="report"), model(models="resnet18=random")]
    keys = {training_key(each, "digest", 0) for each in others} | {training_key(model(), "grown", 0)}
    keys.add(training_key(model(), "digest", 5))
    monkeypatch.setattr(trained_before, "git_sha", lambda: "2" * 40)
    keys.add(training_key(model(), "digest", 0))
    assert len(keys - {None, key}) == 7


@pytest.mark.parametrize(
    "form",
    [
        {"models": "resnet18=models:/pets-classifier@champion"},
        {"models": "resnet18=s3://bucket/weights.pth"},
        {"teacher": "models:/pets-classifier@champion"},
        {"models": "resnet18=models:/pets-classifier/latest"},
    ],
)
def test_what_may_have_changed_is_trained_again(form: dict[str, str]) -> None:
    assert training_key(model(**form), "digest", 0) is None


def test_a_fixed_version_never_changes() -> None:
    assert training_key(model(teacher="models:/pets-classifier/3"), "digest", 0)


def test_changed_code_is_trained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_before, "git_sha", lambda: "1" * 40 + "-dirty")
    assert training_key(model(), "digest", 0) is None


def test_code_of_an_unknown_version_is_trained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an image that was built without its commit and has the code on its path, not installed."""

    def version(name: str) -> str:
        if name == "mlpipe":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(trained_before, "git_sha", lambda: "unknown")
    monkeypatch.setattr(trained_before, "version", version)
    assert training_key(model(), "digest", 0) is None


def test_a_file_of_ones_own_counts_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "mynets.py"
    file.write_text("def Tiny(num_classes): ...")
    own = replace(model(), architecture=f"{file}:Tiny")
    before = training_key(own, "digest", 0)
    assert before == training_key(own, "digest", 0)
    assert before != training_key(replace(own, architecture=f"{file}:TINY"), "digest", 0)
    file.write_text("def Tiny(num_classes): return None")
    assert training_key(own, "digest", 0) != before


@pytest.mark.parametrize("editable", [True, False])
def test_a_package_that_is_installed_from_a_folder_of_sources_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, editable: bool
) -> None:
    (information := tmp_path / "mynets-1.2.dist-info").mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: mynets\nVersion: 1.2\n")
    (information / "entry_points.txt").write_text("[mlpipe.models]\ntiny = mynets:TinyNet\n")
    (information / "direct_url.json").write_text(json.dumps({"url": "file:///x", "dir_info": {"editable": editable}}))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (training_key(replace(model(), architecture="tiny"), "digest", 0) is None) == editable
