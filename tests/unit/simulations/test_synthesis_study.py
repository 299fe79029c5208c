"""A study runs once for each epsilon and number of patients, on patients of the same stores."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from shared.errors import PlanError
from shared.records import RecordStore, open_store
from simulations.display import Display
from simulations.synthesis_study import FIGURES, Study, as_markdown, carry_out, draw_by_patients

DISPLAY = Display(Console(quiet=True))
PLAN = {"rounds": 1, "local_steps": 1, "generator_steps": 1}


@pytest.fixture(autouse=True)
def _quick_classifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.synthesis.STEPS", 5)


@pytest.fixture
def study(tmp_path: Path, make_nodule_store: Callable[..., RecordStore]) -> Study:
    make_nodule_store(tmp_path / "hospital", patients=24, seed=1)
    make_nodule_store(tmp_path / "judged", patients=12, seed=2)
    return Study(
        data=(tmp_path / "hospital",),
        heldout=tmp_path / "judged",
        epsilons=(float("inf"),),
        patients=(12,),
        init="random",
        plan=PLAN,
    )


def test_a_study_has_a_row_for_each_run_and_goes_on_where_it_stood(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = carry_out(study, out, DISPLAY)
    assert [(row["patients"], row["epsilon"]) for row in rows] == [(12.0, "inf")]
    assert all(row[name] is not None for row in rows for name in FIGURES)
    assert json.loads((out / "study.json").read_text()) == json.loads(json.dumps(rows))
    assert (out / "study.md").read_text() == as_markdown(rows)
    assert as_markdown(rows).count("\n") == 3
    trained = {
        key.tobytes() for key in open_store(out / "patients-12" / "epsilon-inf" / "sites" / "site-1", "ct-nodules").keys
    }
    assert trained == {key.tobytes() for key in RecordStore.open(study.data[0]).keys[:12]}
    written = (out / "patients-12" / "epsilon-inf" / "samples.png").stat().st_mtime_ns
    assert carry_out(study, out, DISPLAY) == rows
    assert (out / "patients-12" / "epsilon-inf" / "samples.png").stat().st_mtime_ns == written


def test_more_patients_than_a_hospital_has_are_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="24 patients, fewer than 99"):
        carry_out(Study(data=study.data, heldout=study.heldout, patients=(99,)), tmp_path / "out", DISPLAY)


def test_the_picture_by_patients_has_gaps_where_a_figure_is_missing() -> None:
    known = {"value": 0.8, "low": 0.7, "high": 0.9}
    rows = [{"patients": 50.0, "tstr_auroc": known, "real_auroc": None}]
    rows.append({"patients": 200.0, "tstr_auroc": {**known, "low": None}, "real_auroc": known})
    assert draw_by_patients(rows).startswith(b"\x89PNG")
