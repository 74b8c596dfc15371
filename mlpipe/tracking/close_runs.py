"""`python -m mlpipe.tracking.close_runs NAME DAG_ID DAG_RUN_ID`: close the MLflow runs of a stopped DAG run.

NAME is that of the data set.
"""

from __future__ import annotations

import sys

from mlpipe.tracking.dag_runs import abandon
from mlpipe.tracking.runs import TaskContext

if __name__ == "__main__":
    dataset, dag_id, dag_run_id = sys.argv[1:]
    origin = TaskContext(dag_id=dag_id, dag_run_id=dag_run_id, task_id="")
    abandon(dataset, origin, "the DAG run was stopped in Airflow", killed=True)
