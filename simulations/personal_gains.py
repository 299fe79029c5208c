"""What personalising gains: ``python -m simulations.personal_gains CHECKPOINT EXPORT.csv[.gz] … [--patients 10]``.

Each patient's model is judged on the last readings of the patient's last segment, which neither it nor the choice of
how long to train has seen (``client.monitor.personal``). The hospital's own model is fitted to what a site would train
on, and judged as the global one is (``shared.tasks.cgm_windows``).
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch

from client.intake.glucose import prepare_glucose
from client.monitor.personal import Gain, personalise
from client.trained import load_trained
from shared.errors import IntakeError
from shared.evaluation import Evaluation
from shared.records import RecordStore
from shared.tasks.cgm_windows import split_in_time
from shared.tasks.glucose_forecast import TASK
from simulations.scripts import run_script


def gains_of(checkpoint: Path, export: Path, most: int) -> list[Gain]:
    """Return what personalising gains for the first ``most`` patients whose record is long enough."""
    model, found = load_trained(checkpoint, "glucose-forecast", "forecast glucose").model, list[Gain]()
    with tempfile.TemporaryDirectory() as folder:
        prepare_glucose(export, Path(folder) / "store", bytes(32))
        store = RecordStore.open(Path(folder) / "store")
        for patient in range(len(store)):
            if len(found) == most:
                break
            try:
                found.append(personalise(model, store.subset(np.array([patient])))[1])
            except IntakeError:
                continue
    return found


def own_model(checkpoint: Path, export: Path) -> tuple[Evaluation, Evaluation]:
    """Return how the global model does on a hospital's later readings, and one fitted to its earlier ones."""
    model = load_trained(checkpoint, "glucose-forecast", "forecast glucose").model
    with tempfile.TemporaryDirectory() as folder:
        prepare_glucose(export, Path(folder) / "store", bytes(32))
        training, judged = split_in_time(RecordStore.open(Path(folder) / "store"))
        return TASK.evaluate(model, judged), TASK.evaluate(personalise(model, training)[0], judged)


def described(evaluation: Evaluation) -> str:
    """Return the figures of the table in ``docs/glucose.md``."""
    rmse, skill, mse, mae = map(evaluation.value, ("rmse_30", "skill_30", "path_mse_median", "path_mae_median"))
    return f"RMSE at 30 min {rmse:.2f} ({skill:.0%} below last value), path {mse**0.5:.2f} / {mae:.2f}"


def main() -> None:
    """Print two lines for each export."""
    parser = argparse.ArgumentParser(description="Measure what personalising gains.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("exports", type=Path, nargs="+")
    parser.add_argument("--patients", type=int, default=10)
    chosen = parser.parse_args()
    for export in chosen.exports:
        before, after = own_model(chosen.checkpoint, export)
        sys.stdout.write(f"{export.name}: global {described(before)}; own {described(after)}\n")
        gains = gains_of(chosen.checkpoint, export, chosen.patients)
        if not gains:
            sys.stdout.write(f"{export.name}: nobody's record is long enough\n")
            continue
        rmse, loss = ([1.0 - after / before for before, after in pairs] for pairs in
                      ([g.rmse_30 for g in gains], [g.pinball for g in gains]))  # fmt: skip
        kept = sum(gain.steps == 0 for gain in gains)
        worse = sum(share < 0.0 for share in loss)
        sys.stdout.write(
            f"{export.name}: {len(gains)} patients, median gain RMSE at 30 min {median(rmse):.1%}, pinball "
            f"{median(loss):.1%}; {kept} keep the global model, {worse} are worse off\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_script(main)
