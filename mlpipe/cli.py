"""The command line: `mlpipe`."""

from __future__ import annotations

import sys

import click

from mlpipe.errors import UserError
from mlpipe.stack import commands


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlpipe")
def group() -> None:
    """Train image classifiers with Airflow, compare them in MLflow."""


for command in (commands.up, commands.down, commands.status, commands.logs, commands.doctor):
    group.add_command(command)


def main() -> None:
    """Run the command line; a user's mistake is one line, without a traceback, and exit status 2."""
    try:
        group()
    except UserError as error:
        click.secho(str(error), fg="red", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
