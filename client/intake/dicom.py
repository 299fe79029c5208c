"""Reading one DICOM file: its header without the pixels, and later, if it is needed, its pixels.

Nothing that leaves these functions holds a value from the file: pydicom's messages quote tag values, so its
exceptions end here. Sizes are checked before anything is decoded.

References: DICOM PS3.3 A.3 (CT Image), C.7.6.2 (image plane), C.11.1 (rescale).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array

from client.intake.codestream import check_frame
from client.intake.part10 import (
    MAX_SIDE_PX,
    UNDEFINED_LENGTH,
    PixelElement,
    numbers,
    open_part10,
    parse,
    silence,
    text,
    texts,
    whole,
)
from client.intake.pseudonyms import PatientIdentity
from client.intake.rejects import RejectCode, Rejected
from shared.tasks.ct_nodules import VENDORS

MAX_SPACING_MM: Final = 10.0
MAX_POSITION_MM: Final = 1e5
UNIT_TOLERANCE: Final = 1e-2
_PIXEL_TAGS: Final = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
)
_HEADER_TAGS: Final = (
    *("SpecificCharacterSet", "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality", "Manufacturer"),
    *("PatientID", "IssuerOfPatientID", "SeriesInstanceUID", "FrameOfReferenceUID", "BurnedInAnnotation"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType"),
    *_PIXEL_TAGS,
)
_SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7"
_MAKERS: Final = (
    (re.compile(r"^(GE\b|GENERAL ELECTRIC)"), "GE"),
    (re.compile(r"^SIEMENS"), "Siemens"),
    (re.compile(r"^PHILIPS"), "Philips"),
    (re.compile(r"^(TOSHIBA|CANON)"), "Toshiba"),
)


@dataclass(frozen=True, repr=False)
class SliceHeader:
    """What is kept of one file's header, in this process only. It has no ``repr``: it identifies a patient.

    Attributes:
        path: The file.
        series_uid: Its series.
        instance_uid: Its own UID.
        patient: The hospital's identifier of the patient.
        frame_uid: Its frame of reference, or "".
        vendor: Position in ``VENDORS``.
        shape: Rows and columns.
        spacing_mm: Distance between rows and between columns.
        position_mm: ``(x, y, z)`` LPS of the first pixel's centre.
        orientation: Unit vectors along a row and down a column.
        slope: Hounsfield units per stored value.
        intercept: Hounsfield units of stored value 0.
        fragile: Whether a library decodes it that a damaged stream can crash.
    """

    path: Path
    series_uid: str
    instance_uid: str
    patient: PatientIdentity
    frame_uid: str
    vendor: int
    shape: tuple[int, int]
    spacing_mm: tuple[float, ...]
    position_mm: tuple[float, ...]
    orientation: tuple[float, ...]
    slope: float
    intercept: float
    fragile: bool


def read_header(path: Path) -> SliceHeader | RejectCode:
    """Read and check a file's header; the pixels stay on the disk. Never raises for what the file holds."""
    try:
        with silence(), open_part10(path) as file:
            dataset, pixels = parse(file, _HEADER_TAGS)
            _check_kind(dataset, pixels)
            header = _header(path, dataset, pixels)
            _check_pixels(dataset, pixels)
            return header
    except Rejected as outcome:
        return outcome.code
    except EOFError:
        return RejectCode.TRUNCATED
    except Exception:  # pydicom raises anything on arbitrary bytes; the text can quote a patient, so it ends here
        return RejectCode.UNREADABLE


def read_hounsfield(header: SliceHeader, rows: slice, columns: slice) -> npt.NDArray[np.float32]:
    """Decode a file and return ``(H, W)`` Hounsfield units of a part of it.

    Raises:
        Rejected: ``UNDECODABLE``, for whatever reason. If the header is ``fragile``, the process may die instead.
    """
    try:
        with silence(), open_part10(header.path) as file:
            dataset, pixels = parse(file, (*_PIXEL_TAGS, "PixelData"))
            _check_pixels(dataset, pixels)
            check_frame(dataset.PixelData, dataset.file_meta.TransferSyntaxUID, header.shape)
            stored = pixel_array(dataset)
        if stored.shape != header.shape:
            raise Rejected(RejectCode.UNDECODABLE)
        part = stored[rows, columns].astype(np.float32)
        return part * np.float32(header.slope) + np.float32(header.intercept)
    except Exception:  # as above
        raise Rejected(RejectCode.UNDECODABLE) from None


def _check_kind(dataset: Dataset, pixels: PixelElement) -> None:
    """Refuse what is no CT slice at all."""
    sop_class, kind = text(dataset, "SOPClassUID"), [part.upper() for part in texts(dataset, "ImageType")]
    ended_early = pixels.length is None and "Rows" not in dataset
    checks: tuple[tuple[RejectCode, bool], ...] = (
        (RejectCode.TRUNCATED, ended_early and sop_class in ("", uid.CTImageStorage)),
        (RejectCode.SECONDARY_CAPTURE, sop_class.startswith(_SECONDARY_CAPTURE) or "SCREEN SAVE" in kind),
        (RejectCode.WRONG_MODALITY, text(dataset, "Modality").upper() != "CT"),
        (RejectCode.WRONG_SOP_CLASS, sop_class != uid.CTImageStorage),
        (RejectCode.LOCALIZER, bool({"LOCALIZER", "SCOUT"} & set(kind))),
        (RejectCode.BURNED_IN, text(dataset, "BurnedInAnnotation").upper() == "YES"),
        (RejectCode.TOO_LARGE, max(whole(dataset, "Rows"), whole(dataset, "Columns")) > MAX_SIDE_PX),
        (RejectCode.TOO_LARGE, whole(dataset, "NumberOfFrames") > 1),
    )
    for code, applies in checks:
        if applies:
            raise Rejected(code)


def _header(path: Path, dataset: Dataset, pixels: PixelElement) -> SliceHeader:
    issuer, patient_id = text(dataset, "IssuerOfPatientID"), text(dataset, "PatientID")
    series_uid, instance_uid = text(dataset, "SeriesInstanceUID"), text(dataset, "SOPInstanceUID")
    spacing, position = numbers(dataset, "PixelSpacing"), numbers(dataset, "ImagePositionPatient")
    orientation, slope = numbers(dataset, "ImageOrientationPatient"), numbers(dataset, "RescaleSlope")
    intercept = numbers(dataset, "RescaleIntercept")
    hounsfield = len(slope) == len(intercept) == 1 and slope[0] != 0
    checks: tuple[tuple[RejectCode, bool], ...] = (
        (RejectCode.NO_PATIENT, patient_id != ""),
        (RejectCode.NO_UID, series_uid != "" and instance_uid != ""),
        (RejectCode.NO_SPACING, len(spacing) == 2 and all(0 < x <= MAX_SPACING_MM for x in spacing)),
        (RejectCode.NO_POSITION, len(position) == 3 and all(abs(x) <= MAX_POSITION_MM for x in position)),
        (RejectCode.NO_ORIENTATION, _perpendicular_units(orientation)),
        (RejectCode.NO_HOUNSFIELD, hounsfield and text(dataset, "RescaleType").upper() in ("", "HU")),
    )
    for code, satisfied in checks:
        if not satisfied:
            raise Rejected(code)
    return SliceHeader(
        path=path,
        series_uid=series_uid,
        instance_uid=instance_uid,
        patient=PatientIdentity(issuer, patient_id),
        frame_uid=text(dataset, "FrameOfReferenceUID"),
        vendor=_vendor(text(dataset, "Manufacturer")),
        shape=(whole(dataset, "Rows"), whole(dataset, "Columns")),
        spacing_mm=spacing,
        position_mm=position,
        orientation=orientation,
        slope=slope[0],
        intercept=intercept[0],
        fragile=pixels.length == UNDEFINED_LENGTH and pixels.syntax != uid.RLELossless,
    )


def _check_pixels(dataset: Dataset, pixels: PixelElement) -> None:
    """Refuse pixels that are absent, cut short, of another kind, or in a syntax nothing here decodes."""
    samples = whole(dataset, "Rows") * whole(dataset, "Columns")
    bits, stored = whole(dataset, "BitsAllocated"), whole(dataset, "BitsStored")
    colour = text(dataset, "PhotometricInterpretation").upper()
    native = pixels.length != UNDEFINED_LENGTH
    declared = pixels.length if native else pixels.available
    monochrome = whole(dataset, "SamplesPerPixel") == 1 and colour in ("MONOCHROME1", "MONOCHROME2")
    checks: tuple[tuple[RejectCode, Callable[[], bool]], ...] = (
        (RejectCode.NO_PIXEL_DATA, lambda: not declared or not samples),
        (
            RejectCode.UNSUPPORTED_SYNTAX,
            lambda: not _decodable(pixels.syntax) or pixels.syntax.is_encapsulated == native,
        ),
        (
            RejectCode.UNSUPPORTED_PIXELS,
            lambda: not monochrome or bits not in (8, 16) or not 0 < stored <= bits,
        ),
        (RejectCode.TRUNCATED, lambda: (pixels.length or 0) > pixels.available and native),
        (RejectCode.TRUNCATED, lambda: (declared or 0) < samples * bits // 8 and native),
    )
    for code, applies in checks:
        if applies():
            raise Rejected(code)


def _decodable(syntax: uid.UID) -> bool:
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _perpendicular_units(orientation: tuple[float, ...]) -> bool:
    if len(orientation) != 6:
        return False
    row, column = orientation[:3], orientation[3:]
    lengths = (math.hypot(*row) - 1, math.hypot(*column) - 1)
    return all(abs(x) < UNIT_TOLERANCE for x in (*lengths, sum(a * b for a, b in zip(row, column, strict=True))))


def _vendor(manufacturer: str) -> int:
    name = next((vendor for pattern, vendor in _MAKERS if pattern.search(manufacturer.upper())), "other")
    return VENDORS.index(name)
