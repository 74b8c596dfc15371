from __future__ import annotations

import io
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from mlpipe.data import figures
from mlpipe.data.dataset import ImageRows, Split


def split_of(num_classes: int, per_class: int = 3) -> Split:
    labels = np.repeat(np.arange(num_classes), per_class)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), np.uint8)
    return Split(ImageRows(images), labels)


def texts(figure: Figure) -> str:
    """All texts of a figure; drawing it must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO())
    axes_texts = [
        text.get_text()
        for axes in figure.axes
        for text in (*axes.texts, *axes.get_yticklabels(), axes._left_title)  # type: ignore[attr-defined]
    ]
    return "\n".join([text.get_text() for text in figure.texts] + axes_texts)


@pytest.mark.parametrize("classes", [["a", "b"], ["$5$", "кошка"], [str(i) for i in range(100)], ["x" * 300, "猫"]])
def test_grid_shows_images_of_their_class(classes: list[str]) -> None:
    split = split_of(len(classes))
    figure = figures.sample_grid(split, classes, per_class=2)
    text = texts(figure)
    assert f"24 of {len(classes)} classes" in text if len(classes) > 24 else "classes" not in text
    assert classes[0][:10] in text
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert len(shown) == 2 * min(len(classes), 24)
    of_first_class = [image.tobytes() for image in split.images_u8[:3]]
    assert all(np.asarray(image, np.uint8).tobytes() in of_first_class for image in shown[:2])


def test_balance_shows_the_counts() -> None:
    counts = {"train": (700, 70), "val": (100, 10), "test": (200, 20)}
    dataset = SimpleNamespace(manifest=SimpleNamespace(classes=("a", "b"), class_counts=counts))
    text = texts(figures.class_balance(dataset))
    for expected in ("1,100 images", "10 times as many", "1,000", "100", "a", "b"):
        assert expected in text
    lengths = [patch.get_width() for patch in figures.class_balance(dataset).axes[0].patches]
    assert lengths == [700, 70, 100, 10, 200, 20]


@pytest.mark.parametrize("bytes_per_count", [1, 3 * 8 * 8 * 3, 1 << 20])
def test_channels_show_mean_and_deviation(monkeypatch: pytest.MonkeyPatch, bytes_per_count: int) -> None:
    monkeypatch.setattr(figures, "BYTES_PER_COUNT", bytes_per_count)
    images = np.zeros((4, 8, 8, 3), np.uint8)
    images[..., 0] = 200
    images[:2, ..., 1] = 100
    text = texts(figures.channel_statistics(Split(ImageRows(images), np.zeros(4, np.int64))))
    assert "red   200 ± 0" in text
    assert "green   50 ± 50" in text
    assert "blue   0 ± 0" in text
