"""Open a trained model that a hospital was given, to use it on its own patients."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from client.intake.pseudonyms import PatientIdentity, pseudonym
from shared.errors import PlanError, StorageError
from shared.files import storage_errors
from shared.personal import is_personal
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
        described: What the JSON beside the weights says.
    """

    model: nn.Module
    sha256: str
    owner: tuple[bytes, bytes] | None = None
    described: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, patient_id: str) -> bool:
        """Whether it may be used for this patient."""
        if self.owner is None:
            return True
        salt, key = self.owner
        return pseudonym(salt, PatientIdentity("", patient_id)) == key


def load_trained(checkpoint: Path, task_name: str, purpose: str) -> Trained:
    """Open a checkpoint by the JSON beside it, which names its task and its SHA-256.

    Args:
        checkpoint: Weights as safetensors.
        task_name: The task that the model must be of.
        purpose: What it is to do, for the sentence that refuses another task's: "score nodules".

    Raises:
        StorageError: If a file is missing, damaged, changed or of another model.
        PlanError: If the model is of another task.
    """
    sidecar = checkpoint.with_suffix(".json")
    with storage_errors(checkpoint):
        content = checkpoint.read_bytes()
    if not sidecar.exists():
        raise StorageError(
            f"{sidecar} is missing, which says what {checkpoint.name} is. Copy both files from where the weights came."
        )
    with storage_errors(sidecar):
        text = sidecar.read_bytes()
    try:
        described = json.loads(text)
        name, sha256 = str(described["task"]), described["sha256"]
        owner = _owner(described, personal=is_personal(content))
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{sidecar} does not describe a checkpoint. Copy it together with the weights.") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise StorageError(f"The checkpoint {checkpoint} was changed after it was written. Copy it again.")
    if name != task_name:
        raise PlanError(f"A model of the task {name} does not {purpose}.")
    model = find_task(name).build()
    try:
        model.load_state_dict(load(content))
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise StorageError(f"{checkpoint} is no checkpoint of the task {name}.") from error
    return Trained(model.eval(), str(sha256), owner, described)


def _owner(described: dict[str, object], *, personal: bool) -> tuple[bytes, bytes] | None:
    if not personal or described["patient"] == EVERYBODY:
        return None
    return bytes.fromhex(str(described["salt"])), bytes.fromhex(str(described["patient"]))
