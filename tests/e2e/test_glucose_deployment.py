"""From three clinics' CSV exports to warnings at a bedside: aggregator, daemons, ten rounds, a replayed day."""

import json
import re
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from client.intake.glucose import prepare_glucose
from client.ledger import Ledger
from client.monitor.alarm import DEFAULT_RULES, Alert
from server.checkpoints import load_weights
from server.registry import Registry
from shared.tasks.glucose_forecast import TASK
from simulations.deployment import Deployment, deployment
from simulations.generators.glucose import EXPORT, generate_glucose_hospitals
from simulations.sources import find_source
from simulations.warnings import read_records, seconds_of, total

pytestmark = pytest.mark.timeout(600)
HERE = Path(__file__).parent
SEED, ROUNDS, PATIENTS, DAYS, RUN = 3, 10, 6, 3, "glucose"
SITES, REFERENCE = ("site-2", "site-3", "site-4"), "site-1"


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write four exports; the patients of the first are the server's reference and the bedside's."""
    folder = tmp_path_factory.mktemp("clinics")
    generate_glucose_hospitals(folder, sites=4, seed=SEED, patients_per_site=PATIENTS, days=DAYS)
    return folder


@pytest.fixture
def consortium(tmp_path: Path, hospitals: Path) -> Iterator[Deployment]:
    prepare_glucose(hospitals / REFERENCE / EXPORT, tmp_path / "heldout", bytes(32))
    with deployment(tmp_path / "consortium") as whole:
        whole.folder.mkdir()
        whole.found(tmp_path / "heldout")
        for name in SITES:
            folder = whole.admit(name, 10)
            shown = whole.must("site", "intake", folder, hospitals / name)
            assert f"{PATIENTS} patients" in shown
            assert not re.search("S[1-4]-", shown)
        yield whole


def train(whole: Deployment) -> Path:
    """Run ten rounds; return the checkpoint that the operator gives to the hospitals."""
    for name in ("server", *SITES):
        whole.start(
            name, {"PYTHONPATH": str(HERE), "SITE_SEED": str(SEED)}, module="" if name == "server" else "seeded_site"
        )
    whole.wait_connected(*SITES)
    plan = whole.folder / "plan.toml"
    plan.write_text(
        f'task = "{TASK.name}"\nrounds = {ROUNDS}\nlocal-steps = 2\nepsilon = 8.0\ndelta = 0.01\nseed = {SEED}\n'
    )
    start = find_source(TASK.name).start
    whole.must("server", "run", whole.server, plan, "--wait", "--name", RUN, "--init", start, "--init-is-public")
    return whole.server / "runs" / RUN / "checkpoints" / f"round-{ROUNDS:05d}.safetensors"


def last_day(export: Path, folder: Path) -> Path:
    """Write the rows of everybody's last day, in the order of time."""
    head, *rows = export.read_text().splitlines()
    cells = [row.split(",") for row in rows]
    first = {row[0]: (datetime.fromisoformat(row[1]) - timedelta(days=1)).isoformat() for row in cells}  # of the last
    chosen = [row for row in cells if row[1] >= first[row[0]]]
    path = folder / "day.csv"
    path.write_text("\n".join([head, *(",".join(row) for row in sorted(chosen, key=lambda row: row[1]))]) + "\n")
    return path


def test_from_exports_to_warnings(consortium: Deployment, hospitals: Path, tmp_path: Path) -> None:
    checkpoint = train(consortium)
    record = Registry(consortium.server / "runs" / RUN / "registry.sqlite").read(RUN)
    assert record.rounds_completed == ROUNDS
    assert all(row.evaluation is not None for row in record.rounds if row.aggregated)
    for name in SITES:
        assert [r.round for r in Ledger(consortium.site(name) / "ledger.sqlite").releases()] == list(
            range(1, ROUNDS + 1)
        )
        consortium.must("site", "audit", "verify", consortium.site(name))
    load_weights(checkpoint, TASK.build())

    day, alerts = last_day(hospitals / REFERENCE / EXPORT, tmp_path), tmp_path / "alerts.jsonl"
    site, watched = consortium.site(SITES[0]), ["--from", day, "--once", "--alerts", alerts]
    consortium.must("site", "trust", site, consortium.server / "signing.pub")
    done = consortium.run("site", "monitor", checkpoint, *watched, "--site", site)
    assert done.returncode == 0, done.stderr
    assert "Nobody answers" not in done.stderr  # the aggregator signed what it trained
    assert "S1-" not in done.stdout + done.stderr
    said = [Alert(**json.loads(line)) for line in alerts.read_text().splitlines()]

    records = read_records(day)
    readings = {(name, time_s): glucose for name, record in records.items() for time_s, glucose in record}
    for rule in DEFAULT_RULES:
        result = total(records, said, rule)
        raised = [alert for alert in said if alert.kind == rule.kind]
        assert len(raised) == result.alerts
        for alert in raised:  # each says what was there to be seen at its time, and is of the stage that it names
            there = readings[alert.patient_id, seconds_of(alert.time)]
            assert alert.glucose_mg_dl == there
            assert (alert.stage == "present") == (rule.excess(there) > 0.0)
        assert result.false_alerts < result.alerts
        sys.stdout.write(f"{rule.kind}: {result.line()}\n")
        assert result.events > 0, "choose a seed with something to warn of"
        # An alert comes at the latest with the event: nobody's event may pass in silence outside the refractory time.
        assert len(result.lead_min) + result.late >= 0.8 * result.events
        assert result.lead_min
        deaf = total(records, [], rule)
        assert (deaf.events, deaf.lead_min, deaf.late) == (result.events, (), 0)
