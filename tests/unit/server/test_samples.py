"""What the report says of a generator: its images by round, its faults, and what was found out after the run."""

from pathlib import Path

import pytest

from server.checkpoints import Checkpoint
from server.findings import EXAMINATION
from server.registry import OK, Registry, RoundRow, SiteRow
from server.report import render
from server.summary import summarise
from shared.drafting import draft_plan
from shared.evaluation import Evaluation
from shared.metrics import Estimate

PLAN = draft_plan("ct-synthesis", epsilon=10.0, delta=1e-3, overrides={"rounds": 3, "local_steps": 1})
CHECKPOINT = Checkpoint("run", 3, PLAN.task, PLAN.digest, "ab" * 32, Path("round-00003.safetensors"))
PICTURE = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "registry.sqlite")
    registry.begin("run", PLAN)
    registry.add_site("run", SiteRow("alpha", 100, None))
    for number, value, faults in ((0, 0.5, ["vanishing-discriminator"]), (2, 0.7, ["mode-collapse"]), (3, 0.8, [])):
        details = {"samples": f"{PICTURE}#{number}", "warnings": faults}
        evaluation = Evaluation({"tstr_auroc": Estimate(value, value - 0.1, value + 0.1)}, details=details)
        registry.add_round("run", RoundRow(number, 1.0, evaluation, {"alpha": OK}))
    registry.add_round("run", RoundRow(1, 1.0, None, {"alpha": OK}))
    return registry


def test_every_judged_round_shows_its_images_the_last_first(registry: Registry) -> None:
    page = render(registry.read("run"), CHECKPOINT)
    assert page.count("<img ") == 3
    assert page.index(f"{PICTURE}#3") < page.index(f"{PICTURE}#2") < page.index(f"{PICTURE}#0")


def test_faults_are_said_with_their_rounds(registry: Registry) -> None:
    page = render(registry.read("run"), CHECKPOINT)
    assert "In round 2 the generator made nearly the same image" in page
    assert "In round 0 the discriminator gave every image the same mark" in page


def test_a_picture_from_elsewhere_is_never_shown(registry: Registry) -> None:
    details = {"samples": "https://example.org/x.png", "warnings": ["<script>"]}
    registry.add_round("run", RoundRow(3, 1.0, Evaluation({"tstr_auroc": 0.8}, details=details), {"alpha": OK}))
    page = render(registry.read("run"), CHECKPOINT)
    assert "example.org" not in page
    assert "<script>" not in page


def test_what_was_found_out_after_the_run_stands_with_the_metrics(registry: Registry) -> None:
    registry.add_note("run", EXAMINATION, {"real_auroc": 0.9, "membership_auc": Estimate(0.51, 0.47, 0.55)})
    record = registry.read("run")
    metrics = summarise(record, CHECKPOINT)["metrics"]
    assert metrics["tstr_auroc"]["value"] == 0.8
    assert metrics["real_auroc"] == 0.9
    assert metrics["membership_auc"]["high"] == 0.55
    assert "0.470 to 0.550" in render(record, CHECKPOINT)
