"""Logistic regression on whitened principal components."""

from __future__ import annotations

from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

from mlpipe.config import LinearSettings

IMAGES_PER_DIMENSION = 20
"""Training images that each component needs; whitening would blow up what fewer images cannot tell from noise."""


def build(settings: LinearSettings, *, num_images: int, num_features: int) -> Pipeline:
    """A scikit-learn pipeline that takes (N, num_features) float32.

    Whitening makes the optimisation well-conditioned: it converges in a few steps where raw pixels take hundreds.
    """
    num_components = max(1, min(settings.num_components, num_images // IMAGES_PER_DIMENSION, num_features))
    whiten = PCA(
        n_components=num_components,
        whiten=True,
        # Finding a few of many by random projections is faster than finding all.
        svd_solver="randomized" if num_components * 10 <= num_features else "covariance_eigh",
        iterated_power=1,  # of the randomized one: further passes take longer and classify no better
        random_state=settings.seed,
    )
    classify = LogisticRegression(
        class_weight=None if settings.class_weights == "none" else "balanced",
        C=settings.inverse_regularization,
        max_iter=settings.max_iterations,
        random_state=settings.seed,
    )
    return Pipeline([("whiten", whiten), ("classify", classify)])
