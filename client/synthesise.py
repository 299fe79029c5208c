"""Draw images from a trained generator: sheet, arrays and DICOM files."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch

from client.imaging.synthetic import Origin, write_synthetic_series
from client.trained import load_trained
from shared.errors import PlanError, StorageError
from shared.files import storage_errors, write_atomic
from shared.images import grey_png, grid
from shared.models.gan import ConditionalGan
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
    """

    images: int
    sheet: Path
    arrays: Path
    dicom: Path


def synthesise(checkpoint: Path, count: int, label: str, out: Path, seed: int = 0) -> Synthesised:
    """Draw ``count`` images of one class from the averaged generator and write them into ``out``.

    Args:
        checkpoint: Weights of the task ``ct-synthesis``, with the JSON beside them that the server wrote.
        count: How many images.
        label: ``benign`` or ``malignant``.
        out: New or empty folder.
        seed: The same seed draws the same images.

    Raises:
        PlanError: If count or label is impossible, or the checkpoint is of another task.
        StorageError: If the checkpoint is damaged or ``out`` cannot be written.
    """
    if label not in CLASSES:
        raise PlanError(f"There is no label {label!r}; the labels are: {', '.join(CLASSES)}.")
    if not 1 <= count <= MOST_IMAGES:
        raise PlanError(f"The number of images must lie between 1 and {MOST_IMAGES}, not {count}.")
    model, origin = load_generator(checkpoint, seed)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise StorageError(f"{out} is not empty. Give a new folder to --out.")
        position = CLASSES.index(label)
        images = generated_patches(model, torch.full((count,), position), seed).images.numpy()
        written = Synthesised(count, out / f"{label}.png", out / f"{label}.npz", out / "dicom")
        write_atomic(written.sheet, grey_png(grid(images[:_ON_SHEET], min(count, GRID_COLUMNS), gap_px=2), enlarge=3))
        content = io.BytesIO()
        np.savez_compressed(content, image=images, malignant=np.full(count, position, np.uint8))
        write_atomic(written.arrays, content.getvalue())
        write_synthetic_series(written.dicom, images, label, origin)
    return written


def load_generator(checkpoint: Path, seed: int = 0) -> tuple[ConditionalGan, Origin]:
    """Return the model of a checkpoint and what its images' files say of it; raises as :func:`synthesise` does."""
    trained = load_trained(checkpoint, TASK.name, f"draw images; give one of {TASK.name}")
    run = trained.described.get("run", "unnamed")
    origin = Origin(f"{TASK.name}/{run}", trained.sha256, _promise(trained.described), seed)
    return cast(ConditionalGan, trained.model), origin


def _promise(described: Mapping[str, Any]) -> str:
    epsilon, delta = described.get("epsilon"), described.get("delta")
    if isinstance(epsilon, int | float) and isinstance(delta, int | float):
        return f"differentially private for every patient, epsilon {epsilon:.4g} at delta {delta:.4g}"
    return "no epsilon is guaranteed" if "epsilon" in described else "epsilon not stated"
