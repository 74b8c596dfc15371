"""The linear model against what is usually written: `StandardScaler` and `LogisticRegression`.

    python benchmarks/logistic.py cifar10-images.zip

Both are fitted to the same 50,000 × 3,072 float32 features, one after the other in each round.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conditions, paired, read_images, spread, table
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mlpipe.models.estimators import logistic_regression
from mlpipe.models.features import pixels
from mlpipe.recipes import RECIPES


def reference() -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression())


def ours(features: NDArray[np.float32]) -> Any:
    return logistic_regression.build(RECIPES["report"].linear, num_images=len(features), num_features=features.shape[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="zip of train/<class>/… and test/<class>/…, 32×32 pixels")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    parts = {}
    for part in ("train", "test"):
        images_u8, labels = read_images(arguments.data, part)
        parts[part] = pixels.features(torch.from_numpy(images_u8)), labels
    features, labels = parts["train"]
    times: dict[str, list[float]] = {"ours": [], "reference": []}
    rows = []
    for _ in range(arguments.rounds):
        fitted = {"ours": ours(features), "reference": reference()}
        for name, estimator in fitted.items():
            began = time.perf_counter()
            estimator.fit(features, labels)
            times[name].append(time.perf_counter() - began)
    for name, estimator in fitted.items():
        scores = [f"{100 * estimator.score(*parts[part]):.2f}" for part in ("train", "test")]
        rows.append([name, spread(times[name], 1), *scores, str(int(np.max(estimator[-1].n_iter_)))])
    print("# Logistic regression\n")
    print(f"*reference*: `StandardScaler` and `LogisticRegression()` of scikit-learn. {len(features):,} images of")
    print(
        f"{features.shape[1]:,} features, {len(parts['test'][1]):,} test images. All random numbers are fixed, so the"
    )
    print("accuracy is the same in every round.\n")
    print(conditions("scikit-learn", "numpy"), f"{arguments.rounds} rounds.\n")
    print(table(["model", "fit, s, median (range)", "training accuracy, %", "test accuracy, %", "iterations"], rows))
    ratios = paired(times["ours"], times["reference"])
    print("\n" + table(["ratio, round by round", "median (range)"], [["ours / reference", spread(ratios, 3)]]))


if __name__ == "__main__":
    main()
