"""What kind of export a hospital gives to intake: glucose readings as CSV, or images as DICOM."""

import os
from pathlib import Path
from typing import Final

from client.intake.files import open_plain
from shared.errors import IntakeError

CSV_SUFFIXES: Final = (".csv", ".tsv", ".txt")
"""Also with ``.gz``."""
_PACKED: Final = ".gz"
_DICOM_SUFFIXES: Final = (".dcm", ".dicom", ".ima")
_PREAMBLE: Final = 128


def is_csv_name(name: str) -> bool:
    """Whether intake takes a file of this name for a glucose export."""
    return name.lower().removesuffix(_PACKED).endswith(CSV_SUFFIXES)


def csv_stem(name: str) -> str:
    """Return a file's name without the suffixes of ``is_csv_name``, which say how it is written, not whose it is.

    A dot before them is part of the name: ``mueller.anna.csv`` and ``mueller.bernd.csv`` are two patients'. A name of
    nothing but suffixes stays as it is.
    """
    bare = name[: -len(_PACKED)] if name.lower().endswith(_PACKED) else name
    suffix = next((suffix for suffix in CSV_SUFFIXES if bare.lower().endswith(suffix)), "")
    return bare[: len(bare) - len(suffix)] or name


def holds_glucose(export: Path) -> bool:
    """Whether an export that came without annotations is one of glucose: True for CSV, False where there is DICOM.

    A single file is taken for a CSV unless it is DICOM; in a folder, one DICOM file decides, for a folder of images
    may well hold a CSV beside them.

    Raises:
        IntakeError: If there is nothing there, or nothing of either kind.
    """
    if export.is_file():
        return not _is_dicom(export)
    if export.exists() and not export.is_dir():
        raise IntakeError("The export is a pipe, socket or device. Copy it to a file or a folder, and name that.")
    if not export.is_dir():
        raise IntakeError("There is no such export. Name a CSV file of glucose readings, or a folder.")
    seen_csv = False
    for folder, _, names in os.walk(export):
        for name in names:
            if is_csv_name(name):
                seen_csv = True
            elif _is_dicom(Path(folder) / name):
                return False
    if not seen_csv:
        raise IntakeError(
            "The folder holds neither CSV files of glucose readings nor DICOM files. Name the folder of the export; "
            "images also need --annotations."
        )
    return True


def _is_dicom(path: Path) -> bool:
    """Whether the name or the first bytes say so; what cannot be read is none."""
    if path.name.lower().endswith(_DICOM_SUFFIXES):
        return True
    try:
        with open_plain(path, follow=False) as handle:
            return handle.read(_PREAMBLE + 4)[_PREAMBLE:] == b"DICM"
    except OSError:
        return False
