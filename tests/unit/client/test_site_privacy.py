"""Canaries in every DICOM attribute, from intake through a crash in training: none gets out of the store."""

import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, Metadata, RecordDict

import client.site
from client.app import SITE_FOLDER, app
from client.audit_check import verify
from client.config import SitePolicy
from client.folder import open_books
from client.intake.nodules import prepare_nodules
from client.site import Site
from shared.logs import configure_logs
from shared.messages import PlanQuery, TrainRequest
from shared.plan import RunPlan
from shared.tasks.registry import find_task
from shared.weights import pack

CANARY, BIRTHDAY, UID = "Kanarienvogel", "19471122", "1.2.4711.0815"
PLAN = RunPlan(
    task="nodule-classification",
    rounds=3,
    local_steps=1,
    sample_rate=1.0,
    records_per_patient=1,
    max_grad_norm=1.0,
    noise_multiplier=2.0,
    delta=1e-3,
    learning_rate=0.5,
)


def _identify(dataset: Any, _k: int) -> None:
    dataset.PatientName, dataset.PatientBirthDate = f"{CANARY}^Name", BIRTHDAY
    dataset.StudyDescription, dataset.AccessionNumber = f"{CANARY} study", f"{CANARY[:10]}-A"


@pytest.fixture
def site(export: Any) -> Site:
    for number in range(4):
        uid = export.cube(uid=f"{UID}.{number}", patient=f"{CANARY}-{number}", edit=_identify, names=_names(number))
        export.annotate(uid)
    folder = export.root / "site"
    folder.mkdir()
    prepare_nodules(export.dicom, export.annotations, folder / "store", bytes(32))
    SitePolicy(
        name="h1", declared_patients=10, tasks=(PLAN.task,), max_epsilon=50.0, max_delta=0.01
    ).write(folder / "site.toml")  # fmt: skip
    open_books(folder)
    return Site(folder)


def _names(number: int) -> list[str]:
    return [f"{CANARY}/{number}-{k}.dcm" for k in range(8)]


def _send(site: Site, kind: str, content: RecordDict) -> bytes:
    """Return every byte that would go to Flower's transport."""
    envelope = Message(content=RecordDict(), metadata=Metadata(1, "m", 1, 5, "", "g", 0.0, 3600.0, "query"))  # type: ignore[call-overload]
    message = Message(content, reply_to=envelope)
    message.metadata.__dict__["_message_type"] = kind
    reply = app(message, Context(1, 5, {SITE_FOLDER: str(site.folder)}, RecordDict(), {}))
    body = repr(reply.error).encode() if reply.has_error() else reply.content.deflate()
    return body + repr(reply.metadata).encode()


@pytest.fixture
def logs() -> Any:
    root, stream = logging.getLogger(), io.StringIO()
    names = ("client", "server", "shared", "simulations", "flwr")
    kept = root.handlers[:], root.level, {name: logging.getLogger(name).level for name in names}
    flower = logging.getLogger("flwr").handlers[:]
    configure_logs(stream, logging.DEBUG)
    yield stream
    root.handlers[:], root.level = kept[0], kept[1]
    logging.getLogger("flwr").handlers[:] = flower
    for name, level in kept[2].items():
        logging.getLogger(name).setLevel(level)


def test_no_canary_leaves_the_store(
    site: Site, logs: io.StringIO, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = np.zeros_like(pack(find_task(PLAN.task).build()))
    requests = [TrainRequest("run", number, PLAN, weights).to_content() for number in (1, 2)]
    capfd.readouterr()
    sent = [_send(site, "query", PlanQuery("run", PLAN).to_content())]

    def burst(*_arguments: Any, **_named: Any) -> None:
        logging.getLogger("pydicom").error("cannot read %s", f"{CANARY}^Name")
        raise RuntimeError(f"{CANARY}^Name born {BIRTHDAY} in {site.folder.parent}/dicom/{CANARY}, series {UID}.0")

    task = find_task(PLAN.task)
    with monkeypatch.context() as patched:
        patched.setattr(client.site, "find_task", lambda _name: replace(task, loss=burst))
        sent.append(_send(site, "train", requests[0]))
    assert b"internal" in sent[-1]
    sent += [_send(site, "train", request) for request in (requests[0], requests[1], requests[0])]
    events = [entry.event for entry in site.audit.read()[0].entries]
    assert events.count("released") == 2
    assert "failed" in events
    assert "refused" in events
    assert verify(site.audit).problems == ()
    printed = capfd.readouterr()
    told = "".join([logs.getvalue(), printed.out, printed.err, *_file_names(site.folder)]).encode()
    assert b"failed" in told  # the log did say something
    kept = b"".join(path.read_bytes() for path in sorted(site.folder.rglob("*")) if path.is_file())
    for secret in (CANARY, BIRTHDAY, UID):
        for form in (secret.encode(), secret.encode("utf-16-le")):
            assert form not in told
            assert form not in kept
            assert all(form not in message for message in sent)
    folder = str(site.folder).encode()
    assert folder not in told
    assert all(folder not in message for message in sent)
    assert folder not in (site.folder / "audit.jsonl").read_bytes()


def _file_names(folder: Path) -> list[str]:
    """File names are something that is told, too."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]
