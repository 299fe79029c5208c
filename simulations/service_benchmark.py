"""What a round over the network costs beside its training: our daemons against stock Flower SuperNodes.

Both work for the same aggregator with the same keys, the same TLS, the same ``client.app`` and stores so small that
training takes next to no time, so what is measured is what a round adds to the training.
"""

import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from client.keys import server_fingerprint
from server.control import environment
from server.registry import OK, RoundRow
from server.runs import find_run
from shared.errors import FederationError
from shared.records import Array, PatientItem, store_path, write_store
from shared.tasks.ct_nodules import STORE_KIND, STORED_PX
from simulations.deployment import Deployment, deployment, free_port

_DECLARED, _PATIENTS = 200, 4
_PLAN = """\
task = "nodule-classification"
rounds = {rounds}
epsilon = 4.0
local-steps = 1
sample-rate = 0.5
records-per-patient = 1
min-sites = {sites}
deadline-s = 600
"""


@dataclass(frozen=True)
class Variant:
    """The rounds of one kind of site.

    Attributes:
        seconds: Of each round, from sending the weights to the saved new model.
        peak_mib: Most resident memory of each site's process; of a SuperNode without its subprocesses.
    """

    name: str
    seconds: tuple[float, ...]
    peak_mib: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Median seconds of a round."""
        return statistics.median(self.seconds)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """First and third quartile."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def measure_overhead(rounds: int, stock_rounds: int, sites: int = 3) -> tuple[Variant, Variant]:
    """Run the same federation with our daemons and with stock SuperNodes; return both.

    Raises:
        FederationError: If a process does not come up or a run does not complete.
    """
    names = [f"site-{number}" for number in range(1, sites + 1)]
    with TemporaryDirectory() as folder, deployment(Path(folder)) as whole:
        whole.found()
        for name in names:
            write_tiny_store(store_path(whole.admit(name, _DECLARED), STORE_KIND))
        whole.start("server")
        pids = [whole.start(name).pid for name in names]
        whole.wait_connected(*names)
        rows = run_to_end(whole, "ours", rounds, sites)
        ours = Variant("fedward-site", _seconds(rows), tuple(resident_mib(pid, "VmHWM") for pid in pids))
        for name in (*names, "server"):
            whole.stop(name)
        whole.start("server", module="simulations.stock_server")
        with _supernodes(whole, names) as pids:
            whole.wait_connected(*names)
            rows = run_to_end(whole, "stock", stock_rounds, sites)
            peaks = tuple(resident_mib(pid, "VmHWM") for pid in pids)
        return ours, Variant("flower-supernode", _seconds(rows), peaks)


def run_to_end(whole: Deployment, run: str, rounds: int, sites: int) -> list[RoundRow]:
    """Have the aggregator carry out a run of light rounds; return them, the start left out.

    Raises:
        FederationError: If it does not complete, or a site's reply was missing in any round.
    """
    whole.must("server", "run", whole.server, write_plan(whole, run, rounds, sites), "--wait", "--name", run)
    rows = [row for row in find_run(whole.server, run).record().rounds if row.round]
    if len(rows) != rounds or any(len(row.replies) != sites or set(row.replies.values()) != {OK} for row in rows):
        raise FederationError(f"The run lost replies: {[dict(row.replies) for row in rows]}.")
    return rows


def write_plan(whole: Deployment, run: str, rounds: int, sites: int) -> Path:
    """Write the plan of a run of light rounds that waits for every site."""
    plan = whole.folder / f"{run}.toml"
    plan.write_text(_PLAN.format(rounds=rounds, sites=sites))
    return plan


def write_tiny_store(path: Path) -> None:
    """Prepare a few patients of noise: enough for a round, too few to take any time."""
    generator = np.random.default_rng(0)

    def patient() -> PatientItem:
        arrays: dict[str, Array] = {
            "image": generator.random((1, STORED_PX, STORED_PX)).astype(np.float16),
            "malignant": generator.integers(0, 2, 1).astype(np.uint8),
            "nodule": np.zeros(1, np.int32),
            "diameter_mm": np.full(1, 8.0, np.float32),
            "vendor": np.zeros(1, np.uint8),
        }
        return PatientItem(generator.bytes(16), arrays)

    attributes = {"spacing_mm": 1.0, "window_hu": [-1000.0, 400.0]}
    write_store(path, kind=STORE_KIND, patients=[patient() for _ in range(_PATIENTS)], attributes=attributes)


def resident_mib(pid: int, field: str = "VmRSS") -> float:
    """Return a process's resident memory in MiB: ``VmRSS`` now, ``VmHWM`` at its peak (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def as_json(variants: Sequence[Variant]) -> dict[str, Any]:
    """Return the figures as plain JSON values."""
    ours, stock = variants
    rows = [
        {**asdict(variant), "median_s": variant.median_s, "quartiles_s": variant.quartiles_s} for variant in variants
    ]
    return {"machine": machine(), "variants": rows, "ratio": stock.median_s / ours.median_s}


def as_markdown(variants: Sequence[Variant]) -> str:
    """Return the table of ``docs/performance.md``."""
    ours = variants[0]
    lines = [
        "| sites' process | rounds | median s | quartiles s | to ours | peak MiB a process |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for variant in variants:
        low, high = variant.quartiles_s
        lines.append(
            f"| {variant.name} | {len(variant.seconds)} | {variant.median_s:.2f} | {low:.2f} to {high:.2f} "
            f"| {variant.median_s / ours.median_s:.1f} | {max(variant.peak_mib):.0f} |"
        )
    return "\n".join(lines)


def machine() -> str:
    """Describe the machine, and how busy it is, without naming it."""
    load = os.getloadavg()[0]
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, load {load:.1f}"


def _seconds(rows: Sequence[RoundRow]) -> tuple[float, ...]:
    return tuple(row.seconds for row in rows)


@contextmanager
def _supernodes(whole: Deployment, names: Sequence[str]) -> Iterator[list[int]]:
    """Keep a stock SuperNode running in each site's place; yield their process ids."""
    processes = [_supernode(whole, name) for name in names]
    try:
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own: what it started ends too
            process.wait()


def _supernode(whole: Deployment, name: str) -> subprocess.Popen[bytes]:
    folder = whole.site(name)
    config = f'site-folder="{folder}" server-fingerprint="{server_fingerprint(folder)}"'
    command = [
        *(str(Path(sys.executable).with_name("flower-supernode")), "--superlink", f"localhost:{whole.port}"),
        *("--root-certificates", str(folder / "ca.crt"), "--port", str(free_port())),
        *("--auth-supernode-private-key", str(folder / "site.key"), "--node-config", config),
    ]
    settings = {**environment(whole.server), "FLWR_HOME": str(folder / "flower"), "OMP_NUM_THREADS": "1"}
    with (whole.folder / f"{name}-stock.log").open("wb") as log:
        return subprocess.Popen(  # noqa: S603 - our own command line
            command, env=settings, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
