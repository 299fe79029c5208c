"""An aggregator and three daemons as their people run them: processes, TLS on loopback, from init to report."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from client.intake.nodules import prepare_nodules
from client.ledger import Ledger
from server.config import ServerConfig
from server.registry import OK, Registry
from server.runs import worker
from shared.errors import StorageError
from shared.records import open_store
from simulations.deployment import Deployment, deployment, wait_for
from simulations.generators.hospitals import generate_hospitals
from simulations.sites import coarse

pytestmark = pytest.mark.timeout(600)
HERE = Path(__file__).parent
SEED, ROUNDS, PATIENTS, RUN = 5, 3, 10, "simulation"
SITES = ("site-1", "site-2", "site-3")


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four exports in DICOM; the fourth is also prepared as the held-out store."""
    folder = tmp_path_factory.mktemp("hospitals")
    generate_hospitals(folder, sites=4, seed=SEED, patients_per_site=PATIENTS, workers=1)
    export = folder / "site-4"
    prepare_nodules(export, export / "annotations.csv", folder / "heldout", bytes(32), workers=1)
    return folder


@pytest.fixture(scope="module")
def prepared(hospitals, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    """A consortium that has not started: every test takes a copy."""
    whole = Deployment(tmp_path_factory.mktemp("consortium"))
    whole.found(hospitals / "heldout")
    for name in SITES:
        folder = whole.admit(name, coarse(PATIENTS))
        # The simulation's secret: it decides the order of the patients.
        (folder / "pseudonyms.key").write_bytes(hashlib.sha256(f"{SEED}/{name}".encode()).digest())
        whole.must("site", "intake", folder, hospitals / name, "--annotations", "annotations.csv", "--workers", "1")
    return whole


@pytest.fixture
def consortium(prepared, tmp_path):
    with deployment(tmp_path / "consortium", prepared.port) as whole:
        shutil.copytree(prepared.folder, whole.folder)
        yield whole


def start(whole: Deployment, *names: str) -> None:
    for name in names:
        whole.start(
            name, {"PYTHONPATH": str(HERE), "SITE_SEED": str(SEED)}, module="" if name == "server" else "seeded_site"
        )


def submit(whole: Deployment, rounds: int, *extra: str) -> subprocess.Popen[str]:
    plan = whole.folder / "plan.toml"
    lines = ['task = "nodule-classification"', f"rounds = {rounds}", "epsilon = 8.0", f"seed = {SEED}", *extra]
    plan.write_text("\n".join(lines))
    command = [sys.executable, "-m", "server.cli", "run", str(whole.server), str(plan), "--wait", "--name", RUN]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    whole.end_with_others("run", process)
    return process


def registry(whole: Deployment) -> Registry:
    return Registry(whole.server / "runs" / RUN / "registry.sqlite")


def rounds_done(whole: Deployment) -> int:
    try:
        return registry(whole).read(RUN).rounds_completed
    except StorageError:  # the run is being submitted
        return 0


def finish(process: subprocess.Popen[str]) -> None:
    out, err = process.communicate(timeout=400)
    assert (process.returncode, out.strip()) == (0, RUN), err


def assert_every_round_once(whole: Deployment, rounds: int) -> None:
    """The run has all its rounds, and each ledger holds what was released: every round once, at the plan's epsilon."""
    record = registry(whole).read(RUN)
    assert record.rounds_completed == rounds
    assert [row.round for row in record.rounds if row.aggregated] == list(range(rounds + 1))
    for name in SITES:
        releases = Ledger(whole.site(name) / "ledger.sqlite").releases()
        assert [release.round for release in releases] == list(range(1, rounds + 1))
        assert all(release.committed_at for release in releases)
        spent = json.loads(whole.must("site", "ledger", whole.site(name), "--json"))["epsilon"]
        assert spent == pytest.approx(record.plan.epsilon(rounds), abs=1e-6)
        whole.must("site", "audit", "verify", whole.site(name))


def sockets(pid: int) -> list[tuple[str, int, str, int]]:
    """Return a process's TCP sockets ``(local address, port, remote address, port)``, as the kernel lists them."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(str(link.readlink()))
        except FileNotFoundError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if f"socket:[{words[9]}]" in inodes:
                ends = [end.split(":") for end in words[1:3]]
                found.append((ends[0][0], int(ends[0][1], 16), ends[1][0], int(ends[1][1], 16)))
    return found


def test_from_init_to_report_with_the_simulations_numbers(consortium, hospitals, tmp_path):
    start(consortium, "server", *SITES)
    consortium.wait_connected(*SITES)
    run = submit(consortium, ROUNDS, "min-sites = 1")
    wait_for("a round", lambda: rounds_done(consortium))
    for name in SITES:
        process = consortium._processes[name]
        health = int((consortium.site(name) / "health-port").read_text())
        for _, port, _, remote in sockets(process.pid):
            assert remote == consortium.port or port == health, "a connection that the documentation does not name"
    finish(run)
    assert_every_round_once(consortium, ROUNDS)
    consortium.must("server", "report", consortium.server, RUN, "--out", tmp_path / "report")
    deployed = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000

    command = [sys.executable, "-c", "from simulations.cli import main; main()", "run", "--out", str(tmp_path / "sim")]
    data = [part for name in SITES for part in ("--data", str(hospitals / name))]
    options = ["--rounds", str(ROUNDS), "--seed", str(SEED), "--workers", "1", "--heldout", str(hospitals / "heldout")]
    subprocess.run([*command, *data, *options], check=True, capture_output=True)
    simulated = json.loads((tmp_path / "sim" / "summary.json").read_text())
    assert deployed["metrics"] == simulated["metrics"]
    assert deployed["checkpoint"]["sha256"] == simulated["checkpoint"]["sha256"]


def test_every_process_killed_in_turn_and_the_run_ends_with_every_round_once(consortium):
    rounds = 8
    start(consortium, "server", *SITES)
    consortium.wait_connected(*SITES)
    run = submit(consortium, rounds, "local-steps = 30", "min-sites = 3")
    wait_for("the first round", lambda: rounds_done(consortium))

    consortium.stop("site-1", signal.SIGKILL)  # most likely in mid-training
    start(consortium, "site-1")
    done = rounds_done(consortium)
    wait_for("a round after the daemon's death", lambda: rounds_done(consortium) > done)

    os.kill(consortium.health()["superlink_pid"], signal.SIGKILL)
    done = rounds_done(consortium)
    wait_for("a round after the SuperLink's death", lambda: rounds_done(consortium) > done)

    serverapp = wait_for("the ServerApp", lambda: worker(consortium.server / "runs" / RUN))
    os.kill(serverapp, signal.SIGKILL)
    done = rounds_done(consortium)
    wait_for("a round after the ServerApp's death", lambda: rounds_done(consortium) > done)

    consortium.stop("server", signal.SIGKILL)  # the supervisor, and with it everything
    start(consortium, "server")
    finish(run)
    assert_every_round_once(consortium, rounds)
    record = registry(consortium).read(RUN)
    assert all(set(row.replies.values()) == {OK} for row in record.rounds[1:])
    assert all(consortium.stop(name) == 0 for name in ("server", *SITES))


def test_ports_other_than_fleet_are_on_loopback(consortium):
    config = ServerConfig.read(consortium.server)
    assert len({config.fleet_port, config.control_port, config.health_port}) == 3
    assert len(open_store(consortium.site("site-1"), "ct-nodules")) == PATIENTS
