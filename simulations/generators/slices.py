"""Hospitals of real nodule pixels: an array of LIDC-IDRI slices dealt to prepared stores.

The file is a NumPy archive with ``image`` uint8 (N, 64, 64), nodule pixels on black; ``malignant`` (N,);
``exam`` (N,), the patient; and ``nodule`` (N,), its name within the exam. Slices carry no spacing, so a size
is in pixels of the source, and the store says so.
"""

import hashlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from shared.errors import IntakeError
from shared.records import KEY_BYTES, Array, PatientItem, write_store
from shared.tasks.ct_nodules import MARGIN_PX, PATCH_PX, STORE_KIND, VENDORS

_FIELDS = ("image", "malignant", "exam", "nodule")


def deal_slices(archive: Path, out: Path, *, sites: int, seed: int) -> tuple[Path, ...]:
    """Deal the exams of ``archive`` evenly to ``sites`` prepared stores below ``out``.

    Raises:
        IntakeError: If the archive cannot be read or holds fewer exams than there are sites.
        StorageError: If ``out`` cannot be written.
    """
    image, malignant, exam, nodule = _read(archive)
    exams = np.unique(exam)
    if len(exams) < sites:
        raise IntakeError(f"{archive} holds {len(exams)} exams, too few for {sites} hospitals.")
    np.random.default_rng(seed).shuffle(exams)
    patches, size = shrink(image), diameter_px(image)
    if out.exists() and any(out.iterdir()):
        raise IntakeError(f"{out} is not empty. Give a new folder to --out.")
    folders = tuple(out / f"site-{number}" for number in range(1, sites + 1))
    for number, folder in enumerate(folders):
        patients = []
        for name in exams[number::sites]:
            rows = np.flatnonzero(exam == name)
            _, nodules, inverse = np.unique(nodule[rows], return_index=True, return_inverse=True)
            largest = np.array([size[rows][inverse == index].max() for index in range(len(nodules))])
            arrays: dict[str, Array] = {
                "image": patches[rows],
                "malignant": malignant[rows].astype(np.uint8),
                "nodule": inverse.astype(np.int32),
                "diameter_mm": largest[inverse].astype(np.float32),
                "vendor": np.full(len(rows), VENDORS.index("other"), np.uint8),
            }
            patients.append(PatientItem(hashlib.sha256(str(name).encode()).digest()[:KEY_BYTES], arrays))
        write_store(folder, kind=STORE_KIND, patients=patients, attributes={"diameter_unit": "source pixel"})
    return folders


def shrink(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
    """Return patches ``(N, 36, 36)`` in [0, 1]: the whole slice averaged to 28×28 on a black margin."""
    pixels = torch.from_numpy(image.astype(np.float32) / 255.0)[:, None]
    small = F.interpolate(pixels, size=(PATCH_PX, PATCH_PX), mode="area")
    padded: npt.NDArray[np.float16] = F.pad(small, [MARGIN_PX] * 4)[:, 0].half().numpy()
    return padded


def diameter_px(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return the diameter ``(N,)`` of the disc that has as many pixels as each slice's nodule."""
    return np.asarray(2.0 * np.sqrt((image > 0).sum(axis=(1, 2)) / np.pi))


def _read(archive: Path) -> tuple[npt.NDArray[np.uint8], ...]:
    try:
        with np.load(archive, allow_pickle=False) as content:
            fields = tuple(content[name] for name in _FIELDS)
    except (OSError, EOFError, TypeError, KeyError, ValueError, BadZipFile) as error:
        raise IntakeError(f"{archive} is no archive of nodule slices with {', '.join(_FIELDS)}.") from error
    if fields[0].shape[1:] != (64, 64) or len({len(part) for part in fields}) > 1:
        raise IntakeError(f"{archive} must hold images (N, 64, 64) and as many entries in every other field.")
    return fields
