"""The demo of the monitor: a simulated day, the shipped start, and nothing that is left behind."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from rich.console import Console

from client.monitor.alarm import DEFAULT_RULES
from client.monitor.demo import demo_day, demo_watch, last_time
from client.monitor.view import Screen
from simulations.generators.glucose import EXPORT, generate_glucose_hospitals


def monitor(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "client.cli", "monitor", *arguments]
    return subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def test_the_demo_shows_forecasts_and_alerts_of_a_simulated_patient_and_counts_them(tmp_path: Path) -> None:
    done = monitor(tmp_path, "--demo")
    assert (done.returncode, done.stderr) == (0, "")
    first, *day, counted = done.stdout.splitlines()
    assert "the patient is simulated" in first
    assert any("forecast in 30 min: " in line for line in day)
    alerts = {kind: sum(f"ALERT {kind}: " in line for line in day) for kind in ("low", "high")}
    assert min(alerts.values()) >= 1
    assert counted == f"288 read; alerts: {alerts['high']} high, {alerts['low']} low"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--demo"),
        (["m.safetensors"], "--from"),
        (["--from", "x.csv"], "a checkpoint"),
        (["m.safetensors", "--demo"], "its own model"),
        (["--demo", "--alerts", "a.jsonl"], "writes nothing"),  # simulated alerts have no place in a hospital's file
        (["--demo", "--fhir", "out"], "writes nothing"),
    ],
)
def test_the_demo_mixes_with_nothing_of_a_hospital(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = monitor(tmp_path, *arguments)
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert said in sentence
    assert list(tmp_path.iterdir()) == []


def test_the_screen_shows_the_demos_patient_by_the_demos_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.monitor.demo._PAUSE_S", 0.0)
    watch = demo_watch(DEFAULT_RULES, lambda _words: None)
    console = Console(record=True, width=110, height=40, force_terminal=True)
    with console.capture() as said, Screen(console, DEFAULT_RULES, lambda: last_time(watch)) as screen:
        for lines in demo_day(watch, lambda _words: None, shown=True):
            watch.take(lines)
        screen.show(watch.sights, "")
    assert set(watch.sights) == {"simulated"}
    assert "in range" in said.get()
    assert "last seen" not in said.get()


def test_the_demos_day_is_what_the_generator_writes(tmp_path: Path) -> None:
    (site,) = generate_glucose_hospitals(tmp_path / "out", sites=1, seed=8, patients_per_site=1, days=1)
    assert (site / EXPORT).read_text() == files("client.monitor").joinpath("demo.csv").read_text()
