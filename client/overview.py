"""What a site's steward is shown: budget, releases, store, audit log, daemon. Plain JSON values; nothing is written."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from client.audit_check import verify
from client.folder import HEALTH_PORT_FILE, SELFTEST_FILE, Folder
from shared.accounting import epsilon_of
from shared.errors import StorageError
from shared.records import RecordStore, stores_in
from shared.telemetry import health_of


def ledger_of(site: Folder) -> dict[str, Any]:
    """Return every release, what they compose to, and what is left of the budget.

    ``epsilon`` is what the cap is compared with (:mod:`client.budget`). ``planned_epsilon`` of a run is the tight one
    of its whole plan, as if the hospital took part in no other run.
    """
    policy, releases, spending = site.policy, site.ledger.releases(), site.ledger.spending()
    used = spending.epsilon(policy.cap)
    admissions = {admission.run: admission for admission in spending.admissions}
    return {
        "site": policy.name,
        "releases": [
            {
                **{key: value for key, value in asdict(release).items() if key != "mechanism"},
                **asdict(release.mechanism),
            }
            for release in releases
        ],
        "runs": [
            {
                "run": run,
                "admitted": admission.rule.value,
                "planned_steps": admission.planned.steps,
                "planned_epsilon": _finite(epsilon_of([admission.planned], policy.max_delta)),
            }
            for run, admission in admissions.items()
        ],
        "max_delta": policy.max_delta,
        "max_epsilon": _finite(policy.max_epsilon),
        "epsilon": _finite(used),
        "remaining": _finite(max(0.0, policy.max_epsilon - used)) if math.isfinite(used) else 0.0,
    }


def status_of(site: Folder) -> dict[str, Any]:
    """Return the state of the site at a glance."""
    books, checked = ledger_of(site), verify(site.audit)
    policy = {key.replace("_", "-"): value for key, value in asdict(site.policy).items()}
    return {
        "policy": policy | {"max-epsilon": _finite(site.policy.max_epsilon)},
        "stores": {kind or "unknown": _store(path) for kind, path in stores_in(site.folder).items()},
        "budget": {key: books[key] for key in ("epsilon", "max_epsilon", "remaining", "max_delta")}
        | {"releases": len(books["releases"])},
        "audit": {"ok": not checked.problems, "lines": checked.head.sequence, "head": checked.head.sha256},
        "daemon": daemon_health(site.folder, site.policy.health_port),
        "selftest": last_selftest(site.folder),
    }


def last_selftest(folder: Path) -> dict[str, str]:
    """Return what the daemon's last self-test said, by task; nothing if there was none or it cannot be read."""
    try:
        verdicts = json.loads((folder / SELFTEST_FILE).read_bytes())
        return {str(v["task"]): f"{v['rung'] or 'unsafe'}, {int(v['threads'])} threads" for v in verdicts}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def daemon_health(folder: Path, configured: int) -> Mapping[str, Any]:
    """Ask the site's daemon how it fares, on the port of ``site.toml`` or the one that it chose."""
    try:
        port = configured or int((folder / HEALTH_PORT_FILE).read_text())
    except (OSError, ValueError):
        return {"ok": False, "answers": False}
    return health_of(port)


def _store(path: Path) -> dict[str, Any]:
    try:
        store = RecordStore.open(path)
    except StorageError:
        return {"usable": False}
    return {"usable": True, "patients": len(store), "digest": store.digest}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
