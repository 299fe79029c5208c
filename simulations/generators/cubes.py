"""Real nodules in their surroundings: an archive of LIDC-IDRI cubes.

The archive has ``image`` uint16 (N, side, side, side), a CT window scaled to [0, 65535] with voxels of about 1 mm and
the nodule in the centre; ``mask`` bool of the same shape; and ``ratings`` (N, R), whose columns ``rating_names`` names,
``malignancy`` 1 to 5 among them. Every cube is another patient. A patient's records are the axial, the coronal and the
sagittal slice through the centre. A cube whose malignancy is 3 says neither class and is left out, as LIDC's nodules
are everywhere in this project.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from shared.records import Array
from shared.tasks.ct_nodules import SPACING_MM, STORED_PX, UNDECIDED_MALIGNANCY, VENDORS

FIELDS: Final = ("image", "mask", "ratings", "rating_names")
ATTRIBUTES: Final[Mapping[str, Any]] = {"spacing_mm": SPACING_MM}
_WHITE: Final = 65_535.0


def read_patients(content: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Return the records of every cube with a decided malignancy, by its number in the archive.

    Raises:
        ValueError: If the images are no cubes of at least a patch's side, or a field is missing or too short.
    """
    image, mask, ratings = content["image"], content["mask"], content["ratings"]
    malignancy = ratings[:, list(content["rating_names"]).index("malignancy")]
    if image.shape != mask.shape or len(image) != len(ratings) or min(image.shape[1:]) < STORED_PX:
        raise ValueError(f"cubes of at least {STORED_PX} voxels with a mask and ratings each are needed")
    return {
        str(number): {
            "image": _centre_slices(image[number]),
            "malignant": np.full(3, malignancy[number] > UNDECIDED_MALIGNANCY, np.uint8),
            "nodule": np.zeros(3, np.int32),
            "diameter_mm": np.full(3, _diameter_mm(mask[number]), np.float32),
            "vendor": np.full(3, VENDORS.index("other"), np.uint8),
        }
        for number in np.flatnonzero(malignancy != UNDECIDED_MALIGNANCY)
    }


def _centre_slices(cube: Array) -> Array:
    """Return the slices ``(3, 36, 36)`` through the centre across each axis, in [0, 1]."""
    found = []
    for axis in range(3):
        plane = np.take(cube, cube.shape[axis] // 2, axis)
        top, left = ((side - STORED_PX) // 2 for side in plane.shape)
        found.append(plane[top : top + STORED_PX, left : left + STORED_PX] / _WHITE)
    return np.stack(found).astype(np.float16)


def _diameter_mm(mask: Array) -> float:
    """Return the diameter of the ball that has the nodule's volume."""
    return float((6.0 * mask.sum() / np.pi) ** (1.0 / 3.0)) * SPACING_MM
