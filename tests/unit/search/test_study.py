"""A study's trials: who asks for them, who takes them, who resumes them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from mlpipe.config import NetworkSettings
from mlpipe.errors import UserError
from mlpipe.search import study as studies
from mlpipe.search.form import Search, TuneParams, resolve_search
from mlpipe.search.study import (
    best_trial,
    check_same_search,
    default_settings,
    default_trial,
    is_over,
    next_trial,
    open_study,
    request_trials,
    suggest,
    unfinished_trial,
)


def search_of(**form: object) -> Search:
    return resolve_search(TuneParams.from_mapping({"trials": 6, **form}), "run-1")


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return open_study("pets", tmp_path, seed=0, pruning=True)


def run_all(study: optuna.Study, search: Search, worker: str, request: str = "run-1") -> list[int]:
    taken = []
    while trial := next_trial(study, worker, request):
        values = suggest(trial, search)
        taken.append(trial.number)
        study.tell(trial, values["learning_rate"])
    return taken


def test_the_first_trial_has_the_recipes_settings(study: optuna.Study) -> None:
    search = search_of()
    request_trials(study, search, "run-1")
    trial = next_trial(study, "worker", "run-1")
    assert trial is not None
    assert (
        suggest(trial, search)
        == default_settings(search)
        == {
            "learning_rate": 0.04,
            "weight_decay": 0.0,
            "label_smoothing": 0.0,
        }
    )


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """Address of a PostgreSQL server of this module's own."""
    programs = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"))), None)
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    folder = Path(tempfile.mkdtemp(prefix="mlpipe-postgresql-"))  # pytest's own are closed to other users
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # it refuses to run as root
    if as_user:
        shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(*command: str) -> None:
        subprocess.run([*as_user, *command], check=True, stdout=subprocess.DEVNULL, timeout=60)

    run(f"{programs}/initdb", "--auth=trust", "--username=studies", f"{folder}/data")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder}"
    run(f"{programs}/pg_ctl", "-w", "-D", f"{folder}/data", "-o", options, "-l", f"{folder}/log", "start")
    yield f"postgresql+psycopg2://studies@127.0.0.1:{port}/postgres"
    run(f"{programs}/pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.mark.parametrize("storage", ["file", "postgresql"])
def test_workers_share_the_trials_and_make_no_more(
    storage: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if storage == "postgresql":
        monkeypatch.setenv(studies.STORAGE_VARIABLE, request.getfixturevalue("postgresql"))
    search = search_of(trials=25)
    open_one = [open_study("pets", tmp_path, seed=0, pruning=False, worker=worker) for worker in range(3)]
    request_trials(open_one[0], search, "run-1")
    taken: list[list[int]] = [[], [], []]

    def work(worker: int) -> None:
        taken[worker] = run_all(open_one[worker], search, f"worker-{worker}")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for each in taken for number in each) == list(range(25))
    assert len(open_one[0].trials) == 25


def test_a_retry_asks_for_no_more_trials_and_another_dag_run_goes_on(study: optuna.Study) -> None:
    search = search_of()
    request_trials(study, search, "run-1")
    request_trials(study, search, "run-1")
    assert len(study.trials) == 6
    run_all(study, search, "worker")
    request_trials(study, search, "run-2")
    assert len(study.trials) == 12
    assert [trial.number for trial in study.trials if trial.user_attrs.get(studies.DEFAULT)] == [0]


@pytest.mark.parametrize("storage", ["file", "postgresql"])
def test_dag_runs_of_one_study_leave_each_other_their_trials(
    storage: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if storage == "postgresql":
        monkeypatch.setenv(studies.STORAGE_VARIABLE, request.getfixturevalue("postgresql"))
    first, second = (open_study("shared", tmp_path, seed=0, pruning=False, worker=worker) for worker in range(2))
    request_trials(first, search_of(trials=5), "run-1")  # of which a stopped DAG run leaves some
    assert next_trial(first, "a", "run-1") is not None
    request_trials(second, search_of(trials=3), "run-2")
    assert run_all(second, search_of(), "b", "run-2") == [5, 6, 7]
    assert run_all(first, search_of(), "c") == [1, 2, 3, 4]
    assert next_trial(second, "b", "run-2") is None
    assert len(first.trials) == 8


def test_a_trial_that_another_worker_takes_at_the_same_moment_is_left_to_it(
    study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_trials(study, search_of(trials=3), "run-1")
    seen = study.get_trials()
    other = open_study("pets", tmp_path, seed=0, pruning=True, worker=1)
    ended, running = (next_trial(other, "other", "run-1") for _ in range(2))
    assert ended is not None
    assert running is not None
    other.tell(ended, 0.5)
    monkeypatch.setattr(study, "get_trials", lambda **_: seen)  # as they were just before
    mine = next_trial(study, "mine", "run-1")
    assert mine is not None
    assert mine.number == 2
    assert other.trials[1].user_attrs[studies.OWNER] == "other"
    assert next_trial(study, "mine", "run-1") is None


def test_a_dag_run_makes_the_recipes_trial_where_none_was_completed(study: optuna.Study) -> None:
    search = search_of()
    request_trials(study, search, "run-1")
    stopped = next_trial(study, "a", "run-1")
    assert stopped is not None
    suggest(stopped, search)
    request_trials(study, search, "run-2")
    request_trials(study, search, "run-2")  # a retry
    mine = [trial for trial in study.trials if trial.user_attrs[studies.REQUEST] == "run-2"]
    assert [trial.user_attrs.get(studies.DEFAULT) for trial in mine] == [True, *[None] * 5]
    again = next_trial(study, "b", "run-2")
    assert again is not None
    assert suggest(again, search) == default_settings(search)
    study.tell(again, 0.7)
    default = default_trial(study)
    assert default is not None
    assert (default.number, default.value) == (again.number, 0.7)
    request_trials(study, search, "run-3")
    assert len([trial for trial in study.trials if studies.DEFAULT in trial.user_attrs]) == 2


@pytest.mark.parametrize("storage", ["file", "postgresql"])
def test_a_dag_runs_time_is_that_of_all_workers_and_attempts(
    storage: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if storage == "postgresql":
        monkeypatch.setenv(studies.STORAGE_VARIABLE, request.getfixturevalue("postgresql"))
    search, now = search_of(minutes=10), 1_900_000_000.0
    monkeypatch.setattr(studies.time, "time", lambda: now)
    request_trials(open_study("timed", tmp_path, seed=0, pruning=True), search, "run-1")
    now += 9 * 60
    other = open_study("timed", tmp_path, seed=0, pruning=True, worker=1)
    assert not is_over(other, search, "run-1")
    now += 2 * 60
    request_trials(other, search, "run-1")  # another attempt of the first worker
    assert is_over(other, search, "run-1")
    assert not is_over(other, search_of(), "run-1")
    request_trials(other, search, "run-2")
    assert not is_over(other, search, "run-2")


@pytest.mark.parametrize(
    ("form", "digest", "other"),
    [
        ({}, "b", "data"),
        ({"model": "resnet18=random"}, "a", "model, recipe and settings"),
        ({"vary": "learning_rate"}, "a", "varied settings"),
        ({"recipe": "report"}, "a", "recipe and settings"),
        ({"epochs": 1}, "a", "recipe and settings"),
    ],
)
def test_trials_that_cannot_be_compared_do_not_join_a_study(
    study: optuna.Study, form: dict[str, object], digest: str, other: str
) -> None:
    check_same_search(study, search_of(), "a")
    check_same_search(study, search_of(trials=9, seed=1), "a")
    with pytest.raises(UserError, match=f"^study: pets was made with other {other}, so"):
        check_same_search(study, search_of(**form), digest)


def test_a_network_file_counts_by_its_content(study: optuna.Study, tmp_path: Path) -> None:
    file, moved = tmp_path / "mynets.py", tmp_path / "moved.py"
    for path in (file, moved):
        path.write_text("class Tiny: ...")
    check_same_search(study, search_of(model=f"{file}:Tiny"), "a")
    check_same_search(study, search_of(model=f"{moved}:Tiny"), "a")
    file.write_text("class Tiny: depth = 2")
    with pytest.raises(UserError, match="^study: pets was made with other model, so"):
        check_same_search(study, search_of(model=f"{file}:Tiny"), "a")


def test_each_dag_run_has_a_study_of_its_own() -> None:
    form = TuneParams.from_mapping({"name": "a" * 48})
    assert len({resolve_search(form, f"{'long' * 30}-{number}").study for number in range(2)}) == 2


def test_a_search_that_goes_on_draws_other_settings(tmp_path: Path) -> None:
    drawn: list[dict[str, object]] = []
    for request in ("run-1", "run-2"):
        study = open_study("pets", tmp_path, seed=0, pruning=False)
        request_trials(study, search_of(trials=4), request)
        run_all(study, search_of(trials=4), "w", request)
        drawn = [trial.params for trial in study.trials]
    assert len({str(params) for params in drawn[1:]}) == len(drawn) - 1


def test_a_worker_resumes_its_own_trial_alone(study: optuna.Study, tmp_path: Path) -> None:
    search = search_of()
    request_trials(study, search, "run-1")
    left = next_trial(study, "worker-0", "run-1")
    assert left is not None
    values = suggest(left, search)
    again = open_study("pets", tmp_path, seed=0, pruning=True)
    other = next_trial(again, "worker-1", "run-1")
    assert other is not None
    assert other.number != left.number
    assert unfinished_trial(again, "worker-2") is None
    resumed = unfinished_trial(again, "worker-0")
    assert resumed is not None
    assert (resumed.number, suggest(resumed, search)) == (left.number, values)


def test_a_worker_that_was_killed_while_it_took_a_trial_owns_it(
    study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_trials(study, search_of(), "run-1")
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, "set_user_attr", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next_trial(study, "worker-0", "run-1")
    again = open_study("pets", tmp_path, seed=0, pruning=True)
    assert unfinished_trial(again, "worker-1") is None
    resumed = unfinished_trial(again, "worker-0")
    assert resumed is not None
    assert resumed.number == 0


def test_the_best_trial_is_never_worse_than_the_recipe(study: optuna.Study) -> None:
    search = search_of()
    with pytest.raises(UserError, match="no trial that was completed"):
        best_trial(study)
    request_trials(study, search, "run-1")
    default = next_trial(study, "worker", "run-1")
    assert default is not None
    suggest(default, search)
    study.tell(default, 0.9)
    worse = next_trial(study, "worker", "run-1")
    assert worse is not None
    suggest(worse, search)
    study.tell(worse, 0.8)
    assert best_trial(study).number == 0


def test_any_setting_of_any_model_can_be_varied(study: optuna.Study) -> None:
    names = "learning_rate,weight_decay,label_smoothing,batch_size,augmentation,optimizer,width,depth"
    for form in ({"vary": names}, {"model": "logistic_regression"}):
        search = search_of(**form)
        trial = study.ask()
        values = suggest(trial, search)
        assert set(values) == set(search.vary)
        settings = replace(search.model.train, **values)
        assert isinstance(settings, NetworkSettings) == ("vary" in form)


def test_the_largest_seed_of_the_form_is_allowed(tmp_path: Path) -> None:
    largest = TuneParams.json_schema()["seed"]["maximum"]
    assert open_study("pets", tmp_path, seed=largest, pruning=True, worker=63).ask().number == 0


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ({"model": "custom_cnn,resnet18"}, "model"),
        ({"vary": "num_components"}, "vary"),
        ({"model": "logistic_regression", "vary": "learning_rate"}, "vary"),
        ({"model": "resnet18=random", "vary": "width"}, "vary"),
        ({"model": "resnet18=random", "vary": "depth"}, "vary"),
        ({"trials": 1}, "trials"),
        ({"study": "No Name"}, "study"),
    ],
)
def test_a_bad_form_is_refused_by_name(form: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=f"^{named}: "):
        search_of(**form)


def test_only_shared_storage_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(studies.STORAGE_VARIABLE, "sqlite:///studies.db")
    with pytest.raises(UserError, match=r"^MLPIPE_STUDY_STORAGE: sqlite"):
        open_study("pets", tmp_path, seed=0, pruning=True)
