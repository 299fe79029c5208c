"""The report: every section, the registry's numbers, valid and self-contained HTML, and every sad case."""

import json
import math
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.checkpoints import Checkpoint
from server.findings import Findings, as_estimate, humanise, in_sentence
from server.markup import Markup, duration, epsilon_text, number, tag
from server.registry import LATE, OK, Registry, RoundRow, SiteRow
from server.report import render, write_report
from shared.evaluation import Evaluation
from shared.metrics import Estimate
from shared.plan import RunPlan
from shared.records import RecordStore
from shared.tasks.nodule_classification import judge_nodules

PLAN = RunPlan(
    task="nodule-classification",
    rounds=4,
    local_steps=2,
    sample_rate=0.1,
    records_per_patient=2,
    max_grad_norm=1.0,
    noise_multiplier=2.0,
    delta=1e-3,
    learning_rate=0.1,
    seed=7,
)
CHECKPOINT = Checkpoint("run-7", 3, PLAN.task, PLAN.digest, "ab" * 32, Path("out/round-00003.safetensors"))
BASELINES = {
    "pooled": {"auroc": {"value": 0.931, "low": 0.9, "high": 0.96}, "accuracy": 0.881},
    "local": {"auroc": {"value": 0.822}, "by_site": {"alpha": {"auroc": {"value": 0.843}}}},
    "size_only": {"auroc": {"value": 0.774, "low": 0.7, "high": 0.84}},
}
VOID = {"meta", "br", "hr"}


@dataclass
class Page(HTMLParser):
    """Parses a page and checks as it goes that every element is closed in its turn."""

    source: str
    open: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def judged(seed: int) -> Evaluation:
    """The task's own evaluation on twelve made-up patients."""
    generator = np.random.default_rng(seed)
    patients, records = 12, 36
    store = RecordStore(
        kind="ct-nodules",
        attributes={},
        offsets=np.arange(0, records + 1, 3),
        keys=np.zeros((patients, 16), np.uint8),
        arrays={
            "nodule": np.zeros(records, np.int32),
            "malignant": np.repeat(np.arange(patients) % 2, 3).astype(np.uint8),
            "vendor": np.repeat(np.arange(patients) % 3, 3).astype(np.uint8),
        },
        digest="",
    )
    scores = np.repeat(np.arange(patients) % 2, 3) * 0.3 + generator.random(records) * 0.7
    return judge_nodules(store, scores)


def make(folder: Path, **changes: Any) -> Registry:
    """A run of three rounds with two hospitals and a refusal."""
    store = Registry(folder / "registry.sqlite")
    store.begin("run-7", changes.get("plan", PLAN))
    sites = changes.get("sites", ("alpha", "beta"))
    for index, site in enumerate(sites):
        store.add_site("run-7", SiteRow(site, 100 * (index + 1), None))
    store.add_site("run-7", SiteRow("node-99", None, "policy-refused"))
    for turn in range(4):
        replies = dict.fromkeys(sites, OK) if turn else {}
        if turn == 2 and len(sites) > 1:
            replies |= {sites[1]: changes.get("outcome", "budget-exceeded")}
        evaluation = changes["evaluation"] if "evaluation" in changes else judged(turn)
        store.add_round("run-7", RoundRow(turn, 1.25 * turn, evaluation, replies))
    for name, value in changes.get("notes", {"baselines": BASELINES, "data": "texture is simulated"}).items():
        store.add_note("run-7", name, value)
    store.end("run-7", changes.get("status", "completed"), changes.get("failure"))
    return store


def page(folder: Path, checkpoint: Checkpoint | None = CHECKPOINT, **changes: Any) -> Page:
    return Page(render(make(folder, **changes).read("run-7"), checkpoint))


def figures(shown: Page) -> list[str]:
    return [str(svg["aria-label"]) for svg in shown.named("svg")]


def test_it_shows_every_figure_and_section(tmp_path: Path) -> None:
    shown = page(tmp_path)
    assert [label.split()[0] for label in figures(shown)] == ["AUROC", "ROC", "Calibration:", "Epsilon", "Seconds"]
    for words in (
        "How good the model is", "Confusion matrix", "All metrics", "By scanner vendor",
        "Compared with what there would be without it", "What privacy it cost", "What happened on the way",
        "What exactly was run", "texture is simulated", "Completed",
    ):  # fmt: skip
        assert words in shown.text


def test_it_shows_the_registrys_numbers(tmp_path: Path) -> None:
    shown, final = page(tmp_path), judged(3)
    auroc = final.metrics["auroc"]
    assert isinstance(auroc, Estimate)
    assert f"AUROC is {auroc.value:.3f}" in shown.text
    assert f"{auroc.low:.3f} to {auroc.high:.3f}" in shown.text
    for name in ("accuracy", "precision", "recall", "brier"):
        assert f"{humanise(name)} {final.value(name):.3f}" in shown.text
    for row in final.details["confusion"]:
        assert all(str(cases) in shown.words for cases in row)
    assert f"GE 4 {final.by_group['GE']['auroc']:.3f}" in shown.text
    for value in ("0.931", "0.900 to 0.960", "0.822", "0.843", "0.774", "0.881"):
        assert value in shown.words
    assert f"alpha 100 3 {epsilon_text(PLAN.epsilon())} 0.001 took part" in shown.text
    assert f"beta 200 2 {epsilon_text(PLAN.epsilon())} 0.001 took part" in shown.text
    assert "node-99 – 0 – 0.001 policy-refused" in shown.text
    assert "beta: budget-exceeded" in shown.words
    assert "2 of 3" in shown.words


def test_it_names_plan_start_and_checkpoint(tmp_path: Path) -> None:
    shown = page(tmp_path, notes={"software": {"fedward": "0.1.0"}})
    for name, value in json.loads(PLAN.to_json()).items():
        assert name in shown.words
        assert str(value) in shown.words
    for value in (PLAN.digest, CHECKPOINT.sha256, str(CHECKPOINT.path), "random weights", "0.1.0"):
        assert value in shown.words


def test_it_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    shown = page(tmp_path)
    assert "http" not in shown.source
    assert "url(http" not in shown.source
    assert not {"script", "link", "img", "iframe", "object"} & {name for name, _ in shown.tags}
    for _, attributes in shown.tags:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")


def test_identifiers_are_unique_and_references_resolve(tmp_path: Path) -> None:
    shown = page(tmp_path)
    names = [attributes["id"] for _, attributes in shown.tags if "id" in attributes]
    assert len(names) == len(set(names))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', shown.source)) <= set(names)


def test_figures_take_the_pages_colours(tmp_path: Path) -> None:
    for svg in re.findall(r"<svg.*?</svg>", page(tmp_path).source, re.DOTALL):
        assert "var(--blue)" in svg
        assert not re.search(r"(fill|stroke): #", svg)


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    pages = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name / "report.html", make(tmp_path / name).read("run-7"), CHECKPOINT)
        pages.append((tmp_path / name / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_names_cannot_inject_markup(tmp_path: Path) -> None:
    attack = "<script>alert('$x$')</script>\"&"
    shown = page(tmp_path, sites=(attack, "beta"), notes={"data": attack, "start": attack, "baselines": {attack: {}}})
    assert "<script" not in shown.source
    assert attack in shown.words


def test_hospitals_that_spent_the_same_share_a_curve(tmp_path: Path) -> None:
    shown = page(tmp_path, outcome=LATE)
    assert "alpha, beta" in shown.words
    assert "share one line" in shown.text


def test_the_curve_of_epsilon_ends_at_what_was_spent(tmp_path: Path) -> None:
    findings = Findings(make(tmp_path).read("run-7"), CHECKPOINT)
    curves = findings.spending()
    assert curves[("alpha",)] == pytest.approx([0.0, *(PLAN.epsilon(n) for n in (1, 2, 3))])
    assert curves[("beta",)] == pytest.approx([0.0, *(PLAN.epsilon(n) for n in (1, 1, 2))])


def test_without_heldout_patients_nothing_was_validated(tmp_path: Path) -> None:
    shown = page(tmp_path, evaluation=None)
    assert "nothing was validated" in shown.text
    assert [label.split()[0] for label in figures(shown)] == ["Epsilon", "Seconds"]


def test_a_failed_run_says_so_with_its_code(tmp_path: Path) -> None:
    shown = page(tmp_path, status="failed", failure="quorum-lost")
    assert "The run failed after 3 rounds with the code quorum-lost" in shown.text


def test_a_run_that_failed_at_once_has_a_report(tmp_path: Path) -> None:
    store = Registry(tmp_path / "registry.sqlite")
    store.begin("run-7", PLAN)
    store.end("run-7", "failed", "quorum-lost")
    shown = Page(render(store.read("run-7"), None))
    assert "No round was completed" in shown.text
    assert "none was saved" in shown.words
    assert not figures(shown)


def test_a_run_that_goes_on_is_unfinished(tmp_path: Path) -> None:
    assert "The run has not ended" in page(tmp_path, status="running").text


def test_without_noise_there_is_a_warning_and_no_curve(tmp_path: Path) -> None:
    shown = page(tmp_path, plan=replace(PLAN, noise_multiplier=0.0))
    assert "No privacy guarantee" in shown.text
    assert "∞" in shown.words
    assert {"class": "tile warning"} in shown.named("div")
    assert not [label for label in figures(shown) if label.startswith("Epsilon")]
    assert "Noise is added" not in shown.text


def test_one_hospital_and_no_baselines(tmp_path: Path) -> None:
    shown = page(tmp_path, sites=("alpha",), notes={})
    assert "1 hospital trained" in shown.text
    assert "No baselines were trained" in shown.text


def test_undefined_metrics_are_dashes(tmp_path: Path) -> None:
    undefined = Evaluation(
        {"auroc": Estimate(math.nan, math.nan, math.nan), "accuracy": math.nan},
        {"GE": {"auroc": math.nan}},
        {"roc": {"fpr": [0.0, 0.5, 1.0], "tpr": [math.nan] * 3}, "confusion": [[3, 0], [0, 0]]},
    )
    shown = page(tmp_path, evaluation=undefined)
    assert "AUROC – on held-out patients" in shown.text
    assert "undefined on the held-out set" in shown.text
    assert [label.split()[0] for label in figures(shown)] == ["Epsilon", "Seconds"]
    assert not re.search(r"\bnan\b", shown.text.lower())


@pytest.mark.parametrize("task", ["glucose-forecast", "nodule-classification"])
def test_another_tasks_metrics_are_shown_without_its_curves(tmp_path: Path, task: str) -> None:
    regression = Evaluation({"negative_rmse": Estimate(-21.5, -23.0, -20.0), "mae": 15.25}, {"adult": {"mae": 14.0}})
    shown = page(tmp_path, plan=replace(PLAN, task=task), evaluation=regression, notes={})
    assert "Negative rmse is -21.500 (95% interval -23.000 to -20.000)" in shown.text
    assert "There is no gain over the start" in shown.text
    assert "-23.000 to -20.000" in shown.words
    assert "By group" in shown.words
    assert [label.split()[0] for label in figures(shown)] == ["Negative", "Epsilon", "Seconds"]


def test_odd_notes_do_no_harm(tmp_path: Path) -> None:
    notes = {"baselines": {"pooled": None, "other": {"auroc": 0.5}}, "data": {"source": ["a", 1]}, "timings": None}
    shown = page(tmp_path, notes=notes)
    assert "Source:" in shown.text
    assert "0.500" in shown.words


def test_text_is_escaped_unless_it_is_markup() -> None:
    assert tag("p", "<b>", Markup("<i>"), class_='"') == '<p class="&quot;">&lt;b&gt;<i></p>'


@pytest.mark.parametrize(
    ("value", "shown"), [(7.991, "8.00"), (6.19, "6.19"), (8.0001, "8.01"), (0.0, "0.00"), (math.inf, "∞")]
)
def test_epsilon_is_never_rounded_down(value: float, shown: str) -> None:
    assert epsilon_text(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "–"), (1.25, "1.2 s"), (119.9, "2 min 00 s"), (7260.0, "2 h 01 min")]
)
def test_durations_are_for_people(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


def test_numbers_and_estimates_in_any_form() -> None:
    assert [number(value) for value in (None, math.nan, 1234.5)] == ["–", "–", "1,234.500"]
    assert as_estimate({"value": None}) is None
    assert as_estimate("x") is None
    assert as_estimate(0.5) is not None


def test_a_label_within_a_sentence_keeps_its_acronym() -> None:
    assert in_sentence("The last reading, no change") == "the last reading, no change"
    assert in_sentence("ARIMA, fitted to each window") == "ARIMA, fitted to each window"
    assert in_sentence("A simple method") == "a simple method"
