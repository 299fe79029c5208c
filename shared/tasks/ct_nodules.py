"""The prepared form of CT nodules: what intake writes and the nodule tasks read.

One record is one axial patch through a nodule. Fields of the store (kind ``ct-nodules``):

    image        float16 (R, 36, 36): Hounsfield units windowed to [0, 1], at ``SPACING_MM``
    malignant    uint8 (R,): 1 where the readers' median malignancy is above 3, 0 where it is below
    nodule       int32 (R,): number of the nodule within its patient
    diameter_mm  float32 (R,): the annotated diameter
    vendor       uint8 (R,): position in ``VENDORS``

A patch is wider than the 28×28 the network sees by ``MARGIN_PX`` on each side, so that shifts and turns
need no padding. A nodule looks as likely from every side; a store whose images have an up and a down says so by the
attribute ``UPRIGHT``.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.records import RecordStore

STORE_KIND: Final = "ct-nodules"
SPACING_MM: Final = 1.0
WINDOW_HU: Final = (-1000.0, 400.0)
PATCH_PX: Final = 28
MARGIN_PX: Final = 4
STORED_PX: Final = PATCH_PX + 2 * MARGIN_PX
SLICE_OFFSETS_MM: Final = (-2.0, 0.0, 2.0)
"""Where a nodule's axial patches lie, relative to its centre: three records a nodule."""
UPRIGHT: Final = "upright"
VENDORS: Final = ("GE", "Siemens", "Philips", "Toshiba", "other")
UNDECIDED_MALIGNANCY: Final = 3
"""Readers' median that says neither benign nor malignant; such nodules are left out, as is usual for LIDC."""


def is_upright(store: RecordStore) -> bool:
    """Whether the store's images have an up and a down, so that they must not be turned."""
    return bool(store.attributes.get(UPRIGHT, False))


@dataclass(frozen=True)
class StoredPatients:
    """Who is in a store of this kind; the tasks say what is drawn from them."""

    store: RecordStore

    def __len__(self) -> int:
        """Return the number of patients."""
        return len(self.store)

    @property
    def keys(self) -> npt.NDArray[np.uint8]:
        """The patients' pseudonyms ``(N, 16)``."""
        return self.store.keys
