"""Nothing identifying leaves intake, and one patient is one item."""

import contextlib
import logging
import traceback
import warnings

import numpy as np
import pytest

from client.intake import dicom
from client.intake.dicom import read_header
from client.intake.pseudonyms import PatientIdentity, load_or_create_secret, pseudonym
from client.intake.rejects import RejectCode
from shared.errors import IntakeError, StorageError

CANARY = "Kanarienvogel"


def _identify(dataset, k):
    """Fill everything a hospital knows, with values that provoke pydicom's own complaints."""
    dataset.PatientName = f"{CANARY}^Name"
    dataset.PatientBirthDate, dataset.StudyDate = "19471122", f"{CANARY[:6]}11"
    dataset.AccessionNumber, dataset.InstitutionName = f"{CANARY}-ACC", CANARY * 20
    dataset.ReferringPhysicianName, dataset.StudyDescription = f"{CANARY}^Dr", CANARY * 10
    dataset.PatientAge, dataset.SliceThickness = CANARY, "8"
    dataset.IssuerOfPatientID = f"{CANARY}-Issuer"
    dataset.add_new(0x00091001, "LO", f"{CANARY}-private")
    dataset.SpecificCharacterSet = f"{CANARY[:8]}"


def _canary_export(export):
    uid = "1.2.4711.0815"
    export.cube(
        uid=uid,
        patient=f"{CANARY}-ID",
        edit=_identify,
        names=[f"{CANARY}/{k}/{CANARY}.dcm" for k in range(8)],
    )
    export.annotate(uid)
    for name in ("Modality", "PixelSpacing", "SOPInstanceUID"):

        def edit(dataset, k, name=name):
            _identify(dataset, k)
            dataset.add_new(name, "SH", f"{CANARY}-bad")

        export.cube(count=2, patient=f"{CANARY}-ID", edit=edit)
    whole = (export.dicom / CANARY / "3" / f"{CANARY}.dcm").read_bytes()
    for length in range(300, len(whole) - 2000, 150):
        (export.dicom / f"{CANARY}-{length}").write_bytes(whole[:length] + whole[length + 1 :])
    return uid


@pytest.mark.parametrize("workers", [1, 2])
def test_no_canary_gets_out(export, caplog, capfd, workers):
    uid = _canary_export(export)
    # pydicom also complained while the files were written: that is the test's own doing.
    caplog.clear()
    capfd.readouterr()
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        report, store = export.prepare(workers=workers)
        printed = capfd.readouterr()
    assert report.nodules == 1
    assert [str(w.message) for w in warned] == []
    stored = b"".join(path.read_bytes() for path in sorted(export.store.iterdir()))
    told = repr(report) + repr(report.counts()) + caplog.text + printed.out + printed.err + repr(store.attributes)
    for secret in (CANARY, uid, "19471122", str(export.dicom)):
        assert secret not in told
        assert secret.encode() not in stored
        assert secret.encode("utf-16-le") not in stored
    header = read_header(next((export.dicom / CANARY).rglob("*.dcm")))
    assert CANARY not in repr(header)
    assert CANARY not in repr(header.patient)


def test_the_canary_would_sing_without_the_silence(export, monkeypatch):
    """The control: pydicom does quote values, so the test above is not empty."""
    _canary_export(export)
    monkeypatch.setattr(dicom, "silence", contextlib.nullcontext)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        export.prepare()
    assert any(CANARY[:8] in str(w.message) for w in warned)


def test_no_canary_in_an_exception(export):
    export.cube(patient=CANARY, edit=lambda d, k: (_identify(d, k), d.add_new("RescaleSlope", "SH", CANARY)))
    export.annotate(CANARY)
    export.rows.append((CANARY, CANARY, CANARY))
    with pytest.raises(IntakeError) as caught:
        export.prepare()
    text = "".join(traceback.format_exception(caught.value))
    assert CANARY not in text
    assert str(export.dicom) not in text


def test_one_item_per_patient_over_all_series(export):
    for patient, series in (("A", 3), ("B", 1), (" B ", 1)):
        for _ in range(series):
            uid = export.cube(patient=patient)
            export.annotate(uid)
            export.annotate(uid, (20, 20, 7), malignancy=1.5)
    report, store = export.prepare()
    assert (report.patients, report.nodules, report.records) == (2, 10, 30)
    counts = {item.key: len(item.arrays["nodule"]) for item in store.items()}
    keys = [pseudonym(bytes(range(32)), PatientIdentity("", name)) for name in ("A", "B")]
    assert counts == {keys[0]: 18, keys[1]: 12}
    for item in store.items():
        n = len(item.arrays["nodule"]) // 3
        np.testing.assert_array_equal(item.arrays["nodule"], np.repeat(np.arange(n), 3))
    assert store.arrays["malignant"].sum() == 15


def test_the_issuer_belongs_to_the_identity(export):
    def issued(name):
        return lambda d, k: setattr(d, "IssuerOfPatientID", name) if name else None

    for patient, issuer in (("A", "north"), ("A", "south"), ("B", "north"), ("B", ""), ("C", "")):
        export.annotate(export.cube(patient=patient, edit=issued(issuer)))
    report, _ = export.prepare()
    export.annotate(export.cube(patient="A"))
    report, _ = export.prepare()
    assert (report.patients, report.nodules, report.rejected) == (6, 6, {RejectCode.SPLIT_NUMBER: 2})


def test_pseudonyms_depend_on_secret_and_whole_identity():
    identities = [PatientIdentity(*names) for names in (("", "ab"), ("a", "b"), ("ab", ""), ("", "AB"))]
    keys = {pseudonym(bytes([s]) * 32, identity) for s in range(3) for identity in identities}
    assert len(keys) == 12
    assert {len(key) for key in keys} == {16}
    with pytest.raises(ValueError, match="at least 16 bytes"):
        pseudonym(b"short", identities[0])


def test_pseudonym_golden():
    assert pseudonym(bytes(32), PatientIdentity("", "P-1")).hex() == "f799b13cf7c20563873940597c3c7fbf"


def test_the_secret_is_made_once(tmp_path):
    path = tmp_path / "keys" / "secret"
    secret = load_or_create_secret(path)
    assert len(secret) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_create_secret(path) == secret
    assert [p.name for p in path.parent.iterdir()] == ["secret"]
    assert load_or_create_secret(tmp_path / "other") != secret


def test_a_secret_that_is_damaged_or_open_to_others_is_refused(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"x" * 31)
    path.chmod(0o600)
    with pytest.raises(StorageError, match="damaged"):
        load_or_create_secret(path)
    assert path.read_bytes() == b"x" * 31
    path.write_bytes(b"x" * 32)
    path.chmod(0o640)
    with pytest.raises(StorageError, match="chmod 600"):
        load_or_create_secret(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(StorageError):
        load_or_create_secret(link)
