"""Whatever lies where a file should be: nothing blocks, nothing is unbounded, nothing goes uncounted."""

import gzip
import io
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from client.intake import glucose_text
from client.intake.annotations import read_annotations
from client.intake.exports import holds_glucose
from client.intake.files import MAX_LINE, NotAFileError, lines_of, list_files, open_plain
from client.intake.glucose import prepare_glucose
from client.intake.links import read_links
from client.intake.rejects import GlucoseCode
from shared.errors import IntakeError, StorageError
from shared.records import PatientItem, write_store

from .test_same_patient import waves  # isort: skip

BOMB = """
import resource, sys
from pathlib import Path
from client.intake.glucose import prepare_glucose
from shared.errors import IntakeError
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]) * 2**20,) * 2)
try:
    prepare_glucose(Path(sys.argv[1]), Path(sys.argv[1] + ".store"), bytes(32))
except IntakeError as error:
    print(error)
"""


def bomb(path, head, size):
    """Write a packed file whose one line unfolds to ``size`` bytes."""
    with gzip.open(path, "wb", compresslevel=9) as handle:
        handle.write(head)
        for _ in range(size // 2**20):
            handle.write(b"x" * 2**20)
    return path


@pytest.mark.parametrize("head", [b"", b"patient_id,timestamp,glucose_mg_dl\n"])
def test_a_packed_line_of_a_gigabyte_takes_little_memory_and_is_refused(tmp_path, head):
    path = bomb(tmp_path / "export.csv.gz", head, 2**30)
    assert path.stat().st_size < 2**21
    done = subprocess.run(
        [sys.executable, "-c", BOMB, path, "400"], capture_output=True, text=True, check=False, timeout=240
    )
    assert "unfolds to far more" in done.stdout, done.stderr


def test_a_packed_export_of_ordinary_content_is_far_from_the_bound(tmp_path):
    content = waves(tmp_path / "a.csv", "A", readings=5000).read_bytes()
    assert len(content) < glucose_text.MAX_RATIO / 5 * len(gzip.compress(content))


def test_a_line_too_long_is_a_bad_row_and_the_rows_around_it_are_read(tmp_path):
    path = waves(tmp_path / "a.csv", "A")
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *rows[:5], rows[5] + "x" * MAX_LINE, *rows[6:]]))
    report = prepare_glucose(path, tmp_path / "store", bytes(32))
    assert report.counts_by_code[GlucoseCode.BAD_ROW] == 1
    assert report.rows == 230


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", ""])
def test_lines_are_whole_or_told_to_be_too_long(end):
    long = "y" * (3 * MAX_LINE + 5)
    text = f"a\n{long}\nb\n{'z' * (MAX_LINE - 1)}\n{long}{end}"
    found = [line and line.strip() for line in lines_of(io.StringIO(text, newline=""))]
    assert [line for line in found if line != ""] == ["a", None, "b", "z" * (MAX_LINE - 1), None]


@pytest.fixture(params=["pipe", "device", "folder"])
def special(request, tmp_path):
    path = tmp_path / "named.csv"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")  # a link that the user names is followed
    return path


def test_what_is_no_file_is_refused_wherever_it_is_named(special, tmp_path):
    with pytest.raises(NotAFileError):
        open_plain(special)
    for read in (read_annotations, lambda path: read_links(path, bytes(32))):
        with pytest.raises(IntakeError, match="it is a pipe, socket, device or folder, not a file"):
            read(special)
    if not special.is_dir():
        for read in (holds_glucose, lambda path: prepare_glucose(path, tmp_path / "s", bytes(32))):
            with pytest.raises(IntakeError, match="pipe, socket or device"):
                read(special)


def test_pipes_and_links_in_a_folder_are_counted_under_codes_of_their_own(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    waves(folder / "a.csv", "A")
    os.mkfifo(folder / "b.csv")
    os.mkfifo(folder / "c.dcm.txt.bin")
    (folder / "d.csv").symlink_to("/dev/zero")
    assert holds_glucose(folder)
    report = prepare_glucose(folder, tmp_path / "store", bytes(32))
    assert report.counts_by_code == {GlucoseCode.NOT_A_FILE: 2, GlucoseCode.SYMLINK: 1}


def test_a_link_found_in_an_export_is_not_followed_even_if_it_came_after_the_listing(tmp_path):
    (tmp_path / "target").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert open_plain(tmp_path / "link").close() is None
    with pytest.raises(OSError, match="symbolic links"):
        open_plain(tmp_path / "link", follow=False)
    assert list_files(tmp_path).links == 1


def test_annotations_with_semicolons_and_decimal_commas_are_read(tmp_path):
    path = tmp_path / "annotations.csv"
    path.write_text("seriesuid;coordX;coordY;coordZ;diameter_mm;malignancy\n1.2.3;1,5;2;3;7,25;4\n")
    (found,), rejected = read_annotations(path)
    assert (found.series_uid, found.centre_mm, found.diameter_mm) == ("1.2.3", (1.5, 2.0, 3.0), 7.25)
    assert not rejected


def test_a_full_disk_leaves_nothing_and_is_told_as_the_system_tells_it(tmp_path, disk_full_after):
    item = PatientItem(bytes(16), {"image": np.zeros((4096, 64), np.float64)})
    with disk_full_after(2**20), pytest.raises(StorageError, match=os.strerror(27)):
        write_store(tmp_path / "store", kind="k", patients=[item], attributes={})
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 2**20
