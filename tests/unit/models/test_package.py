"""Models in MLflow: logged, loaded as a stranger would, and started from."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import requests
import torch
from torch import nn

from mlpipe.config import LinearSettings, ModelConfig, NetworkSettings
from mlpipe.data.dataset import Dataset
from mlpipe.errors import UserError
from mlpipe.models import package, portable, registry
from mlpipe.models.estimators import logistic_regression
from mlpipe.models.features import pixels
from mlpipe.models.package import PackagedModel
from mlpipe.models.portable import ImageClassifier, ModelDescription
from mlpipe.models.weights import InitialNetwork, initial_network

PIXELS = "mlpipe.models.features.pixels:features"


@pytest.fixture
def logged(experiment: str, description: ModelDescription, network: nn.Module, images_u8: np.ndarray) -> PackagedModel:
    with mlflow.start_run(experiment_id=experiment):
        return package.log_packaged_model(description, network, name="custom_cnn", example_images_u8=images_u8)


@pytest.fixture
def expected(description: ModelDescription, network: nn.Module, images_u8: np.ndarray, tmp_path: Path) -> np.ndarray:
    classifier = ImageClassifier()
    classifier.load(*package.write_files(description, network, tmp_path))
    return classifier.probabilities(images_u8)


def probabilities(table: Any) -> np.ndarray:
    return table.filter(like="probability_").to_numpy()


def test_it_is_loaded_with_mlflow_alone_and_answers_alike(logged, images_u8, expected, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    model = mlflow.pyfunc.load_model(logged.model_uri)
    np.testing.assert_allclose(probabilities(model.predict(images_u8)), expected, rtol=1e-5)
    np.testing.assert_allclose(probabilities(model.predict(images_u8[:1])), expected[:1], rtol=1e-4)
    assert len(model.predict(np.zeros((2, 50, 40, 1), np.uint8))) == 2


def test_it_has_signature_example_exact_requirements_and_no_pickle(logged, description) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(logged.model_uri))
    info = mlflow.models.get_model_info(logged.model_uri)
    assert info.signature.inputs.inputs[0].type == np.dtype(object)  # as it came, so that the model can refuse it
    assert info.signature.outputs.input_names() == [
        "label", "confidence", *(f"probability_{name}" for name in description.classes)
    ]  # fmt: skip
    assert info.saved_input_example_info is not None
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {
        "portable.py",
        "decode.py",
        "custom_cnn.py",
        "config.json",
        "weights.safetensors",
        "input_example.json",
    } <= files
    assert not [name for name in files if name.endswith((".pkl", ".pth", ".pt", ".pickle"))]
    requirements = (folder / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in requirements} == set(package.REQUIREMENTS)
    assert all("==" in line and "+" not in line for line in requirements)


def test_a_network_that_uses_a_layer_twice_is_saved_and_answers_alike(description, images_u8, tmp_path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from torch import nn\n\n\nclass Tied(nn.Sequential):\n    def __init__(self, num_classes):\n"
        "        layer = nn.Conv2d(3, 3, 1)\n"
        "        super().__init__(layer, nn.ReLU(), layer, nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))\n"
    )
    code = f"{own}:Tied"
    network = portable.load_function(code)(3).eval()
    (tmp_path / "model").mkdir()
    classifier = ImageClassifier()
    classifier.load(*package.write_files(replace(description, code=code), network, tmp_path / "model"))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (description.channel_mean, description.channel_std))
    with torch.no_grad():
        expected = network(portable.normalise(torch.from_numpy(images_u8), mean, std)).softmax(dim=1)
    np.testing.assert_allclose(classifier.probabilities(images_u8), expected, rtol=1e-5)


def test_input_that_is_no_uint8_image_is_refused(logged) -> None:
    model = mlflow.pyfunc.load_model(logged.model_uri)
    with pytest.raises(mlflow.MlflowException, match="if they were divided by 255, multiply them back"):
        model.predict(np.full((1, 32, 32, 3), 0.5))
    with pytest.raises(mlflow.MlflowException, match=r"shape \(32, 32, 3\) is not \(number, height, width, channels\)"):
        model.predict(np.zeros((32, 32, 3), np.uint8))


def test_logging_says_nothing_needless(experiment, description, network, images_u8, caplog, capfd) -> None:
    caplog.set_level(logging.WARNING)
    with mlflow.start_run(experiment_id=experiment), warnings.catch_warnings():
        warnings.simplefilter("error")
        package.log_packaged_model(description, network, name="quiet", example_images_u8=images_u8)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "Downloading" not in capfd.readouterr().err


@pytest.mark.slow
def test_verifying_uses_a_clean_process_and_notices_a_difference(logged, images_u8, expected) -> None:
    package.verify_packaged_model(logged.model_uri, images_u8, expected)
    with pytest.raises(RuntimeError, match="probabilities differ by"):
        package.verify_packaged_model(logged.model_uri, images_u8[:2], expected[:2] + 0.01)


def test_verifying_is_done_on_the_cpu(images_u8, expected, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    script = "import os; raise SystemExit('sees ' + repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    monkeypatch.setattr(package, "_VERIFY", script)
    with pytest.raises(RuntimeError, match="sees ''"):
        package.verify_packaged_model("models:/any/1", images_u8, expected)


def test_verifying_notices_answers_that_are_no_numbers(images_u8, expected, monkeypatch) -> None:
    script = "import sys, numpy; numpy.save(sys.argv[3], numpy.full((7, 3), numpy.nan))"
    monkeypatch.setattr(package, "_VERIFY", script)
    with pytest.raises(RuntimeError, match="probabilities differ by nan"):
        package.verify_packaged_model("models:/any/1", images_u8, expected)


@pytest.mark.slow
def test_verifying_notices_a_model_that_needs_this_project(logged, images_u8, expected, tmp_path, monkeypatch) -> None:
    needy = tmp_path / "portable.py"
    needy.write_text("import mlpipe.config\n" + Path(package.portable.__file__).read_text(encoding="utf-8"))
    folder = Path(mlflow.artifacts.download_artifacts(logged.model_uri, dst_path=str(tmp_path / "model")))
    needy.replace(folder / "portable.py")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(RuntimeError, match="does not load in a clean process"):
        package.verify_packaged_model(str(folder), images_u8, expected)


@pytest.mark.slow
def test_an_estimator_answers_alike_in_a_clean_process(experiment, description, images_u8) -> None:
    estimator = logistic_regression.build(LinearSettings(), num_images=7, num_features=3072)
    features = pixels.features(torch.from_numpy(images_u8))
    estimator.fit(features, np.array([0, 1, 2, 0, 1, 2, 0]))
    linear = replace(description, kind="estimator", architecture="logistic_regression", code=PIXELS)
    with mlflow.start_run(experiment_id=experiment):
        logged = package.log_packaged_model(linear, estimator, name="linear", example_images_u8=images_u8)
    package.verify_packaged_model(logged.model_uri, images_u8, estimator.predict_proba(features))


@pytest.mark.slow
def test_mlflow_models_serve_answers_json(logged, images_u8, expected, tmp_path, unused_port) -> None:
    # `mlflow models serve` looks for uvicorn in PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", logged.model_uri, "--env-manager", "local"]
    address = f"http://127.0.0.1:{unused_port}"
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--port", str(unused_port)], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_for(f"{address}/ping", server)
        answer = requests.post(f"{address}/invocations", json={"inputs": images_u8.tolist()}, timeout=60)
        assert answer.status_code == 200, answer.text
        rows = answer.json()["predictions"]
        assert [row["confidence"] for row in rows] == pytest.approx(expected.max(axis=1), rel=1e-4)
        for wrong in ([[[[300, 0, 0]]]], [[[0, 0, 0]]], "text"):
            refused = requests.post(f"{address}/invocations", json={"inputs": wrong}, timeout=60)
            assert refused.status_code == 400, json.dumps(wrong)
        refused = requests.post(f"{address}/invocations", json={"inputs": (images_u8 / 255).tolist()}, timeout=60)
        assert (refused.status_code, "divided by 255" in refused.json()["message"]) == (400, True)
        dark = requests.post(f"{address}/invocations", json={"inputs": [[[[0, 1, 0]]]]}, timeout=60)
        assert "divided by 255" in dark.json()["predictions"][0]["note"]
    finally:
        if server.poll() is None:
            os.killpg(server.pid, 15)
        server.wait(timeout=30)


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server has ended"
        try:
            if requests.get(address, timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.5)
    raise AssertionError("the server does not answer")


def start_from(
    source: str, classes: tuple[str, ...], architecture: str = "custom_cnn"
) -> tuple[nn.Module, InitialNetwork]:
    config = ModelConfig(architecture=architecture, weights=source, name=architecture, train=NetworkSettings(seed=9))
    labels = np.arange(len(classes))
    images = Dataset.in_memory(classes, *[(np.zeros((len(classes), 32, 32, 3), np.uint8), labels)] * 2)
    start = initial_network(config, registry.describe(config, images.manifest), store=None)  # type: ignore[arg-type]
    return start.network, start


def test_a_logged_model_can_be_started_from(logged, network, description) -> None:
    fresh, initial = start_from(logged.model_uri, description.classes)
    assert "; head (" not in initial.source
    assert initial.description.channel_mean == description.channel_mean
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), network.state_dict().values(), strict=True)
    )


def test_classes_of_other_names_get_a_new_head_though_they_are_as_many(logged, network) -> None:
    head = registry.build_network("custom_cnn", num_classes=3, image_size=32, seed=9).state_dict()[
        "classifier.4.weight"
    ]
    fresh, initial = start_from(logged.model_uri, ("x", "y", "z"))
    assert "; head (" in initial.source
    assert torch.equal(fresh.state_dict()["classifier.4.weight"], head)
    assert torch.equal(fresh.state_dict()["features.0.weight"], network.state_dict()["features.0.weight"])


def test_a_registered_name_and_alias_work_too(logged, description) -> None:
    client = mlflow.MlflowClient()
    client.create_registered_model("tests-classifier")
    version = client.create_model_version("tests-classifier", logged.model_uri, model_id=logged.model_id)
    client.set_registered_model_alias("tests-classifier", "champion", version.version)
    assert start_from("models:/tests-classifier@champion", description.classes)[1].sha256


@pytest.mark.parametrize("source", ["models:/", "models:/a/b/c", "models:/a@b@c"])
def test_no_model_uri(source: str) -> None:
    with pytest.raises(UserError, match=f"models: {source} is not allowed; give models:/<name>/<version>"):
        start_from(source, ("x", "y", "z"))


@pytest.mark.usefixtures("experiment")
@pytest.mark.parametrize("source", ["models:/nothing-of-that-name/1", "models:/m-0123456789abcdef"])
def test_no_such_model(source: str) -> None:
    with pytest.raises(UserError, match=f"models: {source} cannot be had from MLflow"):
        start_from(source, ("x", "y", "z"))


def test_a_model_of_another_architecture_is_named(logged, description) -> None:
    with pytest.raises(UserError, match=f"is a custom_cnn, not a resnet18; write custom_cnn={logged.model_uri}"):
        start_from(logged.model_uri, description.classes, "resnet18")


@pytest.mark.usefixtures("experiment")
def test_a_stranger_s_model_is_no_start(experiment: str) -> None:
    with mlflow.start_run(experiment_id=experiment):
        info = mlflow.pyfunc.log_model(
            name="stranger", python_model=lambda model_input: model_input, pip_requirements=["mlflow"]
        )
    with pytest.raises(UserError, match="is not a network that this project logged"):
        start_from(info.model_uri, ("x", "y", "z"))
