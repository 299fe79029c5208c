"""Many light sites against one aggregator: is anything lost, and does the aggregator's memory grow?"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
_SUPERLINK, _SUPEREXEC, _SERVERAPP = WATCHED = ("superlink", "superexec", "serverapp")
"""The aggregator's processes."""
Memory = dict[str, float]


@dataclass(frozen=True)
class Scale:
    """What came of it.

    Attributes:
        sites: How many there were.
        seconds: Of each round.
        replies: Usable replies of each round.
        memory_mib: By round and process of the aggregator, the most resident memory while that round was open; a
            round so short that no look fell into it is not there, nor is a process that no look found.
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
        """Return by what factor each process grew between two rounds, and all of them if all were seen in both."""
        before, after = self.memory_mib.get(early, {}), self.memory_mib.get(late, {})
        factors = {name: after[name] / before[name] for name in WATCHED if name in before and name in after}
        if len(factors) < len(WATCHED):
            return factors
        return {**factors, "all": sum(after.values()) / sum(before.values())}

    def unseen(self, *rounds: int) -> list[str]:
        """Return which processes were not seen in which of these rounds, as ``serverapp in round 5``."""
        return [
            f"{name} in round {number}"
            for number in rounds
            for name in WATCHED
            if name not in self.memory_mib.get(number, {})
        ]


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
    return {
        "machine": machine(),
        **asdict(scale),
        "nothing_lost": scale.nothing_lost,
        "growth": scale.growth(early, late),
        "unseen": scale.unseen(early, late),
    }


def as_markdown(scale: Scale, early: int, late: int) -> str:
    """Return the table of ``docs/performance.md``; a dash stands for what was not seen, and a line below says so."""
    growth, unseen = scale.growth(early, late), scale.unseen(early, late)
    lines = [
        f"{machine()}; {scale.sites} sites, {len(scale.seconds)} rounds of {min(scale.seconds):.1f} to "
        f"{max(scale.seconds):.1f} s, {'nothing' if scale.nothing_lost else 'REPLIES'} lost",
        "",
        f"| process | MiB in round {early} | MiB in round {late} | ratio |",
        "| --- | --- | --- | --- |",
    ]
    columns = ((scale.memory_mib.get(early, {}), 0), (scale.memory_mib.get(late, {}), 0), (growth, 2))
    lines += [f"| {name} | {' | '.join(_or_dash(*column, name) for column in columns)} |" for name in WATCHED]
    if unseen:
        lines += ["", f"Not seen, and so without a ratio: {', '.join(unseen)}."]
    return "\n".join(lines)


def _or_dash(figures: Mapping[str, float], digits: int, name: str) -> str:
    return f"{figures[name]:.{digits}f}" if name in figures else "–"


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
        _SUPERLINK: health.get("superlink_pid"),
        _SUPEREXEC: health.get("superexec_pid"),
        _SERVERAPP: worker(whole.server / "runs" / _RUN),
    }
    found: Memory = {}
    for name, pid in pids.items():
        if pid:
            with suppress(OSError, StopIteration):  # it has just ended
                found[name] = resident_mib(pid)
    return found
