"""The study of one hostile site: who is hostile, what is compared, and that a finished run is not repeated."""

from collections.abc import Callable
from pathlib import Path

import pytest

from shared.records import RecordStore
from simulations import hostile_site
from simulations.benchmark import document
from simulations.hostile_site import CLEAN, Outcome, Study, as_markdown, measure


@pytest.fixture
def study_of(tmp_path: Path, make_nodule_store: Callable[..., RecordStore]) -> Callable[..., Study]:
    def found(hospitals: int, rounds: int) -> Study:
        folders = [tmp_path / f"h{number}" for number in range(hospitals)]
        for number, folder in enumerate(folders):
            make_nodule_store(folder, patients=15, seed=number)
        return Study(tuple(folders), tmp_path / "out", rounds=rounds)

    return found


@pytest.fixture
def study(study_of: Callable[..., Study]) -> Study:
    return study_of(5, rounds=2)


def test_only_the_hostile_sites_replies_are_touched_and_a_run_is_done_once(study: Study) -> None:
    outcome = study.run("multi-krum", "×1000", seed=1)
    assert (outcome.dropped, outcome.rounds) == (2, 2)
    registry = study.out / "seed-1" / "multi-krum" / "×1000" / "server" / "registry.sqlite"
    before = registry.stat().st_ino
    assert study.run("multi-krum", "×1000", seed=1) == outcome
    assert registry.stat().st_ino == before
    assert study.run("multi-krum", CLEAN, seed=1).dropped == 0


def test_of_ten_hospitals_the_tenth_is_hostile_and_looked_for(study_of: Callable[..., Study]) -> None:
    assert study_of(10, rounds=1).run("fedavg", "×1000", seed=1).dropped == 1  # by name the last would be site-9


def test_the_table_compares_with_the_same_strategys_clean_run(
    study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hostile_site, "STRATEGIES", ("fedavg",))
    found = measure(study, [1])
    assert [outcome.dropped for (outcome,) in found.values()] == [0, 2, 0]
    known = {("krum", CLEAN): [Outcome(0.9, 0, 20), Outcome(0.8, 0, 20)],
             ("krum", "×1000"): [Outcome(0.91, 20, 20), Outcome(0.7, 20, 20)]}  # fmt: skip
    table = as_markdown(known)
    assert "| krum | honest | 0.850 | 0.900 0.800 |  |  |" in table
    assert "| krum | ×1000 | 0.805 | 0.910 0.700 | +0.010 -0.100 | all |" in table
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- hostile-site -->\nold\n<!-- end of hostile-site -->\nb\n")
    document(page, table, hostile_site._MARKS)
    assert "old" not in page.read_text()
    assert page.read_text().startswith("a\n<!-- hostile-site -->")
    assert table in page.read_text()
