"""Bad input: one clear sentence and a non-zero exit, never a traceback."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.records import RecordStore, write_store
from simulations import cli
from simulations.run import read_plan


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedward-sim", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.fixture
def hospital(tmp_path: Path, make_nodule_store: Callable[..., RecordStore]) -> Path:
    make_nodule_store(tmp_path / "hospital")
    return tmp_path / "hospital"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "no-such-task"], "no-such-task"),
        (["--backend", "cloud"], "local, ray"),
        (["--epsilon", "0"], "epsilon must be positive"),
        (["--epsilon", "nan"], "epsilon must be positive"),
        (["--epsilon", "0.0001", "--delta", "1e-6"], "Ask for a larger epsilon"),
        (["--delta", "2"], "delta must lie"),
        (["--sample-rate", "3"], "sample-rate must lie"),
        (["--optimizer", "magic"], "optimizer must be one of"),
        (["--learning-rate", "-1"], "learning-rate must lie"),
        (["--max-epsilon", "0.5"], "budget-exceeded"),
        (["--init", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--heldout", "nowhere"], "neither a prepared store nor a raw export"),
        (["--backend", "ray", "--ray-address", "127.0.0.1:9"], "No Ray cluster answers"),
        (["--backend", "ray", "--ray-address", "banana"], "No Ray cluster answers"),
        (["--ray-address", "127.0.0.1:9"], "needs --backend ray"),
        (["--max-epsilon", "nan"], "must be positive"),
        (["--set", "min-site=3"], "Did you mean min-sites?"),
        (["--set", "rounds=3"], "--rounds and --set rounds both set rounds"),
        (["--epsilon", "4", "--set", "epsilon=3"], "--epsilon and --set epsilon both set epsilon"),
        (["--set", "tau=0"], "tau must lie"),
        (["--set", "min-sites=3"], "1 of the 3 sites that the plan requires"),
        (["--sensitivity", "1.5"], "sensitivity must be above 0"),
        (["--task", "glucose-forecast", "--sensitivity", "0.9"], "makes no yes-or-no decision"),
        (["--heldout", __file__], "neither a prepared store nor a raw export"),
    ],
)
def test_wrong_values_are_one_sentence(
    arguments: list[str],
    said: str,
    hospital: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    common = ["run", "--data", str(hospital), "--rounds", "2", "--workers", "1", "--out", str(tmp_path / "out")]
    assert call(monkeypatch, *common, *arguments) == 1
    error = capfd.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert error.startswith("fedward-sim: ")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("nowhere", "There is no folder"),
        ("empty", "cannot take part"),
        ("no-annotations", "cannot take part"),
        ("file.txt", "There is no folder"),
    ],
)
def test_a_hospital_without_patients_is_named(
    data: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm,malignancy\n")
    (tmp_path / "no-annotations").mkdir()
    (tmp_path / "file.txt").write_text("hello")
    common = ["run", "--data", str(tmp_path / data), "--workers", "1", "--out", str(tmp_path / "out")]
    assert call(monkeypatch, *common) == 1
    error = capfd.readouterr().err
    assert said in error
    assert data in error
    assert "Traceback" not in error


def test_a_missing_out_and_a_missing_resume_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run") == 1
    assert "--out" in capfd.readouterr().err
    assert call(monkeypatch, "run", "--resume", str(tmp_path)) == 1
    assert "no simulation to resume" in capfd.readouterr().err


def test_an_undefined_metric_is_said_and_is_no_failure(
    tmp_path: Path,
    make_nodule_store: Callable[..., RecordStore],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    store = make_nodule_store(tmp_path / "all", patients=20)
    benign = np.flatnonzero([not item.arrays["malignant"].any() for item in store.items()])
    part = store.subset(benign)
    write_store(tmp_path / "benign", kind=part.kind, patients=part.items(), attributes=part.attributes)
    make_nodule_store(tmp_path / "hospital", patients=12, seed=5)
    odd = tmp_path / "odd [/x] ü"
    monkeypatch.setattr(
        sys, "argv",
        ["fedward-sim", "run", "--data", str(tmp_path / "hospital"), "--heldout", str(tmp_path / "benign"),
         "--rounds", "1", "--workers", "1", "--out", str(odd)],
    )  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert "undefined" in capfd.readouterr().out


def test_any_field_of_the_plan_can_be_set_and_the_end_opens_with_its_warnings(
    hospital: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = ("min-sites=1", "strategy=fedprox", "proximal_mu=0.2", "deadline-s=90", "epsilon=6", "rounds=1")
    arguments = ["run", "--data", str(hospital), "--workers", "1", "--out", str(out), "--sensitivity", "0.9"]
    monkeypatch.setattr(sys, "argv", ["fedward-sim", *arguments, *(f"--set={setting}" for setting in settings)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    plan = read_plan(out / "plan.json")
    assert (plan.strategy, plan.proximal_mu, plan.deadline_s, plan.rounds) == ("fedprox", 0.2, 90.0, 1)
    assert plan.epsilon() <= 6.0
    lines = capfd.readouterr().out.splitlines()
    ends = [n for n, line in enumerate(lines) if line.startswith("1 round, held-out auroc")]
    warned = [
        n
        for n, line in enumerate(lines)
        if line.startswith("warning: A hospital has very few patients. Below 50 declared patients: site-1 (10)")
    ]
    assert len(ends) == len(warned) == 1
    assert warned < ends
    [sidecar] = (out / "server" / "checkpoints").glob("round-00001.json")
    point = json.loads(sidecar.read_text())["operating_point"]
    assert point["rule"] == "sensitivity 0.90"
    metrics = json.loads((out / "summary.json").read_text())["metrics"]
    assert (metrics["threshold"], metrics["temperature"]) == (point["threshold"], point["temperature"])


def test_heldout_patients_may_be_a_raw_export_of_dicom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    made = ("--sites", "2", "--patients-per-site", "6", "--seed", "3", "--out", str(raw))
    monkeypatch.setattr(sys, "argv", ["fedward-sim", "generate", *made, "--workers", "1"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    first, second = sorted(path for path in raw.iterdir() if path.is_dir())
    common = ["run", "--data", str(first), "--workers", "1", "--set", "rounds=1"]
    arguments = [*common, "--heldout", str(second), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["fedward-sim", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert len(RecordStore.open(tmp_path / "out" / "heldout")) == 6
    capfd.readouterr()
    assert call(monkeypatch, *common, "--heldout", str(first), "--out", str(tmp_path / "same")) == 1
    assert "among the training patients of site-1" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["run", "generate"])
def test_an_unwritable_folder_is_one_sentence(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")  # stands for a read-only disk: tests may run as root
    assert call(monkeypatch, command, "--out", str(tmp_path / "file" / "out")) == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert str(tmp_path / "file") in error


@pytest.mark.parametrize("arguments", [["run", "--no-such-option"], ["run", "--sites", "0"], ["fly"]])
def test_wrong_usage_exits_with_two(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, *arguments) == 2


def test_help_shows_examples(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(os.environ, "COLUMNS", "200")
    assert call(monkeypatch, "run", "--help") == 0
    assert "--resume runs/first" in capfd.readouterr().out


def test_images_of_no_checkpoint_are_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "synthesise", str(tmp_path / "none.safetensors"), "--out", str(tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert "none" in said
    assert "Traceback" not in said
