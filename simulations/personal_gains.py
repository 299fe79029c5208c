"""What personalising gains: ``python -m simulations.personal_gains CHECKPOINT EXPORT.csv[.gz] … [--patients 10]``.

Each patient's model is judged on the last readings of the patient's last segment, which neither it nor the choice of
how long to train has seen (``client.monitor.personal``).
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
from shared.records import RecordStore
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


def main() -> None:
    """Print a line for each export."""
    parser = argparse.ArgumentParser(description="Measure what personalising gains.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("exports", type=Path, nargs="+")
    parser.add_argument("--patients", type=int, default=10)
    chosen = parser.parse_args()
    for export in chosen.exports:
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
