"""The gate between a run's models and what the aliases name."""

from __future__ import annotations

from mlpipe.tracking.evaluation_run import Result, _remeasured
from mlpipe.tracking.registry import RegisteredVersion


def test_a_champion_that_anybody_wrote_is_one_that_could_not_be_measured() -> None:
    def returns_no_frame(_: str) -> Result:
        raise TypeError("cannot concatenate object of type 'numpy.ndarray'")

    holder = RegisteredVersion(name="digits-classifier", version="7", run_id="", model_id=None, tags={})
    measured = _remeasured(holder, returns_no_frame)
    assert (measured.version, measured.problem) == ("7", "cannot concatenate object of type 'numpy.ndarray'")
