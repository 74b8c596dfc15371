"""Runs and versions in a real MLflow store."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from mlpipe.config import RunParams
from mlpipe.errors import ServiceUnavailableError, SupersededError
from mlpipe.recipes import resolve
from mlpipe.services import services_named
from mlpipe.tracking import dag_runs, registry, runs
from mlpipe.tracking.runs import TaskContext


@pytest.fixture(scope="module")
def _store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{folder}/mlflow.db")
    yield
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri("")


@pytest.fixture
def experiment(_store: None, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)  # MLflow's default artifact folder is relative
    return runs.experiment_id(request.node.name)


def origin(run_id: str = "manual__1", task_id: str = "train", try_number: int = 1) -> TaskContext:
    return TaskContext(dag_id="image_classification", dag_run_id=run_id, task_id=task_id, try_number=try_number)


def opened(experiment: str, who: TaskContext, part: str = "resnet18") -> Run:
    return runs.open_run(experiment, who.key(part), name=part, tags=who.tags(), description="d")


def fetched(run: Run) -> Run:
    return mlflow.MlflowClient().get_run(run.info.run_id)


def test_an_experiment_that_somebody_deleted_is_restored(experiment: str) -> None:
    name = mlflow.get_experiment(experiment).name
    mlflow.delete_experiment(experiment)
    assert runs.experiment_id(name) == experiment
    assert mlflow.get_experiment(experiment).lifecycle_stage == "active"


def test_a_retry_reopens_its_run_and_says_so(experiment: str) -> None:
    with pytest.raises(OSError, match="disk"), runs.active(opened(experiment, origin())):
        raise OSError("disk is full")
    first = runs.find_run(experiment, origin().key("resnet18"))
    assert first is not None
    assert (first.info.status, first.data.tags["error"]) == ("FAILED", "disk is full")

    second = opened(experiment, origin(try_number=2))
    with runs.active(second):
        assert fetched(second).info.status == "RUNNING"
    assert second.info.run_id == first.info.run_id
    assert fetched(second).info.status == "FINISHED"
    assert fetched(second).data.tags["try_number"] == "2"
    assert "error" not in fetched(second).data.tags


def test_other_dag_runs_and_other_parts_have_runs_of_their_own(experiment: str) -> None:
    ids = {
        opened(experiment, origin(run_id), part).info.run_id
        for run_id in ("manual__1", 'it\'s "quoted" `here`')
        for part in ("parent", "resnet18")
    }
    assert len(ids) == 4


def test_a_run_stopped_from_outside_is_killed_with_its_parent(experiment: str) -> None:
    parent = opened(experiment, origin(), "parent")
    run = runs.open_run(experiment, "k", name="child", tags={}, description="", parent_run_id=parent.info.run_id)
    with pytest.raises(KeyboardInterrupt), runs.active(run):
        raise KeyboardInterrupt
    assert [fetched(each).info.status for each in (run, parent)] == ["KILLED", "KILLED"]


def test_an_attempt_that_is_stopped_late_leaves_the_later_ones_runs_alone(experiment: str) -> None:
    parent = opened(experiment, origin(), "parent")

    def attempt(number: int) -> Run:
        tags = origin(try_number=number).tags()
        return runs.open_run(experiment, "k", name="n", tags=tags, description="", parent_run_id=parent.info.run_id)

    def elder() -> None:
        with runs.active(attempt(1)):
            for run in (attempt(2), parent):
                mlflow.MlflowClient().set_terminated(run.info.run_id)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        elder()
    child = runs.find_run(experiment, "k")
    assert child is not None
    assert [run.info.status for run in (child, fetched(parent))] == ["FINISHED", "FINISHED"]
    mlflow.end_run()  # of this process, which would have ended


def test_an_attempt_that_was_believed_dead_writes_nothing_more(experiment: str) -> None:
    first = opened(experiment, origin())
    seen: list[str] = []

    def elder() -> None:
        with runs.active(first) as tracked:
            tracked.ensure_current()
            seen.append(fetched(opened(experiment, origin(try_number=2))).info.status)
            tracked.ensure_current()

    with pytest.raises(SupersededError, match="attempt 2 of this task has taken over"):
        elder()
    assert [*seen, fetched(first).info.status] == ["RUNNING", "RUNNING"], "the run is the later attempt's"
    runs.TrackedRun(fetched(first)).ensure_current()
    mlflow.end_run()  # of this process, which would have ended


def test_parameters_of_the_first_try_stay(experiment: str) -> None:
    run = opened(experiment, origin())
    with runs.active(run) as tracked:
        tracked.log_params({"threads": 1})
        tracked.log_params({"threads": 2, "seed": 0})
    assert fetched(run).data.params == {"threads": "1", "seed": "0"}


def test_a_retry_writes_no_metric_twice(experiment: str) -> None:
    first = opened(experiment, origin())
    with runs.active(first) as tracked:
        assert tracked.last_logged_step("val/loss") == 0
        for epoch in (1, 2, 3):
            tracked.log_metrics({"val/loss": 1 / epoch}, step=epoch)
        tracked.log_metrics({"test/accuracy": 0.5})
    with runs.active(opened(experiment, origin(try_number=2))) as tracked:
        assert tracked.last_logged_step("val/loss") == 3
        for epoch in (2, 3, 4):
            tracked.log_metrics({"val/loss": 7, "val/accuracy": 0.1 * epoch}, step=epoch)
        tracked.log_metrics({"test/accuracy": 0.6, "test/log_loss": 2})
    history = mlflow.MlflowClient().get_metric_history
    written = {
        name: [(entry.step, entry.value) for entry in history(first.info.run_id, name)]
        for name in ("val/loss", "test/accuracy", "test/log_loss")
    }
    assert written == {
        "val/loss": [(1, 1), (2, 1 / 2), (3, 1 / 3), (4, 7)],
        "test/accuracy": [(0, 0.5)],
        "test/log_loss": [(0, 2)],
    }
    assert [entry.step for entry in history(first.info.run_id, "val/accuracy")] == [2, 3, 4]


def test_a_table_is_that_of_the_last_attempt(experiment: str) -> None:
    run = opened(experiment, origin())
    for names in (["a", "b"], ["c"]):
        runs.TrackedRun(run).log_table({"name": names, "length": [1] * len(names)}, "names.json")
    table = mlflow.MlflowClient().load_table(experiment, "names.json", [run.info.run_id])
    assert table.to_dict("records") == [{"name": "c", "length": 1}]


def test_the_commit_is_that_of_this_code_and_of_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *words]
        subprocess.run(command, check=True)

    code = tmp_path / ".venv" / "runs.py"
    code.parent.mkdir()
    code.touch()
    (tmp_path / "own.txt").touch()
    git("init", "-q")
    git("add", "own.txt")
    git("commit", "-qm", "m")
    monkeypatch.delenv("MLPIPE_GIT_SHA", raising=False)
    monkeypatch.setattr(runs, "__file__", str(code))
    runs.git_sha.cache_clear()
    assert runs.git_sha() == "unknown", "the package lies in a checkout of something else"
    git("add", "-f", ".venv")
    git("commit", "-qm", "m")
    runs.git_sha.cache_clear()
    assert len(runs.git_sha()) == 40
    runs.git_sha.cache_clear()


def test_a_result_that_has_changed_is_replaced(experiment: str) -> None:
    run = opened(experiment, origin())
    for number in (2, 3, 3):
        with runs.active(opened(experiment, origin())) as tracked:
            tracked.replace_metrics({"num_models": number, "chance": 0.1})
    assert fetched(run).data.metrics == {"num_models": 3, "chance": 0.1}
    assert len(mlflow.MlflowClient().get_metric_history(run.info.run_id, "num_models")) == 2


def test_what_a_dying_server_wrote_twice_is_kept_once(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's client repeats a request that got no answer; here each is simply made twice."""

    def twice(call: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, **kwargs: [call(*args, **kwargs) for _ in range(2)][-1]

    for name in ("create_run", "create_model_version"):
        monkeypatch.setattr(mlflow.MlflowClient, name, twice(getattr(mlflow.MlflowClient, name)))
    run = opened(experiment, origin())
    assert opened(experiment, origin()).info.run_id == run.info.run_id
    assert len(mlflow.MlflowClient().search_runs([experiment])) == 1
    with runs.active(run):
        logged = mlflow.pyfunc.log_model(name="m", python_model=lambda model_input: model_input, pip_requirements=[])
    registered = {"model_uri": logged.model_uri, "run_id": run.info.run_id, "tags": {}, "description": ""}
    assert registry.register("twice-classifier", **registered).version == "1"
    assert len(mlflow.MlflowClient().search_model_versions("name = 'twice-classifier'")) == 1


@pytest.mark.usefixtures("_store")
def test_closing_ends_what_is_open_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dag_runs.close("letters", origin("a", task_id=""), "FAILED", "no run has begun")
    experiment = runs.experiment_id(dag_runs.experiment_name("letters"))
    done, parent, child = (opened(experiment, origin("a"), part) for part in ("data", "parent", "resnet18"))
    other = opened(experiment, origin("b"), "parent")
    mlflow.MlflowClient().set_terminated(done.info.run_id)
    dag_runs.close("letters", origin("a", task_id=""), "FAILED", "task failure")
    assert [fetched(run).info.status for run in (done, parent, child, other)] == [
        "FINISHED",
        "FAILED",
        "FAILED",
        "RUNNING",
    ]
    assert fetched(parent).data.tags["error"] == "task failure"


@pytest.mark.usefixtures("_store")
def test_what_a_killed_task_left_does_not_end_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = runs.experiment_id(dag_runs.experiment_name("letters"))
    parent, model = (
        runs.open_run(experiment, f"c {stage}", name="n", tags={**origin("c").tags(), "stage": stage}, description="")
        for stage in ("parent", "train")
    )
    dag_runs.close("letters", origin("c", task_id=""), "FINISHED", "see the failed task's log")
    assert [fetched(run).info.status for run in (parent, model)] == ["FINISHED", "FAILED"]
    assert fetched(model).data.tags["error"] == "see the failed task's log"


@pytest.mark.usefixtures("_store")
def test_a_task_keeps_its_reason_while_others_of_its_dag_run_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve(RunParams())
    first, second = (dataclasses.replace(origin(), map_index=number) for number in (0, 1))
    dag_runs.parent_run(config, first)
    dag_runs.note_failure(config, first, OSError("no such weights"))
    parent = dag_runs.parent_run(config, second)
    assert parent.data.tags["error/train/0"] == f"{config.models[0].name}: no such weights"
    dag_runs.parent_run(config, first)  # the next attempt
    assert not [tag for tag in fetched(parent).data.tags if tag.startswith("error")]


@pytest.mark.usefixtures("_store")
def test_a_training_beyond_the_models_of_the_form_keeps_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve(RunParams(models="custom_cnn"))  # as of a search, which trains it on several seeds
    third = dataclasses.replace(origin("seeds"), map_index=2)
    parent = dag_runs.parent_run(config, third)
    dag_runs.note_failure(config, third, OSError("disk is full"))
    assert fetched(parent).data.tags["error/train/2"] == "train: disk is full"


def test_links_lead_to_both_pages(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPE_MLFLOW_UI_URL", "http://localhost:5000/")
    monkeypatch.setenv("MLPIPE_AIRFLOW_UI_URL", "http://localhost:8080/")
    run = opened(experiment, origin())
    assert (
        runs.run_url(run)
        == f"http://localhost:5000/#/experiments/{experiment}/runs/{run.info.run_id}?{runs.TRAINING_VIEW}"
    )
    assert run.data.tags["airflow_url"] == "http://localhost:8080/dags/image_classification/runs/manual__1"


def test_links_hold_no_login(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(experiment, origin())
    for variable in ("MLFLOW_TRACKING_URI", "MLPIPE_MLFLOW_UI_URL"):
        monkeypatch.setenv(variable, "https://us3r:passw0rd@mlflow:5000/")
        for url in (runs.run_url(run), runs.compare_url(run.info.run_id, experiment)):
            assert url.startswith("https://mlflow:5000/#/")


def test_registering_again_gives_the_same_version(experiment: str) -> None:
    run = opened(experiment, origin())
    with runs.active(run):
        logged = mlflow.pyfunc.log_model(name="m", python_model=lambda model_input: model_input, pip_requirements=[])
    versions = [
        registry.register(
            "toy-classifier",
            model_uri=logged.model_uri,
            run_id=run.info.run_id,
            tags={"model": "resnet18"},
            description="d",
        )
        for _ in range(2)
    ]
    assert versions[0].version == versions[1].version
    assert registry.by_alias("toy-classifier", "champion") is None
    registry.RegistryAliases("toy-classifier", runs.tracked(run.info.run_id)).move("champion", versions[0].version)
    holder = registry.by_alias("toy-classifier", "champion")
    assert holder is not None
    assert (holder.uri, holder.tags["model"]) == (f"models:/toy-classifier/{versions[0].version}", "resnet18")


def test_a_registered_model_that_was_renamed_is_missed(experiment: str, caplog: pytest.LogCaptureFixture) -> None:
    run = opened(experiment, origin())
    with runs.active(run) as tracked:
        logged = mlflow.pyfunc.log_model(name="m", python_model=lambda model_input: model_input, pip_requirements=[])
        made = {"model_uri": logged.model_uri, "run_id": run.info.run_id, "tags": {}, "description": ""}
        registry.register("moved-classifier", **made)
        assert "is gone" not in caplog.text
        tracked.set_tags({"model_version": "moved-classifier/1"})
    mlflow.MlflowClient().rename_registered_model("moved-classifier", "renamed")
    registry.register("moved-classifier", **made)
    assert "moved-classifier is gone, though earlier runs made versions of it" in caplog.text


def test_a_model_that_was_never_registered_is_discarded(experiment: str) -> None:
    run = opened(experiment, origin())
    with runs.active(run):
        mlflow.pyfunc.log_model(name="m", python_model=lambda model_input: model_input, pip_requirements=[])
    registry.discard_logged_models(run)
    assert not mlflow.MlflowClient().search_logged_models([experiment])
    assert registry.find("toy-classifier", run.info.run_id) is None


def test_without_a_server_a_run_stays_as_it_is_and_says_so_at_once(
    experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(experiment, origin())
    store = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"

        def work() -> None:
            with services_named(), runs.active(run) as tracked:
                mlflow.set_tracking_uri(address)
                tracked.log_metrics({"val/loss": 1}, step=1)

        with pytest.raises(ServiceUnavailableError, match=f"MLflow at {address} does not answer.* clear this task"):
            work()
    mlflow.set_tracking_uri(store)
    assert mlflow.active_run() is None
    assert fetched(run).info.status == "RUNNING"


def test_an_unknown_registered_model_has_no_alias(experiment: str) -> None:  # noqa: ARG001 - the store
    assert registry.by_alias("nothing-classifier", "champion") is None
