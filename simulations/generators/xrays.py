"""Chest X-rays of the size of MNIST's digits: PneumoniaMNIST (MedMNIST v2), the scale at which others publish.

The archive has ``train_images`` and ``val_images`` uint8 (N, 28, 28) and ``train_labels`` and ``val_labels`` (N, 1): 0
normal, 1 pneumonia. It says of no two images that they are of one patient, so every image stands for a patient, and
what a run promises is promised to an image.

The store is one of patches, so that ``ct-synthesis`` and ``nodule-classification`` read it: ``malignant`` is pneumonia,
the image is carried to 36×36 by repeating its border, and the store says that its images are upright, so that neither
task turns them.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from shared.records import Array
from shared.tasks.ct_nodules import MARGIN_PX, PATCH_PX, UPRIGHT, VENDORS

FIELDS: Final = ("train_images", "train_labels", "val_images", "val_labels")
ATTRIBUTES: Final[Mapping[str, Any]] = {UPRIGHT: True}


def read_patients(content: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Return the training part, one record each. Raises ValueError if images or labels have another shape."""
    return _patients(content, "train")


def read_heldout(content: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Return the validation part, one record each. Raises ValueError if images or labels have another shape."""
    return _patients(content, "val")


def _patients(content: Mapping[str, Array], part: str) -> dict[str, dict[str, Array]]:
    images, labels = content[f"{part}_images"], content[f"{part}_labels"].ravel()
    if images.shape != (len(labels), PATCH_PX, PATCH_PX):
        raise ValueError(f"images (N, {PATCH_PX}, {PATCH_PX}) and as many labels are needed")
    margins = ((0, 0), (MARGIN_PX, MARGIN_PX), (MARGIN_PX, MARGIN_PX))
    patches = (np.pad(images, margins, mode="edge") / 255.0).astype(np.float16)
    return {
        f"{part}/{number}": {
            "image": patches[number : number + 1],
            "malignant": labels[number : number + 1].astype(np.uint8),
            "nodule": np.zeros(1, np.int32),
            "diameter_mm": np.zeros(1, np.float32),
            "vendor": np.full(1, VENDORS.index("other"), np.uint8),
        }
        for number in range(len(labels))
    }
