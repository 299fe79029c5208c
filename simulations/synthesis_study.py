"""How good synthetic images are, by epsilon and by the number of patients: one run of ``ct-synthesis`` for each.

    python -m simulations.synthesis_study --data H1 --data H2 --heldout JUDGED --patients 50 --patients 200 --out DIR

The hospitals are prepared stores, and every run is judged on the same held-out patients. ``--patients`` takes the first
so many of each hospital's; stores are ordered by pseudonym, so that is a fair draw, and the fewer are among the more.
``--set NAME=VALUE`` changes a field of the plan. DIR gets one folder for each run, with its ``samples.png``, and
``study.md``, ``study.json`` and, of several numbers of patients, ``patients.png``; a study that was stopped goes on
where it stood.
"""

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from shared.errors import PlanError
from shared.files import write_atomic
from shared.records import RecordStore, open_store, write_store
from shared.tasks.ct_nodules import STORE_KIND
from simulations.display import Display
from simulations.run import Simulation, resume, start
from simulations.scripts import run_script

FIGURES: Final = (
    "tstr_auroc",
    "real_auroc",
    "tstr_balanced_accuracy",
    "real_balanced_accuracy",
    "frechet_distance",
    "precision",
    "recall",
    "membership_auc",
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is to be compared.

    Attributes:
        data: Prepared hospitals.
        heldout: Prepared patients that judge every run.
        epsilons: One run for each; infinity trains without privacy.
        patients: And for each of these numbers of patients a hospital; 0 takes all.
        seed: Of every run.
        init: A public checkpoint or ``random``; by default the task's.
        plan: Fields of the plan that differ from the task's defaults.
    """

    data: tuple[Path, ...]
    heldout: Path
    epsilons: tuple[float, ...] = (10.0,)
    patients: tuple[int, ...] = (0,)
    seed: int = 0
    init: str | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)


def carry_out(study: Study, out: Path, display: Display) -> list[dict[str, Any]]:
    """Run the study below ``out``; return a row of figures for each run, with ``patients`` and ``epsilon``.

    Raises:
        FederationError: Whatever stops a run.
    """
    rows = []
    for patients, epsilon in product(study.patients, study.epsilons):
        folder = out / f"patients-{patients or 'all'}" / f"epsilon-{epsilon:g}"
        data = study.data if not patients else _first(study.data, patients, folder.parent)
        simulation = Simulation(
            task="ct-synthesis",
            sites=len(data),
            epsilon=epsilon,
            seed=study.seed,
            data=tuple(str(path.resolve()) for path in data),
            heldout=str(study.heldout.resolve()),
            init=study.init,
            plan=study.plan,
        )
        begun = (folder / "plan.json").exists()
        summary = resume(Simulation.load(folder), folder, display) if begun else start(simulation, folder, display)
        held = sum(len(open_store(folder / "sites" / site["name"], STORE_KIND)) for site in summary["sites"])
        values = {name: summary["metrics"].get(name) for name in FIGURES}
        rows.append({"patients": held / len(data), "epsilon": str(epsilon), **values})
        write_atomic(out / "study.json", json.dumps(rows, indent=1).encode())
        write_atomic(out / "study.md", as_markdown(rows).encode())
    if len(study.patients) > 1 and len(study.epsilons) == 1:
        write_atomic(out / "patients.png", draw_by_patients(rows))
    return rows


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures as a table, intervals in brackets."""
    lines = [f"| patients a hospital | epsilon | {' | '.join(FIGURES)} |", "| --- " * (len(FIGURES) + 2) + "|"]
    for row in rows:
        shown = " | ".join(_shown(row[name]) for name in FIGURES)
        lines.append(f"| {row['patients']:g} | {row['epsilon']} | {shown} |")
    return "\n".join(lines) + "\n"


def draw_by_patients(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a picture, PNG, of what classifiers learn from synthetic and from real images, by patients a hospital.

    A figure that could not be computed leaves a gap.
    """
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.subplots()
    patients = [row["patients"] for row in rows]
    for name, label in (("tstr_auroc", "trained on synthetic images"), ("real_auroc", "trained on real images")):
        values = np.array([[(row[name] or {}).get(part) for part in ("value", "low", "high")] for row in rows], float).T
        axes.errorbar(
            patients, values[0], (values[0] - values[1], values[2] - values[0]), label=label, marker="o", capsize=3
        )
    axes.set_xscale("log")
    axes.set_xticks(patients, [f"{number:g}" for number in patients])
    axes.minorticks_off()
    axes.set_xlabel("Patients a hospital")
    axes.set_ylabel("AUROC on real images, 95% interval")
    axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _shown(figure: Any) -> str:
    if isinstance(figure, Mapping):
        return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
    return "-" if figure is None else f"{figure:.3f}"


def _first(hospitals: Sequence[Path], patients: int, out: Path) -> tuple[Path, ...]:
    """Write the first ``patients`` of each hospital below ``out``, unless they are there."""
    folders = tuple(out / f"hospital-{number}" for number in range(1, len(hospitals) + 1))
    for hospital, folder in zip(hospitals, folders, strict=True):
        store = RecordStore.open(hospital)
        if len(store) < patients:
            raise PlanError(f"{hospital} holds {len(store)} patients, fewer than {patients}.")
        chosen = store.subset(np.arange(patients))
        if not (folder / "store.json").exists():
            write_store(folder, kind=store.kind, patients=chosen.items(), attributes=store.attributes)
    return folders


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name.replace("-", "_"), json.loads(value)
    except ValueError:
        return name.replace("-", "_"), value


def main() -> None:
    """Carry out the study that the arguments describe and print its table."""
    parser = argparse.ArgumentParser(description="Measure synthetic images by epsilon and number of patients.")
    parser.add_argument("--data", type=Path, action="append", required=True, help="A prepared hospital; repeat.")
    parser.add_argument("--heldout", type=Path, required=True, help="Prepared patients that judge every run.")
    parser.add_argument("--epsilon", type=float, action="append", help="Repeat for each; 'inf' is no privacy.")
    parser.add_argument("--patients", type=int, action="append", help="Patients a hospital; repeat. Default: all.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", help="A public checkpoint, or 'random'. Default: the task's.")
    parser.add_argument("--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="Of the plan.")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    study = Study(
        data=tuple(chosen.data),
        heldout=chosen.heldout,
        epsilons=tuple(chosen.epsilon or (10.0,)),
        patients=tuple(chosen.patients or (0,)),
        seed=chosen.seed,
        init=chosen.init,
        plan=dict(chosen.set),
    )
    sys.stdout.write(as_markdown(carry_out(study, chosen.out, Display(Console(stderr=True)))))


if __name__ == "__main__":
    run_script(main)
