"""The first stage, where only what downloads is installed."""

from __future__ import annotations

import pytest

from mlpipe.config import RunParams
from mlpipe.errors import UserError
from mlpipe.recipes import resolve
from mlpipe.stages.download import download
from mlpipe.tracking.runs import Origin


def test_a_worker_without_torch_refuses_a_model_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpipe.stages.download.find_spec", lambda _: None)
    config = resolve(RunParams(models="custom_cnn,resnet99"))
    with pytest.raises(UserError, match="models: 'resnet99' is unknown; did you mean resnet"):
        download(config, Origin(dag_id="d", dag_run_id="r", task_id="download"), on_run=lambda _: None)
