"""A trained model as an MLflow model: logged, fetched back, and checked in a process that knows nothing of mlpipe."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import safetensors.torch
import torch
from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
from numpy.typing import NDArray
from torch import nn

from mlpipe.data.archives import decode
from mlpipe.errors import UserError
from mlpipe.models import architectures, portable
from mlpipe.models.architectures import TIMM
from mlpipe.models.portable import DESCRIPTION_FILE, ESTIMATOR_FILE, WEIGHTS_FILE, ModelDescription

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

logger = logging.getLogger(__name__)

ARTIFACTS = ("description", "parameters", "decoder", "code")
"""Files of a logged model, in the order in which `ImageClassifier.load` takes them."""

REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "safetensors", "scikit-learn", "skops", "torch", "torchvision")
"""What the files that travel import; given by name, for finding it out would load the model in yet another process."""

TOLERANCE = 5e-3
"""Largest difference of a probability between two loads of a model, on the CPU."""

MODEL_URI = re.compile(r"models:/+[^/@#]+([/@][^/@#]+)?")

VERIFY_TIMEOUT_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A logged model."""

    model_uri: str
    """`models:/<model_id>`, what `mlflow.pyfunc.load_model` takes."""
    model_id: str


def log_packaged_model(
    description: ModelDescription,
    predictor: nn.Module | Pipeline,
    *,
    name: str,
    example_images_u8: NDArray[np.uint8],
    tags: Mapping[str, str] | None = None,
) -> PackagedModel:
    """Log the model to the active MLflow run, with signature and input example.

    Args:
        predictor: the network with its weights, or the fitted estimator.
        name: the logged model's name.
        example_images_u8: (N, H, W, 3); the first two go with the model.
    """
    with tempfile.TemporaryDirectory(prefix="mlpipe-package-") as folder:
        paths = write_files(description, predictor, Path(folder))
        with _no_progress_bars(), _no_compiled_code():
            info = mlflow.pyfunc.log_model(
                name=name,
                python_model=portable.__file__,
                artifacts=dict(zip(ARTIFACTS, map(str, paths), strict=False)),
                signature=signature(description.classes),
                input_example=np.ascontiguousarray(example_images_u8[:2]),
                pip_requirements=requirements(description),
                tags=dict(tags or {}),
            )
    return PackagedModel(model_uri=info.model_uri, model_id=info.model_id)


def write_files(description: ModelDescription, predictor: nn.Module | Pipeline, folder: Path) -> tuple[Path, ...]:
    """Write the files of `ARTIFACTS`, code only if no installed package has it; their paths. None holds a pickle."""
    source, _, name = description.code.rpartition(":")
    code_path = _travelling_file(source)
    if code_path is not None:
        taken = (Path(decode.__file__).name, Path(portable.__file__).name)
        is_plain = re.fullmatch(r"\w+\.py", code_path.name, re.ASCII) and code_path.name not in taken
        code_path = Path(shutil.copy(code_path, folder / (code_path.name if is_plain else "network.py")))
        description = replace(description, code=f"{code_path.name}:{name}")
    description_path = folder / DESCRIPTION_FILE
    description.write(description_path)
    if isinstance(predictor, nn.Module):
        parameters_path = folder / WEIGHTS_FILE
        # Clones: a layer of two names has its tensors twice, and safetensors takes none that are shared.
        state = {
            key: value.clone(memory_format=torch.contiguous_format) for key, value in predictor.state_dict().items()
        }
        safetensors.torch.save_file(state, parameters_path)
    else:
        parameters_path = folder / ESTIMATOR_FILE
        portable.import_skops().dump(predictor, parameters_path)
    decoder_path = Path(shutil.copy(decode.__file__, folder))
    paths = (description_path, parameters_path, decoder_path)
    return paths if code_path is None else (*paths, code_path)


def _travelling_file(source: str) -> Path | None:
    """The file of a module of this project, or of the user; `None` for a module of an installed package."""
    if source.endswith(".py"):
        return Path(source)
    spec = importlib.util.find_spec(source) if source.startswith("mlpipe.") else None
    return Path(spec.origin) if spec and spec.origin else None


def requirements(description: ModelDescription) -> list[str]:
    """What the model needs to load, with the versions that are installed here."""
    wanted = [f"{package}=={version(package).partition('+')[0]}" for package in REQUIREMENTS]
    if not TIMM.fullmatch(description.architecture) and (
        description.code.startswith("mlpipe.") or ".py:" in description.code
    ):
        return wanted
    distribution = architectures.find(description.architecture).distribution
    return [*wanted, distribution] if distribution else wanted


def signature(classes: tuple[str, ...]) -> ModelSignature:
    """Raw images in, label, confidence and probabilities out."""
    outputs = [ColSpec("string", "label"), ColSpec("float", "confidence")]
    outputs += [ColSpec("float", f"probability_{name}") for name in classes]
    # Of objects, which MLflow passes on as they came. As uint8 its server would cut images that were divided by 255 to
    # zeros, and answer; `ImageClassifier` refuses them.
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(object), (-1,))]),
        outputs=Schema(list(outputs)),
        params=ParamSchema([ParamSpec("min_confidence", "double", 0.0)]),
    )


def read_network(folder: Path) -> portable.ImageClassifier:
    """The network of the files of `write_files`, as it predicts, on the CPU or a GPU."""
    source = ModelDescription.read(folder / DESCRIPTION_FILE).code.rpartition(":")[0]
    classifier = portable.ImageClassifier()
    code = folder / source if source.endswith(".py") else None
    classifier.load(folder / DESCRIPTION_FILE, folder / WEIGHTS_FILE, code=code)
    return classifier


def download_packaged_model(model_uri: str, folder: Path, *, field: str = "models") -> tuple[ModelDescription, Path]:
    """Fetch the description and weights of a network that this project logged.

    Raises:
        UserError: no such model, or not a network of this project.
    """
    if not MODEL_URI.fullmatch(model_uri):
        raise UserError(f"{field}: {model_uri} is not allowed; give models:/<name>/<version>, @<alias> or models:/<id>")
    try:
        with _no_progress_bars():
            local = Path(mlflow.artifacts.download_artifacts(model_uri, dst_path=str(folder)))
    except MlflowException as error:
        if error.get_http_status_code() >= 500:
            raise  # the server, not the user
        raise UserError(f"{field}: {model_uri} cannot be had from MLflow ({str(error)[:300]})") from error
    found = {path.name: path for path in local.rglob("*") if path.is_file()}
    if DESCRIPTION_FILE not in found or WEIGHTS_FILE not in found:
        raise UserError(f"{field}: {model_uri} is not a network that this project logged; give one that is")
    return ModelDescription.read(found[DESCRIPTION_FILE]), found[WEIGHTS_FILE]


@contextmanager
def _no_compiled_code() -> Iterator[None]:
    """MLflow runs the model's file while it logs it; what Python compiles then would be logged as well."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """MLflow draws one per file it copies; in a task's log they are litter."""
    before = MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.get_raw()
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    try:
        yield
    finally:
        if before is None:
            MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.unset()
        else:
            MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(before)


_VERIFY = """
import sys
sys.modules["mlpipe"] = None  # importing it now fails
import mlflow, numpy
model_uri, images, answers = sys.argv[1:]
model = mlflow.pyfunc.load_model(model_uri, suppress_warnings=True)  # does not compare all installed versions
numpy.save(answers, model.predict(numpy.load(images)).filter(regex="^probability_"))
"""


def verify_packaged_model(model_uri: str, images_u8: NDArray[np.uint8], expected: NDArray[np.floating[Any]]) -> None:
    """Load the model as a stranger would, in a clean process without mlpipe or pickle, and compare its answers.

    Args:
        images_u8: (N, H, W, 3).
        expected: (N, number of classes) probabilities.

    Raises:
        RuntimeError: it does not load, or answers differently.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mlpipe-verify-") as folder:
        images, answers = Path(folder) / "images.npy", Path(folder) / "answers.npy"
        np.save(images, np.ascontiguousarray(images_u8))
        result = subprocess.run(
            [sys.executable, "-I", "-c", _VERIFY, model_uri, str(images), str(answers)],
            cwd=folder,
            env={
                **os.environ,
                # What is expected was computed on the CPU. A GPU rounds otherwise, by more than the tolerance at times.
                "CUDA_VISIBLE_DEVICES": "",
                "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
                "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
                "MLFLOW_REGISTRY_URI": mlflow.get_registry_uri(),
                "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            },
            capture_output=True,
            text=True,
            timeout=VERIFY_TIMEOUT_SECONDS,
            check=False,
        )
        if result.returncode != 0:
            raise RuntimeError(f"{model_uri} does not load in a clean process:\n{result.stderr[-4000:]}")
        difference = float(np.abs(np.load(answers) - expected).max())
    if not difference <= TOLERANCE:  # nor if it is no number
        raise RuntimeError(f"{model_uri}: probabilities differ by {difference:.2g} after loading it in a clean process")
    logger.info(
        "%s loads in a clean process and answers alike (to %.1g) in %.1f s",
        model_uri,
        difference,
        time.monotonic() - started,
    )
