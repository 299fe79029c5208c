import csv
import gzip
import json
import logging
import random
from datetime import datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.config import SitePolicy
from client.intake.clock import DateSerialsError, UnknownTimesError, parse_times
from client.intake.glucose import prepare_glucose
from client.intake.glucose_formats import CsvMapping, parse_mapping, read_mapping
from client.intake.pseudonyms import PatientIdentity, pseudonym
from client.intake.rejects import GlucoseCode as Code
from shared.errors import IntakeError, StorageError
from shared.records import RecordStore
from shared.tasks.cgm import COVARIATES, MG_DL_PER_MMOL_L, all_segments, segments_of

SECRET = b"s" * 32
START = datetime(2024, 3, 10, 0, 2, 30)
MARK = "Zaphod-4711"
"""A patient's name that must appear nowhere."""


def curve(n, seed=0):
    """Return n whole mg/dL with no long run of equal values."""
    walk = np.cumsum(np.random.default_rng(seed).normal(0, 4, n))
    return np.round(120 + 50 * np.sin(np.arange(n) / 20) + 10 * np.sin(walk / 10))


def rows(n=200, patient=MARK, start=START, step=5, values=None):
    values = curve(n) if values is None else values
    return [[patient, (start + timedelta(minutes=step * i)).isoformat(), f"{v:g}"] for i, v in enumerate(values)]


HEADER = ["patient_id", "timestamp", "glucose_mg_dl"]


def write(path, body, header=HEADER, delimiter=",", encoding="utf-8", before=()):
    lines = [*before, *(delimiter.join(map(str, row)) for row in [header, *body])]
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return path


@pytest.fixture
def prepare(tmp_path):
    def run(source, **mapping):
        report = prepare_glucose(source, tmp_path / "store", SECRET, mapping=CsvMapping(**mapping))
        return RecordStore.open(tmp_path / "store"), report

    return run


def test_regular_readings_come_back_exactly_with_their_time_of_day(tmp_path, prepare):
    store, report = prepare(write(tmp_path / "a.csv", rows(300)))
    (segment,) = segments_of(store, 0)
    np.testing.assert_array_equal(segment.values, curve(300).astype(np.float32))
    assert segment.minute_of_day[:3].tolist() == [2, 7, 12]
    assert segment.minute_of_day[-1] == (2 + 299 * 5) % 1440
    assert segment.measured.all()
    assert store.keys[0].tobytes() == pseudonym(SECRET, PatientIdentity("", MARK))
    assert (report.patients, report.segments, report.records, report.rows) == (1, 1, 300, 300)
    assert not report.counts_by_code
    assert store.attributes["covariates"] == []


def test_the_order_of_rows_leaves_no_trace(tmp_path, prepare):
    body = [*rows(220), *rows(230, "other", values=curve(230, 1))]
    first, _ = prepare(write(tmp_path / "a.csv", body))
    digest = first.digest
    random.Random(1).shuffle(body)
    again, _ = prepare(write(tmp_path / "a.csv", body))
    assert again.digest == digest


@pytest.mark.parametrize(("minutes", "segments"), [(45, 1), (50, 2)])
def test_a_gap_of_45_minutes_is_a_line_and_a_longer_one_ends_the_segment(tmp_path, prepare, minutes, segments):
    first = rows(200)
    second = rows(200, start=START + timedelta(minutes=199 * 5 + minutes))
    store, report = prepare(write(tmp_path / "a.csv", first + second))
    found = segments_of(store, 0)
    assert len(found) == report.segments == segments
    if segments == 1:
        line = found[0].values[199:209]
        np.testing.assert_allclose(line, np.linspace(float(first[-1][2]), float(second[0][2]), 10), rtol=1e-6)
        assert found[0].measured[199:209].tolist() == [True, *[False] * 8, True]
        assert report.interpolated == 8
        assert report.counts_by_code == {Code.SHORT_GAP: 1}
    else:
        assert report.counts_by_code == {Code.LONG_GAP: 1}


def test_191_readings_are_too_few_and_192_enough(tmp_path, prepare):
    body = [*rows(191, "short"), *rows(192, "long")]
    store, report = prepare(write(tmp_path / "a.csv", body))
    assert (len(store), report.records) == (1, 192)
    assert report.counts_by_code == {Code.SHORT_SEGMENT: 1, Code.SHORT_SEGMENT_READING: 191, Code.NO_SEGMENT: 1}


def test_libre_every_15_minutes_gets_two_values_between_each_two(tmp_path, prepare):
    store, report = prepare(write(tmp_path / "a.csv", rows(100, step=15)))
    (segment,) = segments_of(store, 0)
    assert len(segment) == 99 * 3 + 1
    np.testing.assert_array_equal(segment.values[::3], curve(100))
    assert segment.measured.sum() == 100
    assert report.interpolated == 198


def test_duplicates_conflicts_range_and_bad_rows_are_counted_and_every_row_accounted_for(tmp_path, prepare):
    body = rows(250)
    body += [body[3], body[3], [*body[7][:2], "77"], [MARK, "2024-03-10T00:00:01", "19.9"]]
    body += [[MARK, "2024-03-10T00:00:01", "600.5"], [MARK, "yesterday", "99"], ["", body[9][1], "99"]]
    body += [[MARK, body[9][1], "nine\0ty"], [MARK, body[9][1], "nan"], [MARK, body[9][1], ""]]
    store, report = prepare(write(tmp_path / "a.csv", body))
    assert report.counts_by_code == {
        Code.DUPLICATE_READING: 2,
        Code.CONFLICTING_READING: 2,
        Code.OUT_OF_RANGE: 2,
        Code.BAD_ROW: 4,
        Code.OTHER_ROW: 1,
        Code.SHORT_GAP: 1,
    }
    lost = sum(n for code, n in report.counts_by_code.items() if code.unit == "row")
    (segment,) = segments_of(store, 0)
    assert segment.measured.sum() == report.rows - lost


@pytest.mark.parametrize(("value", "minutes", "stuck"), [(111, 185, True), (111, 175, False), (400, 300, False)])
def test_a_stuck_sensor_is_removed_but_not_a_long_excursion_to_its_limit(tmp_path, prepare, value, minutes, stuck):
    values = curve(600)
    values[300 : 301 + minutes // 5] = value
    values[299], values[301 + minutes // 5] = 150, 151
    _, report = prepare(write(tmp_path / "a.csv", rows(600, values=values)))
    assert report.counts_by_code.get(Code.STUCK_SENSOR, 0) == (1 + minutes // 5 if stuck else 0)
    assert report.segments == (2 if stuck else 1)


def test_insulin_and_carbohydrates_belong_to_the_first_instant_at_or_after_them(tmp_path, prepare):
    body = [[*row, "", ""] for row in rows(200)]
    at = START + timedelta(minutes=50)
    body += [
        [MARK, (at - timedelta(minutes=4)).isoformat(), "", "1.5", ""],
        [MARK, at.isoformat(), "", "2", "30"],
        [MARK, at.isoformat(), "", "2", "30"],  # the same row again
        [MARK, (at + timedelta(seconds=1)).isoformat(), "", "", "12"],
        [MARK, (START - timedelta(hours=1)).isoformat(), "", "9", ""],
        [MARK, at.isoformat(), "", "-3", ""],
    ]
    store, report = prepare(write(tmp_path / "a.csv", body, [*HEADER, "insulin_units", "carbohydrate_g"]))
    (segment,) = segments_of(store, 0)
    assert segment.insulin[10] == 3.5
    assert segment.carbohydrate[[10, 11]].tolist() == [30, 12]
    assert (segment.insulin.sum(), segment.carbohydrate.sum()) == (3.5, 42)
    assert store.attributes["covariates"] == list(COVARIATES)
    assert report.counts_by_code == {Code.OUTSIDE_SEGMENTS: 1, Code.BAD_ROW: 1}


@pytest.mark.parametrize(
    ("encoding", "delimiter"), [("utf-8-sig", ","), ("utf-16", ";"), ("utf-16-le", "\t"), ("cp1252", "|")]
)
def test_encodings_and_separators(tmp_path, prepare, encoding, delimiter):
    body = [[p, t, v + ",5" if delimiter == ";" else v + ".5"] for p, t, v in rows(200, "Müller")]
    store, _ = prepare(write(tmp_path / "a.csv", body, delimiter=delimiter, encoding=encoding))
    assert store.keys[0].tobytes() == pseudonym(SECRET, PatientIdentity("", "Müller"))
    np.testing.assert_array_equal(segments_of(store, 0)[0].values, curve(200) + 0.5)


CLARITY = [
    "Index",
    "Timestamp (YYYY-MM-DDThh:mm:ss)",
    "Event Type",
    "Event Subtype",
    "Patient Info",
    "Device Info",
    "Source Device ID",
    "Glucose Value (mg/dL)",
    "Insulin Value (u)",
    "Carb Value (grams)",
    "Duration (hh:mm:ss)",
]


def test_dexcom_clarity(tmp_path, prepare):
    at = [row[1] for row in rows(200)]
    body = [[1, "", "FirstName", "", "Zaphod"], [2, "", "PatientIdentifier", "", MARK], [3, "", "Device", "", "", "G6"]]
    body += [
        [i, t, "EGV", "", "", "", "G6", f"{v:g}", "", "", ""]
        for i, (t, v) in enumerate(zip(at, curve(200), strict=False))
    ]
    body[10][7], body[11][7] = "Low", "High"
    body += [[0, at[20], "Insulin", "Fast-Acting", "", "", "G6", "", "4", "", ""]]
    body += [[0, at[20], "Insulin", "Long-Acting", "", "", "G6", "", "22", "", ""]]
    body += [[0, at[20], "Carbs", "", "", "", "G6", "", "", "45", ""]]
    body += [[0, at[20], "Calibration", "", "", "", "G6", "99", "", "", ""]]
    store, report = prepare(write(tmp_path / "Clarity_Export_Beeblebrox.csv", body, CLARITY))
    (segment,) = segments_of(store, 0)
    assert store.keys[0].tobytes() == pseudonym(SECRET, PatientIdentity("", MARK))
    assert segment.values[[7, 8]].tolist() == [40, 400]
    assert (segment.insulin[20], segment.carbohydrate[20], segment.insulin.sum()) == (4, 45, 4)
    assert report.counts_by_code == {Code.OTHER_ROW: 5, Code.LIMIT_WORD: 2}


LIBRE = [
    "Device",
    "Serial Number",
    "Device Timestamp",
    "Record Type",
    "Historic Glucose mmol/L",
    "Scan Glucose mmol/L",
    "Non-numeric Rapid-Acting Insulin",
    "Rapid-Acting Insulin (units)",
    "Non-numeric Food",
    "Carbohydrates (grams)",
]


@pytest.mark.parametrize("form", ["%d-%m-%Y %H:%M", "%m-%d-%Y %I:%M %p"])
def test_libreview_in_either_order_of_day_and_month_and_in_mmol(tmp_path, prepare, form):
    at = [(START + timedelta(minutes=15 * i)).strftime(form) for i in range(600)]
    mmol = [f"{v / MG_DL_PER_MMOL_L:.1f}" for v in curve(600)]
    body = [["FreeStyle", "X", t, 0, v, "", "", "", "", ""] for t, v in zip(at, mmol, strict=False)]
    body += [["FreeStyle", "X", at[5], 1, "", "9.9", "", "", "", ""], ["F", "X", at[4], 5, "", "", "", "", "", "60"]]
    path = write(tmp_path / "export.csv", body, LIBRE, before=["Glucose Data,Generated on,x,Generated by,Ford"])
    store, report = prepare(path)
    (segment,) = segments_of(store, 0)
    np.testing.assert_allclose(segment.values[::3], [float(v) * MG_DL_PER_MMOL_L for v in mmol], rtol=1e-6)
    assert segment.minute_of_day[:4].tolist() == [2, 7, 12, 17]
    assert segment.carbohydrate[12] == 60
    assert report.counts_by_code == {Code.OTHER_ROW: 1, Code.SHORT_GAP: 599}


def test_day_and_month_that_cannot_be_told_apart_are_refused_until_named(tmp_path, prepare):
    form = "%d/%m/%Y %H:%M"
    body = [
        [MARK, (datetime(2024, 3, 1) + timedelta(minutes=5 * i)).strftime(form), v] for i, v in enumerate(curve(300))
    ]
    path = write(tmp_path / "a.csv", body)
    with pytest.raises(IntakeError, match="time-format"):
        prepare(path)
    store, _ = prepare(path, time_format=form)
    assert len(segments_of(store, 0)[0]) == 300


def test_tidepool_states_the_unit_in_every_row(tmp_path, prepare):
    at = [row[1] for row in rows(200)]
    body = [["cbg", t, v / MG_DL_PER_MMOL_L, "mmol/L", "", ""] for t, v in zip(at[:100], curve(200), strict=False)]
    body += [["cbg", t, v, "mg/dL", "", ""] for t, v in zip(at[100:], curve(200)[100:], strict=False)]
    body += [["bolus", at[9], "", "", "3.5", ""], ["wizard", at[9], "", "", "", "40"], ["smbg", at[9], 5, "", "", ""]]
    store, _ = prepare(write(tmp_path / "t.csv", body, ["type", "deviceTime", "value", "units", "normal", "carbInput"]))
    (segment,) = segments_of(store, 0)
    np.testing.assert_allclose(segment.values, curve(200), rtol=1e-6)
    assert (segment.insulin[9], segment.carbohydrate[9]) == (3.5, 40)


def test_mimic_is_read_and_what_the_gaps_make_of_it_is_counted(tmp_path, prepare):
    folder = tmp_path / "mimic"
    folder.mkdir()
    chart = ["ROW_ID", "SUBJECT_ID", "ITEMID", "CHARTTIME", "VALUE", "VALUENUM", "VALUEUOM", "ERROR"]
    at = [str(START + timedelta(minutes=30 * i)) for i in range(60)]
    body = [[i, 7, 225664, t, "", v, "mg/dL", 0] for i, (t, v) in enumerate(zip(at, curve(60), strict=False))]
    body += [[0, 7, 220045, at[0], "", 80, "bpm", 0], [0, 7, 807, at[1], "", 300, "mg/dL", 1]]
    write(folder / "CHARTEVENTS.csv", body, chart)
    lab = [[i, 8, 50931, str(START + timedelta(hours=6 * i)), "", 120 + i, "mg/dL"] for i in range(9)]
    write(folder / "LABEVENTS.csv", lab, chart[:-1])
    write(folder / "ADMISSIONS.csv", [[1, 7]], ["ROW_ID", "SUBJECT_ID"])
    store, report = prepare(folder)
    assert (len(store), report.files) == (1, 3)
    np.testing.assert_array_equal(segments_of(store, 0)[0].values[::6], curve(60))
    assert report.counts_by_code[Code.OTHER_ROW] == 2
    assert report.counts_by_code[Code.COLUMNS_MISSING] == 1
    assert report.counts_by_code[Code.SHORT_SEGMENT] == report.counts_by_code[Code.SHORT_SEGMENT_READING] == 9


def test_a_mapping_in_site_toml_names_columns_of_any_language(tmp_path, prepare):
    table = tmp_path / "site.toml"
    tasks = ("glucose-forecast",)
    policy = SitePolicy(name="st-anna", declared_patients=10, tasks=tasks, max_epsilon=1.0, max_delta=0.01)
    policy.write(table)
    text = table.read_text() + (
        '[glucose]\npatient = "Fallnummer"\ntime = "Messzeit"\nglucose = "Gewebezucker"\n'
        'time-format = "%d.%m.%y %H:%M"\nunit = "mmol/L"\ntime-zone = "Europe/Vienna"\n'
    )
    table.write_text(text)
    assert SitePolicy.read(table) == policy
    body = [
        [
            MARK,
            (START + timedelta(minutes=5 * i)).strftime("%d.%m.%y %H:%M"),
            f"{v / MG_DL_PER_MMOL_L:.1f}".replace(".", ","),
        ]
        for i, v in enumerate(curve(200))
    ]
    path = write(tmp_path / "a.csv", body, ["Fallnummer", "Messzeit", "Gewebezucker"], delimiter=";")
    with pytest.raises(IntakeError, match=r"name its columns in site\.toml \[glucose\]"):
        prepare(path)
    report = prepare_glucose(path, tmp_path / "store", SECRET, mapping=read_mapping(table))
    segment = segments_of(RecordStore.open(tmp_path / "store"), 0)[0]
    np.testing.assert_allclose(segment.values, curve(200), atol=1.0)
    assert report.patients == 1


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"tim": "x"}, "unknown keys: tim"),
        ({"time": "x"}, "time and glucose"),
        ({"time": 3, "glucose": "g"}, "a text for: time"),
        ({"unit": "g/l"}, "unit"),
        ({"time-zone": "Mars/Olympus"}, "time-zone"),
        ({"time-zone": "../etc"}, "time-zone"),
        ({"preset": "nokia"}, "preset"),
    ],
)
def test_a_wrong_mapping_is_refused(table, says):
    with pytest.raises(IntakeError, match=says):
        parse_mapping(table)


def serials(body):
    return [[p, f"{45361 + i / 288:.5f}", v] for i, (p, _, v) in enumerate(body)]


BAD = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "blank": (lambda p: p.write_bytes(b"\xff\xfe\n\0\n\0"), "is empty"),
    "rubbish": (lambda p: p.write_bytes(np.random.default_rng(0).bytes(200_000)), "no header row"),
    "nul bytes": (lambda p: p.write_bytes(b"\0\x01\0" * 50_000), "no header row"),
    "other language": (lambda p: write(p, rows(), ["paciente", "fecha", "glucosa"]), "no header row"),
    "header only, elsewhere": (lambda p: write(p, rows(), header=["a"]), "no header row"),
    "cut gzip": (lambda p: p.write_bytes(gzip.compress(write(p, rows(5000)).read_bytes())[:-900]), "to its end"),
    "damaged gzip": (lambda p: p.write_bytes(b"\x1f\x8b" + bytes(90)), "to its end"),
    "serials": (lambda p: write(p, serials(rows())), "date serials"),
    "words": (lambda p: write(p, [[MARK, "noon", v] for *_, v in rows()]), "time-format"),
    "no zone": (lambda p: write(p, [[MARK, t + "Z", v] for _, t, v in rows()]), "time-zone"),
    "mmol as mg/dL": (
        lambda p: write(p, rows(values=curve(200) / 18)),
        r'Set unit = "mmol/L".* in site\.toml \[glucose',
    ),
    "mg/dL as mmol": (
        lambda p: write(p, rows(), ["patient_id", "timestamp", "glucose_mmol_l"]),
        r"wrong-unit 200.*Set unit",
    ),
    "both units": (
        lambda p: write(p, rows(values=np.append(curve(200), curve(100) / 18))),
        "mmol/L and mg/dL under one heading",
    ),
    "nothing long enough": (lambda p: write(p, rows(50)), "Nothing usable .*short-segment 1"),
    "header and no row": (lambda p: write(p, []), "Nothing usable"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_in_one_sentence_that_quotes_nothing(tmp_path, prepare, kind, caplog):
    make, says = BAD[kind]
    path = tmp_path / f"{MARK}.csv"
    make(path)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(IntakeError, match=says) as caught:
        prepare(path)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert MARK not in str(caught.value) + caplog.text
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_date_serials_are_read_where_the_hospital_says_so(tmp_path, prepare):
    store, _ = prepare(write(tmp_path / "a.csv", serials(rows())), time_format="serial")
    assert segments_of(store, 0)[0].minute_of_day[:3].tolist() == [0, 5, 10]


def test_in_a_folder_bad_files_are_counted_and_the_rest_is_used(tmp_path, prepare):
    folder = tmp_path / "in"
    (folder / "anna").mkdir(parents=True)
    write(folder / "good.csv.txt", rows())
    clarity = [[0, t, "EGV", "", "", "", "", v] for _, t, v in rows(200)]
    write(folder / "anna" / "first.csv", clarity[:120], CLARITY)
    write(folder / "anna" / "second.csv", clarity[100:], CLARITY)
    (folder / "readme.pdf").write_bytes(b"x")
    (folder / "empty.csv").write_bytes(b"")
    (folder / "link.csv").symlink_to(folder / "good.csv.txt")
    store, report = prepare(folder)
    assert len(store) == 2
    assert {len(s) for _, s in all_segments(store)} == {200}
    assert report.counts_by_code == {Code.SYMLINK: 1, Code.NOT_CSV: 1, Code.EMPTY: 1, Code.DUPLICATE_READING: 20}
    assert json.loads(json.dumps(report.counts()))["codes"]["empty"] == 1


def test_no_name_of_a_patient_is_in_the_store(tmp_path, prepare):
    prepare(write(tmp_path / "a.csv", rows()))
    for file in (tmp_path / "store").iterdir():
        assert MARK.encode() not in file.read_bytes()
    assert "2024" not in (tmp_path / "store" / "store.json").read_text()


ZONE = ZoneInfo("Europe/Berlin")


def local(utc_minutes, start):
    """Return local clock readings of a sensor that reads every 5 minutes of elapsed time."""
    return [(start + timedelta(minutes=m)).astimezone(ZONE).replace(tzinfo=None) for m in utc_minutes]


@pytest.mark.parametrize(("day", "lost"), [("2024-03-31", 0), ("2024-10-27", 24)])
def test_a_change_of_clocks_with_a_zone(tmp_path, prepare, day, lost):
    start = datetime.fromisoformat(f"{day}T00:00:00").replace(tzinfo=ZONE) - timedelta(days=2)
    at = local(range(0, 4 * 1440, 5), start.astimezone(ZoneInfo("UTC")))
    body = [[MARK, t.isoformat(), v] for t, v in zip(at, curve(len(at)), strict=False)]
    store, report = prepare(write(tmp_path / "a.csv", body), time_zone="Europe/Berlin")
    assert report.counts_by_code.get(Code.CLOCK_CHANGE, 0) == lost
    # In spring nothing is lost and the jump is no gap; in autumn two hours cannot be told apart.
    assert report.segments == (2 if lost else 1)
    assert report.records == len(at) - lost
    minutes = np.concatenate([s.minute_of_day for s in segments_of(store, 0)])
    expected = [t.hour * 60 + t.minute for t in at]
    if not lost:
        assert minutes.tolist() == expected
    else:
        assert minutes[-500:].tolist() == expected[-500:]


def test_a_change_of_clocks_without_a_zone_ends_the_segment(tmp_path, prepare):
    start = datetime(2024, 10, 25, 22, tzinfo=ZoneInfo("UTC"))
    at = local(range(0, 4 * 1440, 5), start)
    _, report = prepare(
        write(tmp_path / "a.csv", [[MARK, t.isoformat(), v] for t, v in zip(at, curve(len(at)), strict=False)])
    )
    assert report.segments == 2
    repeats = report.counts_by_code.get(Code.DUPLICATE_READING, 0)
    assert report.counts_by_code[Code.CONFLICTING_READING] + 2 * repeats == 24


def test_times_with_an_offset_are_shown_on_the_hospitals_clock():
    times = parse_times(["2024-07-01T10:00:00Z", "2024-07-01T12:05:00", "2024-07-01T06:10:00-04:00"], None, ZONE)
    assert np.diff(times.elapsed_s).tolist() == [300, 300]
    assert [s // 60 % 1440 for s in times.local_s] == [720, 725, 730]


@given(st.datetimes(datetime(1990, 1, 1), datetime(2090, 1, 1)), st.sampled_from(["Europe/Berlin", "Asia/Kathmandu"]))
def test_local_times_agree_with_zoneinfo(stamp, name):
    stamp, zone = stamp.replace(microsecond=0), ZoneInfo(name)
    times = parse_times([stamp.isoformat()], None, zone)
    folds = {stamp.replace(tzinfo=zone, fold=fold).timestamp() for fold in (0, 1)}
    assert bool(times.certain[0]) == (len(folds) == 1)
    if times.certain[0]:
        assert times.elapsed_s[0] == folds.pop()


@pytest.mark.parametrize("form", ["%d.%m.%Y %H:%M:%S", "%d %B %Y %H:%M", "%H:%M %d/%m/%Y", "%Y%m%d%H%M"])
def test_any_time_format_reads_what_it_wrote(form):
    stamps = [datetime(2024, 1, 5, 23, 55) + timedelta(minutes=5 * i) for i in range(4)]
    times = parse_times([stamp.strftime(form) for stamp in stamps], form, None)
    assert times.valid.all()
    assert [b - a for a, b in pairwise(times.local_s)] == [300] * 3
    assert times.local_s[0] == (stamps[0] - datetime(1970, 1, 1)).total_seconds()


def test_unknown_times_carry_no_text():
    for texts, kind in (
        (["x"], UnknownTimesError),
        (["45361.5"], DateSerialsError),
        (["2024-01-01"], UnknownTimesError),
    ):
        with pytest.raises(kind) as caught:
            parse_times(texts, None, None)
        assert not caught.value.args


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(10, 620)), min_size=1, max_size=60), st.randoms())
def test_every_row_is_used_or_counted_once(tmp_path, events, shuffle):
    body = rows(200)
    body += [[MARK, (START + timedelta(minutes=5 * at, seconds=30)).isoformat(), v] for at, v in events]
    shuffle.shuffle(body)
    report = prepare_glucose(write(tmp_path / "a.csv", body), tmp_path / "store", SECRET)
    lost = sum(n for code, n in report.counts_by_code.items() if code.unit == "row")
    store = RecordStore.open(tmp_path / "store")
    assert report.rows == 200 + len(events)
    assert report.rows - lost >= 192
    for _, segment in all_segments(store):
        assert segment.values.min() >= 20
        assert segment.values.max() <= 600
        assert len(segment) >= 192


def test_a_million_rows_of_one_patient(tmp_path, prepare):
    path = tmp_path / "a.csv.gz"
    at = np.datetime_as_string(np.datetime64("2015-01-01T00:00") + np.arange(1_000_000) * np.timedelta64(5, "m"))
    values = curve(1_000_000).astype(int)
    with gzip.open(path, "wt", compresslevel=1, newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(HEADER)
        writer.writerows(zip(["x"] * len(at), at.tolist(), values.tolist(), strict=False))
    store, report = prepare(path)
    assert report.records == 1_000_000
    np.testing.assert_array_equal(store.arrays["glucose"], values)


def test_a_missing_source_and_a_store_of_another_kind(tmp_path, prepare, make_nodule_store):
    with pytest.raises(IntakeError, match="no such file"):
        prepare(tmp_path / "nowhere.csv")
    with pytest.raises(StorageError, match="ct-nodules"):
        segments_of(make_nodule_store(tmp_path / "ct"), 0)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("study", "patients"),
    [("hall2018", 57), ("colas2019", 202), ("AZT1D", 25), ("BIGIDEAs", 16), ("Bris-T1D_Open", 20)],
)
def test_the_five_studies(real_data, prepare, study, patients):
    store, report = prepare(real_data / "glucose" / f"{study}.csv.gz")
    assert len(store) == patients
    lost = sum(n for code, n in report.counts_by_code.items() if code.unit == "row")
    assert lost < 0.11 * report.rows
    assert report.records - report.interpolated == report.rows - lost  # their readings lie on the grid
    assert report.counts_by_code.get(Code.BAD_ROW, 0) == 0
