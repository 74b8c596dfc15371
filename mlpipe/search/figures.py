"""Pictures of a study, by Optuna."""

from __future__ import annotations

import warnings
from typing import Any

import matplotlib
import optuna
from matplotlib.figure import Figure
from optuna.trial import TrialState

FEWEST_TRIALS = 4
"""Completed trials from which on importances and coordinates say something."""


def of_study(study: optuna.Study) -> dict[str, Figure]:
    """History, importances and parallel coordinates by file name, as far as there are enough trials for them."""
    matplotlib.use("agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    drawn: dict[str, Any] = {"search_history.png": plots.plot_optimization_history}
    if len(done) >= FEWEST_TRIALS:
        drawn["search_importances.png"] = plots.plot_param_importances
        drawn["search_coordinates.png"] = plots.plot_parallel_coordinate
    figures = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls its figures experimental
        for name, draw in drawn.items():
            figure: Any = draw(study).get_figure()
            figure.set_size_inches(9, 5)
            figure.tight_layout()
            figures[name] = figure
            pyplot.close(figure)
    return figures
