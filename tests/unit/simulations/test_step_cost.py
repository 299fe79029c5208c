"""The cost of a task's own step is measured on a prepared store; no time is asserted."""

import sys
from pathlib import Path

import pytest

from simulations import step_cost
from simulations.service_benchmark import write_tiny_store


def test_both_steps_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_store(tmp_path / "store")
    monkeypatch.setattr(step_cost, "_REPEATS", 1)
    monkeypatch.setattr(sys, "argv", ["step_cost", str(tmp_path / "store"), "--task", "nodule-classification"])
    step_cost.main()
    said = capsys.readouterr().out
    private, ordinary, ratio = (float(word) for word in said.split() if word.replace(".", "").isdigit() and "." in word)
    assert ratio == pytest.approx(private / ordinary, rel=0.05)
