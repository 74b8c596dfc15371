"""The command line: `mlpipe`."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from mlpipe import run_command, runs_commands, tune_command
from mlpipe.addresses import without_login
from mlpipe.errors import UserError
from mlpipe.stack import commands


class _Group(click.Group):
    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line. A user error prints one line without a traceback and exits with status 2."""
        try:
            return super().main(*args, **kwargs)
        except UserError as error:
            told = str(error)
        except Exception as error:
            if "mlflow" not in sys.modules:
                raise
            from mlpipe.tracking.runs import is_unreachable

            if not is_unreachable(error):
                raise
            address = without_login(os.environ.get("MLFLOW_TRACKING_URI", ""))
            told = f"MLflow at {address} does not answer; is it up? See `mlpipe status`"
        click.secho(told, fg="red", err=True)
        sys.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlpipe")
def main() -> None:
    """Train image classifiers with Airflow, compare them in MLflow."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # 7 take four minutes


for command in (
    run_command.run,
    run_command.predict,
    tune_command.tune,
    runs_commands.models,
    runs_commands.recipes,
    runs_commands.runs,
    runs_commands.watch,
    runs_commands.stop,
    runs_commands.report,
    runs_commands.open_page,
    runs_commands.gc,
    commands.up,
    commands.down,
    commands.env,
    commands.status,
    commands.logs,
    commands.doctor,
):
    main.add_command(command)


if __name__ == "__main__":
    main()
