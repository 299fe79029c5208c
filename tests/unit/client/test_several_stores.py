"""A site holds a prepared store of each kind under one ledger; a folder of an earlier version goes on."""

import math
from pathlib import Path

import numpy as np
import pytest

from client.config import SitePolicy
from client.folder import open_books
from client.intake.nodules import prepare_nodules
from client.overview import status_of
from client.setup import PSEUDONYMS, fill_store, load_or_create_secret
from client.site import Site
from shared.errors import PolicyError, StorageError
from shared.messages import PlanQuery, TrainRequest
from shared.plan import RunPlan
from shared.records import open_store, stores_in
from shared.tasks.registry import find_task
from shared.weights import pack

from .test_same_patient import waves  # isort: skip

TASKS = ("nodule-classification", "glucose-forecast-lstm")


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "H1"
    folder.mkdir()
    SitePolicy(
        name="h1", declared_patients=10, tasks=TASKS, max_epsilon=math.inf, max_delta=0.1, min_noise_multiplier=0.0
    ).write(folder / "site.toml")
    open_books(folder)
    load_or_create_secret(folder / PSEUDONYMS)
    return folder


@pytest.fixture
def dicom(export) -> Path:
    for number in range(3):
        export.annotate(export.cube(patient=f"P-{number}", value=-400 + 100 * number))
    export.annotations.rename(export.dicom / "annotations.csv")
    return export.dicom


def plan(task):
    return RunPlan(
        task=task,
        rounds=1,
        local_steps=1,
        sample_rate=0.5,
        records_per_patient=1,
        max_grad_norm=1.0,
        noise_multiplier=2.0,
        delta=0.01,
        learning_rate=0.1,
    )


def test_intake_of_one_kind_leaves_the_other_alone_and_the_task_picks(folder, dicom, tmp_path):
    fill_store(Site(folder), dicom, None)  # finds annotations.csv at the top of the export
    before = {path: path.read_bytes() for path in (folder / "stores" / "ct-nodules").iterdir()}
    report, replaced = fill_store(Site(folder), waves(tmp_path / "g.csv", "A", "B"), None)
    assert (report.patients, replaced) == (2, False)
    assert {path: path.read_bytes() for path in (folder / "stores" / "ct-nodules").iterdir()} == before
    assert set(stores_in(folder)) == {"ct-nodules", "cgm-5min"}

    site = Site(folder)
    for task in TASKS:
        site.answer_query(PlanQuery(task, plan(task)))
        site.answer_train(TrainRequest(task, 1, plan(task), np.zeros_like(pack(find_task(task).build()))))
    releases = site.ledger.releases()
    assert [release.run for release in releases] == list(TASKS)  # one ledger, one cap
    kinds = [entry.fields.get("store_kind") for entry in site.audit.read()[0].entries if entry.event == "reserved"]
    assert kinds == ["ct-nodules", "cgm-5min"]
    stores = status_of(site)["stores"]
    assert {kind: facts["patients"] for kind, facts in stores.items()} == {"ct-nodules": 3, "cgm-5min": 2}


def test_without_a_store_of_its_kind_a_task_is_refused_by_name(folder, dicom):
    with pytest.raises(StorageError, match="no prepared store"):
        Site(folder).answer_query(PlanQuery("r", plan(TASKS[1])))
    fill_store(Site(folder), dicom, None)
    with pytest.raises(PolicyError, match="hold ct-nodules, the task reads cgm-5min"):
        Site(folder).answer_query(PlanQuery("r", plan(TASKS[1])))


def test_the_store_of_an_earlier_version_is_read_and_then_replaced(folder, dicom, tmp_path):
    prepare_nodules(dicom, dicom / "annotations.csv", folder / "store", bytes(32))
    old = open_store(folder, "ct-nodules").keys.tolist()
    fill_store(Site(folder), waves(tmp_path / "g.csv", "A"), None)
    assert Site(folder).store_of("ct-nodules").keys.tolist() == old
    _, replaced = fill_store(Site(folder), dicom, None)
    assert replaced
    assert Site(folder).store_of("ct-nodules").keys.tolist() != old  # the site's own secret
    assert not (folder / "store").exists()
    assert sorted(path.name for path in (folder / "stores").iterdir()) == ["cgm-5min", "ct-nodules"]


def test_an_intake_that_died_at_any_rename_leaves_a_store(folder, dicom, tmp_path, monkeypatch):
    prepare_nodules(dicom, dicom / "annotations.csv", folder / "store", bytes(32))
    rename, calls = Path.rename, []

    def dies(path, target):
        calls.append(path.name)
        if path.name == ".store.new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        fill_store(Site(folder), dicom, None)
    monkeypatch.undo()
    assert stores_in(folder) == {}
    fill_store(Site(folder), waves(tmp_path / "g.csv", "A"), None)  # any intake puts the old one back
    assert set(stores_in(folder)) == {"ct-nodules", "cgm-5min"}


def test_a_damaged_store_is_said_to_be_damaged(folder, dicom):
    (folder / "store").mkdir()
    (folder / "store" / "store.json").write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        Site(folder).answer_query(PlanQuery("r", plan(TASKS[0])))
    assert status_of(Site(folder))["stores"] == {"unknown": {"usable": False}}
    fill_store(Site(folder), dicom, None)
    assert len(Site(folder).store_of("ct-nodules")) == 3


def test_a_store_under_another_kinds_name_is_not_used(folder, dicom):
    prepare_nodules(dicom, dicom / "annotations.csv", folder / "stores" / "cgm-5min", bytes(32))
    with pytest.raises(StorageError, match="holds ct-nodules"):
        Site(folder).store_of("cgm-5min")
