"""Arbitrary bytes never raise, and neither names, order nor workers change the store."""

import contextlib
import math
import os
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from client.intake.dicom import SliceHeader, read_header, read_hounsfield
from client.intake.lanes import Lanes
from client.intake.nodules import prepare_nodules
from client.intake.rejects import RejectCode, Rejected

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless)
FUZZ = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def _assert_read_or_rejected(path):
    """Read as intake does; anything but a code or an image fails the test by raising."""
    header = read_header(path)
    if isinstance(header, SliceHeader):
        with contextlib.suppress(Rejected):
            assert read_hounsfield(header, slice(0, 4), slice(0, 4)).dtype == np.float32
    else:
        assert isinstance(header, RejectCode)


@pytest.fixture(params=SYNTAXES, ids=lambda syntax: syntax.keyword)
def valid(request, export) -> bytes:
    export.cube(count=1, side=24, syntax=request.param)
    return next(export.dicom.iterdir()).read_bytes()


@FUZZ
@given(content=st.binary(max_size=600))
def test_random_bytes(tmp_path, content):
    path = tmp_path / "file"
    for prefix in (b"", bytes(128) + b"DICM"):
        path.write_bytes(prefix + content)
        _assert_read_or_rejected(path)


@FUZZ
@given(data=st.data())
def test_truncations_and_flipped_bytes_of_a_valid_file(tmp_path, valid, data):
    path = tmp_path / "file"
    content = bytearray(valid)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(132, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[: data.draw(st.sampled_from([cut, len(content)]))])
    _assert_read_or_rejected(path)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_that_kills_its_decoder_costs_one_nodule(export, workers):
    """GDCM ends the whole process on a JPEG-LS precision of 127 bits; the other nodules must not notice."""
    for k in range(3):
        uid = export.cube(count=4, patient=f"P-{k}", syntax=JPEGLSLossless)
        export.annotate(uid, (24, 24, 3))
        if k == 1:
            for path in export.dicom.glob(f"{uid}*"):
                content = bytearray(path.read_bytes())
                content[content.index(b"\xff\xd8\xff\xf7") + 6] = 127
                path.write_bytes(content)
    report, _ = export.prepare(workers=workers)
    assert report.rejected == {RejectCode.UNDECODABLE: 1}
    assert report.nodules == 2


@pytest.mark.parametrize("count", [1, 2])
def test_a_lane_survives_what_its_process_does_not(count):
    """The lane's process cannot import this module, so the work is a call of the standard library."""
    with Lanes(count) as lanes:
        for _ in range(2):
            died = lanes.map(os._exit, [3, 0], crashed=lambda code: code + 1, isolate=lambda _code: True)
            assert list(died) == [4, 1]
            alive = lanes.map(math.sqrt, [1, 4, 9], crashed=math.nan.__add__, isolate=lambda _item: True)
            assert list(alive) == [1, 2, 3]


def _bytes(store):
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


@pytest.fixture
def busy(export):
    """Six patients, eight series, copies and bad files."""
    rng = np.random.default_rng(3)
    for k in range(8):
        volume = rng.integers(-1000, 400, (6, 40, 40))
        uid = export.series(volume, positions=[(0, 0, 2 * z) for z in range(6)], patient=f"P-{k % 6}")
        for _ in range(3):
            export.annotate(uid, rng.uniform(5, 9, 3).round(3), malignancy=rng.choice([1, 2.5, 4, 5]))
    for k in range(10):
        (export.dicom / f"junk-{k}").write_bytes(rng.bytes(300))
    export.annotate("1.2.3")
    return export


def test_any_number_of_workers_gives_the_same_store(busy):
    told = []
    reports = [busy.prepare(workers=1, on_progress=lambda *step: told.append(step))[0]]
    alone = _bytes(busy.store)
    reports.append(busy.prepare(workers=2)[0])
    assert _bytes(busy.store) == alone
    assert reports[0] == reports[1]
    assert [step for step in told if step[1] == step[2]] == [("headers", 58, 58), ("nodules", 24, 24)]


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_and_names_of_files_and_rows_give_the_same_store(busy, seed):
    report, _ = busy.prepare()
    before = _bytes(busy.store)
    shuffle = random.Random(seed)
    paths = list(busy.dicom.iterdir())
    names = shuffle.sample(range(1000), len(paths))
    for path, name in zip(paths, names, strict=True):
        folder = busy.dicom / f"folder {name % 7}"
        folder.mkdir(exist_ok=True)
        path.rename(folder / f"{name:04}")
    shuffle.shuffle(busy.rows)
    assert busy.prepare()[0] == report
    assert _bytes(busy.store) == before


def test_every_file_and_row_is_used_or_counted_once(busy):
    report, _ = busy.prepare()
    by_unit = {unit: sum(n for c, n in report.rejected.items() if c.unit == unit) for unit in ("file", "annotation")}
    assert report.files == 48 + by_unit["file"]
    assert report.nodules + by_unit["annotation"] == len(busy.rows)


def test_a_rerun_does_not_read_its_own_store_or_list(export):
    uid = export.cube()
    export.annotate(uid)
    export.dicom.mkdir(exist_ok=True)
    annotations = export.dicom / "annotations.csv"
    annotations.write_bytes(export.annotations.read_bytes())
    for _ in range(2):
        report = prepare_nodules(export.dicom, annotations, export.dicom / "store", bytes(32))
        assert (report.files, report.rejected) == (8, {})
