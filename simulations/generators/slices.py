"""Real nodule pixels: an archive of LIDC-IDRI slices.

The archive has ``image`` uint8 (N, 64, 64), nodule pixels on black; ``malignant`` (N,); ``exam`` (N,), the patient;
and ``nodule`` (N,), its name within the exam. Slices carry no spacing, so a size is in pixels of the source, and the
store says so.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from shared.records import Array
from shared.tasks.ct_nodules import MARGIN_PX, PATCH_PX, VENDORS

FIELDS: Final = ("image", "malignant", "exam", "nodule")
ATTRIBUTES: Final[Mapping[str, Any]] = {"diameter_unit": "source pixel"}
_SIDE: Final = 64


def read_patients(content: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Return each exam's records by the exam's name.

    Raises:
        ValueError: If the fields are of unequal lengths or the images of another size.
    """
    image, malignant, exam, nodule = (content[name] for name in FIELDS)
    if image.shape[1:] != (_SIDE, _SIDE) or len({len(content[name]) for name in FIELDS}) > 1:
        raise ValueError(f"images (N, {_SIDE}, {_SIDE}) and as many entries in every other field are needed")
    patches, size = shrink(image), diameter_px(image)
    patients: dict[str, dict[str, Array]] = {}
    for name in np.unique(exam):
        rows = np.flatnonzero(exam == name)
        _, nodules, inverse = np.unique(nodule[rows], return_index=True, return_inverse=True)
        largest = np.array([size[rows][inverse == index].max() for index in range(len(nodules))])
        patients[str(name)] = {
            "image": patches[rows],
            "malignant": malignant[rows].astype(np.uint8),
            "nodule": inverse.astype(np.int32),
            "diameter_mm": largest[inverse].astype(np.float32),
            "vendor": np.full(len(rows), VENDORS.index("other"), np.uint8),
        }
    return patients


def shrink(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
    """Return patches ``(N, 36, 36)`` in [0, 1]: the whole slice averaged to 28×28 on a black margin."""
    pixels = torch.from_numpy(image.astype(np.float32) / 255.0)[:, None]
    small = F.interpolate(pixels, size=(PATCH_PX, PATCH_PX), mode="area")
    padded: npt.NDArray[np.float16] = F.pad(small, [MARGIN_PX] * 4)[:, 0].half().numpy()
    return padded


def diameter_px(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return the diameter ``(N,)`` of the disc that has as many pixels as each slice's nodule."""
    return np.asarray(2.0 * np.sqrt((image > 0).sum(axis=(1, 2)) / np.pi))
