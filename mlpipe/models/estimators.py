"""scikit-learn's models, apart from the networks: who trains a network need not import scikit-learn."""

from __future__ import annotations

from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

from mlpipe.config import ESTIMATORS, TrainConfig
from mlpipe.errors import UserError

IMAGES_PER_DIMENSION = 20
"""Training images that each component needs; whitening would blow up what fewer images cannot tell from noise."""


def build_estimator(architecture: str, train: TrainConfig, *, num_images: int, num_features: int) -> Pipeline:
    """A scikit-learn pipeline that takes (N, num_features) float32, as `portable.estimator_features` makes them.

    Whitening makes the optimisation well-conditioned: it converges in a few steps where raw pixels take hundreds.

    Raises:
        UserError: no such estimator.
    """
    if architecture not in ESTIMATORS:
        raise UserError(f"models: {architecture!r} is not an estimator; known are {', '.join(sorted(ESTIMATORS))}")
    num_components = max(1, min(train.num_components, num_images // IMAGES_PER_DIMENSION, num_features))
    whiten = PCA(
        n_components=num_components,
        whiten=True,
        # Finding a few of many by random projections is faster than finding all.
        svd_solver="randomized" if num_components * 10 <= num_features else "covariance_eigh",
        iterated_power=1,  # of the randomized one: further passes take longer and classify no better
        random_state=train.seed,
    )
    classify = LogisticRegression(
        C=train.inverse_regularization, max_iter=train.max_iterations, random_state=train.seed
    )
    return Pipeline([("whiten", whiten), ("classify", classify)])
