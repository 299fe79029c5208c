"""Judging generated nodule patches by a classifier: what it learns from them, and how they look to one.

The classifier is LungCTNet, the project's own; trained on generated patches and tested on real ones it says what they
are worth (TSTR), trained on real ones its last hidden layer is the space in which distances are measured.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from shared import synthesis_metrics as metrics
from shared.images import grey_png, grid
from shared.models.cnn import LungCTNet
from shared.models.gan import ConditionalGan
from shared.records import RecordStore
from shared.tasks.ct_nodules import PATCH_PX, STORED_PX

CLASSES: Final = ("benign", "malignant")
GRID_COLUMNS: Final = 12
STEPS, BATCH = 250, 32
_RATE: Final = 1e-3
_EVALUATION_BATCH: Final = 512
_FEWEST: Final = 8
_MOST: Final = 600


@dataclass(frozen=True)
class Patches:
    """Labelled patches.

    Attributes:
        images: ``(N, side, side)`` in [0, 1].
        labels: ``(N,)`` positions in ``CLASSES``.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of patches."""
        return len(self.labels)

    def at(self, chosen: Tensor) -> "Patches":
        """Return the chosen patches."""
        return Patches(self.images[chosen], self.labels[chosen])

    def __add__(self, other: "Patches") -> "Patches":
        """Return both together."""
        return Patches(torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels]))


def real_patches(store: RecordStore, side: int) -> Patches:
    """Return every record's centre of ``side`` pixels."""
    margin = (STORED_PX - side) // 2
    inner = slice(margin, margin + side)
    images = np.asarray(store.arrays["image"][:, inner, inner], np.float32)
    return Patches(torch.from_numpy(images), torch.from_numpy(np.asarray(store.arrays["malignant"], np.int64)))


def generated_patches(model: ConditionalGan, labels: Tensor, seed: int) -> Patches:
    """Return one generated patch for each label ``(N,)``."""
    return Patches(model.sample(labels, Generator().manual_seed(seed))[:, 0], labels)


def train_classifier(patches: Patches, seed: int, *, upright: bool = False, steps: int | None = None) -> LungCTNet:
    """Return a LungCTNet trained on ``patches``, both classes equally often, shifted and turned at random.

    Args:
        patches: Of one class at least.
        seed: Of everything random.
        upright: Whether the patches have an up and a down and so are not turned.
        steps: By default ``STEPS``.
    """
    steps = steps or STEPS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LungCTNet()
        generator = Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        members = [found for label in (0, 1) if len(found := torch.nonzero(patches.labels == label)[:, 0])]
        for _ in range(steps):
            picks = [m[torch.randint(len(m), (BATCH // len(members),), generator=generator)] for m in members]
            batch = patches.at(torch.cat(picks))
            optimizer.zero_grad()
            F.cross_entropy(model(_augmented(batch.images, generator, turned=not upright)), batch.labels).backward()
            optimizer.step()
            decay.step()
    return model.eval()


@torch.no_grad()
def malignancy(classifier: nn.Module, patches: Patches) -> npt.NDArray[np.float32]:
    """Return the classifier's probability ``(N,)`` that each patch is malignant."""
    parts = _centred(patches.images).split(_EVALUATION_BATCH)
    return np.asarray(torch.cat([classifier(part).softmax(1)[:, 1] for part in parts]).numpy(), np.float32)


@torch.no_grad()
def features(classifier: LungCTNet, patches: Patches) -> npt.NDArray[np.float64]:
    """Return the last hidden layer ``(N, 128)`` of the classifier."""
    last = classifier.classifier[:-1]
    parts = _centred(patches.images).split(_EVALUATION_BATCH)
    return torch.cat([last(classifier.features(part)) for part in parts]).double().numpy()


def fidelity(classifier: LungCTNet, real: Patches, generated: Patches) -> dict[str, float]:
    """Return how far generated patches are from real ones; all are NaN where there are too few to say.

    Args:
        classifier: A LungCTNet that was trained on neither.
        real: Of the same classes, in the same numbers, as ``generated``.
        generated: To be judged.
    """
    names = ("frechet_distance", "kernel_distance", "precision", "recall", "histogram_distance", "spectrum_distance")
    if len(real) < _FEWEST:
        return dict.fromkeys(names, float("nan"))
    spaces = features(classifier, real), features(classifier, generated)
    pixels = real.images.double().numpy(), generated.images.double().numpy()
    values = (
        metrics.frechet_distance(*spaces),
        metrics.kernel_distance(*spaces),
        *metrics.precision_and_recall(*spaces),
        metrics.histogram_distance(*pixels),
        metrics.spectrum_distance(*pixels),
    )
    return dict(zip(names, values, strict=True))


def least_diversity(real: Patches, generated: Patches) -> float:
    """Return the lowest diversity of any class, relative to the real one's: near 0, a mode has collapsed."""
    found = []
    for label in range(len(CLASSES)):
        ours, theirs = real.images[real.labels == label], generated.images[generated.labels == label]
        if min(len(ours), len(theirs)) >= 2:
            found.append(metrics.diversity(ours.double().numpy(), theirs.double().numpy()))
    return min(found, default=float("nan"))


def samples_sheet(real: Patches, generated: Patches) -> bytes:
    """Return a PNG: for each class a row of real patches and a row of generated ones below it."""
    side, blank = generated.images.shape[-1], []
    for label in range(len(CLASSES)):
        for patches in (real, generated):
            row = torch.ones(GRID_COLUMNS, side, side)
            chosen = patches.images[patches.labels == label]
            # Evenly spread, so that the patches of one nodule do not fill the row.
            every = max(1, len(chosen) // GRID_COLUMNS)
            chosen = chosen[::every][:GRID_COLUMNS]
            row[: len(chosen)] = chosen
            blank.append(row)
    return grey_png(grid(torch.cat(blank).numpy(), GRID_COLUMNS, gap_px=2), enlarge=2)


def as_data_url(png: bytes) -> str:
    """Return a PNG for embedding in a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def halves(store: RecordStore) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which records ``(R,)`` belong to every second patient, and which to the others."""
    first = store.patient_of_record % 2 == 0
    return first, ~first


def thin(patches: Patches, most: int = _MOST) -> Patches:
    """Return at most so many patches, evenly spread."""
    return patches.at(torch.arange(0, len(patches), max(1, -(-len(patches) // most))))


def faults(values: Mapping[str, Any]) -> list[str]:
    """Return codes of what is wrong with a generator, from its diagnostics."""
    found = []
    if not values["finite"]:
        found.append("not-finite")
    if values["diversity"] < 0.5:
        found.append("mode-collapse")
    if values["logit_spread"] < 0.01:
        found.append("vanishing-discriminator")
    return found


def _augmented(images: Tensor, generator: Generator, *, turned: bool) -> Tensor:
    """Return ``(N, 1, 28, 28)``: cut at random, turned together, each with its own brightness and contrast."""
    room = images.shape[-1] - PATCH_PX
    top, left, turns = (int(torch.randint(n, (1,), generator=generator)) for n in (room + 1, room + 1, 8))
    cut = images[:, None, top : top + PATCH_PX, left : left + PATCH_PX]
    if turned:
        cut = torch.rot90(cut.flip(-1) if turns % 2 else cut, turns // 2, (-2, -1))
    noise = torch.randn(2, len(images), 1, 1, 1, generator=generator)
    return (cut * (1.0 + 0.1 * noise[0]) + 0.05 * noise[1]).clamp(0.0, 1.0)


def _centred(images: Tensor) -> Tensor:
    margin = (images.shape[-1] - PATCH_PX) // 2
    return images[:, None, margin : margin + PATCH_PX, margin : margin + PATCH_PX]
