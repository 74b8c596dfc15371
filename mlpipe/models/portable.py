"""What travels with every logged model: its description, and the class that predicts.

MLflow copies this file beside the weights and runs it when the model is loaded ("models from code"). The file that
builds the network, or makes the estimator's features, travels as an artifact and is run from here. So a model works
where mlpipe is not installed and nothing is unpickled. Hence: no import from mlpipe in here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import logging
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import mlflow
import numpy as np
import pandas as pd
import safetensors.torch
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "weights.safetensors"
ESTIMATOR_FILE = "estimator.skops"
DESCRIPTION_FILE = "config.json"
FORMAT = 2
"""Of `DESCRIPTION_FILE`; 1 named no code."""

DARK = "no pixel is above 1 of 255; if the image was divided by 255, give its raw pixels"

SMALLEST = 1e-12
"""Probabilities are taken to be at least this where their logarithm is."""

UNSURE = "unsure"
"""Label of an image whose most probable class is less probable than the caller wants."""

PIXELS_PER_BATCH = 256 * 32 * 32
"""Bounds the memory of one forward pass: 256 images of 32×32, 16 of 128×128.

Three maps of 64 channels of them, which a ResNet holds at once, take 0.2 GiB in float32.
"""

MOST_TIMES_ON_A_GPU = 32
"""On a GPU, which computes small batches no faster than larger ones: so many times the pixels, if it has the memory."""


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """All that is needed, beside the weights, to turn raw images into labels."""

    kind: Literal["network", "estimator"]
    """Whether PyTorch or scikit-learn computes the probabilities."""
    architecture: str
    """Name of the network or estimator."""
    classes: tuple[str, ...]
    """Class names in the order of the outputs."""
    image_size: int
    """Height and width to which images are resized, pixels."""
    channel_mean: tuple[float, float, float]
    """Subtracted from each channel of a network's input, in units of 0..1."""
    channel_std: tuple[float, float, float]
    """Divides each channel of a network's input, in units of 0..1."""
    variant: Literal["standard", "small_images"] = "standard"
    """Form of the network, as its builder takes it."""
    width: float = 1.0
    """Multiple of the network's numbers of channels, as its builder takes it."""
    depth: int = 1
    """Multiple of the number of convolutions in each of the network's stages, as its builder takes it."""
    input_size: int | None = None
    """Height and width to which a network enlarges its input, pixels; `None`: not at all."""
    test_time_averaging: str = "none"
    """none; flip: the mean of the probabilities of an image and of its mirror image; flip_shift: the mean of these and
    of their mean for two views of the image, shifted by a pixel down and right, and up and left."""
    temperature: float = 1.0
    """Divides the logarithms of the probabilities, fitted so that they are as high as the share that is right."""
    uniform_share: float = 0.0
    """Of the uniform distribution, mixed with the probabilities after that; fitted together with it."""
    code: str = ""
    """What builds the network or makes the estimator's features, as `load_function` takes it. Empty where an earlier
    version of this project logged the model."""
    outline: Literal["meta", "cpu"] = "cpu"
    """Device on which the network is built before its weights are read."""
    file_size: int | None = None
    """Height and width to which image files are decoded, pixels: those of the data set's images. `None`: `image_size`.
    """

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """The inverse of `write`."""
        values = json.loads(path.read_text(encoding="utf-8"))
        if (version := values.pop("format")) not in (1, FORMAT):
            raise ValueError(f"{path.name}: format {version} is unknown; this file reads formats 1 and {FORMAT}")
        for name in ("classes", "channel_mean", "channel_std"):
            values[name] = tuple(values[name])
        return cls(**values)


def load_function(code: str, folder: Path | None = None) -> Any:
    """The function or class that a reference names.

    Args:
        code: `module:name` of an installed package, or `file.py:name`.
        folder: where the file is; `None`: the reference has its whole path.

    Raises:
        FileNotFoundError: there is no such file.
        AttributeError: nothing in it has that name.
    """
    source, _, name = code.rpartition(":")
    if not source.endswith(".py"):
        return getattr(importlib.import_module(source), name)
    path = (folder or Path()) / source
    content = path.read_bytes()
    # By content: two models that are loaded side by side may have files of one name.
    module_name = f"model_code_{hashlib.sha256(content).hexdigest()[:32]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[module_name] = module  # before it runs: dataclasses look for it there
        try:
            exec(compile(content, str(path), "exec"), module.__dict__)  # noqa: S102 - the model's own code
        except BaseException:
            del sys.modules[module_name]
            raise
    return getattr(sys.modules[module_name], name)


def build_network(builder: Any, **values: Any) -> nn.Module:
    """Call a builder with those of the values that it takes."""
    taken = inspect.signature(builder).parameters
    return builder(**{name: value for name, value in values.items() if name in taken})


def normalise(images_u8: Tensor, channel_mean: Tensor, channel_std: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 with channels last in memory, which CPUs compute fastest with.

    Args:
        channel_mean: (3, 1, 1) in units of 0..1.
        channel_std: (3, 1, 1) in units of 0..1.
    """
    images = images_u8.permute(0, 3, 1, 2).to(torch.float32)
    return images.sub_(channel_mean * 255).mul_(1 / (channel_std * 255))


def resize(images_u8: Tensor, image_size: int) -> Tensor:
    """(B, H, W, 3) uint8 to (B, image_size, image_size, 3) uint8: bilinear, with antialiasing when shrinking."""
    if images_u8.shape[1:3] == (image_size, image_size):
        return images_u8
    # Here, since its import takes longer than most calls; the same below.
    from torchvision.transforms.v2 import functional as transforms

    size = [image_size, image_size]
    return transforms.resize(images_u8.permute(0, 3, 1, 2), size, antialias=True).permute(0, 2, 3, 1)


def enlarge(images: Tensor, input_size: int | None) -> Tensor:
    """(B, 3, H, W) float32 to (B, 3, input_size, input_size), bilinear; the very same tensor for `None`."""
    if input_size is None:
        return images
    return F.interpolate(images, size=(input_size, input_size), mode="bilinear")


def images_per_pass(num_pixels: int, device: torch.device) -> int:
    """How many images of so many pixels each go through a network at once."""
    times = 1
    if device.type == "cuda":
        gibibytes = torch.cuda.get_device_properties(device).total_memory >> 30
        times = max(1, min(MOST_TIMES_ON_A_GPU, gibibytes))  # about a fifth of the memory, or less
    return max(1, times * PIXELS_PER_BATCH // num_pixels)


def network_probabilities(
    network: nn.Module, description: ModelDescription, images_u8: Tensor, mean: Tensor, std: Tensor
) -> NDArray[np.float32]:
    """(B, H, W, 3) uint8 images of the model's own size to (B, number of classes) probabilities.

    Args:
        network: in evaluation mode.
        mean, std: the description's, (3, 1, 1), on the network's device.
    """
    images = enlarge(normalise(images_u8, mean, std), description.input_size)
    if description.test_time_averaging == "none":
        return calibrated(network(images).float().softmax(dim=1).cpu().numpy(), description)

    def both_ways(view: Tensor) -> Tensor:
        return (network(view).float().softmax(dim=1) + network(view.flip(3)).float().softmax(dim=1)) / 2

    probabilities = both_ways(images)
    if description.test_time_averaging == "flip_shift":
        height, width = images.shape[2:]
        padded = F.pad(images, (1, 1, 1, 1), "reflect")
        shifted = [both_ways(padded[:, :, at : at + height, at : at + width]) for at in (0, 2)]
        probabilities = probabilities / 2 + (shifted[0] + shifted[1]) / 4
    return calibrated(probabilities.cpu().numpy(), description)


def calibrated(probabilities: NDArray[np.float32], description: ModelDescription) -> NDArray[np.float32]:
    """(N, K) probabilities by the description's temperature and uniform share; the very same ones where it has none."""
    if description.temperature != 1:
        logs = np.log(np.maximum(probabilities, SMALLEST)) / description.temperature
        powers = np.exp(logs - logs.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
    if share := description.uniform_share:
        probabilities = (1 - share) * probabilities + share / probabilities.shape[1]
    return probabilities.astype(np.float32, copy=False)


def estimator_probabilities(
    estimator: Any, description: ModelDescription, features: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(B, D) features to (B, number of classes) probabilities of a fitted estimator."""
    return calibrated(estimator.predict_proba(features).astype(np.float32), description)


def import_skops() -> Any:
    """`skops.io`, imported when it is needed: it asks every loaded module for scipy's functions.

    That takes seconds beside many modules, and wakes the deprecation warnings of all of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import skops.io
    return skops.io


class BadInputError(ValueError, MlflowException):
    """What a caller gave are no images; MLflow's server answers 400 with the reason."""

    def __init__(self, message: str) -> None:
        MlflowException.__init__(self, message, error_code=INVALID_PARAMETER_VALUE)


def check_images(values: Any) -> NDArray[np.uint8]:
    """Bring what a caller gave into (N, H, W, C) uint8, C being 1 or 3.

    Whole numbers of any type within 0..255 are accepted, so that lists and JSON work.

    Raises:
        BadInputError: another shape, or values that are not pixels.
    """
    images = np.asarray(values)
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise BadInputError(
            f"images: shape {images.shape} is not (number, height, width, channels) with 1 or 3 channels; "
            "a single image needs a first axis of length 1, and channels come last"
        )
    if len(images) and not images.size:
        raise BadInputError(f"images: shape {images.shape} has no pixels")
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind not in "iufb":
        raise BadInputError(f"images: values of type {images.dtype} are not pixels; give whole numbers from 0 to 255")
    with np.errstate(invalid="ignore"):
        as_u8 = images.astype(np.uint8)
    if not np.array_equal(as_u8, images):
        raise BadInputError(
            f"images: values from {images.min()} to {images.max()} of type {images.dtype} are not all whole numbers "
            "from 0 to 255; give raw pixels (if they were divided by 255, multiply them back)"
        )
    return as_u8


class ImageClassifier(PythonModel):
    """Raw images in, a DataFrame with `label`, `confidence` and one `probability_<class>` per class out."""

    def load_context(self, context: Any) -> None:
        """Read what was logged with the model."""
        files = {name: Path(path) for name, path in context.artifacts.items()}
        self.load(files["description"], files["parameters"], files.get("decoder"), files.get("code"))

    def load(self, description: Path, parameters: Path, decoder: Path | None = None, code: Path | None = None) -> None:
        """Read the files that make a model.

        Args:
            description: JSON of a `ModelDescription`.
            parameters: `.safetensors` of a network or `.skops` of an estimator.
            decoder: the file that decodes image files; `None`: they are not labelled.
            code: the file that the description's `code` names; `None` where an installed package has it.
        """
        self.description = ModelDescription.read(description)
        self.decoder = decoder
        self.device = torch.device("cpu")
        self.mean = self.std = torch.empty(0)
        function = load_function(self.description.code, code.parent if code else None)
        if self.description.kind == "estimator":
            self.features = function
            self.predictor = import_skops().load(parameters)  # no types beyond skops' own list
            return
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.predictor = self._network(function, OrderedDict(safetensors.torch.load_file(parameters)))
        self.mean = torch.tensor(self.description.channel_mean, device=self.device).view(3, 1, 1)
        self.std = torch.tensor(self.description.channel_std, device=self.device).view(3, 1, 1)

    def _network(self, builder: Any, state: OrderedDict[str, Tensor]) -> nn.Module:
        described = self.description
        with torch.device(described.outline):
            network = build_network(
                builder,
                architecture=described.architecture,
                num_classes=len(described.classes),
                image_size=described.input_size or described.image_size,
                variant=described.variant,
                width=described.width,
                depth=described.depth,
            )
        # The versions of the layers' formats, which mnasnet insists on and safetensors does not hold.
        state._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
        network.load_state_dict(state, strict=True, assign=True)
        network = network.eval().requires_grad_(False).to(self.device)
        return network.to(memory_format=torch.channels_last)

    # The hint is plain np.ndarray because MLflow reads it and warns of any other, also of none.
    def predict(
        self,
        context: Any,  # noqa: ARG002
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Label images.

        Args:
            model_input: (N, H, W, C) uint8 pixels, C being 1 (grey) or 3 (RGB), any N, H and W; or nested lists of
                them; or a sequence of N arrays (H, W, C) of different sizes.
            params: `min_confidence`, 0 to 1: images below it are labelled `unsure`.

        Returns:
            N rows; `confidence` is the label's probability. Where an image has no pixel above 1 of 255 there is a
            column `note` that says so: it may have been divided by 255, and cut to whole numbers on its way here.

        Raises:
            BadInputError: the input is no such images.
        """
        images = _as_arrays(model_input)
        frame = self._frame(self._probabilities(images), params)
        if isinstance(images, list):
            brightest = np.array([image.max() for image in images])
        else:
            brightest = images.max(axis=(1, 2, 3), initial=0)
        if (brightest <= 1).any():
            frame["note"] = np.where(brightest <= 1, DARK, "")
        return frame

    def predict_files(self, files: Sequence[str | Path | bytes], params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Label image files, decoded as those of the data set were.

        Args:
            files: paths, or the bytes of files.
            params: as of `predict`.

        Returns:
            A row per file: as `predict`, and `error`, which says why a file could not be read, or is empty; the other
            columns of such a row are empty.

        Raises:
            RuntimeError: the model was logged by a version of this project that did not send its decoder along.
        """
        size = self.description.file_size or self.description.image_size
        images_u8, errors = self._decoded(files, size)
        good = np.array([not error for error in errors], bool)
        frame = self._frame(self.probabilities(images_u8[good]), params)
        frame.index = pd.Index(np.flatnonzero(good))
        frame = frame.reindex(range(len(files)))
        frame["error"] = errors
        return frame

    def _decoded(self, files: Sequence[str | Path | bytes], size: int) -> tuple[NDArray[np.uint8], list[str]]:
        """(N, size, size, 3) pixels, and why a file has none, or an empty text."""
        if self.decoder is None:
            raise RuntimeError("this model labels arrays alone; register it anew to label files")
        decode = load_function(f"{self.decoder.name}:decode_image", self.decoder.parent)
        images_u8, errors = np.zeros((len(files), size, size, 3), np.uint8), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which are refused by their size
            for file, pixels in zip(files, images_u8, strict=True):
                error = ""
                try:
                    decode(file if isinstance(file, bytes) else Path(file).read_bytes(), pixels, Counter())
                except (OSError, ValueError) as reason:
                    error = reason.strerror or str(reason) if isinstance(reason, OSError) else str(reason)
                errors.append(error)
        return images_u8, errors

    def probabilities(self, images: Any) -> NDArray[np.float32]:
        """(N, number of classes) probabilities of images as in `predict`."""
        return self._probabilities(_as_arrays(images))

    def _probabilities(self, images: NDArray[Any] | list[NDArray[Any]]) -> NDArray[np.float32]:
        if isinstance(images, list):
            return np.concatenate([self._probabilities(image[None]) for image in images])
        images_u8 = check_images(images)
        size = self.description.input_size or self.description.image_size
        num_pixels = max(size**2, images_u8.shape[1] * images_u8.shape[2])
        batch_size = images_per_pass(num_pixels, self.device)
        parts = [self._batch(images_u8[i : i + batch_size]) for i in range(0, len(images_u8), batch_size)]
        return np.concatenate(parts) if parts else np.empty((0, len(self.description.classes)), np.float32)

    @torch.inference_mode()
    def _batch(self, images_u8: NDArray[np.uint8]) -> NDArray[np.float32]:
        copied = np.array(images_u8, order="C")  # what the caller gave may be read-only, or mirrored in place
        # On the CPU: to shrink an image a hundredfold, CUDA's kernel needs more shared memory than there is.
        images = resize(torch.from_numpy(copied).expand(-1, -1, -1, 3), self.description.image_size).to(self.device)
        if self.description.kind == "estimator":
            return estimator_probabilities(self.predictor, self.description, self.features(images))
        return network_probabilities(self.predictor, self.description, images, self.mean, self.std)

    def _frame(self, probabilities: NDArray[np.float32], params: dict[str, Any] | None) -> pd.DataFrame:
        wanted = (params or {}).get("min_confidence") or 0.0
        if not isinstance(wanted, int | float) or not 0 <= wanted <= 1:
            raise BadInputError(f"min_confidence: {wanted!r} is not allowed; give a number from 0 to 1")
        names = np.array(self.description.classes, dtype=object)
        columns: dict[str, Any] = {"label": names[probabilities.argmax(axis=1)] if len(probabilities) else names[:0]}
        columns["confidence"] = probabilities.max(axis=1, initial=0)
        columns["label"][columns["confidence"] < wanted] = UNSURE
        columns |= {f"probability_{name}": probabilities[:, i] for i, name in enumerate(self.description.classes)}
        return pd.DataFrame(columns)


def _as_arrays(images: Any) -> NDArray[Any] | list[NDArray[Any]]:
    """One array, or a list of arrays where the images differ in size."""
    if isinstance(images, np.ndarray) and images.dtype != object:  # of objects: as MLflow's server passes JSON on
        return images
    try:
        return np.array(images.tolist() if isinstance(images, np.ndarray) else images)
    except ValueError:  # of different sizes
        return [np.array(image.tolist() if isinstance(image, np.ndarray) else image) for image in images]


if __name__ != "mlpipe.models.portable":
    # Run by MLflow as the code of a model, not imported by the training code.
    mlflow.models.set_model(ImageClassifier())
