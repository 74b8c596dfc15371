"""How a part is added: one new file and one line; or, without changing this project, a file or a package."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from torch import nn

from mlpipe.config import NetworkSettings, RunParams
from mlpipe.data import sources
from mlpipe.data.sources import catalog
from mlpipe.data.sources.catalog import DataSource
from mlpipe.data.storage import allowed
from mlpipe.errors import UserError
from mlpipe.evaluation import metrics
from mlpipe.evaluation.comparison import compare
from mlpipe.evaluation.result import ModelResult
from mlpipe.evaluation.scoring import evaluate_predictions
from mlpipe.models import architectures, estimators, networks
from mlpipe.models.architectures import Architecture
from mlpipe.recipes import resolve
from mlpipe.stages.download import download
from mlpipe.stages.messages import PublishedData, RegisteredModel
from mlpipe.stages.preprocess import preprocess
from mlpipe.stages.train import train
from mlpipe.tracking.runs import TaskContext
from mlpipe.training import optimizers
from mlpipe.training.optimizers import build_optimizers
from tests.stage_stores import stage_stores

NETWORK = """
from torch import nn


class TinyNet(nn.Module):
    def __init__(self, num_classes, image_size):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1)
        self.classifier = nn.Linear(4 * image_size * image_size, num_classes)

    def forward(self, images):
        return self.classifier(self.features(images).relu().flatten(1))
"""

ESTIMATOR = """
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline


def build(settings, *, num_images, num_features):
    return make_pipeline(GaussianNB(var_smoothing=1e-2))
"""

OPTIMIZER = """
from torch.optim import RMSprop


def build(parameters, settings):
    return [RMSprop(parameters, lr=settings.learning_rate)]
"""

METRIC = """
from sklearn.metrics import cohen_kappa_score

from mlpipe.evaluation.metrics import Metric

METRIC = Metric(
    name="kappa",
    title="Cohen's kappa",
    compute=lambda predictions: float(cohen_kappa_score(predictions.labels, predictions.predicted)),
    is_share=False,
)
"""

SOURCE = """
import hashlib
from contextlib import contextmanager

import numpy as np

from mlpipe.data.imageset import ArrayImages
from mlpipe.data.sources.fetch import SourceRef


def fetch(data, store, *, max_bytes):
    store.put_bytes("sources/seed", b"3")
    return SourceRef(key="sources/seed", sha256=hashlib.sha256(b"3").hexdigest(), kind="")


@contextmanager
def open_images(path, data, kind):
    labels = np.arange(60) % 2
    noise = np.random.default_rng(int(path.read_bytes())).integers(0, 100, (60, 8, 8), np.uint8)
    yield ArrayImages(("dark", "bright"), noise + (100 * labels).astype(np.uint8)[:, None, None], labels)
"""

RUN_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def prepared(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PublishedData]:  # noqa: ARG001
    """Published digits of 8×8 pixels; an object store and an MLflow store of their own."""
    with stage_stores(tmp_path_factory.mktemp("how-to-add"), "how-to-add"):
        config, origin = resolve(RunParams(image_size=8)), _origin()
        yield preprocess(config, origin, download(config, origin, on_run=lambda _: None), on_run=lambda _: None)


def _origin() -> TaskContext:
    return TaskContext(dag_id="image_classification", dag_run_id=f"add__{next(RUN_NUMBERS)}", task_id="any")


@pytest.fixture
def trained(prepared: PublishedData) -> Callable[..., RegisteredModel]:
    """The stages `download` and `train` on a model, by the recipe report, for two steps.

    `train` loads the logged model in a process without this project and compares its answers.
    """

    def trained(models: str, *, devices: int = 1, meanwhile: Callable[[str], object] = str) -> RegisteredModel:
        form = RunParams(recipe="report", models=models, devices=devices, image_size=8, epochs=1, batch_size=1024)
        config = resolve(form)
        origin = _origin()
        download(config, origin, on_run=lambda _: None)
        return train(config, origin, config.models[0].name, prepared, on_run=meanwhile).model

    return trained


def _add(package: Any, name: str, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file in a package of this project."""
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])


@pytest.mark.slow
def test_a_network_is_one_file_and_one_entry(
    trained: Callable[..., RegisteredModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add(networks, "tinynet", NETWORK, tmp_path, monkeypatch)
    entry = Architecture(name="tinynet", kind="network", builder="mlpipe.models.networks.tinynet:TinyNet")
    monkeypatch.setattr(architectures, "KNOWN", (*architectures.KNOWN, entry))
    model = trained("tinynet")
    assert (model.name, model.weights) == ("tinynet", "random")
    assert trained(f"tinynet={model.model_uri}").weights == model.model_uri


@pytest.mark.slow
def test_an_estimator_is_one_file_and_one_entry(
    trained: Callable[..., RegisteredModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add(estimators, "naive_bayes", ESTIMATOR, tmp_path, monkeypatch)
    entry = Architecture(
        name="naive_bayes",
        kind="estimator",
        builder="mlpipe.models.estimators.naive_bayes:build",
        default_weights="none",
        takes_any_image_size=True,
    )
    monkeypatch.setattr(architectures, "KNOWN", (*architectures.KNOWN, entry))
    model = trained("naive_bayes")
    assert model.weights == "none"
    assert model.metrics["val/accuracy"] > 0.6


@pytest.mark.slow
@pytest.mark.usefixtures("prepared")
def test_a_data_source_is_one_file_and_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _add(sources, "brightness", SOURCE, tmp_path, monkeypatch)
    entry = DataSource(name="brightness", description="dark and bright noise", module="mlpipe.data.sources.brightness")
    monkeypatch.setattr(catalog, "KNOWN", (*catalog.KNOWN, entry))
    form = RunParams(dataset="brightness", recipe="strong", models="logistic_regression", image_size=8)
    config, origin = resolve(form), _origin()
    data = preprocess(config, origin, download(config, origin, on_run=lambda _: None), on_run=lambda _: None)
    assert (data.name, data.classes) == ("brightness", ("dark", "bright"))
    assert train(config, origin, "logistic_regression", data, on_run=lambda _: None).model.version


def test_a_metric_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _add(metrics, "kappa", METRIC, tmp_path, monkeypatch)
    kappa = importlib.import_module("mlpipe.evaluation.metrics.kappa").METRIC
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, kappa))
    labels, probabilities = np.array([0, 0, 1, 1]), np.eye(2)[[0, 0, 1, 0]]
    evaluation = evaluate_predictions(labels, probabilities, ("a", "b"), seed=0)
    comparison = compare([ModelResult(name="cnn", evaluation=evaluation)])
    assert evaluation.as_metrics()["test/kappa"] == 0.5
    table = [line.split("|") for line in comparison.markdown().splitlines()]
    assert table[2][table[0].index(" Cohen's kappa ")] == " 0.500 "
    [row] = csv.DictReader(io.StringIO(comparison.csv()))
    assert row["kappa"] == "0.5"


def test_an_optimizer_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _add(optimizers, "rmsprop", OPTIMIZER, tmp_path, monkeypatch)
    monkeypatch.setitem(optimizers.OPTIMIZERS, "rmsprop", "mlpipe.training.optimizers.rmsprop:build")
    network = nn.Linear(2, 2)
    [optimizer] = build_optimizers(list(network.parameters()), NetworkSettings(optimizer="rmsprop", learning_rate=0.5))
    assert (type(optimizer).__name__, optimizer.defaults["lr"]) == ("RMSprop", 0.5)
    with pytest.raises(
        ValueError, match="optimizer: 'rmsprob' is unknown; known are adam, muon, normalized_muon, sgd, rmsprop"
    ):
        build_optimizers(list(network.parameters()), NetworkSettings(optimizer="rmsprob"))


@pytest.mark.slow
def test_a_file_of_the_users_own_travels_with_the_model(
    trained: Callable[..., RegisteredModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(allowed.FILES, str(tmp_path))  # as docker-compose.yml does; the copy lies elsewhere
    path = tmp_path / "mynets.py"
    path.write_text(NETWORK)
    model = trained(f"{path}:TinyNet", meanwhile=lambda _: path.write_text("edited during the training"))
    path.write_text(NETWORK)
    assert (model.name, model.architecture, model.weights) == ("tinynet", "tinynet", "random")
    params = mlflow.get_run(model.run_id).data.params
    assert params["network_file_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    [copy] = Path(mlflow.artifacts.download_artifacts(model.model_uri)).rglob("mynets.py")
    assert copy.read_text() == NETWORK
    assert trained(f"{path}:TinyNet={model.model_uri}").weights == model.model_uri


@pytest.mark.slow
def test_a_file_of_the_users_own_is_trained_by_several_processes(
    trained: Callable[..., RegisteredModel], tmp_path: Path
) -> None:
    (tmp_path / "mynets.py").write_text(NETWORK)
    assert trained(f"{tmp_path}/mynets.py:TinyNet", devices=2).version


@pytest.mark.slow
def test_a_network_of_an_installed_package_is_named_in_the_models_requirements(
    trained: Callable[..., RegisteredModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    (information := site / "mynets-1.2.dist-info").mkdir(parents=True)
    (site / "mynets.py").write_text(NETWORK)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: mynets\nVersion: 1.2\n")
    (information / "entry_points.txt").write_text("[mlpipe.models]\ntiny = mynets:TinyNet\n")
    monkeypatch.syspath_prepend(str(site))
    # The stage's clean process sees installed packages alone, and this one is not; it is loaded below.
    monkeypatch.setattr("mlpipe.stages.train.verify_packaged_model", lambda *_: None)
    model = trained("tiny")
    assert model.architecture == "tiny"
    folder = Path(mlflow.artifacts.download_artifacts(model.model_uri))
    assert "mynets==1.2" in (folder / "requirements.txt").read_text().split()
    code = (
        "import sys; sys.modules['mlpipe'] = None; import mlflow, numpy\n"
        "print(len(mlflow.pyfunc.load_model(sys.argv[1]).predict(numpy.zeros((2, 8, 8, 3), 'uint8'))))"
    )
    command = [sys.executable, "-P", "-c", code, str(folder)]
    loaded = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "2"


BROKEN = {
    "no class": ("x = 1", "AttributeError"),
    "not Python": ("class TinyNet(:", "SyntaxError"),
    "a file beside it": ("from blocks import Block", "ModuleNotFoundError"),
    "no network": ("TinyNet = lambda num_classes: 3", "TypeError"),
    "no single image": (NETWORK.replace("flatten(1))", "flatten(1)).squeeze()"), "gives"),
    "fixed classes": (NETWORK.replace("image_size * image_size, num_classes", "image_size * image_size, 10"), "gives"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.usefixtures("prepared")
def test_a_file_that_gives_no_network_is_refused_before_data_are_fetched(fault: str, tmp_path: Path) -> None:
    source, message = BROKEN[fault]
    (tmp_path / "mynets.py").write_text(source)
    config = resolve(RunParams(models=f"{tmp_path}/mynets.py:TinyNet", image_size=8))
    with pytest.raises(UserError, match=rf"^models: .*mynets\.py:TinyNet .*{message}"):
        download(config, _origin(), on_run=lambda _: None)


@pytest.mark.usefixtures("prepared")
def test_misspelt_weights_are_refused_before_data_are_fetched() -> None:
    config = resolve(RunParams(models="resnet18=imagnet"))
    with pytest.raises(UserError, match="^models: 'imagnet' is neither random nor imagenet nor the address"):
        download(config, _origin(), on_run=lambda _: None)


@pytest.mark.usefixtures("prepared")
def test_a_file_that_a_worker_does_not_have_is_named(tmp_path: Path) -> None:
    config = resolve(RunParams(models=f"{tmp_path}/mynets.py:TinyNet"))
    with pytest.raises(UserError, match=r"^models: .*/mynets\.py does not exist where this task runs"):
        download(config, _origin(), on_run=lambda _: None)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("mynets.py:TinyNet", "'mynets.py' is not the whole path of a file"),
        ("https://user:secret@h/mynets.py:TinyNet", "is not the whole path of a file"),
        ("/a/mynets.py:ResNet18", "'ResNet18' would be called 'resnet18', which is another model's name"),
        ("/a/mynets.py:V2", "'V2' would be called 'v2', which is an alias with a meaning of its own"),
        ("/a/mynets.py:Champion", "which is an alias with a meaning of its own"),
        ("/a/mynets.py:TinyNet=imagenet", "no ImageNet weights exist"),
        ("/a/mynets.py:TinyNet,/b/mynets.py:TinyNet", "two models would be called 'tinynet'"),
    ],
)
def test_what_cannot_be_a_network_of_ones_own_is_refused_from_its_name(models: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^models: .*{message}") as refused:
        resolve(RunParams(models=models))
    assert "secret" not in str(refused.value)


def test_no_torch_is_loaded_by_naming_a_network_of_ones_own() -> None:
    code = (
        "import sys; from mlpipe.config import RunParams; from mlpipe.recipes import resolve\n"
        "resolve(RunParams(models='/a/mynets.py:TinyNet,resnet18')); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
