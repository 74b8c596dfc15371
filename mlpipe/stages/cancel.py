"""`python -m mlpipe.stages.cancel DATASET DAG_ID DAG_RUN_ID`: close the MLflow runs of a DAG run that was stopped."""

from __future__ import annotations

import sys

from mlpipe.stages.runs import abandon
from mlpipe.tracking.runs import Origin

if __name__ == "__main__":
    dataset, dag_id, dag_run_id = sys.argv[1:]
    origin = Origin(dag_id=dag_id, dag_run_id=dag_run_id, task_id="")
    abandon(dataset, origin, "the DAG run was stopped in Airflow", killed=True)
