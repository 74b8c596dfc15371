"""The pictures of a report: images of each confusion, the worst mistakes, labels that are probably wrong."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlpipe.data.dataset import Split
from mlpipe.evaluation.result import ModelResult

if TYPE_CHECKING:
    from mlpipe.evaluation.explain import Explainer

MAX_BYTES = 1_200_000
"""Of all pictures of a report together."""
MAX_CELLS = 2_000
"""Cells of a confusion matrix that a report holds, the most frequent ones."""
PICTURES_OF_A_CELL = 8
NUM_MISTAKES = 12
NUM_LOOK_ALIKES = 4
NUM_DOUBTS = 24
MAX_CLASSES = 50
"""Rows of the table of classes."""
THUMBNAIL = 96
"""Largest height and width of a picture, pixels."""
HEAT = np.array([255, 110, 0], np.float32)
"""Color of the places where a network looked."""


class Gallery:
    """Collects pictures, each once, up to `MAX_BYTES`; as JSON for the report's script."""

    def __init__(self, test: Split, names: Sequence[str], classes: Sequence[str], training: Split) -> None:
        """
        Args:
            names: of the test images' files.
            training: where look-alikes are searched.
        """
        self._training = training
        self._test = test
        self._names = names
        self._classes = classes
        self._pictures: dict[str, str] = {}
        self._bytes = 0
        self._is_full = False
        self._models: list[dict[str, Any]] = []
        self._doubts: list[dict[str, Any]] = []

    def add_model(self, result: ModelResult, explained: Explainer | None = None) -> None:
        """Add a model's worst mistakes; where it can be explained with look-alikes and places."""
        predictions = result.evaluation.predictions
        rows = predictions.mistakes[:NUM_MISTAKES]
        training = self._training
        if explained is not None and len(rows):
            images_u8 = self._test.images_u8.take(rows)
            alike = explained.look_alikes(images_u8, training, NUM_LOOK_ALIKES)
            heat = explained.attention(images_u8, predictions.predicted[rows])
        shown = []
        for number, row in enumerate(map(int, rows)):
            mistake = self._entry(result, row)
            if explained is not None:
                blended = _blend(images_u8[number], heat[number])
                mistake["heat"] = self._keep(f"h{len(self._models)}-{row}", blended)
                mistake["alike"] = [
                    {
                        "picture": self._keep(f"t{other}", training.images_u8[other]),
                        "label": int(training.labels[other]),
                    }
                    for other in map(int, alike[number])
                ]
            shown.append(mistake)
        self._models.append({"name": result.display_name, "mistakes": shown, "result": result})

    def add_doubts(self, result: ModelResult) -> None:
        """Add test images whose label is probably wrong, as the model sees them (confident learning).

        Source: C. Northcutt et al., "Confident Learning", JAIR 2021, by the library cleanlab.
        """
        from cleanlab.filter import find_label_issues

        predictions = result.evaluation.predictions
        present = np.bincount(predictions.labels, minlength=len(self._classes))
        if (present == 0).any():
            return  # its thresholds are means over the images of each class
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = find_label_issues(
                predictions.labels, predictions.probabilities, return_indices_ranked_by="self_confidence", n_jobs=1
            )
        self._doubts = [self._entry(result, row) for row in map(int, rows[:NUM_DOUBTS])]

    def _entry(self, result: ModelResult, row: int) -> dict[str, Any]:
        """A test image with its label and the model's answer, and how probable the model finds both."""
        predictions = result.evaluation.predictions
        truth, answer = int(predictions.labels[row]), int(predictions.predicted[row])
        return {
            "picture": self._keep(f"e{row}", self._test.images_u8[row]),
            "file": self._names[row],
            "truth": truth,
            "p_truth": round(float(predictions.probabilities[row, truth]), 4),
            "answer": answer,
            "p_answer": round(float(predictions.probabilities[row, answer]), 4),
        }

    def to_json(self) -> dict[str, Any]:
        """All of it; images of the confusions are chosen now, from the most frequent cell on."""
        matrices = [_cells(model["result"].evaluation.confusion) for model in self._models]
        wrong = sorted(
            ((cell[2], number, cell) for number, cells in enumerate(matrices) for cell in cells if cell[0] != cell[1]),
            key=lambda entry: -entry[0],
        )
        for _, number, cell in wrong:
            predictions = self._models[number]["result"].evaluation.predictions
            rows = np.flatnonzero((predictions.labels == cell[0]) & (predictions.predicted == cell[1]))
            for row in map(int, rows[:PICTURES_OF_A_CELL]):
                if picture := self._keep(f"e{row}", self._test.images_u8[row]):
                    cell[3].append(picture)
        return {
            "classes": list(self._classes),
            "pictures": self._pictures,
            "models": [
                {"name": model["name"], "mistakes": model["mistakes"], "cells": cells}
                for model, cells in zip(self._models, matrices, strict=True)
            ],
            "doubts": self._doubts,
        }

    def _keep(self, key: str, image_u8: NDArray[np.uint8]) -> str | None:
        """The key under which the page finds the picture; `None` where there is no room for it."""
        if key not in self._pictures:
            if self._is_full:
                return None
            source = _as_source(image_u8)
            if self._bytes + len(source) > MAX_BYTES:
                self._is_full = True
                return None
            self._pictures[key] = source
            self._bytes += len(source)
        return key


def _cells(confusion: NDArray[np.int64]) -> list[list[Any]]:
    """The most frequent cells that are not 0: true class, predicted class, images, and room for pictures."""
    truths, answers = np.nonzero(confusion)
    order = np.argsort(-confusion[truths, answers], kind="stable")[:MAX_CELLS]
    return [[int(truths[i]), int(answers[i]), int(confusion[truths[i], answers[i]]), []] for i in order]


def _as_source(image_u8: NDArray[np.uint8]) -> str:
    """As the `src` of an image element."""
    image = Image.fromarray(image_u8)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _blend(image_u8: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    share = 0.65 * heat[..., None]
    return (image_u8 * (1 - share) + HEAT * share).astype(np.uint8)


def class_table(counts: Mapping[str, Sequence[int]], classes: Sequence[str]) -> dict[str, Any]:
    """Images of each class in each split; the smallest classes alone where there are more than `MAX_CLASSES`."""
    totals = np.array([counts["train"], counts["val"], counts["test"]]).T  # (K, 3)
    order = (
        np.argsort(totals.sum(axis=1), kind="stable")[:MAX_CLASSES]
        if len(classes) > MAX_CLASSES
        else np.arange(len(classes))
    )
    return {
        "rows": [(classes[i], *map(int, totals[i])) for i in order],
        "hidden": max(0, len(classes) - MAX_CLASSES),
        "largest": int(totals.sum(axis=1).max()),
        "smallest": int(totals.sum(axis=1).min()),
    }
