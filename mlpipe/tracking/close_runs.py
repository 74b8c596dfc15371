"""`python -m mlpipe.tracking.close_runs NAME DAG_ID DAG_RUN_ID STATUS REASON`: close the MLflow runs of a DAG run.

NAME is that of the data set; STATUS is FINISHED, FAILED or KILLED.
"""

from __future__ import annotations

import sys
from typing import Any, cast

from mlpipe.tracking.dag_runs import close
from mlpipe.tracking.runs import TaskContext

if __name__ == "__main__":
    dataset, dag_id, dag_run_id, status, reason = sys.argv[1:]
    close(dataset, TaskContext(dag_id=dag_id, dag_run_id=dag_run_id, task_id=""), cast(Any, status), reason)
