"""How a simulation sets data aside: whole patients, or where the task's source says so, the later readings."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.errors import IntakeError
from shared.records import RecordStore, open_store
from shared.tasks.cgm_windows import judged_windows
from shared.tasks.glucose_forecast import TASK
from simulations.sites import Federation, prepare_federation

Maker = Callable[..., RecordStore]


def prepare(folder: Path, raw: list[Path], task: str, heldout: Path | None = None) -> Federation:
    return prepare_federation(
        folder, raw, task=task, seed=0, heldout=heldout, workers=1, report=lambda _stage, _done, _total: None
    )


@pytest.fixture
def hospitals(make_cgm_store: Maker, tmp_path: Path) -> list[Path]:
    return [make_cgm_store(tmp_path / name, seed=seed) and tmp_path / name for seed, name in enumerate("ab")]


def test_glucose_is_divided_in_time_and_every_patient_is_on_both_sides(hospitals: list[Path], tmp_path: Path) -> None:
    federation = prepare(tmp_path / "out", hospitals, TASK.name)
    judged = RecordStore.open(federation.heldout)
    windows = judged_windows(judged)
    assert windows.sites == federation.names == ("site-1", "site-2")
    for number, (folder, source) in enumerate(zip(federation.sites, hospitals, strict=True)):
        trained, whole = open_store(folder, TASK.store_kind), RecordStore.open(source)
        own = set(np.asarray(whole.arrays["glucose"]).tolist())
        mine = windows.path[windows.site == number]
        assert len(mine) == len(windows) // 2
        assert set(mine.ravel().tolist()) <= own
        assert not set(mine.ravel().tolist()) & set(np.asarray(trained.arrays["glucose"]).tolist())
        assert {key.tobytes() for key in trained.keys} == {key.tobytes() for key in whole.keys}


def test_another_tasks_patients_are_never_on_both_sides(make_nodule_store: Maker, tmp_path: Path) -> None:
    make_nodule_store(tmp_path / "a", patients=20)
    federation = prepare(tmp_path / "out", [tmp_path / "a"], "nodule-classification")
    judged, trained = RecordStore.open(federation.heldout), open_store(federation.sites[0], "ct-nodules")
    assert len(judged) + len(trained) == 20
    assert not {key.tobytes() for key in judged.keys} & {key.tobytes() for key in trained.keys}
    assert "site" not in judged.arrays


def test_given_judged_readings_must_be_of_other_patients(hospitals: list[Path], tmp_path: Path) -> None:
    with pytest.raises(IntakeError, match="among the training patients"):
        prepare(tmp_path / "out", hospitals, TASK.name, heldout=hospitals[0])
    apart = prepare(tmp_path / "apart", hospitals[:1], TASK.name, heldout=hospitals[1])
    assert len(open_store(apart.sites[0], TASK.store_kind).arrays["glucose"]) == 4 * 440
