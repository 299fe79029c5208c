"""Generated patches as a DICOM series that nobody can take for a patient's.

Secondary Capture images: they lie at no place in a body, so they form no volume. Every mark that the standard has for
such images is set: Image Type ``DERIVED\\SECONDARY``, Conversion Type ``SYN``, the patient's name ``SYNTHETIC``, UIDs
of a root of their own, and an item of Contributing Equipment that names the model and its epsilon.

References: DICOM PS3.3 A.8.1 (Secondary Capture Image IOD), C.8.6.1 (Conversion Type), C.12.1.1.5 (Contributing
Equipment), PS3.5 B.2 (UIDs under 2.25), PS3.16 CID 7005.
"""

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from shared.files import storage_errors
from shared.tasks.ct_nodules import SPACING_MM, WINDOW_HU

MANUFACTURER: Final = "Fedward"
_INTERCEPT_HU: Final = -1024
Images = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Origin:
    """Where generated images come from, as their files tell.

    Attributes:
        model: Task and run, in words.
        sha256: Of the checkpoint.
        privacy: What its patients were promised, in words.
        seed: Of the images.
    """

    model: str
    sha256: str
    privacy: str
    seed: int


def write_synthetic_series(folder: Path, images: Images, label: str, origin: Origin) -> Sequence[Path]:
    """Write one file per image into ``folder`` and return them.

    The same images and origin give the same files, UIDs included.

    Args:
        folder: Made if need be.
        images: ``(N, side, side)`` windowed to [0, 1].
        label: What they are images of, e.g. ``malignant``.
        origin: Of the images.

    Raises:
        StorageError: If a file cannot be written.
    """
    low, high = WINDOW_HU
    hounsfield = np.rint(low + images.clip(0.0, 1.0) * (high - low))
    stored = (hounsfield - _INTERCEPT_HU).astype(np.uint16)
    files = []
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(stored, start=1):
            dataset = _image(pixels, number, label, origin)
            files.append(folder / f"{number:05d}.dcm")
            dataset.save_as(files[-1], enforce_file_format=True)
    return files


def _image(pixels: npt.NDArray[np.uint16], number: int, label: str, origin: Origin) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.ImplementationClassUID = _uid("implementation")
    dataset.file_meta.ImplementationVersionName = "FEDWARD"
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = _uid("instance", origin, label, number)
    dataset.SpecificCharacterSet = "ISO_IR 192"
    _describe(dataset, number, label, origin)
    _set_pixels(dataset, pixels)
    return dataset


def _describe(dataset: Dataset, number: int, label: str, origin: Origin) -> None:
    # Patient, study: of nobody, at no time.
    dataset.PatientName = "SYNTHETIC"
    dataset.PatientID = f"SYNTHETIC-{origin.sha256[:8]}"
    for empty in ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName"):
        setattr(dataset, empty, "")
    dataset.StudyID, dataset.AccessionNumber = "SYNTHETIC", ""
    dataset.StudyInstanceUID = _uid("study", origin)
    dataset.StudyDescription = "SYNTHETIC images, of no patient"
    # Series and equipment.
    dataset.Modality = "CT"
    dataset.SeriesInstanceUID = _uid("series", origin, label)
    dataset.SeriesNumber = 1
    dataset.BodyPartExamined = "CHEST"
    dataset.SeriesDescription = f"SYNTHETIC lung nodules, {label}"
    dataset.Manufacturer = MANUFACTURER
    dataset.ConversionType = "SYN"
    # Image.
    dataset.InstanceNumber = number
    dataset.PatientOrientation = ""
    dataset.ImageType = ["DERIVED", "SECONDARY", "SYNTHETIC"]
    dataset.DerivationDescription = "Drawn from a generative model; shows no patient"
    dataset.ImageComments = f"SYNTHETIC, {label}, seed {origin.seed}"
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"
    dataset.ContributingEquipmentSequence = [_equipment(origin)]


def _equipment(origin: Origin) -> Dataset:
    purpose = Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator = "109102", "DCM"
    purpose.CodeMeaning = "Processing Equipment"
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [purpose]
    item.Manufacturer = MANUFACTURER
    item.ManufacturerModelName = origin.model[:64]
    item.SoftwareVersions = origin.sha256
    item.ContributionDescription = f"Generative model {origin.model}; {origin.privacy}"[:1024]
    return item


def _set_pixels(dataset: Dataset, pixels: npt.NDArray[np.uint16]) -> None:
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 0
    dataset.PixelSpacing = [SPACING_MM, SPACING_MM]
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = _INTERCEPT_HU, 1, "HU"
    low, high = WINDOW_HU
    dataset.WindowCenter, dataset.WindowWidth = (low + high) / 2, high - low
    dataset.PixelData = pixels.astype("<u2").tobytes()


def _uid(what: str, origin: Origin | None = None, label: str = "", number: int = 0) -> UID:
    text = f"fedward/synthetic/{what}/{origin and (origin.sha256, origin.seed)}/{label}/{number}"
    return UID(f"2.25.{uuid.UUID(bytes=hashlib.sha256(text.encode()).digest()[:16], version=5).int}")
