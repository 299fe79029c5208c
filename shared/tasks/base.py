"""What a task is: a model, a way to draw patients, a loss per patient and an evaluation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor, nn

from shared.errors import PlanError
from shared.evaluation import Evaluation
from shared.operating_point import check_sensitivity
from shared.plan import RunPlan
from shared.records import RecordStore


@dataclass(frozen=True)
class Batch:
    """``B`` patients with ``K`` records each.

    Attributes:
        fields: Field name to tensor ``(B, K, ...)``; ``B`` may be 0.
        padding: How many of the last rows are no patients.
    """

    fields: Mapping[str, Tensor]
    padding: int = 0

    def __len__(self) -> int:
        """Return the number of patients."""
        return len(next(iter(self.fields.values())))

    def __getitem__(self, name: str) -> Tensor:
        """Return one field, ``(B, K, ...)``."""
        return self.fields[name]

    @property
    def real(self) -> int:
        """How many of the first rows are patients."""
        return len(self) - self.padding

    @classmethod
    def joined(cls, batches: Sequence["Batch"]) -> "Batch":
        """Return batches of one form, at least one, as one."""
        return cls({name: torch.cat([batch[name] for batch in batches]) for name in batches[0].fields})

    def padded(self, patients: int) -> "Batch":
        """Return the batch with rows of zeros up to ``patients`` rows."""
        missing = patients - len(self)
        filled = {
            name: torch.cat([tensor, tensor.new_zeros((missing, *tensor.shape[1:]))])
            for name, tensor in self.fields.items()
        }
        return Batch(filled, self.padding + missing)

    def first(self, real: int) -> "Batch":
        """Return the batch with all rows after the first ``real`` cleared: zeros that are no patients.

        The work is the same for every ``real``.
        """

        def cleared(tensor: Tensor) -> Tensor:
            kept = torch.arange(len(tensor), device=tensor.device) < real
            return torch.where(kept.view(-1, *[1] * (tensor.dim() - 1)), tensor, torch.zeros_like(tensor))

        return Batch({name: cleared(tensor) for name, tensor in self.fields.items()}, len(self) - real)

    def to(self, device: str) -> "Batch":
        """Return the batch on another device."""
        return Batch({name: tensor.to(device) for name, tensor in self.fields.items()}, self.padding)


class PatientDataset(Protocol):
    """A site's patients, as training sees them. ``len()`` is the number of patients."""

    def __len__(self) -> int:
        """Return the number of patients."""

    @property
    def keys(self) -> npt.NDArray[np.uint8]:
        """The patients' pseudonyms ``(N, 16)``: what a patient's draws hang on, whoever else is in the store."""

    def draw(self, patients: Tensor, records_per_patient: int, generator: Generator) -> Batch:
        """Draw ``K`` augmented records of each patient ``(B,)``, with replacement among the patient's own."""


def whole(model: nn.Module) -> nn.Module:
    """Return all of the model, as the part that patients' gradients move."""
    return model


def hold_all_but(part: nn.Module, model: nn.Module) -> nn.Module:
    """Fix every parameter of ``model`` but those of its ``part``, so that no patient moves it; return the part."""
    moved = {id(parameter) for parameter in part.parameters() if parameter.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in moved)
    return part


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing that hospitals can train together.

    A round at a site has two parts. First ``post_process`` may change the model by what is public already: it gets
    the global weights, the plan and a generator of random numbers, and no patient. Then come the private steps, which
    move the parameters of ``private`` alone; the rest of the model stands still. After the server has made one model
    of the sites' replies, ``settle`` may change it once more.

    Attributes:
        name: The name in plans and policies.
        store_kind: The kind of prepared store it reads.
        metric: Name of the primary metric; larger is better.
        build: Makes a model with fresh weights from torch's global generator.
        load: Opens a store as patients.
        loss: Returns ``(B,)``, each the mean over that patient's records; depends on no other patient.
        random_patients: Makes ``(patients, records, generator)`` a random batch of the form that the store's patients
            have, with no patient's data in it: what the self-test of the kernels runs on.
        evaluate: Judges a model on a data set that the evaluating party owns.
        evaluate_at: Judges it at the threshold that finds a given share of the positives, for a task that decides.
        defaults: What a plan sets where its author says nothing (fields of :class:`shared.plan.RunPlan`).
        without_privacy: What it sets instead where there is no noise: nothing is clipped then, so other rates suit.
        private: Returns the part of the model that patients' gradients move; by default all of it.
        post_process: Improves the model in place from the global weights alone, before a round's private steps:
            ``(model, plan, round_number, generator)``. It gets nothing that depends on a patient but what was
            released before, so it costs no privacy (Dwork and Roth, 2014, Proposition 2.1).
        settle: Changes the aggregated model in place, at the server.
        judged_every: The server evaluates after every so many rounds, and at the start and the end.
        records_at_once: Most records in one pass of a private step, for a task of small records; see
            :class:`shared.dp.passes.Passes`.
        augmented_by: Name of the task whose checkpoints can draw synthetic patients for this one; empty if none can.
        as_patients: Draws so many synthetic patients from a model, as a store; the same from the same model.
        example: Makes ``N`` random inputs of the model, ``(N, ...)``; without it the model cannot be exported.
    """

    name: str
    store_kind: str
    metric: str
    build: Callable[[], nn.Module]
    load: Callable[[RecordStore], PatientDataset]
    loss: Callable[[nn.Module, Batch], Tensor]
    random_patients: Callable[[int, int, Generator], Batch]
    evaluate: Callable[[nn.Module, RecordStore], Evaluation]
    defaults: Mapping[str, Any]
    without_privacy: Mapping[str, Any] = field(default_factory=dict)
    evaluate_at: Callable[[nn.Module, RecordStore, float], Evaluation] | None = None
    private: Callable[[nn.Module], nn.Module] = whole
    post_process: Callable[[nn.Module, RunPlan, int, Generator], None] | None = None
    settle: Callable[[nn.Module], None] | None = None
    judged_every: int = 1
    records_at_once: int | None = None
    augmented_by: str = ""
    as_patients: Callable[[nn.Module, int], RecordStore] | None = None
    example: Callable[[int], Tensor] | None = None

    def judge(self, model: nn.Module, store: RecordStore, sensitivity: float | None = None) -> Evaluation:
        """Judge a model, at the threshold of a sensitivity if one is asked for and the task decides."""
        if sensitivity is None or self.evaluate_at is None:
            return self.evaluate(model, store)
        return self.evaluate_at(model, store, sensitivity)

    def check_sensitivity(self, sensitivity: float | None) -> None:
        """Refuse a sensitivity that cannot be asked for.

        Raises:
            PlanError: If it does not lie in (0, 1], or the task makes no decisions.
        """
        check_sensitivity(sensitivity)
        if sensitivity is not None and self.evaluate_at is None:
            raise PlanError(f"The task {self.name} makes no yes-or-no decision, so it has no sensitivity to ask for.")
