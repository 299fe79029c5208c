"""One patient more or less in an export changes no other patient's records, to the byte."""

import gzip
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.intake.glucose import prepare_glucose
from client.intake.identities import Identities, IssuerRule, parse_rule
from client.intake.links import Links
from client.intake.nodules import prepare_nodules
from client.intake.pseudonyms import PatientIdentity, pseudonym
from client.intake.rejects import GlucoseCode, RejectCode
from shared.errors import IntakeError
from shared.records import RecordStore

from .conftest import SECRET, Export  # isort: skip

SLOW = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
RULES = [IssuerRule(), IssuerRule("ignore"), IssuerRule("required"), IssuerRule(missing="NORTH")]


def records(store: Path) -> dict[bytes, dict[str, bytes]]:
    """Return every patient's records as bytes."""
    if not store.exists():
        return {}
    return {
        item.key: {name: array.dtype.str.encode() + array.tobytes() for name, array in item.arrays.items()}
        for item in RecordStore.open(store).items()
    }


def issued(issuer, missing=()):
    """Return an edit that states the issuer, but not in the slices ``missing``."""

    def edit(dataset, k):
        if issuer and k not in missing:
            dataset.IssuerOfPatientID = issuer

    return edit


def key(issuer, number):
    return pseudonym(SECRET, PatientIdentity(issuer, number))


def test_a_patient_of_another_issuer_takes_no_slice_away(export):
    """The series of (A, X) states its issuer in one slice of four; (B, X) is somebody else."""
    uid = export.cube(count=4, patient="X", edit=issued("A", missing=(1, 2, 3)))
    export.annotate(uid, (24, 24, 3))
    report, _ = export.prepare()
    alone = records(export.store)
    assert report.rejected == {}
    export.annotate(export.cube(count=4, patient="X", edit=issued("B")), (24, 24, 3))
    report, _ = export.prepare()
    both = records(export.store)
    assert report.rejected == {}
    assert set(both) == {key("A", "X"), key("B", "X")}
    assert {name: both[name] for name in alone} == alone


@pytest.mark.parametrize(
    ("rule", "patients", "left_out"),
    [
        (IssuerRule(), [("N", "A"), ("S", "A"), ("", "A"), ("", "B")], 0),
        (IssuerRule("ignore"), [("", "A"), ("", "B")], 0),
        (IssuerRule("required"), [("N", "A"), ("S", "A")], 16),
        (IssuerRule(missing="N"), [("N", "A"), ("S", "A"), ("N", "B")], 0),
    ],
)
def test_the_rule_for_issuers_says_who_is_one_patient(export, rule, patients, left_out):
    for issuer, number in (("N", "A"), ("S", "A"), ("", "A"), ("", "B")):
        export.annotate(export.cube(patient=number, edit=issued(issuer)))
    report, _ = export.prepare(identities=Identities(rule))
    assert set(records(export.store)) == {key(*patient) for patient in patients}
    assert report.rejected.get(RejectCode.NO_ISSUER, 0) == left_out


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"isuer": "ignore"}, "unknown keys: isuer"),
        ({"issuer": True}, "a text for: issuer"),
        ({"issuer": "guess"}, "one of: as-written, ignore, required"),
        ({"issuer": "ignore", "missing-issuer": "N"}, "does not go with"),
    ],
)
def test_a_wrong_rule_is_refused(table, says):
    with pytest.raises(IntakeError, match=says):
        parse_rule(table)


SERIES = st.fixed_dictionaries(
    {
        "number": st.sampled_from("XYZ"),
        "issuer": st.sampled_from(["", "NORTH", "SOUTH"]),
        "missing": st.sets(st.integers(0, 3)),
        "uid": st.integers(0, 5),
        "instances": st.sampled_from([0, 10]),  # first instance UID: series share them
        "value": st.integers(-900, 300),
        "copies": st.integers(0, 2),
        "nodules": st.lists(st.tuples(st.integers(8, 14), st.sampled_from([1, 3, 5])), max_size=3),
    }
)


def whose(series, identities):
    """Return the pseudonym of whom a series is meant to be: the oracle, from the generator's own knowledge."""
    rule = identities.rule
    stated = series["issuer"] if len(series["missing"]) < 4 and rule.issuer != "ignore" else ""
    return identities.key(SECRET, PatientIdentity(stated or rule.missing, series["number"]))


def write(root, drawn):
    export = Export(root)
    export.dicom.mkdir(parents=True)
    for place, series in enumerate(drawn):

        def edit(dataset, k, series=series):
            issued(series["issuer"], series["missing"])(dataset, k)
            dataset.SOPInstanceUID = f"1.9.{series['instances'] + k}"

        uid = f"1.2.{series['uid']}"
        volume = np.full((4, 24, 24), series["value"], np.int16)
        names = [f"{place}-{k}.dcm" for k in range(4)]
        positions = [(0, 0, 2.0 * k) for k in range(4)]
        export.series(volume, positions=positions, patient=series["number"], uid=uid, edit=edit, names=names)
        for copy in range(series["copies"]):
            content = (export.dicom / names[copy]).read_bytes()
            (export.dicom / f"copy-{names[copy]}").write_bytes(content)
        for x, malignancy in series["nodules"]:
            export.annotate(uid, (x, 12, 3), malignancy=malignancy)
    return export


def prepared(drawn, identities):
    with TemporaryDirectory() as folder:
        export = write(Path(folder), drawn)
        try:
            prepare_nodules(export.dicom, export.annotations, export.store, SECRET, identities=identities)
        except IntakeError:
            return {}
        return records(export.store)


X_IS_Y = [((key("", "X"),) * 2, (key("", "Y"),) * 2)]


@SLOW
@given(
    drawn=st.lists(SERIES, min_size=2, max_size=6),
    rule=st.sampled_from(RULES),
    links=st.sampled_from([[], X_IS_Y]),
    data=st.data(),
)
def test_one_patient_more_in_a_dicom_export_changes_nobody_elses_records(drawn, rule, links, data):
    """All but those one of whose series the patient's own files name; see ``client.intake.nodules``."""
    identities = Identities(rule, Links.of(links))
    gone = data.draw(st.sampled_from(sorted({whose(series, identities) for series in drawn})))
    its_uids = {series["uid"] for series in drawn if whose(series, identities) == gone}
    sharers = {whose(series, identities) for series in drawn if series["uid"] in its_uids}
    with_it = prepared(drawn, identities)
    without = prepared([series for series in drawn if whose(series, identities) != gone], identities)
    for patient in sharers:
        with_it.pop(patient, None), without.pop(patient, None)
    assert with_it == without


def test_a_series_that_names_two_patients_is_refused_for_both_and_costs_them_nothing_else(export):
    for patient in "AB":
        export.annotate(export.cube(patient=patient))
    before = records(export.prepare()[1] and export.store)
    shared = export.cube(patient="A", count=4)
    export.cube(patient="B", count=4, uid=shared, names=[f"b-{k}" for k in range(4)])
    export.annotate(shared, (24, 24, 3))
    report, _ = export.prepare()
    assert report.rejected == {RejectCode.MIXED_PATIENTS: 1, RejectCode.REJECTED_SERIES: 1}
    assert records(export.store) == before


def test_a_quotation_mark_in_one_row_of_the_annotations_takes_no_other_row_away(export):
    uid = export.cube()
    lines = [
        "seriesuid,coordX,coordY,coordZ,diameter_mm,malignancy,remark",
        '1.2.3,24,24,7,10,5,"he said',
        f"{uid},24,24,7,10,5,",
        f'{uid},20,24,7,10,5,"a 3"" one, solid"',
    ]
    path = export.root / "annotations.csv"
    path.write_text("\n".join(lines))
    report = prepare_nodules(export.dicom, path, export.store, SECRET)
    assert (report.nodules, report.rejected) == (2, {RejectCode.UNKNOWN_SERIES: 1})


# Glucose: every patient's rows in one file, each written in the way that most disturbs a reading of the whole file.

START = datetime(2024, 3, 1, 6)
WAYS = ("iso", "day-first", "ambiguous", "serial", "zone", "mmol", "mixed", "quote", "latin", "long", "words")


def glucose_rows(number: int, way: str, count: int) -> list[bytes]:
    """Return one patient's rows as bytes."""
    walk = np.random.default_rng(number).normal(0, 4, count).cumsum()
    values = np.round(120 + 40 * np.sin(np.arange(count) / 20) + 10 * np.sin(walk / 10), 1)
    if way == "mmol":
        values = np.round(values / 18, 1)
    elif way == "mixed":
        values[count // 2 :] = np.round(values[count // 2 :] / 18, 1)
    name = f"patient-{number}".encode() + (b" M\xfcller" if way == "latin" else " Mäder".encode() if number else b"")
    start = START + timedelta(days=20 if way == "day-first" else 0)
    rows = []
    for k, value in enumerate(values):
        at = start + timedelta(minutes=5 * k)
        text = {
            "day-first": f"{at:%d/%m/%Y %H:%M}",
            "ambiguous": f"{at:%d/%m/%Y %H:%M}",
            "serial": f"{45352 + k / 288:.5f}",
            "zone": at.isoformat() + "Z",
            "words": "noon",
        }.get(way, at.isoformat())
        rows.append(name + f",{text},{value:g},".encode())
    if way == "quote":
        rows[count // 3] += b'"he said'
    if way == "long":
        rows[count // 3] += b"x" * 200_000
    return rows


@SLOW
@given(
    ways=st.lists(st.sampled_from(WAYS), min_size=2, max_size=5),
    files=st.integers(1, 2),
    packed=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_one_patient_more_in_a_glucose_export_changes_nobody_elses_records(ways, files, packed, seed, data):
    gone = data.draw(st.integers(0, len(ways) - 1))
    order = np.random.default_rng(seed)
    lines: list[list[tuple[int, bytes]]] = [[] for _ in range(files)]
    for number, way in enumerate(ways):
        for k, row in enumerate(glucose_rows(number, way, 230)):
            lines[k * files // 230].append((number, row))
    for part in lines:
        order.shuffle(part)

    def made(left_out):
        with TemporaryDirectory() as folder:
            (export := Path(folder, "in")).mkdir()
            for place, part in enumerate(lines):
                body = [row for number, row in part if number != left_out]
                content = b"\n".join([b"patient_id,timestamp,glucose_mg_dl,remark", *body])
                name = f"{place}.csv" + (".gz" if packed else "")
                (export / name).write_bytes(gzip.compress(content) if packed else content)
            try:
                prepare_glucose(export, Path(folder, "store"), SECRET)
            except IntakeError:
                return {}
            return records(Path(folder, "store"))

    with_it, without = made(None), made(gone)
    assert {name: with_it.get(name) for name in without} == without
    assert len(with_it) - len(without) in (0, 1)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("mueller.anna.csv", "mueller.bernd.csv"),
        ("mueller.anna.csv.gz", "mueller.anna.2.CSV.GZ"),
        (".anna.csv", ".bernd.csv"),
        (".csv", ".txt"),
    ],
)
def test_one_file_more_that_names_nobody_changes_no_other_files_records(tmp_path, name, other):
    def made(*named):
        (export := tmp_path / f"in-{len(named)}").mkdir()
        for number, file_name in enumerate(named):
            cells = [row.split(b",") for row in glucose_rows(number, "iso", 230)]
            body = [time + b",0," + value for _, time, value, _ in cells]
            content = b"\n".join([b"Device Timestamp,Record Type,Historic Glucose mg/dL", *body])
            packed = file_name.lower().endswith(".gz")
            (export / file_name).write_bytes(gzip.compress(content) if packed else content)
        prepare_glucose(export, tmp_path / "store", SECRET)
        return records(tmp_path / "store")

    alone, both = made(name), made(name, other)
    assert (len(alone), len(both)) == (1, 2)
    assert alone.items() <= both.items()


DAMAGE = {
    "a stray byte": lambda row, _: row[:21] + b"x" + row[21:],
    "a byte lost": lambda row, _: row[:21] + row[22:],
    "a stray zero at the end": lambda row, _: row + b"\0",
    "a stray line feed at the end": lambda row, _: row + b"\n",
    "a stray zero at the start": lambda row, _: b"\0" + row,
    "half of a pair": lambda row, _: row + b"\xd8\xd8",
    "letters like a row's end": lambda row, encoding: row + "ਅĀਅ".encode(encoding),
    "too long": lambda row, _: row + b"x" * 300_001,
}


@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_row_of_utf_16_costs_its_own_patient_only(tmp_path, damage, encoding, mark):
    """The damaged row of a third patient stands between the rows of two others."""
    first, second, third = ([r.decode() for r in glucose_rows(n, "iso", 230)] for n in range(3))

    def made(name, *rows):
        head = "patient_id,timestamp,glucose_mg_dl,remark\r\n"
        whole = [head, *(f"{row}\r\n" if isinstance(row, str) else row for row in rows)]
        content = b"".join(row.encode(encoding) if isinstance(row, str) else row for row in whole)
        path = tmp_path / f"{name}.csv"
        path.write_bytes(("\ufeff".encode(encoding) if mark else b"") + content)
        report = prepare_glucose(path, tmp_path / name, SECRET)
        return records(tmp_path / name), report.counts_by_code.get(GlucoseCode.BAD_ROW, 0)

    damaged = DAMAGE[damage](third[0].encode(encoding), encoding) + "\r\n".encode(encoding)
    without, _ = made("without", *first, *second)
    with_it, bad = made("with", *first, damaged, *second)
    assert (len(without), with_it) == (2, without)
    assert bad >= 1


def glucose_file(path, *patients):
    rows = [row for number, way in patients for row in glucose_rows(number, way, 230)]
    path.write_bytes(b"\n".join([b"patient_id,timestamp,glucose_mg_dl,remark", *rows]))
    return path


@pytest.mark.parametrize(
    ("way", "code"),
    [
        ("mmol", GlucoseCode.WRONG_UNIT),
        ("mixed", GlucoseCode.MIXED_UNITS),
        ("serial", GlucoseCode.DATE_SERIALS),
        ("words", GlucoseCode.UNKNOWN_TIMES),
        ("zone", GlucoseCode.UNKNOWN_TIMES),
        ("ambiguous", GlucoseCode.UNKNOWN_TIMES),
    ],
)
def test_rows_that_cannot_be_told_cost_their_own_patient_only(tmp_path, way, code):
    path = glucose_file(tmp_path / "a.csv", (0, "iso"), (1, way), (2, "day-first"))
    report = prepare_glucose(path, tmp_path / "store", SECRET)
    assert report.counts_by_code == {code: 230}
    assert code.unit == "row"
    assert report.patients == 2
