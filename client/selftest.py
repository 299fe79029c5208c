"""Which kernels this machine can train with: the self-test of every permitted task, at the daemon's start or by hand.

See :mod:`shared.dp.selftest`. A task that is unsafe does not keep the daemon from the others: a plan for it is refused
at the query, with the code ``unsafe-kernels``, before anything is spent.
"""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from client.config import SitePolicy
from client.folder import SELFTEST_FILE
from client.training import findings_of
from shared.drafting import DELTA_SHARE
from shared.files import write_atomic
from shared.plan import RunPlan
from shared.records import stores_in
from shared.tasks.registry import find_task

DECLARED: Final = 200
"""Patients that a test without a site takes for declared."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What the self-test says of a task under its default plan.

    Attributes:
        task: Its name.
        rung: The rung taken; empty if none is safe.
        threads: Of that rung.
        difference: The largest difference seen on any rung tried, relative to the largest entry; 0 if there was none.
        differences: The same by rung.
    """

    task: str
    rung: str
    threads: int
    difference: float
    differences: dict[str, float]

    @property
    def safe(self) -> bool:
        """Whether the task can be trained here."""
        return bool(self.rung)

    @property
    def facts(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"safe": self.safe}


def use_threads(configured: int) -> None:
    """Let torch use so many threads, or with 0 one for each core that this process may use.

    It holds for every thread of the process. Each rung sets it once more in the thread that trains.
    """
    torch.set_num_threads(configured or len(os.sched_getaffinity(0)))


def verdicts(tasks: Iterable[str], declared_patients: int) -> list[Verdict]:
    """Test each task with its default plan and torch's present number of threads.

    Raises:
        PlanError: If a task is unknown.
    """
    return [_verdict(name, declared_patients) for name in tasks]


def examine(folder: Path, policy: SitePolicy) -> list[Verdict]:
    """Set the daemon's threads and test every permitted task that has patients here; keep the result for ``status``.

    What has none cannot train. Its kernels are tested when a plan for it comes.

    Raises:
        StorageError: If the result cannot be written.
    """
    use_threads(policy.threads)
    prepared = stores_in(folder)
    tasks = [name for name in policy.tasks if find_task(name).store_kind in prepared]
    found = verdicts(tasks, policy.declared_patients)
    for verdict in found:
        level = logging.INFO if verdict.safe else logging.ERROR
        _LOG.log(level, "selftest", extra=verdict.facts)
    write_atomic(folder / SELFTEST_FILE, json.dumps([verdict.facts for verdict in found]).encode())
    return found


def _verdict(name: str, declared_patients: int) -> Verdict:
    task = find_task(name)
    values = {**task.defaults, "task": name, "noise_multiplier": 1.0, "delta": DELTA_SHARE / declared_patients}
    findings = findings_of(task, RunPlan.from_mapping(values), declared_patients)
    last = findings[-1]
    return Verdict(
        name,
        last.rung.name if last.safe else "",
        last.rung.threads,
        max(finding.difference for finding in findings),
        {finding.rung.name: finding.difference for finding in findings},
    )
