"""Where a run's start comes from: decided when the run is agreed, kept in its folder, and inherited by its models.

    start.json   the start's ancestry (shared.provenance.ancestry), beside start.safetensors

A start is free of privacy cost only if no patient of the run's hospitals was in its training. So a checkpoint is
accepted as it is if a key that the operator trusts signed its ancestry; its runs then stay in every card. Anything
else needs the operator's word that it is public, and the word is recorded in sidecar, registry and report.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from server.checkpoints import Checkpoint, load_weights
from server.registry import RunRecord
from shared.errors import PlanError, StorageError
from shared.files import write_atomic
from shared.plan import RANDOM_START, RunPlan
from shared.provenance.ancestry import OPERATOR, PUBLIC, UNKNOWN, Ancestry, PastRun, shares_of
from shared.provenance.bounded import MOST_JSON_BYTES, read_bounded
from shared.provenance.card import card_of
from shared.provenance.keys import Trusted
from shared.provenance.sidecar import Sidecar, ancestry_json, parse_ancestry, read_sidecar
from shared.provenance.signing import require_signature
from shared.tasks.registry import find_task

START = "start.json"


def ancestry_of(checkpoint: Path, task: str, trusted: Trusted, *, is_public: bool) -> Ancestry:
    """Return what a checkpoint comes from that a run is to start from.

    Args:
        checkpoint: The weights, with their sidecar beside them if there is one.
        task: Of the run.
        trusted: Keys that may have signed it.
        is_public: Whether the operator says that no patient of the consortium was in its training.

    Raises:
        PlanError: If its origin cannot be verified and the operator does not say that it is public; or if the
            operator says so of a model whose signed ancestry has a run with noise.
        StorageError: If it cannot be read or does not fit the task.
    """
    sha256 = load_weights(checkpoint, find_task(task).build())
    sidecar, doubt = _verified(checkpoint, sha256, trusted)
    known = sidecar.ancestry if sidecar else None
    if is_public:
        if known and any(run.noise_multiplier for run in known.runs):  # nobody adds noise for public data
            raise PlanError(
                f"{checkpoint.name} is signed, and its ancestry has private runs of hospitals: it is not public. "
                "Leave out --init-is-public; its epsilon is composed with the run's."
            )
        return Ancestry(PUBLIC, sha256, OPERATOR)
    if known is None:
        raise PlanError(
            f"The origin of {checkpoint.name} cannot be verified: {doubt} If no patient of your hospitals was in its "
            "training, say so with --init-is-public."
        )
    return replace(known, start_sha256=sha256) if known.origin == PUBLIC and not known.runs else known


def _verified(checkpoint: Path, sha256: str, trusted: Trusted) -> tuple[Sidecar | None, str]:
    """Return the sidecar if a trusted key signed it for these very weights; else None and the reason."""
    path = checkpoint.with_suffix(".json")
    if not path.exists():
        return None, f"there is no {path.name} beside it."
    try:
        sidecar = read_sidecar(path)
        require_signature(sidecar, trusted, checkpoint.name)
    except StorageError as error:
        return None, str(error)
    if sidecar.sha256 != sha256:
        return None, f"{path.name} describes other weights."
    return sidecar, "its description names no ancestry."


def record_start(folder: Path, ancestry: Ancestry) -> None:
    """Keep the ancestry of a run's start in the run's folder. Raises StorageError."""
    write_atomic(folder / START, ancestry_json(ancestry))


def start_of(folder: Path, plan: RunPlan) -> Ancestry:
    """Return the ancestry of a run's start; of a run of an earlier version, which kept none, what its plan tells.

    Raises:
        StorageError: If it is damaged.
    """
    path = folder / START
    if path.exists():
        return parse_ancestry(read_bounded(path, MOST_JSON_BYTES), str(path))
    return _start_by_plan(plan)


def descent(folder: Path, run: str, plan: RunPlan, rounds: Mapping[str, int], keys: Mapping[str, str]) -> Ancestry:
    """Return what a run's model comes from: all that its start comes from, and the run itself.

    Args:
        folder: The run's.
        run: Its name.
        plan: Its plan.
        rounds: In how many rounds each site took part.
        keys: SHA-256 of the sites' public keys, where they are known.

    Raises:
        StorageError: If the start's ancestry is damaged.
    """
    return start_of(folder, plan).followed_by(_past(run, plan, rounds, keys))


def ancestry_in(record: RunRecord, checkpoint: Checkpoint) -> Ancestry:
    """Return what a run's model comes from: what its checkpoint says, or of an earlier version's, what the plan tells.

    A plan that starts from a checkpoint does not tell what that comes from: the origin is then unknown.
    """
    if checkpoint.ancestry is not None:
        return checkpoint.ancestry
    plan, rounds = record.plan, {row.site: record.rounds_of(row.site) for row in record.sites if row.refused is None}
    return _start_by_plan(plan).followed_by(_past(record.run, plan, rounds, {}))


def _start_by_plan(plan: RunPlan) -> Ancestry:
    return Ancestry() if plan.init == RANDOM_START else Ancestry(UNKNOWN, plan.init)


def _past(run: str, plan: RunPlan, rounds: Mapping[str, int], keys: Mapping[str, str]) -> PastRun:
    whole = plan.rounds * plan.local_steps  # see RunPlan.stated_epsilon
    return PastRun(
        run=run,
        plan_digest=plan.digest,
        sample_rate=plan.sample_rate,
        noise_multiplier=plan.noise_multiplier,
        delta=plan.delta,
        sites=shares_of({site: whole for site, count in rounds.items() if count}, keys),
    )


def start_words(ancestry: Ancestry, name: str, sha256: str) -> str:
    """Return in words what a run started from, for its registry and report."""
    runs = ", ".join(run.run for run in ancestry.runs)
    if runs:
        return f"checkpoint {name} (SHA-256 {sha256}), a model of {runs}. {card_of(ancestry).sentence()}"
    if ancestry.origin == PUBLIC:
        return f"public checkpoint {name} (SHA-256 {sha256}), public by {ancestry.said_by or 'its signed description'}"
    if ancestry.origin == UNKNOWN:
        return f"checkpoint {name} (SHA-256 {sha256}) of unknown origin"
    return f"checkpoint {name} (SHA-256 {sha256}) of random weights"
