"""How long the monitor takes: ``python -m simulations.monitor_bench CHECKPOINT``.

Two numbers, each with everything that a batch costs, state and alerts on the disk included: the median per reading of
one patient whose readings come one by one, and a cycle in which each of 1,000 patients has a new reading. One thread.
"""

import argparse
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import torch

from client.monitor.alarm import DEFAULT_RULES
from client.monitor.memory import AlertFile, Memory
from client.monitor.stream import Lines
from client.monitor.watch import Watch
from client.trained import load_trained
from shared.tasks.cgm import STEP_MIN
from shared.tasks.glucose_forecast import HISTORY
from simulations.scripts import run_script

_PATIENTS: Final = 1000
_READINGS: Final = 200
_CYCLES: Final = 5
_START: Final = datetime(2024, 1, 1, tzinfo=UTC)


def seconds_a_cycle(checkpoint: Path, patients: int, cycles: int) -> list[float]:
    """Return how long each of ``cycles`` cycles took after a full history, every patient with one reading in each."""
    trained = load_trained(checkpoint, "glucose-forecast", "forecast glucose")
    with tempfile.TemporaryDirectory() as folder, Memory(Path(folder) / "state") as memory:
        alerts = AlertFile(Path(folder) / "alerts.jsonl")
        watch = Watch(trained, DEFAULT_RULES, memory, writers=[alerts.append])
        for step in range(HISTORY):
            watch.take(Lines(_rows(patients, step)))
        taken = []
        for step in range(HISTORY, HISTORY + cycles):
            rows = _rows(patients, step)
            began = time.perf_counter()
            watch.take(Lines(rows))
            taken.append(time.perf_counter() - began)
    return taken


def _rows(patients: int, step: int) -> list[str]:
    time_text = f"{_START + timedelta(minutes=STEP_MIN * step):%Y-%m-%dT%H:%M:%S}"
    values = 125.0 + 70.0 * np.sin(step / 9.0 + np.arange(patients))
    return [f"bench-{patient},{time_text},{value:.0f}" for patient, value in enumerate(values)]


def main() -> None:
    """Print both numbers."""
    parser = argparse.ArgumentParser(description="Time the monitor.")
    parser.add_argument("checkpoint", type=Path)
    chosen = parser.parse_args()
    one = seconds_a_cycle(chosen.checkpoint, 1, _READINGS)
    many = seconds_a_cycle(chosen.checkpoint, _PATIENTS, _CYCLES)
    sys.stdout.write(f"one patient: median {1000 * median(one):.1f} ms a reading, worst {1000 * max(one):.1f} ms\n")
    sys.stdout.write(f"{_PATIENTS} patients: median {median(many):.2f} s a cycle, worst {max(many):.2f} s\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_script(main)
