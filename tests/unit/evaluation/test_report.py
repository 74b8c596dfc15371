"""The report as one file."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from mlpipe.data.dataset import Dataset, Split
from mlpipe.evaluation.comparison import compare
from mlpipe.evaluation.gallery import Gallery
from mlpipe.evaluation.report import Report, render
from mlpipe.evaluation.result import ModelResult
from mlpipe.evaluation.scoring import evaluate_predictions


def data_of(classes: tuple[str, ...], count: int) -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (count, 32, 32, 3), np.uint8)
    labels = np.arange(count) % len(classes)
    return Dataset.in_memory(classes, (images, labels), (images[:2], labels[:2]), name="pets")


def page_of(rows, failed=None, *, data: Dataset | None = None, names: list[str] | None = None, **changes) -> str:
    comparison = compare(rows, failed)
    data = data or data_of(comparison.classes, comparison.num_images)
    split = Split(data.train_split().images_u8, comparison.rows[0].evaluation.predictions.labels)
    gallery = Gallery(split, names or [f"test/{row}.png" for row in range(len(split))], comparison.classes, split)
    for row in comparison.rows[:4]:
        gallery.add_model(row)
    values = {
        "title": "pets",
        "verdict": "cnn is best.",
        "notes": ["2 images were left out"],
        "curves": {"cnn": {"train/loss": [(1, 2.0), (2, 1.0)], "val/loss": [(1, 2.5), (2, 1.5)]}},
        "snippet": "import mlflow",
        "links": {"Charts": "http://mlflow/#/x"},
        "settings": {"dataset": "digits"},
        "best": comparison.rows[0],
    }
    return render(Report(comparison=comparison, manifest=data.manifest, gallery=gallery, **values | changes))


def in_page(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_everything_is_in_the_file(result):
    page = page_of([result("cnn", [1] * 9 + [0]), result("svm", [1] * 6 + [0] * 4)], {"vit": "out of memory"})
    for text in ("cnn is best.", "2 images were left out", "import mlflow", "no result: out of memory", "90.00"):
        assert text in page
    assert "cnn, validation" in page
    assert re.findall(r'(?:src|href)="(?!data:|http://mlflow/)', page) == []


def test_each_confusion_has_its_images(result):
    rows = [result("cnn", [1] * 9 + [0]), result("svm", [1] * 6 + [0] * 4)]
    gallery = in_page(page_of(rows))["gallery"]
    wrong = {
        model["name"]: sum(len(cell[3]) for cell in model["cells"] if cell[0] != cell[1]) for model in gallery["models"]
    }
    assert wrong == {"cnn": 1, "svm": 4}
    assert all(
        gallery["pictures"][key].startswith("data:image/webp")
        for m in gallery["models"]
        for c in m["cells"]
        for key in c[3]
    )
    mistake = gallery["models"][0]["mistakes"][0]
    assert mistake["file"].startswith("test/")
    assert mistake["p_answer"] > mistake["p_truth"]


def test_names_are_no_html(result):
    bad = "</script><script>alert(1)</script>"
    rows = [result(bad, [1, 0])]
    page = page_of(
        rows,
        {bad: bad},
        title=bad,
        verdict=bad,
        notes=[bad],
        names=[bad] * 2,
        curves={bad: {"val/loss": [(1, 1.0), (2, 1.0)]}},
    )
    assert "<script>alert" not in page


def test_the_former_champion_is_among_the_models(result):
    former = result("old", [1, 1, 0])
    page = page_of([result("cnn", [1, 1, 1])], former=former)
    assert "the champion before" in page


@pytest.mark.parametrize(("num_models", "num_classes"), [(16, 10), (16, 1000)])
def test_large_comparisons_stay_small(num_models: int, num_classes: int):
    classes = tuple(f"class {i}" for i in range(num_classes))
    rng, count = np.random.default_rng(0), 10_000
    labels = np.arange(count) % num_classes
    rows = []
    for number in range(num_models):
        probabilities = np.full((count, num_classes), 0.1 / num_classes)
        answers = np.where(rng.random(count) < 0.7, labels, rng.integers(0, num_classes, count))
        probabilities[np.arange(count), answers] += 0.9
        rows.append(
            ModelResult(
                name=f"m{number}",
                evaluation=evaluate_predictions(labels, probabilities, classes, seed=0, num_resamples=20),
            )
        )
    page = page_of(rows, data=data_of(classes, count))
    assert len(page.encode()) < 3_000_000
    assert page.count("<tr><td>m") >= num_models


def test_labels_that_are_probably_wrong_are_listed():
    rng, labels = np.random.default_rng(0), np.arange(300) % 3
    seen = labels.copy()
    seen[7] = (seen[7] + 1) % 3  # the image shows another class than its label says
    probabilities = np.full((300, 3), 0.02)
    probabilities[np.arange(300), seen] = 0.96
    evaluation = evaluate_predictions(labels, probabilities, ("a", "b", "c"), seed=0)
    split = Split.of(rng.integers(0, 255, (300, 8, 8, 3), np.uint8), labels)
    gallery = Gallery(split, [f"{row}.png" for row in range(300)], ("a", "b", "c"), split)
    gallery.add_doubts(ModelResult(name="cnn", evaluation=evaluation))
    assert [doubt["file"] for doubt in gallery.to_json()["doubts"]] == ["7.png"]
