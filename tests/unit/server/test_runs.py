"""Requests on runs are files: they work without the service and nobody works twice on one run."""

import os
from pathlib import Path

import pytest

from server.registry import COMPLETED, FAILED, RUNNING, STOPPED, RoundRow
from server.runs import all_runs, find_run, lock_holder, submit, worker
from shared.errors import ErrorCode, FederationError, StorageError
from shared.plan import RunPlan

PLAN = RunPlan(
    task="nodule-classification", rounds=2, local_steps=1, sample_rate=0.5, records_per_patient=1, max_grad_norm=1.0,
    noise_multiplier=1.0, delta=1e-3, learning_rate=0.1,
)  # fmt: skip


def test_runs_get_names_and_keep_their_plan(tmp_path: Path) -> None:
    (tmp_path / "start").write_bytes(b"weights")
    names = [submit(tmp_path, PLAN, None, None).name, submit(tmp_path, PLAN, "pilot", tmp_path / "start").name]
    assert [*names, submit(tmp_path, PLAN, None, None).name] == ["run-1", "pilot", "run-2"]
    run = find_run(tmp_path, "pilot")
    assert run.plan == PLAN
    assert run.start.read_bytes() == b"weights"
    assert (run.record().status, run.wanted) == (RUNNING, RUNNING)
    assert {folder.name for folder in all_runs(tmp_path)} == {"run-1", "pilot", "run-2"}
    with pytest.raises(StorageError, match="called pilot already"):
        submit(tmp_path, PLAN, "pilot", None)
    for name in ("../x", "", "a/b"):
        with pytest.raises(StorageError, match="cannot name a run"):
            submit(tmp_path, PLAN, name, None)
        with pytest.raises(StorageError, match="There is no run"):
            find_run(tmp_path, name)


def test_a_half_made_run_is_none(tmp_path: Path) -> None:
    submit(tmp_path, PLAN, "whole", None)
    (tmp_path / "runs" / "half").mkdir()
    assert [folder.name for folder in all_runs(tmp_path)] == ["whole"]


def test_stop_and_resume(tmp_path: Path) -> None:
    run = submit(tmp_path, PLAN, None, None)
    with pytest.raises(StorageError, match="running already"):
        run.resume()
    run.stop()
    assert (run.record().status, run.wanted) == (STOPPED, STOPPED)
    with pytest.raises(StorageError, match="not running: it is stopped"):
        run.stop()
    run.resume()
    assert (run.record().status, run.wanted) == (RUNNING, RUNNING)
    run.fail(FederationError("No quorum.", ErrorCode.QUORUM_LOST))
    record = run.record()
    assert (record.status, record.failure, record.notes["failure"]) == (FAILED, "quorum-lost", "No quorum.")
    run.resume()
    run.registry().add_round(run.name, RoundRow(2, 1.0, None, {}))
    run.registry().end(run.name, COMPLETED)
    with pytest.raises(StorageError, match="nothing to resume"):
        run.resume()


def test_a_run_at_work_is_stopped_by_the_service_only(tmp_path: Path) -> None:
    run = submit(tmp_path, PLAN, None, None)
    assert worker(run.path) is None
    with run.working():
        assert worker(run.path) == os.getpid()
        with pytest.raises(StorageError, match="Another process"), run.working():
            pass
        run.stop()
        assert (run.record().status, run.wanted) == (RUNNING, STOPPED)
    assert worker(run.path) is None


def test_a_lock_file_that_nobody_holds_is_stale(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("1")
    assert lock_holder(tmp_path / "pid") is None


def test_a_run_may_have_a_sensitivity_of_its_own_that_is_no_part_of_its_plan(tmp_path: Path) -> None:
    assert submit(tmp_path, PLAN, "as-set", None).sensitivity is None
    run = submit(tmp_path, PLAN, "own", None, sensitivity=0.9)
    assert find_run(tmp_path, "own").sensitivity == 0.9
    assert run.plan == PLAN
    (run.path / "sensitivity").write_text("high")
    with pytest.raises(StorageError, match="damaged"):
        _ = run.sensitivity
