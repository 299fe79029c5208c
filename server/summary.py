"""The machine-readable result of a run: ``summary.json``, a pure function of the registry."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from server.checkpoints import Checkpoint
from server.findings import Findings
from server.lineage import ancestry_in
from server.registry import RunRecord, SiteRow, finite
from server.warnings import warnings_of
from shared.evaluation import Evaluation
from shared.files import write_atomic
from shared.plan import RANDOM_START
from shared.provenance.card import card_of


def summarise(record: RunRecord, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Return what others script against, as plain JSON values.

    What is not finite is ``null``: a metric that could not be computed, or the epsilon of a run without noise.

    Args:
        record: The run as registered.
        checkpoint: The latest saved model, if there is one.
    """
    findings = Findings(record, checkpoint)
    evaluation = findings.evaluation
    details = evaluation.details if evaluation else {}
    by_site = details.get("by_site") or {}
    summary = {
        "warnings": [{"code": warning.code, "text": warning.text} for warning in warnings_of(findings)],
        "task": record.plan.task,
        "run": record.run,
        "status": record.status,
        "rounds_completed": record.rounds_completed,
        "seed": record.plan.seed,
        "plan_digest": record.plan.digest,
        "sites": [_site(record, row) for row in record.sites],
        # Where a task tells hospitals apart, its metrics have the form of the baselines'.
        "metrics": {**_metrics(evaluation), **({"by_site": by_site} if by_site else {})},
        "by_site": by_site,
        "worst_site": details.get("worst_site"),
        "rmse_30_of_patients": details.get("rmse_30_of_patients"),
        "rmse_30_of_patients_by_site": details.get("rmse_30_of_patients_by_site") or {},
        "by_group": evaluation.by_group if evaluation else {},
        "baselines": record.notes.get("baselines") or {},
        "timings": timings(record),
        "peak_rss_mib": record.notes.get("peak_rss_mib"),
        "start": start(record),
        "card": card(record, checkpoint),
        "data": record.notes.get("data"),
        "checkpoint": {"path": str(checkpoint.path), "sha256": checkpoint.sha256} if checkpoint else None,
    }
    plain: dict[str, Any] = finite(summary)
    return plain


def write_summary(path: Path, record: RunRecord, checkpoint: Checkpoint | None) -> None:
    """Write :func:`summarise` to ``path`` atomically, as strict JSON.

    Raises:
        StorageError: If the file cannot be written.
    """
    text = json.dumps(summarise(record, checkpoint), indent=2, allow_nan=False)
    write_atomic(path, f"{text}\n".encode())


def start(record: RunRecord) -> str:
    """Return in words what the run started from."""
    fallback = "random weights" if record.plan.init == RANDOM_START else f"public checkpoint {record.plan.init}"
    return str(record.notes.get("start") or fallback)


def card(record: RunRecord, checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """Return what the saved model comes from and promises over all of it; None where no model is saved."""
    if checkpoint is None:
        return None
    ancestry = ancestry_in(record, checkpoint)
    origin = {"origin": ancestry.origin, "start_sha256": ancestry.start_sha256, "said_by": ancestry.said_by}
    runs = [{name: value for name, value in asdict(run).items() if name != "sites"} for run in ancestry.runs]
    return {**card_of(ancestry).to_json(), **origin, "runs": runs}


def timings(record: RunRecord) -> dict[str, Any]:
    """Return seconds: as measured around the run if that was noted, else the sum of what was registered."""
    noted = record.notes.get("timings")
    measured = noted if isinstance(noted, Mapping) else {}
    return {
        "total_s": measured.get("total_s", sum(row.seconds for row in record.rounds)),
        "setup_s": measured.get("setup_s", sum(row.seconds for row in record.rounds if row.round < 1)),
        "round_s": [row.seconds for row in record.rounds if row.round >= 1],
    }


def _metrics(evaluation: Evaluation | None) -> dict[str, Any]:
    """Return the metrics, and where the model decides, the threshold and temperature that the checkpoint has too."""
    if evaluation is None:
        return {}
    point = evaluation.operating_point
    chosen = {} if point is None else {"threshold": point.threshold, "temperature": point.temperature}
    return {**evaluation.metrics, **chosen}


def _site(record: RunRecord, row: SiteRow) -> dict[str, Any]:
    rounds = record.rounds_of(row.site)
    return {
        "name": row.site,
        "declared_patients": row.declared_patients,
        "epsilon": record.plan.stated_epsilon(rounds),
        "delta": record.plan.delta,
        "rounds": rounds,
        "refused": row.refused,
    }
