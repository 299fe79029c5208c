"""Synthetic patients beside a hospital's own: ``augment-with`` of ``site.toml``, or ``fedward-sim run --augment-with``.

Privacy. The images are drawn from a generator's checkpoint that was released under privacy, by numbers that depend on
nobody: they are post-processing, and the same whoever is in the store. Each image is one more patient, of a fixed
number that ``site.toml`` states. So of two neighbouring data sets, with the same synthetic patients in both, one still
has one patient more; that patient joins a step with the plan's ``sample_rate``, has one gradient clipped to the plan's
bound, and so moves the sum as much as without synthetic patients. The noise is added to that sum as ever, and the
ledger accounts for it as ever. The sum is divided by ``sample_rate`` times the declared *and* the synthetic patients, a
public constant as before. What a synthetic patient's records become in a step hangs on that patient's own key, as
everybody's do (:func:`client.training.draw_own`), and synthetic patients come first, so that adding a patient renumbers
none of them.

A checkpoint is refused whose stated epsilon or delta is above what ``site.toml`` permits for everything that leaves the
hospital: its images may then repeat patients, of this hospital too, in whose ledger it has no line. That epsilon is a
claim about privacy, so it counts only under the signature of a key in the site's ``signing.pub``: the aggregator
answers for it, over all runs that the generator comes from. Should the checkpoint be another one when a round is
repeated after a crash, that is another computation under the same key; no reply of the first had left.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Generator, Tensor

from client.config import SitePolicy
from client.trained import Trust, load_trained
from shared.errors import PlanError, PolicyError
from shared.provenance.card import card_of
from shared.provenance.keys import Trusted
from shared.provenance.sidecar import Sidecar
from shared.records import RecordStore
from shared.tasks.base import Batch, PatientDataset, Task
from shared.tasks.registry import find_task

_ROUNDING = 1e-6
"""An epsilon may be so much below what it composes, for the rounding of its digits."""


@dataclass(frozen=True)
class Synthetic:
    """Patients who do not exist.

    Attributes:
        checkpoint: SHA-256 of the generator that draws them.
        draw: Draws them.
    """

    checkpoint: str
    draw: Callable[[], RecordStore]

    @cached_property
    def patients(self) -> RecordStore:
        """One image each, drawn when first asked for."""
        return self.draw()


@dataclass(frozen=True)
class Augmented:
    """A hospital's patients behind synthetic ones, as training sees them."""

    synthetic: PatientDataset
    own: PatientDataset

    def __len__(self) -> int:
        """Return the number of patients of both kinds."""
        return len(self.synthetic) + len(self.own)

    @property
    def keys(self) -> npt.NDArray[np.uint8]:
        """All pseudonyms ``(N, 16)``, the synthetic patients' first."""
        return np.concatenate([self.synthetic.keys, self.own.keys])

    def draw(self, patients: Tensor, records_per_patient: int, generator: Generator) -> Batch:
        """Draw ``K`` augmented records of each patient ``(B,)``, as the data set does whose patient it is."""
        if not len(patients):
            return self.own.draw(patients, records_per_patient, generator)
        first = len(self.synthetic)
        return Batch.joined(
            [
                self.synthetic.draw(one, records_per_patient, generator)
                if int(one) < first
                else self.own.draw(one - first, records_per_patient, generator)
                for one in patients.split(1)
            ]
        )


def load_synthetic(checkpoint: Path, task: Task, policy: SitePolicy, trusted: Trusted) -> Synthetic:
    """Return the synthetic patients of a checkpoint for ``task``; the same checkpoint always gives the same ones.

    Args:
        checkpoint: Weights of the task that can draw them, with the JSON beside them that the server wrote.
        task: Names the task that can, in ``augmented_by``.
        policy: How many, and what epsilon and delta are good enough here.
        trusted: The keys of which one must have signed it.

    Raises:
        PolicyError: If the task takes no synthetic patients, or the checkpoint is not one that may draw them.
        StorageError: If it is missing, damaged, changed or not signed.
    """
    if not task.augmented_by:
        raise PolicyError(f"The task {task.name} cannot be augmented with synthetic patients. Take augment-with out.")
    source = find_task(task.augmented_by)
    if source.as_patients is None:
        raise PolicyError(f"The task {source.name} draws no patients. Take augment-with out.")
    purpose = f"draw patients for {task.name}; give one of {source.name}"
    try:
        trained = load_trained(checkpoint, source.name, purpose, Trust(trusted, policy.max_weights_norm))
    except PlanError as error:
        raise PolicyError(str(error)) from error
    if trained.doubt:
        raise PolicyError(f"{trained.doubt} augment-with needs a checkpoint that the server signed.")
    _check_privacy(checkpoint, trained.sidecar, policy)
    return Synthetic(trained.sha256, partial(source.as_patients, trained.model, policy.augment_patients))


def _check_privacy(checkpoint: Path, sidecar: Sidecar | None, policy: SitePolicy) -> None:
    epsilon, delta = (sidecar.epsilon, sidecar.delta) if sidecar else (None, None)
    if not (epsilon and delta):
        raise PolicyError(
            f"{checkpoint} states no epsilon and delta: it was trained without privacy, so its images may repeat "
            "patients. Give a checkpoint of a private run to augment-with."
        )
    promised = card_of(sidecar.ancestry) if sidecar and sidecar.ancestry else None
    if promised is None or not promised.private or promised.delta is None or promised.epsilon > epsilon + _ROUNDING:
        raise PolicyError(
            f"{checkpoint} does not say what its epsilon of {epsilon:g} composes, or it composes to more. Ask the "
            "server's operator for an export of this version."
        )
    if epsilon > policy.max_epsilon or delta > policy.max_delta:
        raise PolicyError(
            f"{checkpoint} promises epsilon {epsilon:g} at delta {delta:g}; max-epsilon is {policy.max_epsilon:g} and "
            f"max-delta {policy.max_delta:g} here. Give a checkpoint with more privacy to augment-with."
        )
