"""Why a part of an export is left out: a closed list of codes, so that nothing else needs to be told.

A code says what was counted (a file, a whole series, a row of the annotations) and what it means; it never
says which one. Every file and every row is either used or counted under exactly one code of its own unit; a
rejected series is counted once more, as a series.
"""

from enum import StrEnum
from typing import Self


class _Code(StrEnum):
    """A reason, what it counts (``unit``) and what it means to the hospital's staff."""

    unit: str
    meaning: str

    def __new__(cls, code: str, unit: str, meaning: str) -> Self:
        """Make a member whose value is ``code`` alone."""
        member = str.__new__(cls, code)
        member._value_ = code
        member.unit = unit
        member.meaning = meaning
        return member


class RejectCode(_Code):
    """Why a part of a DICOM export or of its annotations is left out."""

    # Files, in the order of the checks.
    SYMLINK = "symlink", "file", "a symbolic link; links are never followed"
    NOT_A_FILE = "not-a-file", "file", "a pipe, socket or device; it is not opened"
    UNREADABLE = "unreadable", "file", "cannot be opened or parsed"
    NOT_DICOM = "not-dicom", "file", "not a DICOM Part 10 file"
    TRUNCATED = "truncated", "file", "ends before its content is complete"
    SECONDARY_CAPTURE = "secondary-capture", "file", "a screenshot or secondary capture"
    WRONG_MODALITY = "wrong-modality", "file", "not a CT image"
    WRONG_SOP_CLASS = "wrong-sop-class", "file", "CT, but not of the class CT Image Storage"
    LOCALIZER = "localizer", "file", "a localizer or scout view"
    BURNED_IN = "burned-in", "file", "declares annotations burned into the pixels"
    TOO_LARGE = "too-large", "file", "more rows, columns, frames or bytes than one CT slice can have"
    NO_PATIENT = "no-patient", "file", "no PatientID, so the unit of privacy is unknown"
    NO_ISSUER = "no-issuer", "file", "no issuer of the PatientID, which site.toml [intake] requires"
    NO_UID = "no-uid", "file", "no series or instance UID"
    NO_SPACING = "no-spacing", "file", "pixel spacing absent or not usable"
    NO_POSITION = "no-position", "file", "image position absent or not usable"
    NO_ORIENTATION = (
        "no-orientation",
        "file",
        "image orientation absent or not two perpendicular unit vectors",
    )
    NO_HOUNSFIELD = "no-hounsfield", "file", "no rescale to Hounsfield units"
    NO_PIXEL_DATA = "no-pixel-data", "file", "no pixel data"
    UNSUPPORTED_PIXELS = "unsupported-pixels", "file", "pixels that are not 8 or 16-bit monochrome integers"
    UNSUPPORTED_SYNTAX = "unsupported-syntax", "file", "a transfer syntax that cannot be decoded here"
    DUPLICATE_FILE = "duplicate-file", "file", "an identical copy of another file; one is kept"

    # What may be one person under two identities. Not a loss, and nothing is decided by it.
    SPLIT_NUMBER = (
        "split-number",
        "number",
        "a PatientID here with an issuer, there without: two patients; see site.toml [intake]",
    )

    # Series.
    MIXED_PATIENTS = "mixed-patients", "series", "slices of more than one patient under one series UID"
    MIXED_SERIES = "mixed-series", "series", "slices of different size, spacing, orientation, frame or maker"
    DUPLICATE_SLICES = "duplicate-slices", "series", "different slices of one instance UID or at one position"
    IRREGULAR_STACK = "irregular-stack", "series", "slices that do not lie along one line, or tilt above 45°"
    TOO_FEW_SLICES = "too-few-slices", "series", "fewer than two usable slices"

    # Rows of the annotations.
    BAD_ROW = "bad-row", "annotation", "a value that is absent or not a finite number"
    BAD_DIAMETER = "bad-diameter", "annotation", "a diameter that no nodule has"
    BAD_MALIGNANCY = "bad-malignancy", "annotation", "a malignancy outside 1 to 5"
    UNDECIDED = "undecided", "annotation", "malignancy 3: neither benign nor malignant"
    DUPLICATE_ANNOTATION = (
        "duplicate-annotation",
        "annotation",
        "repeats a row, or contradicts it (none is kept)",
    )
    UNKNOWN_SERIES = "unknown-series", "annotation", "no accepted file belongs to its series"
    REJECTED_SERIES = "rejected-series", "annotation", "its series was rejected as a whole"
    OUTSIDE_VOLUME = "outside-volume", "annotation", "a centre outside the scanned volume"
    MISSING_SLICES = "missing-slices", "annotation", "a gap between the slices that the nodule needs"
    UNDECODABLE = "undecodable", "annotation", "a slice that the nodule needs cannot be decoded"


class GlucoseCode(_Code):
    """What became of parts of a glucose export. Every row is used or counted under one code of unit ``row``."""

    # Files.
    SYMLINK = "symlink", "file", "a symbolic link; links are never followed"
    NOT_A_FILE = "not-a-file", "file", "a pipe, socket or device; it is not opened"
    NOT_CSV = "not-csv", "file", "not named .csv, .tsv or .txt (also with .gz)"
    UNREADABLE = "unreadable", "file", "cannot be opened or unpacked to its end"
    TOO_LARGE = "too-large", "file", "unfolds to far more bytes than a packed export can hold"
    EMPTY = "empty", "file", "nothing in it"
    COLUMNS_MISSING = "columns-missing", "file", "no header row with the columns of a known export"

    # Rows.
    OTHER_ROW = "other-row", "row", "an event of another kind, or no value"
    BAD_ROW = "bad-row", "row", "a patient, time or value that is absent or cannot be read"
    OUT_OF_RANGE = "out-of-range", "row", "a glucose outside 20 to 600 mg/dL"
    WRONG_UNIT = "wrong-unit", "row", "of a patient whose glucose is in the other unit; set unit in [glucose]"
    MIXED_UNITS = "mixed-units", "row", "of a patient with mmol/L and mg/dL under one heading"
    UNKNOWN_TIMES = "unknown-times", "row", "of a patient whose times have no known form or zone"
    DATE_SERIALS = "date-serials", "row", "of a patient whose times are a spreadsheet's date serials"
    CLOCK_CHANGE = "clock-change", "row", "a local time that the change of clocks skips or repeats"
    DUPLICATE_READING = "duplicate-reading", "row", "repeats another row; one is kept"
    CONFLICTING_READING = "conflicting-reading", "row", "another value at the same time (none is kept)"
    STUCK_SENSOR = "stuck-sensor", "row", "one value for three hours or longer"
    SHORT_SEGMENT_READING = "short-segment-reading", "row", "belongs to a segment that is too short"
    OUTSIDE_SEGMENTS = "outside-segments", "row", "insulin or carbohydrates outside every segment that is kept"

    # What the rows made. Not a loss of rows.
    LIMIT_WORD = "limit-word", "reading", "'Low' or 'High', taken as the sensor's limit, 40 or 400 mg/dL"
    SHORT_GAP = "short-gap", "gap", "a gap of up to 45 minutes, interpolated"
    LONG_GAP = "long-gap", "gap", "a longer gap, which ends a segment"
    SHORT_SEGMENT = "short-segment", "segment", "fewer than 192 readings of 5 minutes"
    NO_SEGMENT = "no-segment", "patient", "no segment long enough"


class Rejected(Exception):  # noqa: N818 - not an error of the program but an outcome, caught where it is counted
    """Something is left out. Carries its code and nothing of the data."""

    def __init__(self, code: RejectCode) -> None:
        super().__init__(code.value)
        self.code = code
