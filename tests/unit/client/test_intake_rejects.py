"""Every kind of bad input is counted under its code and never stops the rest."""

import os
import socket
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
from pydicom.uid import (
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from client.intake import dicom, part10
from client.intake.nodules import prepare_nodules
from client.intake.rejects import RejectCode
from shared.errors import IntakeError

CODE = RejectCode


def _set(**values) -> Callable:
    def edit(dataset, _k):
        for keyword, value in values.items():
            if value is None:
                del dataset[keyword]
            else:
                setattr(dataset, keyword, value)

    return edit


FILE_EDITS = [
    (CODE.SECONDARY_CAPTURE, _set(SOPClassUID=SecondaryCaptureImageStorage)),
    (CODE.SECONDARY_CAPTURE, _set(ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"])),
    (CODE.WRONG_MODALITY, _set(Modality="MR")),
    (CODE.WRONG_MODALITY, _set(Modality=None)),
    (CODE.WRONG_SOP_CLASS, _set(SOPClassUID=EnhancedCTImageStorage)),
    (CODE.LOCALIZER, _set(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])),
    (CODE.BURNED_IN, _set(BurnedInAnnotation="YES")),
    (CODE.TOO_LARGE, _set(Rows=5000)),
    (CODE.TOO_LARGE, _set(Columns=65535)),
    (CODE.TOO_LARGE, _set(NumberOfFrames=100_000)),
    (CODE.NO_PATIENT, _set(PatientID="")),
    (CODE.NO_PATIENT, _set(PatientID=None)),
    (CODE.NO_PATIENT, _set(PatientID="   ")),
    (CODE.NO_UID, _set(SeriesInstanceUID=None)),
    (CODE.NO_UID, _set(SOPInstanceUID="")),
    (CODE.NO_SPACING, _set(PixelSpacing=None)),
    (CODE.NO_SPACING, _set(PixelSpacing=[0, 1])),
    (CODE.NO_SPACING, _set(PixelSpacing=[1])),
    (CODE.NO_POSITION, _set(ImagePositionPatient=None)),
    (CODE.NO_POSITION, _set(ImagePositionPatient=[0, 0, 1e9])),
    (CODE.NO_ORIENTATION, _set(ImageOrientationPatient=None)),
    (CODE.NO_ORIENTATION, _set(ImageOrientationPatient=[1, 0, 0, 1, 0, 0])),
    (CODE.NO_ORIENTATION, _set(ImageOrientationPatient=[2, 0, 0, 0, 1, 0])),
    (CODE.NO_HOUNSFIELD, _set(RescaleSlope=None)),
    (CODE.NO_HOUNSFIELD, _set(RescaleIntercept=None)),
    (CODE.NO_HOUNSFIELD, _set(RescaleSlope=0)),
    (CODE.NO_HOUNSFIELD, _set(RescaleType="US")),
    (CODE.NO_PIXEL_DATA, _set(PixelData=None)),
    (CODE.NO_PIXEL_DATA, _set(PixelData=b"")),
    (CODE.TRUNCATED, _set(PixelData=b"\0" * 100)),
    (CODE.UNSUPPORTED_PIXELS, _set(SamplesPerPixel=3, PhotometricInterpretation="RGB")),
    (CODE.UNSUPPORTED_PIXELS, _set(BitsAllocated=32, BitsStored=32)),
]


def _good(export, **options):
    export.annotate(export.cube(**options))


@pytest.mark.parametrize(("code", "edit"), FILE_EDITS, ids=[f"{c}-{i}" for i, (c, _) in enumerate(FILE_EDITS)])
def test_a_bad_slice_is_counted_and_the_rest_goes_on(export, code, edit):
    _good(export)
    bad = export.cube(count=2, edit=edit)
    export.annotate(bad)
    report, store = export.prepare()
    assert report.rejected == {code: 2, CODE.UNKNOWN_SERIES: 1}
    assert code.unit == "file"
    assert (report.patients, report.nodules, report.records, report.files) == (1, 1, 3, 10)
    assert len(store) == 1


def test_every_code_is_exercised_or_named_here():
    by_edit = {code for code, _ in FILE_EDITS}
    elsewhere = {
        *(CODE.SYMLINK, CODE.NOT_A_FILE, CODE.UNREADABLE, CODE.NOT_DICOM, CODE.NO_ISSUER, CODE.UNSUPPORTED_SYNTAX),
        *(CODE.DUPLICATE_FILE, CODE.MIXED_PATIENTS, CODE.MIXED_SERIES, CODE.DUPLICATE_SLICES),
        *(CODE.IRREGULAR_STACK, CODE.TOO_FEW_SLICES, CODE.BAD_ROW, CODE.BAD_DIAMETER, CODE.BAD_MALIGNANCY),
        *(CODE.UNDECIDED, CODE.DUPLICATE_ANNOTATION, CODE.UNKNOWN_SERIES, CODE.REJECTED_SERIES),
        *(CODE.OUTSIDE_VOLUME, CODE.MISSING_SLICES, CODE.UNDECODABLE, CODE.SPLIT_NUMBER),
    }
    assert by_edit | elsewhere == set(RejectCode)
    assert {code.unit for code in RejectCode} == {"file", "number", "series", "annotation"}


def test_what_is_no_dicom_file(export):
    _good(export)
    (export.dicom / "scan.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500))
    (export.dicom / "notes.txt").write_text("x" * 500)
    (export.dicom / "empty.dcm").touch()
    (export.dicom / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    with zipfile.ZipFile(export.dicom / "more.zip", "w") as archive:
        archive.writestr("a", "b")
    report, _ = export.prepare()
    assert report.rejected == {CODE.NOT_DICOM: 4}
    assert report.files == 12


def test_truncation_at_every_kind_of_place(export):
    _good(export)
    whole = next(export.dicom.iterdir()).read_bytes()
    for length in (200, 400, 700, len(whole) - 1, len(whole) - 1000):
        (export.dicom / f"cut-{length}").write_bytes(whole[:length])
    report, _ = export.prepare()
    assert report.rejected == {CODE.TRUNCATED: 5}


def test_links_are_never_followed(export, tmp_path):
    _good(export)
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in export.dicom.iterdir():
        (outside / path.name).write_bytes(path.read_bytes())
    (export.dicom / "folder").symlink_to(outside)
    (export.dicom / "file.dcm").symlink_to(next(outside.iterdir()))
    (export.dicom / "dangling").symlink_to(tmp_path / "nothing")
    report, _ = export.prepare()
    assert report.rejected == {CODE.SYMLINK: 3}


def test_pipes_and_sockets_are_counted_and_never_opened(export):
    _good(export)
    os.mkfifo(export.dicom / "pipe.dcm")
    with socket.socket(socket.AF_UNIX) as listening:
        folder = os.open(export.dicom, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{folder}/s.dcm")  # a socket's own path may be too long
        os.close(folder)
        report, _ = export.prepare()
    assert report.rejected == {CODE.NOT_A_FILE: 2}
    assert report.files == 10


def test_an_unknown_transfer_syntax(export, save_slice):
    _good(export)
    path = next(export.dicom.iterdir())
    content = path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0")
    (export.dicom / "private").write_bytes(content)
    report, _ = export.prepare()
    assert report.rejected == {CODE.UNSUPPORTED_SYNTAX: 1}
    assert not dicom._decodable(MPEG2MPML)


def test_refused_for_its_size_before_anything_is_read(export, monkeypatch):
    _good(export)
    monkeypatch.setattr(part10, "MAX_FILE_BYTES", 10_000)
    (export.dicom / "large.dcm").write_bytes(bytes(128) + b"DICM" + bytes(20_000))
    report, _ = export.prepare()
    assert report.rejected == {CODE.TOO_LARGE: 1}


def test_a_deflated_bomb_is_not_inflated(export, monkeypatch):
    _good(export, side=64)
    monkeypatch.setattr(part10, "MAX_FILE_BYTES", 300_000)
    export.cube(count=2, side=800, value=0, syntax=DeflatedExplicitVRLittleEndian)
    report, _ = export.prepare()
    assert report.rejected == {CODE.TOO_LARGE: 2}


@pytest.mark.parametrize("syntax", [JPEGLSLossless, RLELossless])
def test_a_code_stream_of_another_size_is_not_decoded(export, monkeypatch, syntax):
    """Forged sizes inside the compressed image must be refused before the decoder allocates them."""
    _good(export)
    forged = export.cube(syntax=syntax, patient="P-2")
    export.annotate(forged)
    for path in export.dicom.glob(f"{forged}*"):
        content = path.read_bytes()
        if syntax == JPEGLSLossless:
            at = content.index(b"\xff\xf7") + 5
            content = content[:at] + b"\xff\xff\xff\xff" + content[at + 4 :]
        else:
            at = content.rindex(b"\xfe\xff\x00\xe0") + 8
            content = content[:at] + b"\xff" * 60 + content[at + 60 :]
        path.write_bytes(content)
    report, _ = export.prepare()
    assert report.rejected == {CODE.UNDECODABLE: 1}


def test_slices_of_two_patients_under_one_series_uid_are_all_rejected(export):
    _good(export)
    bad = export.cube(patient="P-2", edit=lambda d, k: setattr(d, "PatientID", "P-3" if k == 4 else "P-2"))
    export.annotate(bad)
    report, _ = export.prepare()
    assert report.rejected == {CODE.MIXED_PATIENTS: 1, CODE.REJECTED_SERIES: 1}
    assert report.patients == 1


@pytest.mark.parametrize(
    ("code", "edit"),
    [
        (CODE.MIXED_SERIES, lambda d, k: setattr(d, "PixelSpacing", [1 + 0.1 * (k == 3), 1])),
        (CODE.MIXED_SERIES, lambda d, k: setattr(d, "ImageOrientationPatient", [1, 0, 0, 0, 1 - 2 * (k == 3), 0])),
        (CODE.MIXED_SERIES, lambda d, k: setattr(d, "FrameOfReferenceUID", f"1.2.{k == 3:d}")),
        (CODE.MIXED_SERIES, lambda d, k: setattr(d, "Rows", 48 - (k == 3))),
        (CODE.MIXED_SERIES, lambda d, k: setattr(d, "Manufacturer", "Philips" if k == 3 else "SIEMENS")),
        (CODE.DUPLICATE_SLICES, lambda d, k: setattr(d, "SOPInstanceUID", f"1.2.{min(k, 6)}")),
        (CODE.DUPLICATE_SLICES, lambda d, k: setattr(d, "ImagePositionPatient", [0, 0, 2.0 * min(k, 6)])),
        (CODE.IRREGULAR_STACK, lambda d, k: setattr(d, "ImagePositionPatient", [3.0 * (k == 3), 0, 2.0 * k])),
        (CODE.IRREGULAR_STACK, lambda d, k: setattr(d, "ImagePositionPatient", [9.0 * k, 0, 2.0 * k])),
        (CODE.TOO_FEW_SLICES, lambda d, k: k and setattr(d, "BurnedInAnnotation", "YES")),
    ],
)
def test_what_makes_a_series_unusable(export, code, edit):
    _good(export)
    export.annotate(export.cube(edit=edit))
    report, _ = export.prepare()
    assert {c: n for c, n in report.rejected.items() if c.unit == "series"} == {code: 1}
    assert report.rejected[CODE.REJECTED_SERIES] == 1
    assert report.nodules == 1


def test_identical_copies_are_dropped(export):
    _good(export)
    for path in list(export.dicom.iterdir())[:3]:
        (export.dicom / f"copy of {path.name}").write_bytes(path.read_bytes())
    report, _ = export.prepare()
    assert report.rejected == {CODE.DUPLICATE_FILE: 3}


def test_a_nodule_at_a_gap_is_rejected_and_another_in_the_series_is_not(export):
    positions = [(0, 0, 2.0 * k) for k in (0, 1, 2, 3, 4, 5, 6, 10, 11, 12, 13)]
    uid = export.series(np.zeros((11, 48, 48)), positions=positions)
    for z in (5.0, 9.9, 10.1, 16.0, 21.9, 22.1, 24.0):
        export.annotate(uid, (24, 24, z))
    report, _ = export.prepare()
    # Patches lie at z - 2, z, z + 2: those that need anything between 12 and 20 mm are left out.
    assert report.rejected == {CODE.MISSING_SLICES: 3}
    assert report.nodules == 4


def test_8_mm_slices_pass_and_12_mm_do_not(export):
    export.annotate(export.cube(interval=8.0), (24, 24, 20))
    export.annotate(export.cube(interval=12.0), (24, 24, 20))
    report, _ = export.prepare()
    assert report.rejected == {CODE.MISSING_SLICES: 1}


@pytest.mark.parametrize(
    ("centre", "inside"),
    [
        ((-0.4, 0, 7), True),
        ((-0.6, 0, 7), False),
        ((47.4, 47.4, 7), True),
        ((0, 47.6, 7), False),
        ((0, 0, 14.9), True),
        ((0, 0, 15.1), False),
        ((0, 0, -1.1), False),
    ],
)
def test_a_volume_ends_at_the_faces_of_its_voxels(export, centre, inside):
    uid = export.cube()
    export.annotate(uid)
    export.annotate(uid, centre)
    report, _ = export.prepare()
    assert report.rejected == ({} if inside else {CODE.OUTSIDE_VOLUME: 1})


def test_annotation_rows(export):
    uid = export.cube()
    export.annotate(uid, malignancy=3)
    for malignancy in (0, 5.5, -1):
        export.annotate(uid, malignancy=malignancy)
    for diameter in (0, -3, 1e6):
        export.annotate(uid, diameter=diameter)
    for x in ("nan", "inf", "", "left", 1e9):
        export.annotate(uid, (x, 24, 7))
    export.rows.append((uid, 1, 2))
    export.rows.append(("", 24, 24, 7, 10, 5))
    export.annotate("1.2.3")
    export.annotate(uid, (24, 24, 7))
    export.annotate(uid, (24, 24, 7))
    export.annotate(uid, (20, 24, 7), malignancy=1)
    export.annotate(uid, (20, 24, 7), malignancy=5)
    report, _ = export.prepare()
    assert report.rejected == {
        CODE.UNDECIDED: 1,
        CODE.BAD_MALIGNANCY: 3,
        CODE.BAD_DIAMETER: 3,
        CODE.BAD_ROW: 7,
        CODE.UNKNOWN_SERIES: 1,
        CODE.DUPLICATE_ANNOTATION: 3,
    }
    assert report.nodules + sum(n for c, n in report.rejected.items() if c.unit == "annotation") == len(export.rows)


@pytest.mark.parametrize("content", [b"", b"name,coordX\nDoe,1\n", b"\x89PNG\xff\xfe\0\0", b'"' + b"x" * 200_000])
def test_annotations_of_another_form(export, content):
    _good(export)
    path = export.root / "other.csv"
    path.write_bytes(content)
    with pytest.raises(IntakeError, match="seriesuid, coordX, coordY, coordZ, diameter_mm, malignancy") as caught:
        prepare_nodules(export.dicom, path, export.store, bytes(32))
    assert "Doe" not in str(caught.value)


def test_one_sentence_when_nothing_is_left(export):
    export.annotate(generate_uid())
    export.dicom.mkdir()
    (export.dicom / "a.txt").touch()
    with pytest.raises(IntakeError, match=r"Nothing usable is left .* \(1 files: not-dicom 1, unknown-series 1\)"):
        export.prepare()
    assert not export.store.exists()


def test_one_sentence_when_there_is_no_folder_or_list(export):
    with pytest.raises(IntakeError, match="is not a folder"):
        export.prepare()
    _good(export)
    with pytest.raises(IntakeError, match="Cannot read the annotations"):
        prepare_nodules(export.dicom, export.root / "none.csv", export.store, bytes(32))
