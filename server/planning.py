"""The operator's ``plan.toml``, and the run that it becomes.

    task = "nodule-classification"
    rounds = 12
    epsilon = 8.0

Every other field of :class:`shared.plan.RunPlan` may be added in kebab-case; ``noise-multiplier`` follows from epsilon.
"""

import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.checkpoints import load_weights
from server.config import ServerConfig
from server.members import Member
from shared.drafting import DELTA_SHARE, draft_plan
from shared.errors import PlanError, StorageError
from shared.files import storage_errors
from shared.plan import RunPlan
from shared.plan_keys import check_keys
from shared.records import RecordStore, find_store
from shared.tasks.registry import find_task


@dataclass(frozen=True)
class PlanRequest:
    """What ``plan.toml`` says: the promise, and the fields that differ from the task's defaults."""

    task: str
    epsilon: float
    delta: float | None
    overrides: dict[str, Any]


def read_plan_request(path: Path) -> PlanRequest:
    """Read ``plan.toml``.

    Raises:
        StorageError: If it cannot be read.
        PlanError: If a key is missing, unknown or of the wrong type.
    """
    with storage_errors(path):
        content = path.read_bytes()
    try:
        raw = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not valid TOML: {error}.") from error
    return parse_plan_request(raw)


def parse_plan_request(raw: dict[str, Any]) -> PlanRequest:
    """Turn the keys of ``plan.toml`` into a request.

    Raises:
        PlanError: If a key is missing, unknown or of the wrong type.
    """
    check_keys(raw, "plan.toml")
    for key, kind in (("task", "a text"), ("epsilon", "a number")):
        if key not in raw:
            raise PlanError(f"plan.toml lacks {key}, {kind}.")
    values = {key.replace("-", "_"): value for key, value in raw.items()}
    task, epsilon, delta = values.pop("task"), values.pop("epsilon"), values.pop("delta", None)
    if not isinstance(task, str):
        raise PlanError("plan.toml is wrong: task must be a text.")
    return PlanRequest(task, _number("epsilon", epsilon), None if delta is None else _number("delta", delta), values)


def agree_plan(request: PlanRequest, members: Collection[Member], start: Path | None) -> RunPlan:
    """Draft the run's plan from the request and the enrolled sites.

    Where the request leaves it open, delta is a tenth of one over the largest declared number of patients, which is
    also what a site permits by default, and the quorum is a majority of the enrolled sites: one hospital's outage
    must not stop the others, and a few must not speak for all.

    Args:
        request: From ``plan.toml``.
        members: The enrolled sites, at least one.
        start: A public checkpoint to start from.

    Raises:
        PlanError: If the plan is impossible.
        StorageError: If the checkpoint cannot be read or is none of this task.
    """
    delta = request.delta
    if delta is None:
        delta = DELTA_SHARE / max(member.declared_patients for member in members)
    overrides = {"min_sites": len(members) // 2 + 1, **request.overrides}
    if start is not None:
        overrides["init"] = checkpoint_digest(start, request.task)
    plan = draft_plan(request.task, epsilon=request.epsilon, delta=delta, overrides=overrides)
    if plan.min_sites > len(members):
        raise PlanError(f"The plan asks for {plan.min_sites} sites; {len(members)} are enrolled.")
    if plan.quorum > len(members):
        raise PlanError(
            f"To withstand byzantine-sites = {plan.byzantine_sites}, {plan.strategy} needs {plan.quorum} sites; "
            f"{len(members)} are enrolled. Enrol more, or choose another strategy or a smaller number."
        )
    return plan


def checkpoint_digest(path: Path, task: str) -> str:
    """Return the SHA-256 of a checkpoint that fits the task's model.

    Raises:
        StorageError: If it cannot be read or does not fit.
    """
    return load_weights(path, find_task(task).build())


def open_heldout(config: ServerConfig, task: str) -> RecordStore | None:
    """Open the reference patients, if there are any.

    Raises:
        StorageError: If they cannot be read, or were prepared for another kind of task.
    """
    if not config.heldout:
        return None
    kind = find_task(task).store_kind
    store = RecordStore.open(find_store(Path(config.heldout), kind))
    if store.kind != kind:
        raise StorageError(
            f"The held-out store {config.heldout} is of kind {store.kind}; the task {task} reads {kind}. "
            "Set heldout in server.toml to another store, or to the empty text to go without."
        )
    return store


def _number(key: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise PlanError(f"plan.toml is wrong: {key} must be a number.")
    return float(value)
