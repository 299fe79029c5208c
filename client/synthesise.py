"""Draw images from a trained generator: sheet, arrays and DICOM files."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch

from client.imaging.synthetic import Origin, write_synthetic_series
from client.trained import NO_SITE, Trust, load_trained
from shared.errors import PlanError, StorageError
from shared.files import storage_errors, write_atomic
from shared.images import grey_png, grid
from shared.models.gan import ConditionalGan
from shared.provenance.sidecar import Sidecar
from shared.synthesis import CLASSES, GRID_COLUMNS, generated_patches
from shared.tasks.ct_synthesis import TASK

MOST_IMAGES: Final = 100_000
_ON_SHEET: Final = 8 * GRID_COLUMNS


@dataclass(frozen=True)
class Synthesised:
    """What was written.

    Attributes:
        images: How many.
        sheet: PNG of the first of them.
        arrays: NumPy archive of ``image`` float32 ``(N, side, side)`` in [0, 1] and ``malignant`` uint8 ``(N,)``.
        dicom: Folder with one DICOM file each.
        doubt: Why nobody answers for the checkpoint's promise; see :class:`client.trained.Trained`.
    """

    images: int
    sheet: Path
    arrays: Path
    dicom: Path
    doubt: str | None = None


def synthesise(
    checkpoint: Path, count: int, label: str, out: Path, seed: int = 0, *, trust: Trust = NO_SITE
) -> Synthesised:
    """Draw ``count`` images of one class from the averaged generator and write them into ``out``.

    Args:
        checkpoint: Weights of the task ``ct-synthesis``, with the JSON beside them that the server wrote.
        count: How many images.
        label: ``benign`` or ``malignant``.
        out: New or empty folder.
        seed: The same seed draws the same images.
        trust: What is asked of the checkpoint.

    Raises:
        PlanError: If count or label is impossible, or the checkpoint is of another task.
        StorageError: If the checkpoint is damaged or ``out`` cannot be written.
    """
    if label not in CLASSES:
        raise PlanError(f"There is no label {label!r}; the labels are: {', '.join(CLASSES)}.")
    if not 1 <= count <= MOST_IMAGES:
        raise PlanError(f"The number of images must lie between 1 and {MOST_IMAGES}, not {count}.")
    model, origin, doubt = load_generator(checkpoint, seed, trust=trust)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise StorageError(f"{out} is not empty. Give a new folder to --out.")
        position = CLASSES.index(label)
        images = generated_patches(model, torch.full((count,), position), seed).images.numpy()
        written = Synthesised(count, out / f"{label}.png", out / f"{label}.npz", out / "dicom", doubt)
        write_atomic(written.sheet, grey_png(grid(images[:_ON_SHEET], min(count, GRID_COLUMNS), gap_px=2), enlarge=3))
        content = io.BytesIO()
        np.savez_compressed(content, image=images, malignant=np.full(count, position, np.uint8))
        write_atomic(written.arrays, content.getvalue())
        write_synthetic_series(written.dicom, images, label, origin)
    return written


def load_generator(
    checkpoint: Path, seed: int = 0, *, trust: Trust = NO_SITE
) -> tuple[ConditionalGan, Origin, str | None]:
    """Return the model of a checkpoint, what its images' files say of it, and any doubt about that.

    Raises as :func:`synthesise` does.
    """
    trained = load_trained(checkpoint, TASK.name, f"draw images; give one of {TASK.name}", trust)
    run = (trained.sidecar and trained.sidecar.run) or "unnamed"
    origin = Origin(f"{TASK.name}/{run}", trained.sha256, _promise(trained.sidecar), seed)
    return cast(ConditionalGan, trained.model), origin, trained.doubt


def _promise(sidecar: Sidecar | None) -> str:
    if sidecar is None or sidecar.epsilon is None or sidecar.delta is None:
        return "epsilon not stated" if sidecar is None or sidecar.ancestry is None else "no epsilon is guaranteed"
    return f"differentially private for every patient, epsilon {sidecar.epsilon:.4g} at delta {sidecar.delta:.4g}"
