"""Write a simulated series as a hospital's export would hold it: DICOM Part 10 files, CT Image Storage.

The texture in these files is simulated; the nodules' shapes and labels are real (``lidc.py``). People,
institutions and identifiers are invented. Everything, UIDs included, follows from the seed.

References: DICOM PS3.3 A.3 (CT Image IOD), PS3.5 B.2 (UIDs under 2.25), PS3.10 (file format).
"""

import hashlib
import uuid
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from simulations.generators.series import Series

_FAMILY_NAMES: Final = (
    "Abbott Achterberg Adeyemi Baumann Bellini Brennan Castillo Chandra Dubois Eriksen Ferreira Fischer "
    "Grabowski Haddad Halloran Ibrahim Jansen Kovacs Lindqvist Marchetti McAllister Moreau Nakamura Novak "
    "Okafor Petrov Quintero Reyes Schneider Tanaka Ueda Vasquez Whitfield Yamada Zielinski"
)
_GIVEN_NAMES: Final = {
    "F": "Alma Beatriz Chiara Dorothy Elena Fatima Greta Helen Ingrid Joan Keiko Lucia Marta Nora Olga Ruth",
    "M": "Aldo Bernard Carlos David Erik Franz Giorgio Henry Ivan Jorge Kenji Louis Martin Nils Omar Peter",
}
_FIRST_STUDY: Final = date(2021, 1, 4)
_IMPLEMENTATION: Final = "fedward"


@dataclass(frozen=True)
class Equipment:
    """A hospital's scanner and archive, as its files tell of them.

    Attributes:
        manufacturer: As the vendor writes it.
        model: Likewise.
        kernel: Convolution kernel.
        institution: Name of the hospital.
        syntax: Transfer syntax of the archive's export.
        signed: Whether stored values are signed.
        intercept: Rescale intercept in HU; the slope is 1.
        layout: ``numbered`` export folders and files, or folders and files named by ``uid``.
        numbering: Whether InstanceNumber follows position from the ``head`` down or was ``shuffled``.
    """

    manufacturer: str
    model: str
    kernel: str
    institution: str
    syntax: UID
    signed: bool
    intercept: int
    layout: Literal["numbered", "uid"]
    numbering: Literal["head", "shuffled"]


@dataclass(frozen=True)
class Identity:
    """An invented person and visit.

    Attributes:
        seed: Words from which every UID is derived.
        number: Position in the export, from 0.
        name: In DICOM's form.
        sex: ``F`` or ``M``.
        born: Date of birth.
        patient_id: The hospital's own number.
        studied: Date of the scan.
        accession: The radiology department's number of the visit.
    """

    seed: str
    number: int
    name: str
    sex: str
    born: date
    patient_id: str
    studied: date
    accession: str

    def uid(self, what: str) -> UID:
        """Return the UID of one of this visit's things, such as ``study``."""
        digest = hashlib.sha256(f"{self.seed}/{self.number}/{what}".encode()).digest()
        return UID(f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}")


def draw_identity(seed: str, number: int, rng: np.random.Generator) -> Identity:
    """Invent the person behind the export's patient ``number``."""
    sex = str(rng.choice(["F", "M"]))
    studied = _FIRST_STUDY + timedelta(days=int(rng.integers(900)))
    return Identity(
        seed=seed,
        number=number,
        name=f"{rng.choice(_FAMILY_NAMES.split())}^{rng.choice(_GIVEN_NAMES[sex].split())}",
        sex=sex,
        born=studied - timedelta(days=int(rng.integers(42 * 365, 86 * 365))),
        # The number at the end keeps patients of one hospital apart whatever the digits before it.
        patient_id=f"{rng.integers(10**3, 10**4)}{number:05d}",
        studied=studied,
        accession=f"A{studied:%y}{rng.integers(10**2, 10**3)}{number:05d}",
    )


def write_series(
    export: Path, series: Series, equipment: Equipment, identity: Identity, rng: np.random.Generator
) -> UID:
    """Write one file per slice below ``export`` and return the SeriesInstanceUID.

    Neither file names nor the order of writing tells where a slice lies; only ImagePositionPatient does.
    """
    common = _common_attributes(series, equipment, identity)
    slices = len(series.hu)
    numbers = np.arange(slices)[::-1] if equipment.numbering == "head" else rng.permutation(slices)
    files = rng.permutation(slices)
    folder = _series_folder(export, equipment, identity)
    folder.mkdir(parents=True)
    lowest = -1024 - equipment.intercept if equipment.signed else 0
    stored = np.clip(np.rint(series.hu - equipment.intercept), lowest, lowest + 4095)  # 12 bits, as CT has
    stored = stored.astype("<i2" if equipment.signed else "<u2")
    for index in range(slices):
        image = Dataset()
        image.update(common)
        image.SOPInstanceUID = identity.uid(f"image {index}")
        image.InstanceNumber = int(numbers[index]) + 1
        x, y, z = series.origin_mm
        place = round(z + index * series.thickness_mm, 4)
        image.ImagePositionPatient = [x, y, place]
        image.SliceLocation = place
        name = f"IM{files[index]:06d}" if equipment.layout == "numbered" else f"{image.SOPInstanceUID}.dcm"
        _save(image, stored[index], equipment.syntax, folder / name)
    return identity.uid("series")


def _series_folder(export: Path, equipment: Equipment, identity: Identity) -> Path:
    if equipment.layout == "numbered":
        return export / "DICOM" / f"PA{identity.number:06d}" / "ST000000" / "SE000000"
    return export / identity.patient_id / identity.uid("study") / identity.uid("series")


def _save(image: Dataset, stored: npt.NDArray[np.integer], syntax: UID, path: Path) -> None:
    """Add pixels and the file meta information, compress if the syntax does, and write."""
    image.file_meta = FileMetaDataset()
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.file_meta.ImplementationVersionName = _IMPLEMENTATION
    if syntax.is_encapsulated:
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.compress(syntax, stored, generate_instance_uid=False)
    else:
        image.file_meta.TransferSyntaxUID = syntax
        image.add_new("PixelData", "OW", stored.tobytes())
    image.save_as(path, enforce_file_format=True)


def _common_attributes(series: Series, equipment: Equipment, identity: Identity) -> Dataset:
    """Return what all images of a series share."""
    shared = Dataset()
    shared.update(_about_patient(identity))
    shared.update(_about_equipment(equipment))
    shared.SOPClassUID = CTImageStorage
    shared.SpecificCharacterSet = "ISO_IR 100"
    shared.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    shared.SeriesInstanceUID = identity.uid("series")
    shared.SeriesNumber, shared.AcquisitionNumber = 2, 1
    shared.SeriesDescription = f"LUNG {series.thickness_mm:g} {equipment.kernel}"
    shared.FrameOfReferenceUID = identity.uid("frame")
    shared.PositionReferenceIndicator = ""
    shared.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelSpacing = [series.spacing_mm, series.spacing_mm]
    shared.SliceThickness = series.thickness_mm
    shared.SpacingBetweenSlices = series.thickness_mm
    shared.ReconstructionDiameter = round(series.hu.shape[2] * series.spacing_mm, 2)
    shared.Rows, shared.Columns = series.hu.shape[1:]
    shared.SamplesPerPixel = 1
    shared.PhotometricInterpretation = "MONOCHROME2"
    shared.BitsAllocated = 16
    shared.BitsStored = 16 if equipment.signed else 12
    shared.HighBit = shared.BitsStored - 1
    shared.PixelRepresentation = int(equipment.signed)
    shared.RescaleIntercept = equipment.intercept
    shared.RescaleSlope = 1
    shared.RescaleType = "HU"
    shared.WindowCenter, shared.WindowWidth = -600, 1500
    return shared


def _about_patient(identity: Identity) -> Dataset:
    about = Dataset()
    about.PatientName = identity.name
    about.PatientID = identity.patient_id
    about.PatientBirthDate = f"{identity.born:%Y%m%d}"
    about.PatientSex = identity.sex
    about.PatientAge = f"{(identity.studied - identity.born).days // 365:03d}Y"
    about.StudyInstanceUID = identity.uid("study")
    about.StudyID = f"{identity.number + 1}"
    about.AccessionNumber = identity.accession
    physicians = _FAMILY_NAMES.split()
    about.ReferringPhysicianName = f"{physicians[identity.number % len(physicians)]}^Dr"
    about.StudyDescription = "CT THORAX"
    about.StudyDate = about.SeriesDate = about.AcquisitionDate = about.ContentDate = f"{identity.studied:%Y%m%d}"
    minutes = identity.number * 37 % (9 * 60)
    about.StudyTime = f"{8 + minutes // 60:02d}{minutes % 60:02d}00"
    about.SeriesTime = about.AcquisitionTime = about.ContentTime = f"{about.StudyTime[:4]}41"
    return about


def _about_equipment(equipment: Equipment) -> Dataset:
    about = Dataset()
    about.Modality = "CT"
    about.Manufacturer = equipment.manufacturer
    about.ManufacturerModelName = equipment.model
    about.InstitutionName = equipment.institution
    about.StationName = f"CT{len(equipment.institution) % 4 + 1}"
    about.SoftwareVersions = "4.1"
    about.ConvolutionKernel = equipment.kernel
    about.KVP = 120
    about.XRayTubeCurrent = 220
    about.ExposureTime = 500
    about.PatientPosition = "HFS"
    about.BodyPartExamined = "CHEST"
    about.ProtocolName = "Chest low dose"
    return about
