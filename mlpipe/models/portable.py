"""What travels with every logged model: the networks, and the class that predicts.

MLflow copies this one file beside the weights and runs it when the model is loaded ("models from code"), so a
model works where mlpipe is not installed and nothing is unpickled. Hence: no import from mlpipe in here. The
training code imports the networks from this file; each is written once.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import mlflow
import numpy as np
import pandas as pd
import safetensors.torch
import torch
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "weights.safetensors"
ESTIMATOR_FILE = "estimator.skops"
DESCRIPTION_FILE = "config.json"

TRUSTED_TYPES: tuple[str, ...] = ()
"""Types beyond skops' own list that an estimator file may hold: none."""

PIXELS_PER_BATCH = 256 * 32 * 32
"""Bounds the memory of one forward pass: 256 images of 32×32, 16 of 128×128."""

HOG_CELL = 4
"""Height and width of a cell of oriented gradients, pixels."""
HOG_ORIENTATIONS = 9


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
    """Form of the network, as `build_network` takes it."""
    input_size: int | None = None
    """Height and width to which a network enlarges its input, pixels; `None`: not at all."""
    test_time_averaging: str = "none"
    """none, or flip: the mean of the probabilities of an image and of its mirror image."""

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps({"format": 1, **asdict(self)}, indent=2, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """The inverse of `write`."""
        values = json.loads(path.read_text(encoding="utf-8"))
        if (version := values.pop("format")) != 1:
            raise ValueError(f"{path.name}: format {version} is unknown; this file reads format 1")
        for name in ("classes", "channel_mean", "channel_std"):
            values[name] = tuple(values[name])
        return cls(**values)


class ByteDropout(nn.Dropout):
    """Dropout whose probability is a multiple of 1/256.

    On a CPU it draws one random byte for an element, eight from each number of the generator; `nn.Dropout` draws a
    floating-point number each, serially, which was a fifth of the report's network's whole step.
    """

    def forward(self, values: Tensor) -> Tensor:
        """As `nn.Dropout`."""
        if not self.training or values.device.type != "cpu":
            return super().forward(values)
        numbers = torch.empty((values.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        random_bytes = numbers.view(torch.uint8)[: values.numel()].view(values.shape)
        kept = (random_bytes >= round(self.p * 256)).to(values.dtype)
        return values * kept.mul_(1 / (1 - self.p))


def adaptive_average(features: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to (B, C, size, size), like PyTorch's own, whose gradients are not repeatable on a GPU."""
    for _ in range(2):
        length = features.shape[-1]
        weights = F.adaptive_avg_pool1d(torch.eye(length, device=features.device), size).T
        features = F.linear(features, weights).transpose(-1, -2)
    return features


class CustomCNN(nn.Module):
    """The report's network: two convolutions with pooling, then two linear layers.

    Images of any size are pooled to 8×8 features, which for 32×32 images they already are.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(inplace=True),  # after pooling, with which it commutes: a quarter of the work
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Sequential(
            ByteDropout(0.5),
            nn.Linear(64 * 8 * 8, 256),
            nn.ReLU(inplace=True),
            ByteDropout(0.25),
            nn.Linear(256, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32, normalised, to (B, num_classes) logits."""
        features = self.features(images)
        if features.shape[-2:] != (8, 8):
            features = adaptive_average(features, 8)
        return self.classifier(features.flatten(1))


class ResidualBlock(nn.Module):
    """Convolution, pooling to half the size, and a second convolution beside a shortcut."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.shrink = nn.Sequential(
            nn.Conv2d(num_inputs, num_outputs, kernel_size=3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(num_outputs),
            nn.ReLU(inplace=True),
        )
        self.refine = nn.Sequential(
            nn.Conv2d(num_outputs, num_outputs, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(num_outputs),
            nn.ReLU(inplace=True),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, num_inputs, H, W) to (B, num_outputs, H // 2, W // 2)."""
        small = self.shrink(images)
        return small + self.refine(small)


class SmallResidualCNN(nn.Module):
    """The `small_images` form of `custom_cnn`: a 2×2 convolution, three residual blocks, the maximum, a linear layer.

    After the fast CIFAR-10 networks of David Page ("How to train your ResNet") and Keller Jordan ("94% on CIFAR-10 in
    3.29 seconds on a single GPU", arXiv:2404.00498), narrower. The first convolution is not trained: the training sets
    it to whiten the 2×2 patches of its images.
    """

    STEM_CHANNELS = 24

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, self.STEM_CHANNELS, kernel_size=2).requires_grad_(False)
        self.blocks = nn.Sequential(
            ResidualBlock(self.STEM_CHANNELS, 64), ResidualBlock(64, 192), ResidualBlock(192, 192)
        )
        self.classifier = nn.Linear(192, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32, normalised, to (B, num_classes) logits."""
        features = self.blocks(F.relu(self.stem(images)))
        return self.classifier(features.amax(dim=(2, 3))) / 8


def build_network(architecture: str, num_classes: int, image_size: int, variant: str = "standard") -> nn.Module:
    """A network with random weights that maps (B, 3, image_size, image_size) to (B, num_classes) logits.

    Args:
        architecture: `custom_cnn` or the name of a classification network of torchvision.
        variant: `standard`, or `small_images`, of which custom_cnn and the resnets have one.
    """
    if architecture == "custom_cnn":
        return SmallResidualCNN(num_classes) if variant == "small_images" else CustomCNN(num_classes)
    import torchvision

    if variant == "small_images":
        return _small_images_resnet(torchvision.models.get_model(architecture, weights=None, num_classes=num_classes))
    options: dict[str, Any] = {}
    if architecture in ("googlenet", "inception_v3"):
        # Their auxiliary outputs only helped before batch normalisation. transform_input makes them take the same
        # normalisation as all others, also with ImageNet weights.
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    elif architecture.startswith("vit_"):
        options = {"image_size": image_size}
    elif architecture.startswith("maxvit_"):
        options = {"input_size": (image_size, image_size)}
    return torchvision.models.get_model(architecture, weights=None, num_classes=num_classes, **options)


def _small_images_resnet(network: Any) -> nn.Module:
    """Change one of torchvision's resnets, in place, so that its stages give 16, 16, 8 and 4 pixels of 32.

    The first convolution is 3×3 without stride, and no pooling follows it (K. He et al., "Deep Residual Learning",
    section 4.2). Three of the stages halve their maps, and none skips pixels to do so: the maximum behind the
    convolution, as fast CIFAR-10 networks take it, and the mean in the shortcut (T. He et al., "Bag of Tricks", CVPR
    2019). The initial weights are PyTorch's own, which are smaller than torchvision's.
    """
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    for stage in (network.layer1, network.layer3, network.layer4):
        first = stage[0]
        number = 2 if hasattr(first, "conv3") else 1  # of the block's first 3×3 convolution
        setattr(first, f"bn{number}", nn.Sequential(nn.MaxPool2d(2), first.get_submodule(f"bn{number}")))
        first.downsample = nn.Sequential(nn.AvgPool2d(2), *(first.downsample or ()))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            module.reset_parameters()
    return network


def outline_network(architecture: str, num_classes: int, image_size: int, variant: str = "standard") -> nn.Module:
    """A network as `build_network` makes it, but without weights: on the meta device it costs no time and no memory."""
    # regnets compute their widths with tensors, which the meta device cannot.
    with torch.device("cpu" if architecture.startswith("regnet_") else "meta"):
        return build_network(architecture, num_classes, image_size, variant)


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


def estimator_features(images_u8: Tensor, architecture: str) -> NDArray[np.float32]:
    """What an estimator sees of (B, H, W, 3) uint8 images: (B, D) float32.

    `hog_logistic_regression` gets oriented gradients and coarse colours, every other one the pixels in 0..1.
    """
    if architecture == "hog_logistic_regression":
        images = images_u8.permute(0, 3, 1, 2).to(torch.float32) / 255
        colours = F.avg_pool2d(images, HOG_CELL).flatten(1) / 2
        return torch.cat([oriented_gradients(images), colours], dim=1).numpy()
    return images_u8.reshape(len(images_u8), -1).numpy().astype(np.float32) / np.float32(255)


def oriented_gradients(images: Tensor) -> Tensor:
    """Histograms of oriented gradients: (B, 3, H, W) in 0..1 to (B, D).

    After Dalal and Triggs, "Histograms of Oriented Gradients for Human Detection" (CVPR 2005): square root of the
    intensities, at each pixel the channel of largest gradient, 9 unsigned orientations shared between the two nearest,
    cells of 4×4 pixels, blocks of 2×2 cells normalised by L2 with clipping at 0.2.
    """
    padded = F.pad(images.sqrt(), (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    strongest = (across.square() + down.square()).argmax(dim=1, keepdim=True)
    across, down = across.gather(1, strongest), down.gather(1, strongest)  # (B, 1, H, W)
    magnitude = torch.hypot(across, down)
    position = torch.atan2(down, across) * (HOG_ORIENTATIONS / torch.pi)
    below = position.floor()
    share = position - below
    votes = torch.zeros(len(images), HOG_ORIENTATIONS, *images.shape[2:])
    votes.scatter_(1, below.long() % HOG_ORIENTATIONS, magnitude * (1 - share))
    votes.scatter_add_(1, (below.long() + 1) % HOG_ORIENTATIONS, magnitude * share)
    blocks = F.unfold(F.avg_pool2d(votes, HOG_CELL), kernel_size=2)  # (B, 4·orientations, number of blocks)
    for _ in range(2):
        blocks = blocks / (blocks.square().sum(dim=1, keepdim=True) + 1e-4).sqrt()
        blocks = blocks.clamp(max=0.2)
    return blocks.flatten(1)


def predict_probabilities(
    predictor: Any, description: ModelDescription, images_u8: Tensor, mean: Tensor, std: Tensor
) -> NDArray[np.float32]:
    """(B, H, W, 3) uint8 images of the model's own size to (B, number of classes) probabilities.

    Args:
        predictor: a network in evaluation mode, or a fitted estimator.
        mean, std: the description's, (3, 1, 1), on the network's device.
    """
    if description.kind == "estimator":
        return predictor.predict_proba(estimator_features(images_u8, description.architecture)).astype(np.float32)
    images = enlarge(normalise(images_u8, mean, std), description.input_size)
    probabilities = predictor(images).float().softmax(dim=1)
    if description.test_time_averaging == "flip":
        probabilities = (probabilities + predictor(images.flip(3)).float().softmax(dim=1)) / 2
    return probabilities.cpu().numpy()


def import_skops() -> Any:
    """`skops.io`, imported when it is needed: it asks every loaded module for scipy's functions.

    That takes seconds beside many modules, and wakes the deprecation warnings of all of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import skops.io
    return skops.io


def check_images(values: Any) -> NDArray[np.uint8]:
    """Bring what a caller gave into (N, H, W, C) uint8, C being 1 or 3.

    Whole numbers of any type within 0..255 are accepted, so that lists and JSON work.

    Raises:
        ValueError: another shape, or values that are not pixels.
    """
    images = np.asarray(values)
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"images: shape {images.shape} is not (number, height, width, channels) with 1 or 3 channels; "
            "a single image needs a first axis of length 1, and channels come last"
        )
    if len(images) and not images.size:
        raise ValueError(f"images: shape {images.shape} has no pixels")
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind not in "iufb":
        raise ValueError(f"images: values of type {images.dtype} are not pixels; give whole numbers from 0 to 255")
    with np.errstate(invalid="ignore"):
        as_u8 = images.astype(np.uint8)
    if not np.array_equal(as_u8, images):
        raise ValueError(
            f"images: values from {images.min()} to {images.max()} of type {images.dtype} are not all whole numbers "
            "from 0 to 255; give raw pixels (if they were divided by 255, multiply them back)"
        )
    return as_u8


class ImageClassifier(PythonModel):
    """Raw images in, a DataFrame with `label`, `confidence` and one `probability_<class>` per class out."""

    def load_context(self, context: Any) -> None:
        """Read the description and the weights that were logged with the model."""
        self.load(Path(context.artifacts["description"]), Path(context.artifacts["parameters"]))

    def load(self, description: Path, parameters: Path) -> None:
        """Read the two files that make a model.

        Args:
            description: JSON of a `ModelDescription`.
            parameters: `.safetensors` of a network or `.skops` of an estimator.
        """
        self.description = ModelDescription.read(description)
        self.device = torch.device("cpu")
        self.mean = self.std = torch.empty(0)
        if self.description.kind == "estimator":
            self.predictor = import_skops().load(parameters, trusted=list(TRUSTED_TYPES))
            return
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        described = self.description
        size = described.input_size or described.image_size
        network = outline_network(described.architecture, len(described.classes), size, described.variant)
        state = OrderedDict(safetensors.torch.load_file(parameters))
        # The versions of the layers' formats, which mnasnet insists on and safetensors does not hold.
        state._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
        network.load_state_dict(state, strict=True, assign=True)
        network = network.eval().requires_grad_(False).to(self.device)
        self.predictor = network.to(memory_format=torch.channels_last)
        self.mean = torch.tensor(self.description.channel_mean, device=self.device).view(3, 1, 1)
        self.std = torch.tensor(self.description.channel_std, device=self.device).view(3, 1, 1)

    # The hint is plain np.ndarray because MLflow reads it and warns of any other, also of none.
    def predict(
        self,
        context: Any,  # noqa: ARG002
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> pd.DataFrame:
        """Label images.

        Args:
            model_input: (N, H, W, C) uint8 pixels, C being 1 (grey) or 3 (RGB), any N, H and W; or nested lists of
                them; or a sequence of N arrays (H, W, C) of different sizes.

        Returns:
            N rows; `confidence` is the label's probability.

        Raises:
            ValueError: the input is no such images.
        """
        return self._frame(self.probabilities(model_input))

    def probabilities(self, images: Any) -> NDArray[np.float32]:
        """(N, number of classes) probabilities of images as in `predict`."""
        if _differ_in_size(images):
            parts = [self.probabilities(np.asarray(image)[None]) for image in images]
            return np.concatenate(parts)
        images_u8 = check_images(images)
        if images_u8.size and images_u8.max() <= 1:
            logger.warning("images: no pixel is above 1 in 0..255; were they divided by 255 before?")
        size = self.description.input_size or self.description.image_size
        num_pixels = max(size**2, images_u8.shape[1] * images_u8.shape[2])
        batch_size = max(1, PIXELS_PER_BATCH // num_pixels)
        parts = [self._batch(images_u8[i : i + batch_size]) for i in range(0, len(images_u8), batch_size)]
        return np.concatenate(parts) if parts else np.empty((0, len(self.description.classes)), np.float32)

    @torch.inference_mode()
    def _batch(self, images_u8: NDArray[np.uint8]) -> NDArray[np.float32]:
        copied = np.array(images_u8, order="C")  # what the caller gave may be read-only, or mirrored in place
        images = torch.from_numpy(copied).to(self.device)
        images = resize(images.expand(-1, -1, -1, 3), self.description.image_size)
        return predict_probabilities(self.predictor, self.description, images, self.mean, self.std)

    def _frame(self, probabilities: NDArray[np.float32]) -> pd.DataFrame:
        names = np.array(self.description.classes, dtype=object)
        columns: dict[str, Any] = {"label": names[probabilities.argmax(axis=1)] if len(probabilities) else names[:0]}
        columns["confidence"] = probabilities.max(axis=1, initial=0)
        columns |= {f"probability_{name}": probabilities[:, i] for i, name in enumerate(self.description.classes)}
        return pd.DataFrame(columns)


def _differ_in_size(images: Any) -> bool:
    if isinstance(images, np.ndarray) and images.dtype != object:
        return False
    return (
        isinstance(images, Sequence | np.ndarray)
        and all(isinstance(image, np.ndarray) for image in images)
        and len({image.shape for image in images}) > 1
    )


if __name__ != "mlpipe.models.portable":
    # Run by MLflow as the code of a model, not imported by the training code.
    mlflow.models.set_model(ImageClassifier())
