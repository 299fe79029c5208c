"""What one hostile site of five does to a run: ``python -m simulations.hostile_site HOSPITAL… --out FOLDER``.

Each hospital is a prepared store, or a folder of DICOM with its ``annotations.csv`` as ``fedward-sim generate`` writes
it. For every seed and strategy a run without the attack is the measure of runs in which the last hospital sends
poisoned weights in every round; everything else is a simulation as any other, privacy included. A run that is done is
not done again, so the study may be interrupted. ``--into DOC`` puts the table between the marks of a document.

References:
    Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
        NeurIPS 2017.
    Yin, Chen, Kannan, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018.
"""

import argparse
import hashlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Final

import numpy as np
import torch
from flwr.app import Message, MessageType

from server.registry import COMPLETED, OK, Registry, RunRecord
from server.rounds import Job, run_federation
from shared.drafting import draft_plan
from shared.messages import TrainReply
from shared.plan import FEDAVG, KRUM, MEDIAN, MULTI_KRUM, TRIMMED_MEAN
from shared.records import RecordStore
from shared.tasks.registry import find_task
from shared.weights import Vector
from simulations.benchmark import document
from simulations.grid import LocalGrid
from simulations.scripts import run_script
from simulations.sites import Federation, prepare_federation, write_policies
from simulations.sources import find_source

TASK, RUN = "nodule-classification", "hostile-site"
CLEAN = "clean"
Attack = Callable[[Vector], Vector]
ATTACKS: Mapping[str, Attack] = {
    "×1000": lambda weights: weights * np.float32(1000.0),
    "sign-flipped": lambda weights: -weights,
}
"""From the site's honest weights ``(D,)`` to what it sends instead."""
STRATEGIES = (FEDAVG, MEDIAN, TRIMMED_MEAN, KRUM, MULTI_KRUM)
_HOSTILE: Final = -1
"""Which of the hospitals, in the order in which they were given: the last."""
_MARKS = ("<!-- hostile-site -->", "<!-- end of hostile-site -->")


class HostileGrid(LocalGrid):
    """A grid on which the last site sends what ``attack`` makes of its weights; ``None`` leaves it honest."""

    def __init__(self, folders: Sequence[Path], seed: int, attack: Attack | None) -> None:
        super().__init__(folders, seed)
        self._attack, self._hostile = attack, list(self._folders)[_HOSTILE]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are ready, the hostile site's among them."""
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            trained = reply.metadata.message_type == MessageType.TRAIN and not reply.has_error()
            if self._attack and trained and reply.metadata.src_node_id == self._hostile:
                honest = TrainReply.from_content(reply.content)
                reply.content = replace(honest, weights=self._attack(honest.weights)).to_content()
        return replies


@dataclass(frozen=True)
class Outcome:
    """One run's end.

    Attributes:
        auroc: Held-out, of the last round.
        dropped: Rounds in which the server dropped the hostile site's reply.
        rounds: All rounds.
    """

    auroc: float
    dropped: int
    rounds: int


@dataclass(frozen=True)
class Study:
    """What stays the same from run to run; ``rounds`` is by default the task's."""

    hospitals: tuple[Path, ...]
    out: Path
    epsilon: float = 8.0
    rounds: int | None = None

    @cached_property
    def stores(self) -> tuple[Path, ...]:
        """The hospitals' prepared stores; raw hospitals are read once, into ``out/prepared``."""
        return tuple(self._prepared(number, folder) for number, folder in enumerate(self.hospitals, start=1))

    def _prepared(self, number: int, folder: Path) -> Path:
        store = self.out / "prepared" / f"site-{number}"
        if not (folder / "annotations.csv").exists():
            return folder
        if not store.exists():
            store.parent.mkdir(parents=True, exist_ok=True)
            secret = hashlib.sha256(store.name.encode()).digest()
            find_source(TASK).prepare(folder, store, secret, 1, lambda *_progress: None)
        return store

    def run(self, strategy: str, attack: str, seed: int) -> Outcome:
        """Carry out one run, or read what came of it.

        Raises:
            FederationError: If the data cannot be used or the run fails.
        """
        folder = self.out / f"seed-{seed}" / strategy / attack
        path = folder / "server" / "registry.sqlite"
        federation = Federation.open(folder)
        if federation is None or not path.exists() or Registry(path).read(RUN).status != COMPLETED:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
            (folder / "server").mkdir(parents=True)
            federation = self._carry_out(folder, strategy, ATTACKS.get(attack), seed)
        return _outcome(Registry(path).read(RUN), federation.names[_HOSTILE])

    def _carry_out(self, folder: Path, strategy: str, attack: Attack | None, seed: int) -> Federation:
        federation = prepare_federation(
            folder,
            self.stores,
            task=TASK,
            seed=seed,
            heldout=None,
            workers=1,
            report=lambda *_progress: None,
        )
        overrides = {"seed": seed, "strategy": strategy, **({"rounds": self.rounds} if self.rounds else {})}
        plan = draft_plan(TASK, epsilon=self.epsilon, delta=federation.delta, overrides=overrides)
        write_policies(federation, task=TASK, max_epsilon=self.epsilon)
        job = Job(RUN, plan, folder / "server", RecordStore.open(federation.heldout))
        run_federation(HostileGrid(federation.sites, seed, attack), job)
        return federation


def _outcome(record: RunRecord, hostile: str) -> Outcome:
    rounds = [row for row in record.rounds if row.round and row.aggregated]
    last = rounds[-1].evaluation
    dropped = sum(row.replies.get(hostile) != OK for row in rounds)
    return Outcome(last.value(find_task(TASK).metric) if last else float("nan"), dropped, len(rounds))


def measure(study: Study, seeds: Sequence[int]) -> dict[tuple[str, str], list[Outcome]]:
    """Return the outcomes by strategy and attack, one for each seed; a line on standard error tells of each."""
    found: dict[tuple[str, str], list[Outcome]] = {}
    for seed in seeds:
        for strategy in STRATEGIES:
            for attack in (CLEAN, *ATTACKS):
                outcome = study.run(strategy, attack, seed)
                found.setdefault((strategy, attack), []).append(outcome)
                sys.stderr.write(f"seed {seed}  {strategy:<12}  {attack:<15}  AUROC {outcome.auroc:.3f}\n")
                sys.stderr.flush()
    return found


def as_markdown(found: Mapping[tuple[str, str], Sequence[Outcome]]) -> str:
    """Return a table of AUROC, its difference to the same strategy's clean run by seed, and who was dropped."""
    lines = [
        "| strategy | the fifth site | AUROC, mean | by seed | difference to clean, by seed | replies dropped |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (strategy, attack), outcomes in found.items():
        clean = found[strategy, CLEAN]
        changes = [f"{one.auroc - other.auroc:+.3f}" for one, other in zip(outcomes, clean, strict=True)]
        dropped, asked = sum(one.dropped for one in outcomes), sum(one.rounds for one in outcomes)
        cells = (
            strategy,
            "honest" if attack == CLEAN else attack,
            f"{mean(one.auroc for one in outcomes):.3f}",
            " ".join(f"{one.auroc:.3f}" for one in outcomes),
            "" if attack == CLEAN else " ".join(changes),
            "" if attack == CLEAN else ("all" if dropped == asked else "none" if not dropped else f"{dropped}/{asked}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description="Measure what one hostile site of five does to a run, by strategy.",
        epilog="Example: python -m simulations.hostile_site raw/site-1 raw/site-2 … raw/site-5 --out runs/hostile",
    )
    parser.add_argument("hospitals", type=Path, nargs="+", help="the last one is hostile")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; a finished run is not repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, help="default: the task's")
    parser.add_argument("--into", type=Path, help="put the table into this document, between its marks")
    chosen = parser.parse_args()
    study = Study(tuple(chosen.hospitals), chosen.out, chosen.epsilon, chosen.rounds)
    table = as_markdown(measure(study, chosen.seeds))
    sys.stdout.write(table + "\n")
    if chosen.into:
        document(chosen.into, table, _MARKS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    run_script(main)
