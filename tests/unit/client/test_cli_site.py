"""The steward's command: from init to predictions, and one sentence where something is wrong."""

import csv
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from prometheus_client import CollectorRegistry

pytest.importorskip("client.keys")

from client import cli, setup
from client.folder import HEALTH_PORT_FILE
from client.overview import daemon_health
from client.predict import load_model
from client.site import Site
from server.checkpoints import Checkpoint, save_checkpoint
from shared.errors import StorageError
from shared.messages import TrainRequest
from shared.operating_point import OperatingPoint
from shared.plan import RunPlan
from shared.records import stores_in
from shared.tasks.registry import find_task
from shared.telemetry import Health, serve
from shared.weights import pack

PLAN = RunPlan(
    task="nodule-classification",
    rounds=2,
    local_steps=1,
    sample_rate=0.5,
    records_per_patient=1,
    max_grad_norm=1.0,
    noise_multiplier=2.0,
    delta=4e-4,
    learning_rate=0.5,
)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fedward-site", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now).not_valid_after(now + timedelta(days=1)).sign(key, hashes.SHA384())
    )  # fmt: skip
    path = tmp_path / "given-ca.crt"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def site(tmp_path: Path, authority: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "H1"
    assert call(monkeypatch, "init", folder, "--name", "h1", "--server", "localhost:9092", "--ca", authority) == 0
    return folder


@pytest.fixture
def dicom(export: Any) -> Path:
    for number in range(3):
        export.annotate(export.cube(patient=f"P-{number}", value=-400 + 100 * number), malignancy=1 + 2 * (number % 2))
    export.annotations.rename(export.dicom / "annotations.csv")
    return export.dicom


def test_init_makes_everything_a_site_needs_for_its_owner_only(site: Path, authority: Path) -> None:
    names = {path.name for path in site.iterdir()}
    assert names == {"site.toml", "site.key", "site.pub", "ca.crt", "pseudonyms.key", "ledger.sqlite", "audit.jsonl"}
    assert site.stat().st_mode & 0o777 == 0o700
    for secret in ("site.key", "pseudonyms.key", "ledger.sqlite", "audit.jsonl"):
        assert (site / secret).stat().st_mode & 0o777 == 0o600
    assert (site / "ca.crt").read_bytes() == authority.read_bytes()
    policy = Site(site).policy
    assert (policy.declared_patients, policy.max_epsilon, policy.server) == (200, 8.0, "localhost:9092")
    assert "nodule-classification" in policy.tasks
    assert [path.name for path in site.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name", "h1", "--server", "nowhere"], "host:port"),
        (["--name", "h1", "--server", ""], "--server"),
        (["--name", "h 1", "--server", "a:1"], "name must be"),
        (["--name", "h1", "--server", "a:1", "--ca", "missing.crt"], "missing.crt"),
        (["--name", "h1", "--server", "a:1", "--ca", __file__], "no PEM certificate"),
    ],
)
def test_a_refused_init_leaves_nothing(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    authority: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tmp_path.iterdir())
    assert call(monkeypatch, "init", tmp_path / "H", "--ca", authority, *arguments) == 1
    error = capfd.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


def test_the_declared_number_and_the_key_can_be_changed(
    site: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (site / "site.pub").read_text()
    assert call(monkeypatch, "declare", site, 300) == 0
    assert (site / "site.pub").read_text() == before.replace("=200", "=300")
    assert "h1 declares 300 patients, with max-delta 0.000333333. Send" in capfd.readouterr().out
    assert call(monkeypatch, "new-key", site) == 0
    assert (site / "site.pub").read_text().split()[1] != before.split()[1]
    assert "revokes the site and then enrols it anew" in capfd.readouterr().out
    assert call(monkeypatch, "declare", site, 0) == 2
    assert call(monkeypatch, "declare", site / "nowhere", 300) == 1


def test_a_half_made_site_does_not_appear(
    tmp_path: Path, authority: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(_folder: Path) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(setup, "open_books", full)
    before = sorted(tmp_path.iterdir())
    assert call(monkeypatch, "init", tmp_path / "H", "--name", "h", "--server", "a:1", "--ca", authority) == 1
    assert "the disk is full" in capfd.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_second_init_keeps_the_first(
    site: Path, authority: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in site.iterdir()}
    assert call(monkeypatch, "init", site, "--name", "h1", "--server", "a:1", "--ca", authority) == 1
    assert "exists" in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in site.iterdir()} == before


@pytest.mark.parametrize("command", [["status"], ["ledger"], ["audit", "verify"], ["audit", "show"], ["start"]])
def test_where_there_is_no_site_one_sentence(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("client.daemon")
    assert call(monkeypatch, *command, tmp_path / "nowhere") == 1
    error = capfd.readouterr().err
    assert error.startswith("fedward-site: There is no site at")
    assert "Traceback" not in error


def test_from_intake_to_a_verified_ledger(
    site: Path, dicom: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (dicom / "noise.txt").write_text("no DICOM")
    arguments = ("intake", site, dicom, "--annotations", "annotations.csv", "--workers", 1)
    assert call(monkeypatch, *arguments) == 0
    out = capfd.readouterr()
    assert "patients" in out.out
    assert "not-dicom" in out.out
    assert "replaced" not in out.err
    opened = Site(site, server="a" * 16)
    weights = np.zeros_like(pack(find_task(PLAN.task).build()))
    opened.answer_train(TrainRequest("run", 1, PLAN, weights))
    assert call(monkeypatch, *arguments) == 0
    assert "The store was replaced" in capfd.readouterr().err

    assert call(monkeypatch, "ledger", site, "--json") == 0
    books = json.loads(capfd.readouterr().out)
    assert [(row["run"], row["round"]) for row in books["releases"]] == [(f"{'a' * 16}/run", 1)]
    assert books["epsilon"] == pytest.approx(opened.ledger.spending().epsilon(opened.policy.cap))
    assert books["remaining"] == pytest.approx(8.0 - books["epsilon"])
    assert [(run["run"], run["planned_steps"]) for run in books["runs"]] == [
        (f"{'a' * 16}/run", PLAN.mechanism(PLAN.rounds).steps)
    ]
    assert call(monkeypatch, "ledger", site, "--rounds") == 0
    shown = capfd.readouterr().out
    (release,) = books["releases"]  # whole, though no terminal shows it
    assert f"{'a' * 16}/run: {release['task']}" in shown
    (row,) = [line for line in shown.splitlines() if release["reserved_at"] in line]
    assert release["committed_at"] in row
    assert call(monkeypatch, "ledger", site) == 0
    shown = capfd.readouterr().out.splitlines()
    assert shown[0].startswith("epsilon ")
    assert "max-epsilon 8 left" in shown[0]
    assert any(line.split()[:3] == ["run", release["task"], "1"] for line in shown)

    assert call(monkeypatch, "status", site, "--json") == 0
    status = json.loads(capfd.readouterr().out)
    assert [*status["stores"]] == ["ct-nodules"]
    assert (status["audit"]["ok"], status["daemon"]["answers"]) == (True, False)

    assert call(monkeypatch, "audit", "show", site, "--last", 2) == 0
    shown = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["event"] for line in shown] == ["released", "prepared"]
    assert call(monkeypatch, "audit", "verify", site) == 0
    assert "agree with the ledger" in capfd.readouterr().out
    path = site / "audit.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"round":1', b'"round":2', 1))
    assert call(monkeypatch, "audit", "verify", site, "--json") == 1
    assert "was changed" in json.loads(capfd.readouterr().out)["problems"][0]


def test_a_failed_intake_keeps_the_old_store(
    site: Path, dicom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--annotations", "annotations.csv", "--workers", 1)
    assert call(monkeypatch, "intake", site, dicom, *arguments) == 0
    before = Site(site).store_of("ct-nodules").digest
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "annotations.csv").write_bytes((dicom / "annotations.csv").read_bytes())
    assert call(monkeypatch, "intake", site, tmp_path / "empty", *arguments) == 1
    assert "Nothing usable" in capfd.readouterr().err
    assert Site(site).store_of("ct-nodules").digest == before
    (site / "stores" / "ct-nodules").rename(site / "stores" / ".ct-nodules.old")  # died between the two renames
    assert call(monkeypatch, "intake", site, tmp_path / "empty", *arguments) == 1
    assert Site(site).store_of("ct-nodules").digest == before
    (site / "pseudonyms.key").unlink()
    assert call(monkeypatch, "intake", site, dicom, *arguments) == 1
    assert not (site / "pseudonyms.key").exists()


def waves(path: Path, readings: int = 230, times: str = "plain") -> Path:
    """Write an export of two patients; ``times`` is "plain" or the heading of a hospital's own column."""
    start = datetime(2024, 1, 1)
    heads = "patient_id,timestamp,glucose_mg_dl" if times == "plain" else f"MRN;{times};Wert"
    rows = [heads]
    for patient in ("Doe-1", "Doe-2"):
        for k in range(readings):
            cells = (patient, (start + timedelta(minutes=5 * k)).isoformat(), f"{120 + 30 * np.sin(k / 8):.0f}")
            rows.append((";" if times != "plain" else ",").join(cells))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows))
    return path


def test_a_table_of_one_persons_identifiers_is_kept_for_later_intakes(
    site: Path, dicom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "links.csv"
    table.write_text("Doe-1\n")
    export = waves(tmp_path / "clinic.csv")
    assert call(monkeypatch, "intake", site, export, "--same-patient", table) == 1
    error = capfd.readouterr().err
    assert "Line 1 of links.csv" in error
    assert "Doe" not in error
    assert stores_in(site) == {}
    table.write_text("Doe-1,Doe-2\nP-0,P-2\n")
    assert call(monkeypatch, "intake", site, export, "--same-patient", table) == 0
    assert "1 patients, 1 segments, 230 records" in capfd.readouterr().out  # the same readings twice
    assert call(monkeypatch, "intake", site, dicom, "--workers", 1) == 0
    assert "1 patients, 2 nodules" in capfd.readouterr().out  # P-1 is undecided
    assert (site / "same-patient.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("folder", [False, True])
def test_intake_without_annotations_takes_glucose(
    folder: bool, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    export = waves(tmp_path / "export" / "clinic.csv")
    assert call(monkeypatch, "intake", site, export.parent if folder else export) == 0
    shown = capfd.readouterr()
    assert "2 patients, 2 segments, 460 records" in shown.out
    assert "Doe" not in shown.out + shown.err
    store = Site(site).store_of("cgm-5min")
    assert (store.kind, len(store)) == ("cgm-5min", 2)
    assert "prepared" in (site / "audit.jsonl").read_text()


def test_glucose_is_read_by_the_columns_in_site_toml(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    export = waves(tmp_path / "export.csv", times="Messzeit")
    assert call(monkeypatch, "intake", site, export) == 1
    assert "site.toml [glucose]" in capfd.readouterr().err
    with (site / "site.toml").open("a") as handle:
        handle.write('\n[glucose]\npatient = "MRN"\ntime = "Messzeit"\nglucose = "Wert"\n')
    assert call(monkeypatch, "intake", site, export) == 0
    assert len(Site(site).store_of("cgm-5min")) == 2


def test_an_export_that_is_neither_or_lacks_its_annotations_is_refused(
    site: Path, dicom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (dicom / "annotations.csv").unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.pdf").write_bytes(b"%PDF")
    for export, said in ((dicom, "--annotations"), (tmp_path / "other", "neither"), (tmp_path / "no", "no such")):
        assert call(monkeypatch, "intake", site, export) == 1
        error = capfd.readouterr().err
        assert said in error
        assert "Traceback" not in error
    assert stores_in(site) == {}


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoint:
    torch.manual_seed(5)
    point = OperatingPoint(0.47, 2.5, "sensitivity 0.90")
    return save_checkpoint(
        tmp_path / "c", find_task(PLAN.task).build(), run="r", number=1, task=PLAN.task, plan_digest="p",
        operating_point=point,
    )  # fmt: skip


def test_predictions_name_the_patient_series_and_position_for_the_owner_alone(
    saved: Checkpoint, dicom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out, marked = (
        tmp_path / "predictions.csv",
        list(csv.DictReader((dicom / "annotations.csv").read_text().splitlines())),
    )
    before = sorted(tmp_path.iterdir())
    assert call(monkeypatch, "predict", saved.path, dicom, "--out", out, "--workers", 1) == 0
    assert sorted(tmp_path.iterdir()) == sorted([*before, out])  # no store is left behind
    assert out.stat().st_mode & 0o777 == 0o600
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert list(rows[0]) == [
        "patient", "seriesuid", "coordX", "coordY", "coordZ", "diameter_mm", "probability", "decision", "threshold"
    ]  # fmt: skip
    assert {row["patient"] for row in rows} == {"P-0", "P-1", "P-2"}
    places = {(row["seriesuid"], *(float(row[f"coord{axis}"]) for axis in "XYZ")) for row in rows}
    assert places == {(row["seriesuid"], *(float(row[f"coord{axis}"]) for axis in "XYZ")) for row in marked}
    by_patient = {row["patient"]: row["seriesuid"] for row in rows}
    assert by_patient == {f"P-{number}": row["seriesuid"] for number, row in enumerate(marked)}
    for row in rows:
        assert float(row["threshold"]) == 0.47
        assert row["decision"] == ("malignant" if float(row["probability"]) >= 0.47 else "benign")
    shown = capfd.readouterr()
    assert "malignant from a probability of 0.470 on (sensitivity 0.90)" in shown.out
    assert "P-0" not in shown.out + shown.err


def test_a_checkpoint_without_an_operating_point_decides_at_one_half_and_says_so(
    saved: Checkpoint, dicom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sidecar, out = saved.path.with_suffix(".json"), tmp_path / "out.csv"
    described = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({k: v for k, v in described.items() if k != "operating_point"}))
    assert call(monkeypatch, "predict", saved.path, dicom, "--out", out, "--workers", 1) == 0
    assert "0.500 on (one half: no reference patients chose a threshold)" in capfd.readouterr().out
    assert {row["threshold"] for row in csv.DictReader(out.read_text().splitlines())} == {"0.500000"}
    sidecar.write_text(json.dumps({**described, "operating_point": {"threshold": 7}}))
    assert call(monkeypatch, "predict", saved.path, dicom, "--out", out, "--workers", 1) == 1
    assert "operating_point is not as it must be" in capfd.readouterr().err


def test_predictions_are_the_models_and_stay_with_their_pseudonyms(
    saved: Checkpoint, site: Path, dicom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert call(monkeypatch, "intake", site, dicom, "--annotations", "annotations.csv", "--workers", 1) == 0
    out = tmp_path / "predictions.csv"
    arguments = ("--out", out, "--pseudonymous", "--site", site, "--workers", 1)
    assert call(monkeypatch, "predict", saved.path, dicom, *arguments) == 0
    text = out.read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert list(rows[0]) == ["patient", "nodule", "diameter_mm", "probability", "decision", "threshold"]
    for mark in csv.DictReader((dicom / "annotations.csv").read_text().splitlines()):
        assert mark["seriesuid"] not in text
    assert "P-" not in text
    assert len(rows) == 3  # the undecided nodule too: nobody's judgement is needed to score it
    trained = {key.tobytes().hex() for key in Site(site).store_of("ct-nodules").keys}
    assert trained < {row["patient"] for row in rows}
    store = Site(site).store_of("ct-nodules")
    images = torch.from_numpy(np.asarray(store.arrays["image"][:, 4:-4, 4:-4], np.float32))[:, None]
    with torch.no_grad():
        scores = load_model(saved.path)(images).softmax(1)[:, 1].view(-1, 3).mean(1).double()
    expected = torch.sigmoid(torch.logit(scores) / 2.5)
    by_patient = {row["patient"]: float(row["probability"]) for row in rows}
    told = [by_patient[key.tobytes().hex()] for key in store.keys]
    np.testing.assert_allclose(told, expected.numpy(), atol=1e-5)

    sidecar = saved.path.with_suffix(".json")
    sidecar.rename(tmp_path / "aside.json")
    assert call(monkeypatch, "predict", saved.path, dicom, "--out", out) == 1
    assert "round-00001.json is missing, which says what round-00001.safetensors is." in capfd.readouterr().err
    (tmp_path / "aside.json").rename(sidecar)
    saved.path.write_bytes(saved.path.read_bytes()[:-1] + b"\x01")
    assert call(monkeypatch, "predict", saved.path, dicom, "--out", out) == 1
    assert "was changed after it was written" in capfd.readouterr().err


def test_the_health_of_a_daemon_is_asked_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked
    state = {"ok": True}
    with serve(CollectorRegistry(), lambda: Health(state["ok"], {"connected": True}), 0) as port:
        assert daemon_health(tmp_path, 0) == {"answers": False, "ok": False}
        (tmp_path / HEALTH_PORT_FILE).write_text(f"{port}\n")
        assert daemon_health(tmp_path, 0) == {"answers": True, "ok": True, "connected": True}
        state["ok"] = False
        assert daemon_health(tmp_path, port) == {"answers": True, "ok": False, "connected": True}
    assert daemon_health(tmp_path, port) == {"answers": False, "ok": False}
