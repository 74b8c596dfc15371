"""`mlpipe up`, `down`, `env`, `status`, `logs` and `doctor`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

from mlpipe.errors import UserError
from mlpipe.stack.components import NAMES, components
from mlpipe.stack.local import StackSettings

LABELS = {
    "seaweedfs": "SeaweedFS (S3)",
    "mlflow": "MLflow",
    "api-server": "Airflow api-server",
    "scheduler": "Airflow scheduler",
    "dag-processor": "Airflow dag-processor",
    "triggerer": "Airflow triggerer",
    "DAG": "DAG image_classification",
}


def _port_option(name: str, what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        f"--{name}-port", type=click.IntRange(1, 65_535), help=f"Port of {what} (MLPIPE_{name.upper()}_PORT)."
    )


@click.command()
@_port_option("airflow", "Airflow's UI and API")
@_port_option("mlflow", "MLflow's UI and API")
@_port_option("s3", "the object store's S3 API")
@click.option("--timeout", default=180.0, show_default=True, help="Seconds to wait before the start fails.")
def up(airflow_port: int | None, mlflow_port: int | None, s3_port: int | None, timeout: float) -> None:
    """Start the local stack or its missing components, and wait until it is ready."""
    from rich.console import Console

    from mlpipe.stack import lifecycle

    console = Console(highlight=False)
    settings = StackSettings.load(airflow_port=airflow_port, mlflow_port=mlflow_port, s3_port=s3_port)
    began = time.monotonic()
    with console.status("Starting the local stack"):

        def report(name: str, _: float) -> None:
            console.print(f"[green]✔[/] {LABELS[name]:<26}[dim]{time.monotonic() - began:5.1f} s[/]")

        try:
            settings, already = lifecycle.up(settings, report, timeout)
        except lifecycle.StackNotReadyError as error:
            console.print(error.log, style="dim", markup=False)
            raise
    console.print("already up" if already else f"up after {time.monotonic() - began:.0f} s")
    console.print(_box(settings))


def _box(settings: StackSettings) -> object:
    from rich.panel import Panel
    from rich.table import Table

    from mlpipe.stack.credentials import Credentials

    credentials = Credentials.load(settings.credentials_path)
    table = Table.grid(padding=(0, 2))
    table.add_row("Airflow", f"[link]{settings.airflow_url}[/link]")
    table.add_row("MLflow", f"[link]{settings.mlflow_url}[/link]")
    table.add_row("Login", f"{credentials.airflow_user} / {credentials.airflow_password}")
    table.add_row("State", _shown(settings.home))
    table.add_row("Secrets", _shown(settings.credentials_path))
    return Panel(table, expand=False, title="mlpipe", title_align="left")


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@click.command()
def down() -> None:
    """Stop the local stack; its data stays."""
    from rich.console import Console

    from mlpipe.stack import lifecycle

    console = Console(highlight=False)
    began = time.monotonic()
    settings = StackSettings.load()
    if not lifecycle.is_running(settings):
        console.print(f"the stack in {_shown(settings.home)} is not running")
        return
    with console.status("Stopping the local stack"):
        left = lifecycle.down(settings)
    if left:
        raise UserError(
            f"processes {', '.join(map(str, left))} could not be stopped; stop them as the user who owns them"
        )
    console.print(f"down after {time.monotonic() - began:.0f} s; the data stays in {_shown(settings.home)}")


@click.command()
def env() -> None:
    """Print MLflow's address and login for other programs: eval "$(mlpipe env)"."""
    import shlex

    from mlpipe.stack.credentials import Credentials

    settings = StackSettings.load()
    for name, value in settings.mlflow_environment(Credentials.load(settings.credentials_path)).items():
        click.echo(f"export {name}={shlex.quote(value)}")


@click.command()
def status() -> None:
    """Show what runs. The exit status is 1 if a component does not run, 2 if image_classification is paused."""
    from rich.console import Console
    from rich.table import Table

    from mlpipe.stack.supervisor import Supervisor

    settings = StackSettings.load()
    states = {state.name: state for state in Supervisor(settings).states()}
    urls = {part.name: part.url for part in components(settings)} if states else {}
    table = Table("component", "state", "pid", "uptime", "url")
    for name in NAMES:
        state = states.get(name)
        word = state.state.lower() if state else "stopped"
        color = {"running": "green", "starting": "yellow"}.get(word, "red")
        table.add_row(
            LABELS[name],
            f"[{color}]{word}[/]",
            str(state.pid) if state and state.pid else "",
            _duration(state.uptime) if state and state.pid else "",
            urls.get(name) or "",
        )
    Console(highlight=False).print(table)
    if not all(name in states and states[name].state == "RUNNING" for name in NAMES):
        sys.exit(1)
    from mlpipe.airflow_api import AirflowApi
    from mlpipe.stack.health import DAG_ID

    AirflowApi.from_env(settings.client_environment()).check_dag(DAG_ID)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


@click.command()
@click.argument("component", required=False, type=click.Choice(NAMES))
@click.option("-f", "--follow", is_flag=True, help="Keep printing new lines until interrupted.")
@click.option("-n", "--lines", default=40, show_default=True, help="Number of last lines to print first.")
def logs(component: str | None, follow: bool, lines: int) -> None:
    """Print the last lines of the components' logs."""
    from mlpipe.stack.lifecycle import tail

    settings = StackSettings.load()
    names = [component] if component else list(NAMES)
    paths = {name: settings.logs / f"{name}.log" for name in names}
    present = {name: path for name, path in paths.items() if path.exists()}
    if not present:
        raise UserError(f"no logs in {settings.logs} yet; run `mlpipe up`")
    ends = {}
    for name, path in present.items():
        ends[name] = (path.stat().st_ino, path.stat().st_size)
        if len(names) > 1:
            click.secho(f"==> {path}", bold=True)
        click.echo(tail(path, lines))
    if follow:
        _follow(present, ends)


def _follow(paths: dict[str, Path], ends: dict[str, tuple[int, int]]) -> None:
    width = max(map(len, paths))
    while True:
        for name, path in paths.items():
            if not path.exists():  # being rotated
                continue
            inode, size = path.stat().st_ino, path.stat().st_size
            known, start = ends[name]
            if inode != known or size < start:
                start = 0
            if size > start:
                with path.open("rb") as file:
                    file.seek(start)
                    text = file.read(size - start).decode(errors="replace")
                for line in text.splitlines():
                    click.echo(f"{name:<{width}}  {line}" if len(paths) > 1 else line)
            ends[name] = (inode, size)
        time.sleep(0.3)


@click.command()
def doctor() -> None:
    """Check versions, disk, every connection and the executor, and say how to fix failures."""
    from rich.console import Console

    from mlpipe.stack.doctor import diagnose

    console = Console(highlight=False)
    failed = 0
    for finding in diagnose(StackSettings.load()):
        mark = "[red]✘[/]" if not finding.ok else "[yellow]![/]" if finding.remedy else "[green]✔[/]"
        console.print(f"{mark} {finding.name:<28}", end="")
        console.print(finding.detail, markup=False, soft_wrap=True)
        failed += not finding.ok
        if finding.remedy:
            console.print(f"  {finding.remedy}", style="yellow", markup=False, soft_wrap=True)
    if failed:
        sys.exit(1)
