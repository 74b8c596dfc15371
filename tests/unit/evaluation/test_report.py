"""The report as one file."""

from __future__ import annotations

import re

from mlpipe.evaluation.comparison import compare
from mlpipe.evaluation.report import Picture, render


def page_of(comparison, **changes):
    values = {
        "title": "pets",
        "verdict": "cnn is best.",
        "notes": ["2 images were left out"],
        "pictures": [Picture(title="Learning curves", png=b"\x89PNG")],
        "of_models": {"cnn": [Picture(title="Confusion matrix", png=b"\x89PNG")]},
        "snippet": "import mlflow",
        "links": {"Charts": "http://mlflow/#/x"},
    }
    return render(comparison, **values | changes)


def test_everything_is_in_the_file(result):
    comparison = compare([result("cnn", [1] * 9 + [0]), result("svm", [1] * 6 + [0] * 4)], {"vit": "out of memory"})
    page = page_of(comparison)
    for text in ("cnn is best.", "2 images were left out", "import mlflow", "no result: out of memory", "90.00"):
        assert text in page
    assert re.findall(r'(?:src|href)="(?!data:|http://mlflow/)', page) == []
    assert page.count("data:image/png;base64,iVBORw==") == 2


def test_names_are_no_html(result):
    bad = "<script>alert(1)</script>"
    page = page_of(compare([result(bad, [1, 0])], {bad: bad}), title=bad, verdict=bad, notes=[bad], of_models={bad: []})
    assert bad not in page


def test_equal_models_and_many_of_them_are_drawn(result):
    assert page_of(compare([result(f"model_{i}", [1, 1, 1]) for i in range(16)])).count("<tr><td>") == 16
