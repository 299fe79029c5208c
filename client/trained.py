"""Open a trained model that a hospital was given, to use it on its own patients."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from client.intake.pseudonyms import PatientIdentity, pseudonym
from shared.errors import PlanError, StorageError
from shared.personal import is_personal
from shared.provenance.keys import Trusted
from shared.provenance.sidecar import Sidecar, read_sidecar
from shared.provenance.signing import require_signature
from shared.provenance.tensors import load_into, read_weights
from shared.tasks.registry import find_task

EVERYBODY = "everybody"
"""Whose a model is that was fitted to a hospital's own patients."""


@dataclass(frozen=True)
class Trained:
    """A model and what is known of it.

    Attributes:
        model: In evaluation mode.
        sha256: Of the weights file.
        owner: Salt and pseudonym of the one patient to whom it was fitted; None for a model for everybody here.
        sidecar: What the JSON beside the weights says; None for a model that was never in a file.
        doubt: Why nobody answers for what the sidecar says, as a sentence for people; None if a trusted key does.
    """

    model: nn.Module
    sha256: str
    owner: tuple[bytes, bytes] | None = None
    sidecar: Sidecar | None = None
    doubt: str | None = None

    def fits(self, patient_id: str) -> bool:
        """Whether it may be used for this patient."""
        if self.owner is None:
            return True
        salt, key = self.owner
        return pseudonym(salt, PatientIdentity("", patient_id)) == key


@dataclass(frozen=True)
class Trust:
    """What a hospital asks of a model before it opens it.

    Attributes:
        keys: The keys of which one must have signed it. Without any, it is opened and its ``doubt`` says so. A model
            that was fitted in this hospital is signed by nobody.
        most_norm: Largest L2 norm of its weights, ``max-weights-norm`` of ``site.toml``; None for no such bound.
    """

    keys: Trusted = ()
    most_norm: float | None = None


NO_SITE = Trust()
"""Where no hospital's rules are known."""


def load_trained(
    checkpoint: Path, task_name: str, purpose: str, trust: Trust = NO_SITE, *, fitted: bool = False
) -> Trained:
    """Open a checkpoint by the JSON beside it, which names its task and its SHA-256.

    Args:
        checkpoint: Weights as safetensors.
        task_name: The task that the model must be of.
        purpose: What it is to do, for the sentence that refuses another task's: "score nodules".
        trust: What is asked of it.
        fitted: Whether a model that a hospital fitted to its own patients will do. Nobody signs such a one, and anybody
            can write its mark, so only what is made for it takes it.

    Raises:
        StorageError: If a file is missing, damaged, changed, of another model or not signed as it must be.
        PlanError: If the model is of another task.
    """
    described = checkpoint.with_suffix(".json")
    weights = read_weights(checkpoint)
    if not described.exists():
        raise StorageError(
            f"{described} is missing, which says what {checkpoint.name} is. Copy both files from where the weights "
            "came."
        )
    sidecar = read_sidecar(described)
    if weights.sha256 != sidecar.sha256:
        raise StorageError(f"The checkpoint {checkpoint} was changed after it was written. Copy it again.")
    personal = is_personal(weights.metadata)
    if personal and not fitted:
        raise StorageError(
            f"{checkpoint.name} is marked as fitted to patients of one hospital, and nobody signs such a model. Give "
            "the model that the server exported."
        )
    doubt = _doubt(sidecar, checkpoint.name, trust.keys, personal=personal)
    if sidecar.task != task_name:
        raise PlanError(f"A model of the task {sidecar.task} does not {purpose}.")
    model = find_task(task_name).build()
    load_into(model, weights, most_norm=trust.most_norm)
    return Trained(model.eval(), weights.sha256, _owner(sidecar, personal=personal), sidecar, doubt)


def _doubt(sidecar: Sidecar, name: str, trusted: Trusted, *, personal: bool) -> str | None:
    if personal:
        return f"{name} was fitted in a hospital and is signed by nobody. Use it only if it was fitted here."
    if not trusted:
        return (
            f"Nobody answers for {name}: no key is trusted here that could have signed it. Run fedward-site trust SITE "
            "signing.pub once, and give --site SITE."
        )
    require_signature(sidecar, trusted, name)
    return None


def _owner(sidecar: Sidecar, *, personal: bool) -> tuple[bytes, bytes] | None:
    if not personal or sidecar.patient == EVERYBODY:
        return None
    try:
        return bytes.fromhex(sidecar.salt or ""), bytes.fromhex(sidecar.patient or "none")
    except ValueError as error:
        raise StorageError("The model's description does not say whose it is. Copy it with the weights.") from error
