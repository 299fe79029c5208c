"""The command as a researcher runs it, on real DICOM files: contract, kill, resume, Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.ledger import Ledger
from shared.accounting import epsilon_of
from shared.records import RecordStore

COMMAND = [sys.executable, "-c", "from simulations.cli import main; main()"]
SMALL = ["--rounds", "4", "--records-per-patient", "1", "--seed", "7", "--workers", "1"]


def fedward_sim(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}
    return subprocess.run([*COMMAND, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


@pytest.fixture
def hospitals(tmp_path: Path, make_nodule_store: Callable[..., RecordStore]) -> list[str]:
    arguments = []
    for number in (1, 2):
        make_nodule_store(tmp_path / f"hospital-{number}", patients=30, seed=number)
        arguments += ["--data", str(tmp_path / f"hospital-{number}")]
    return arguments


def test_from_raw_dicom_to_the_report(tmp_path: Path) -> None:
    generated = fedward_sim("generate", "--sites", "2", "--patients-per-site", "8", "--out", "raw", cwd=tmp_path)
    assert generated.returncode == 0, generated.stderr
    sites = sorted((tmp_path / "raw").iterdir())
    assert [site.name for site in sites] == ["site-1", "site-2"]
    assert all((site / "annotations.csv").exists() for site in sites)
    data = [argument for site in sites for argument in ("--data", str(site))]
    done = fedward_sim("run", *SMALL, *data, "--epsilon", "8", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = summary(tmp_path / "out")
    assert set(found) >= {
        "task", "rounds_completed", "seed", "plan_digest", "sites", "metrics", "baselines", "timings",
        "peak_rss_mib", "checkpoint",
    }  # fmt: skip
    assert set(found["sites"][0]) == {"name", "declared_patients", "epsilon", "delta", "rounds", "refused"}
    assert set(found["metrics"]["auroc"]) == {"value", "low", "high"}
    assert found["rounds_completed"] == len(found["timings"]["round_s"]) == 4
    assert Path(found["checkpoint"]["path"]).exists()
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["epsilon"] <= 8.0
    assert plan["digest"] == found["plan_digest"]
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_resumes_to_the_very_same_weights(tmp_path: Path, hospitals: list[str], stop: int) -> None:
    whole = fedward_sim("run", *SMALL, *hospitals, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    running = subprocess.Popen(
        [*COMMAND, "run", *SMALL, *hospitals, "--out", "cut"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    checkpoints = tmp_path / "cut" / "server" / "checkpoints"
    while not list(checkpoints.glob("round-00001.json")):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(stop)
    _, said = running.communicate(timeout=30)
    assert running.returncode in (-signal.SIGKILL, 130)
    assert "Traceback" not in said
    resumed = fedward_sim("run", "--resume", "cut", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    before, after = summary(tmp_path / "whole"), summary(tmp_path / "cut")
    assert after["checkpoint"]["sha256"] == before["checkpoint"]["sha256"]
    for site in after["sites"]:
        ledger = Ledger(tmp_path / "cut" / "sites" / site["name"] / "ledger.sqlite")
        assert epsilon_of(ledger.mechanisms(), site["delta"]) == site["epsilon"] <= 8.0


def test_ray_gives_the_same_weights(tmp_path: Path, hospitals: list[str]) -> None:
    local = fedward_sim("run", *SMALL, *hospitals, "--out", "local", cwd=tmp_path)
    assert local.returncode == 0, local.stderr
    ray = fedward_sim("run", *SMALL, *hospitals, "--backend", "ray", "--out", "ray", cwd=tmp_path)
    assert ray.returncode == 0, ray.stderr
    assert summary(tmp_path / "ray")["checkpoint"]["sha256"] == summary(tmp_path / "local")["checkpoint"]["sha256"]
