"""Many light sites against one aggregator: is anything lost, and does the aggregator's memory grow?"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from client.keys import AUTHORITY, PUBLIC_KEY, make_key
from server.members import Members, read_site_key
from server.registry import OK, RUNNING, RoundRow
from server.runs import find_run, worker
from shared.errors import FederationError
from simulations.deployment import Deployment, deployment, wait_for
from simulations.light_sites import DECLARED_PATIENTS
from simulations.service_benchmark import machine, resident_mib, write_plan

_RUN, _PROCESSES, _LOOK_S = "scale", 2, 0.2
_PATIENCE_S = 600.0
Memory = dict[str, float]


@dataclass(frozen=True)
class Scale:
    """What came of it.

    Attributes:
        sites: How many there were.
        seconds: Of each round.
        replies: Usable replies of each round.
        memory_mib: By round and process of the aggregator, the most resident memory while that round was open.
    """

    sites: int
    seconds: tuple[float, ...]
    replies: tuple[int, ...]
    memory_mib: dict[int, Memory]

    @property
    def nothing_lost(self) -> bool:
        """Whether every site's reply counted in every round."""
        return all(count == self.sites for count in self.replies)

    def growth(self, early: int, late: int) -> dict[str, float]:
        """Return by what factor each process, and all of them, grew between two rounds."""
        before, after = self.memory_mib[early], self.memory_mib[late]
        factors = {name: after[name] / before[name] for name in before}
        return {**factors, "all": sum(after.values()) / sum(before.values())}


def measure_scale(sites: int, rounds: int) -> Scale:
    """Run ``rounds`` rounds of the nodule model with as many light sites.

    Raises:
        FederationError: If the sites do not connect or the run does not complete.
    """
    names = [f"site-{number:03d}" for number in range(1, sites + 1)]
    with TemporaryDirectory() as folder, deployment(Path(folder)) as whole:
        whole.found()
        for name in names:
            _admit(whole, name)
        whole.start("server")
        with _light_sites(whole, names):
            wait_for("the sites to connect", lambda: _connected(whole) == set(names), _PATIENCE_S)
            plan = write_plan(whole, _RUN, rounds, sites)
            whole.must("server", "run", whole.server, plan, "--name", _RUN)
            memory = _follow(whole)
        record = find_run(whole.server, _RUN).record()
        rows = [row for row in record.rounds if row.round]
        if record.rounds_completed != rounds:
            raise FederationError(f"The run ended after {record.rounds_completed} of {rounds} rounds.")
    return Scale(sites, tuple(row.seconds for row in rows), tuple(map(_usable, rows)), memory)


def as_json(scale: Scale, early: int, late: int) -> dict[str, Any]:
    """Return the figures as plain JSON values."""
    figures = {**asdict(scale), "nothing_lost": scale.nothing_lost, "growth": scale.growth(early, late)}
    return {"machine": machine(), **figures}


def as_markdown(scale: Scale, early: int, late: int) -> str:
    """Return the table of ``docs/performance.md``."""
    growth = scale.growth(early, late)
    lines = [
        f"{machine()}; {scale.sites} sites, {len(scale.seconds)} rounds of {min(scale.seconds):.1f} to "
        f"{max(scale.seconds):.1f} s, {'nothing' if scale.nothing_lost else 'REPLIES'} lost",
        "",
        f"| process | MiB in round {early} | MiB in round {late} | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name, before in scale.memory_mib[early].items():
        lines.append(f"| {name} | {before:.0f} | {scale.memory_mib[late][name]:.0f} | {growth[name]:.2f} |")
    return "\n".join(lines)


def _usable(row: RoundRow) -> int:
    return sum(outcome == OK for outcome in row.replies.values())


def _connected(whole: Deployment) -> set[str]:
    return set(whole.health().get("connected", "").split(","))


def _admit(whole: Deployment, name: str) -> None:
    """Make a key and enrol it; the command would take seconds for each."""
    folder = whole.site(name)
    folder.mkdir()
    make_key(folder, name, DECLARED_PATIENTS)
    (folder / AUTHORITY).write_bytes((whole.server / AUTHORITY).read_bytes())
    Members(whole.server).enrol(read_site_key(folder / PUBLIC_KEY), name, None)


@contextmanager
def _light_sites(whole: Deployment, names: Sequence[str]) -> Iterator[None]:
    command = [sys.executable, "-m", "simulations.light_sites", f"localhost:{whole.port}"]
    parts = [[str(whole.site(name)) for name in names[part::_PROCESSES]] for part in range(_PROCESSES)]
    processes = [
        subprocess.Popen([*command, *part], env={**os.environ, "OMP_NUM_THREADS": "1"})  # noqa: S603 - our own
        for part in parts
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _follow(whole: Deployment) -> dict[int, Memory]:
    """Look at the aggregator's processes until the run has ended; return the most that each held in each round."""
    folder = find_run(whole.server, _RUN)
    most: dict[int, Memory] = {}
    while (record := folder.record()).status == RUNNING:
        now = most.setdefault(record.rounds_completed + 1, {})
        for name, mib in _memory(whole).items():
            now[name] = max(mib, now.get(name, 0.0))
        time.sleep(_LOOK_S)
    return most


def _memory(whole: Deployment) -> Memory:
    health = whole.health()
    pids = {
        "superlink": health.get("superlink_pid"),
        "superexec": health.get("superexec_pid"),
        "serverapp": worker(whole.server / "runs" / _RUN),
    }
    found: Memory = {}
    for name, pid in pids.items():
        try:
            found[name] = resident_mib(pid) if pid else 0.0
        except (OSError, StopIteration):  # it has just ended
            continue
    return found
