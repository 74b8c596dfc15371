"""The forms of the DAGs, by the DAG's id."""

from __future__ import annotations

from mlpipe.config import RunParams
from mlpipe.search.form import TuneParams

FORMS: dict[str, type[RunParams] | type[TuneParams]] = {"image_classification": RunParams, "tune": TuneParams}
