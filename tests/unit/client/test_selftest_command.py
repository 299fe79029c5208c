"""The command ``selftest``, the daemon's self-test at its start, and what ``status`` says of it."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from client import cli, selftest
from client.config import SitePolicy
from client.overview import last_selftest
from shared.records import RecordStore, store_path
from shared.tasks.base import Batch
from shared.tasks.registry import find_task

TASK = "glucose-forecast"
POLICY = SitePolicy(name="h", declared_patients=20, tasks=(TASK,), max_epsilon=8.0, threads=2)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fedward-site", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def restless() -> Callable[[nn.Module, Batch], Tensor]:
    """A loss that differs at every call, so that no rung is safe."""
    calls = iter(range(1, 10**6))
    return lambda model, batch: find_task(TASK).loss(model, batch) * (1.0 + next(calls) * 2.0**-20)


@pytest.mark.parametrize("threads", [1, 3])
def test_selftest_names_rung_and_largest_difference_by_task(
    threads: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "selftest", "--task", TASK, "--threads", threads, "--json") == 0
    facts = json.loads(capsys.readouterr().out)[TASK]
    assert facts["safe"]
    assert facts["rung"] in facts["differences"]
    assert facts["differences"][facts["rung"]] == 0.0
    assert facts["threads"] in (1, threads)


def test_selftest_fails_if_a_permitted_task_is_unsafe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    POLICY.write(tmp_path / "site.toml")
    unsafe = replace(find_task(TASK), name="restless", loss=restless())
    monkeypatch.setattr(selftest, "find_task", lambda _: unsafe)
    assert call(monkeypatch, "selftest", tmp_path) == 1
    assert "unsafe" in capsys.readouterr().out


def test_the_daemon_sets_its_threads_whatever_the_environment_says_and_keeps_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_nodule_store: Callable[..., RecordStore]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert selftest.examine(tmp_path, POLICY) == []  # without patients nothing trains
    make_nodule_store(store_path(tmp_path, find_task(TASK).store_kind))
    (verdict,) = selftest.examine(tmp_path, POLICY)
    assert torch.get_num_threads() == 2
    assert last_selftest(tmp_path) == {TASK: f"{verdict.rung}, {verdict.threads} threads"}


@pytest.mark.parametrize("content", ["", "[]", "{", '[{"task": 1}]', "3"])
def test_a_damaged_result_is_no_result(tmp_path: Path, content: str) -> None:
    (tmp_path / "selftest.json").write_text(content)
    assert last_selftest(tmp_path) == {}


def test_an_old_site_toml_without_threads_uses_all_cores(tmp_path: Path) -> None:
    POLICY.write(tmp_path / "site.toml")
    lines = (tmp_path / "site.toml").read_text().splitlines()
    (tmp_path / "site.toml").write_text("\n".join(line for line in lines if not line.startswith("threads")))
    assert SitePolicy.read(tmp_path / "site.toml").threads == 0
