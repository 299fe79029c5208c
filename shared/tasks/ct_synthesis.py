"""Task ``ct-synthesis``: a conditional GAN of lung-nodule patches, benign and malignant.

Privacy. Patients are seen by the discriminator alone. A patient's loss is the mean hinge loss of the K records drawn
from that patient and of K generated images that lie beside them in the same row of the batch: same classes, latent
vectors of their own. The gradient of that whole row is clipped to C, so adding or removing a patient changes the
clipped sum by at most C, exactly as without generated images; had they a clipped gradient of their own for every
patient, it would be 2C. The generated images of a row depend on the row's own labels and latents and on the generator's
weights, which stand still during the private steps and are made of earlier releases; they depend on no other patient.

The generator learns in ``teach_generator``, before the private steps of a round, from the discriminator that the
server sent, which is the noised release of the round before: post-processing, at no cost.

References:
    Bie, Kamath, Zhang, "Private GANs, Revisited", TMLR 2023: large batches and many discriminator steps for each
        of the generator's, adaptively many, make the private GAN; here the discriminator's steps are fixed, since
        they are what is accounted for, and the generator pauses until the discriminator has caught up.
    Lim, Ye, "Geometric GAN", 2017: the hinge loss.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import Adam

from shared.evaluation import Evaluation
from shared.models.gan import ConditionalGan
from shared.plan import RunPlan
from shared.records import KEY_BYTES, RecordStore
from shared.synthesis import (
    CLASSES,
    Patches,
    as_data_url,
    faults,
    fidelity,
    generated_patches,
    halves,
    least_diversity,
    malignancy,
    real_patches,
    samples_sheet,
    thin,
    train_classifier,
)
from shared.tasks.base import Batch, Task
from shared.tasks.ct_nodules import STORE_KIND, STORED_PX, VENDORS, StoredPatients, is_upright
from shared.tasks.nodule_classification import judge_nodules
from shared.tasks.sampling import draw_records

SIDE_PX: Final = 32
AVERAGE_DECAY: Final = 0.8
"""Of the moving average of the generator, a round."""
_LATENT: Final = 64
_BATCH: Final = 32
_BETAS: Final = (0.5, 0.99)
_FOR_CLASSIFIER: Final = 1024
_EVALUATION_SEED: Final = 20
_PATIENTS_SEED: Final = 21


@dataclass(frozen=True)
class SynthesisPatients(StoredPatients):
    """Patients of a ``ct-nodules`` store, each record with the latent vector of a generated companion."""

    def draw(self, patients: Tensor, records_per_patient: int, generator: Generator) -> Batch:
        """Draw patches ``(B, K, 32, 32)``, labels ``(B, K)`` and latents ``(B, K, Z)``."""
        rows = draw_records(self.store.offsets, patients, records_per_patient, generator)
        stored = torch.from_numpy(np.asarray(self.store.arrays["image"][rows.ravel()], np.float32))
        images = _shifted(stored, generator)
        if not is_upright(self.store):
            images = _turned(images, generator)
        images = images.view(*rows.shape, SIDE_PX, SIDE_PX)
        labels = torch.from_numpy(np.asarray(self.store.arrays["malignant"][rows], np.int64))
        latents = torch.randn(*rows.shape, _LATENT, generator=generator)
        return Batch({"image": images, "malignant": labels, "latent": latents})


def random_patients(patients: int, records: int, generator: Generator) -> Batch:
    """Return noise in place of patches, with random labels and latents; see :class:`shared.tasks.base.Task`."""
    shape = (patients, records)
    return Batch(
        {
            "image": torch.rand(*shape, SIDE_PX, SIDE_PX, generator=generator),
            "malignant": torch.randint(0, len(CLASSES), shape, generator=generator),
            "latent": torch.randn(*shape, _LATENT, generator=generator),
        }
    )


def _shifted(stored: Tensor, generator: Generator) -> Tensor:
    """Return patches ``(N, 32, 32)`` cut from ``(N, 36, 36)``, each with its own shift."""
    count = len(stored)
    shifts = torch.randint(0, STORED_PX - SIDE_PX + 1, (count, 2), generator=generator)
    steps = torch.arange(SIDE_PX)
    rows, columns = shifts[:, :1] + steps, shifts[:, 1:] + steps
    return stored[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _turned(patches: Tensor, generator: Generator) -> Tensor:
    """Return patches ``(N, side, side)``, each under its own symmetry of the square."""
    chosen = torch.rand(3, len(patches), 1, 1, generator=generator) < 0.5
    patches = torch.where(chosen[0], patches.transpose(-1, -2), patches)
    patches = torch.where(chosen[1], patches.flip(-2), patches)
    return torch.where(chosen[2], patches.flip(-1), patches)


def build() -> ConditionalGan:
    """Return both networks with fresh weights."""
    return ConditionalGan(side=SIDE_PX, classes=len(CLASSES), latent=_LATENT)


def example(count: int) -> Tensor:
    """Return random codes ``(N, latent + classes)`` of the averaged generator."""
    return build().average.code(torch.randn(count, _LATENT), torch.arange(count) % len(CLASSES))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return each patient's hinge loss ``(B,)`` over its records and as many generated images; see the module."""
    gan = cast(ConditionalGan, model)
    real, labels = batch["image"], batch["malignant"]
    patients, records = labels.shape
    with torch.no_grad():
        generated = gan.generator(batch["latent"].flatten(0, 1), labels.flatten()).view(real.shape)
    images, classes = torch.cat([real, generated], dim=1), torch.cat([labels, labels], dim=1)
    logits = gan.judge(images.flatten(0, 1)[:, None], classes.flatten()).view(patients, 2 * records)
    return F.relu(1.0 - logits[:, :records]).mean(dim=1) + F.relu(1.0 + logits[:, records:]).mean(dim=1)


def teach_generator(model: nn.Module, plan: RunPlan, round_number: int, generator: Generator) -> None:
    """Improve the generator against the discriminator as it was released; no patient is seen.

    It pauses when the discriminator recognises less than ``plan.generator_pause`` of its images, and forgets the
    round's steps if they made it not finite.
    """
    gan = cast(ConditionalGan, model)
    before = {name: value.clone() for name, value in gan.generator.state_dict().items()}
    device = next(gan.parameters()).device
    gan.discriminator.requires_grad_(False)
    rate = plan.generator_learning_rate_in(round_number)
    optimizer = Adam(gan.generator.parameters(), lr=rate, betas=_BETAS)
    for _ in range(plan.generator_steps):
        labels = torch.randint(len(CLASSES), (_BATCH,), generator=generator).to(device)
        latents = torch.randn(_BATCH, gan.generator.latent, generator=generator).to(device)
        logits = gan.judge(gan.generator(latents, labels), labels)
        if float((logits < 0).float().mean()) < plan.generator_pause:
            break
        optimizer.zero_grad()
        (-logits.mean()).backward()
        optimizer.step()
    if not all(value.isfinite().all() for value in gan.generator.state_dict().values()):
        gan.generator.load_state_dict(before)
    gan.discriminator.requires_grad_(True)


def settle(model: nn.Module) -> None:
    """Let the average follow the aggregated generator."""
    cast(ConditionalGan, model).follow(AVERAGE_DECAY)


def evaluate(model: nn.Module, store: RecordStore) -> Evaluation:
    """Judge what the averaged generator makes, on real patches of held-out patients.

    ``tstr_auroc`` is that of a classifier trained on generated patches only, tested on all of the store by nodule.
    Distances are taken in the features of a classifier trained on the real patches of every second patient, between
    the other patients' real patches and as many generated ones of the same classes.
    """
    gan, upright = cast(ConditionalGan, model), is_upright(store)
    real = real_patches(store, SIDE_PX)
    balanced = torch.arange(_FOR_CLASSIFIER) % len(CLASSES)
    made = generated_patches(gan, balanced, _EVALUATION_SEED)
    finite = bool(made.images.isfinite().all())
    if not finite:
        made = Patches(torch.zeros_like(made.images), made.labels)
    students = judge_nodules(store, malignancy(train_classifier(made, _EVALUATION_SEED, upright=upright), real))
    mine, others = (thin(real.at(torch.from_numpy(np.flatnonzero(half)))) for half in halves(store))
    matched = generated_patches(gan, others.labels, _EVALUATION_SEED + 1)
    spaces = (
        fidelity(train_classifier(mine, _EVALUATION_SEED, upright=upright), others, matched)
        if finite and len(others)
        else {}
    )
    logits = _logits(gan, others), _logits(gan, matched)
    diagnostics: dict[str, Any] = {
        "finite": finite,
        "diversity": least_diversity(others, matched),
        "logit_spread": _spread(logits[0], others.labels),
    }
    return Evaluation(
        metrics={
            "tstr_auroc": students.metrics["auroc"],
            "tstr_balanced_accuracy": students.metrics["balanced_accuracy"],
            **spaces,
            "diversity": diagnostics["diversity"],
            "discriminator_gap": float(logits[0].mean() - logits[1].mean()),
        },
        by_group={},
        details={
            "samples": as_data_url(samples_sheet(others, matched)),
            "warnings": faults(diagnostics),
            "cases": students.details["cases"],
            "positives": students.details["positives"],
        },
    )


def as_patients(model: nn.Module, count: int) -> RecordStore:
    """Draw ``count`` patients of one patch each, the classes in turn, by numbers that are always the same.

    A patch is carried to the store's size by repeating its border.
    """
    drawn = generated_patches(cast(ConditionalGan, model), torch.arange(count) % len(CLASSES), _PATIENTS_SEED)
    margin = (STORED_PX - SIDE_PX) // 2
    images = F.pad(drawn.images[:, None], [margin] * 4, mode="replicate")[:, 0].half().numpy()
    names = [hashlib.sha256(f"synthetic/{number}".encode()).digest() for number in range(count)]
    return RecordStore(
        kind=STORE_KIND,
        attributes={},
        offsets=np.arange(count + 1),
        keys=np.frombuffer(b"".join(name[:KEY_BYTES] for name in names), np.uint8).reshape(count, KEY_BYTES),
        arrays={
            "image": images,
            "malignant": drawn.labels.numpy().astype(np.uint8),
            "nodule": np.zeros(count, np.int32),
            "diameter_mm": np.zeros(count, np.float32),
            "vendor": np.full(count, VENDORS.index("other"), np.uint8),
        },
        digest=hashlib.sha256(images.tobytes()).hexdigest(),
    )


def _spread(logits: Tensor, labels: Tensor) -> float:
    """Return the widest standard deviation of the logits of any class; NaN if no class has two."""
    found = [float(part.std()) for label in labels.unique() if len(part := logits[labels == label]) > 1]
    return max(found, default=math.nan)


@torch.no_grad()
def _logits(gan: ConditionalGan, patches: Patches) -> Tensor:
    device = next(gan.parameters()).device
    return gan.judge(patches.images[:, None].to(device), patches.labels.to(device)).cpu()


TASK = Task(
    name="ct-synthesis",
    store_kind=STORE_KIND,
    metric="tstr_auroc",
    build=build,
    load=SynthesisPatients,
    loss=loss,
    random_patients=random_patients,
    evaluate=evaluate,
    private=lambda model: cast(ConditionalGan, model).discriminator,
    post_process=teach_generator,
    settle=settle,
    judged_every=10,
    as_patients=as_patients,
    example=example,
    defaults={
        "rounds": 40,
        "local_steps": 4,
        "sample_rate": 0.5,
        "records_per_patient": 1,
        "max_grad_norm": 1.0,
        "optimizer": "sgd",
        "learning_rate": 0.2,
        "schedule": "linear",
        "generator_steps": 8,
        "generator_learning_rate": 3e-4,
        "generator_pause": 0.1,
    },
    without_privacy={"optimizer": "adam", "learning_rate": 4e-4, "local_steps": 8, "generator_steps": 16},
)
