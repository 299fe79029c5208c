"""The monitor on streams as they are: late, doubled, broken, cut off and taken up again."""

import contextlib
import hashlib
import http.client
import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from client import cli
from client.config import SitePolicy
from client.intake.glucose import prepare_glucose
from client.intake.pseudonyms import PatientIdentity, pseudonym
from client.monitor.alarm import DEFAULT_RULES, MODEL_FAILED, NO_FORECAST, SENSOR_STUCK, Stage
from client.monitor.fhir import detected_issue, observation, write_fhir
from client.monitor.forecaster import KEPT_S, Fate, History
from client.monitor.listen import MOST_BYTES, listening
from client.monitor.memory import AlertFile, Memory
from client.monitor.stream import Lines, Reading, growing_file, parse_line, standard_input
from client.monitor.view import render, sparkline
from client.monitor.watch import Watch
from client.trained import Trained, load_trained
from server.checkpoints import load_weights, save_checkpoint
from shared.errors import PlanError, StorageError
from shared.personal import save_personal
from shared.provenance.keys import SIGNING_PUB, ensure_signing_key, public_line
from shared.provenance.sidecar import read_sidecar, write_sidecar
from shared.provenance.signing import signed
from shared.records import RecordStore
from shared.tasks.glucose_forecast import HISTORY, TASK, readings_at

NOW_S = datetime(2024, 6, 1, tzinfo=UTC).timestamp()
RULES = {rule.kind: rule for rule in DEFAULT_RULES}


class Crash(Exception):  # noqa: N818
    """The monitor's process ends here."""


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Return fresh weights: they forecast the last reading, with a band of 14 mg/dL on either side."""
    torch.manual_seed(0)
    return Trained(TASK.build().eval(), "0" * 64)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save_checkpoint(tmp_path / "c", TASK.build(), run="r", number=1, task=TASK.name, plan_digest="p").path


def stamp(minute: float) -> str:
    return datetime.fromtimestamp(1_704_067_200 + 60 * minute, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def waves(people: int = 2, steps: int = 120, sway: float = 70.0) -> list[str]:
    """Return rows of patients who go from too low to too high and back, everybody's next row in turn."""
    return [
        f"P-{who},{stamp(5 * k)},{130 + sway * np.sin(k / (6 + who)):.0f}"
        for k in range(steps)
        for who in range(people)
    ]


def messy(rows: list[str], seed: int) -> list[str]:
    """Lose, repeat, delay and spoil some rows."""
    rng = np.random.default_rng(seed)
    kept = [row for row in rows if rng.random() > 0.05]
    order = np.argsort(np.arange(len(kept)) + np.where(rng.random(len(kept)) < 0.1, rng.integers(0, 12, len(kept)), 0))
    found = []
    for index in order:
        found += [kept[index]] * (2 if rng.random() < 0.05 else 1)
        if rng.random() < 0.05:
            found.append(kept[index][:-1] + "x")
    return found


def alerts_in(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def watch_all(trained: Trained, rows: list[str], sizes: Iterator[int] | None = None, **options: object) -> Watch:
    watch = Watch(trained, DEFAULT_RULES, Memory(None), now=lambda: NOW_S, **options)
    for batch in batches(rows, sizes):
        watch.take(Lines(batch))
    return watch


def batches(rows: list[str], sizes: Iterator[int] | None = None) -> Iterator[list[str]]:
    at = 0
    while at < len(rows):
        size = next(sizes) if sizes else 10
        yield rows[at : at + size]
        at += size


# What a line says.


@pytest.mark.parametrize(
    ("line", "fate"),
    [
        ("patient_id,timestamp,glucose_mg_dl", Fate.HEADER),
        ("P,2024-01-01T00:00,100,x", Fate.BAD_ROW),
        ("P,2024-01-01T00:00", Fate.BAD_ROW),
        ("P,2024-01-01,100", Fate.BAD_ROW),
        ("P,01/02/2024 10:00,100", Fate.BAD_ROW),
        ("P,2024-01-01T00:00,nan", Fate.BAD_ROW),
        ("P,2024-01-01T00:00,inf", Fate.BAD_ROW),
        ("P,2024-01-01T00:00,", Fate.BAD_ROW),
        (",2024-01-01T00:00,100", Fate.BAD_ROW),
        ("P\x1b[2J,2024-01-01T00:00,100", Fate.BAD_ROW),
        ("P\0,2024-01-01T00:00,100", Fate.BAD_ROW),
        ("P,2024-01-01T00:00,100,-3", Fate.BAD_ROW),
        ("P,2024-01-01T00:00,7.1", Fate.OUT_OF_RANGE),
        ("P,2024-01-01T00:00,900", Fate.OUT_OF_RANGE),
        ("P,2034-01-01T00:00,100", Fate.AHEAD),
        ("P,9999-12-31T23:59:59-23:59,100", Fate.BAD_ROW),
        ("P,2024-03-31T02:30,100", Fate.CLOCK_CHANGE),
        ("P,2023-10-29T02:30,100", Fate.CLOCK_CHANGE),
        ("{" * 3000, Fate.BAD_ROW),
        ("[" * 3000, Fate.BAD_ROW),
        ("x" * 100_000, Fate.BAD_ROW),
        ('{"patient_id": true, "timestamp": "2024-01-01T00:00", "glucose_mg_dl": 100}', Fate.BAD_ROW),
        ('{"patient_id": {"a": 1}, "timestamp": "2024-01-01T00:00", "glucose_mg_dl": 100}', Fate.BAD_ROW),
        ('{"patient_id": "P", "glucose_mg_dl": 100}', Fate.BAD_ROW),
    ],
)
def test_a_line_that_says_nothing_is_counted_under_one_word(line: str, fate: Fate) -> None:
    assert parse_line(line, ZoneInfo("Europe/Vienna"), NOW_S) is fate


def test_csv_and_json_say_the_same_and_zones_are_kept_apart() -> None:
    zone = ZoneInfo("Europe/Vienna")
    line = parse_line("P-1,2024-01-01T10:00,100,1.5,20", zone, NOW_S)
    row = {"patient_id": "P-1", "timestamp": "2024-01-01T09:00:00Z", "glucose_mg_dl": 100, "insulin_units": 1.5}
    assert line == parse_line(json.dumps({**row, "carbohydrate_g": "20"}), zone, NOW_S)
    assert isinstance(line, Reading)
    assert (line.time_s, line.offset_s) == (1_704_099_600, 3600)
    assert "P-1" not in repr(line)
    low = parse_line("P-1,2024-01-01T10:00,Low", None, NOW_S)
    assert isinstance(low, Reading)
    assert low.glucose == 40.0
    dose = parse_line("P-1,2024-01-01T10:00,,2", None, NOW_S)
    assert isinstance(dose, Reading)
    assert (dose.glucose, dose.insulin) == (None, 2.0)


def test_only_a_stamp_that_hides_its_zone_may_be_hours_ahead_of_the_clock() -> None:
    def fate(minutes: float, offset: str, zone: ZoneInfo | None = None) -> object:
        ahead = datetime.fromtimestamp(NOW_S + 60 * minutes, UTC)
        found = parse_line(f"P,{ahead:%Y-%m-%dT%H:%M:%S}{offset},100", zone, NOW_S)
        return found if isinstance(found, Fate) else "read"

    assert (fate(14, "Z"), fate(16, "Z"), fate(14 * 60, "Z")) == ("read", Fate.AHEAD, Fate.AHEAD)
    assert (fate(14 * 60, "+14:00"), fate(14 * 60 + 16, "+14:00")) == ("read", Fate.AHEAD)
    assert (fate(14 * 60 + 14, ""), fate(14 * 60 + 16, "")) == ("read", Fate.AHEAD)
    assert (fate(14, "", ZoneInfo("UTC")), fate(16, "", ZoneInfo("UTC"))) == ("read", Fate.AHEAD)


@pytest.mark.parametrize(
    ("text", "zone", "said", "clock"),
    [
        ("2024-05-01T23:30:00-05:00", None, "2024-05-01T23:30:00-05:00", "23:30"),
        ("2024-05-01T23:30:00Z", None, "2024-05-01T23:30:00+00:00", "23:30"),
        ("2024-05-01T23:30:00", None, "2024-05-01T23:30:00", "23:30"),
        ("2024-05-01T23:30:00-05:00", "Europe/Vienna", "2024-05-02T06:30:00+02:00", "06:30"),
        ("2024-05-01T23:30:00", "America/Bogota", "2024-05-01T23:30:00-05:00", "23:30"),
    ],
)
def test_alerts_and_screen_keep_the_local_clock(
    trained: Trained, text: str, zone: str | None, said: str, clock: str
) -> None:
    watch = Watch(trained, DEFAULT_RULES, Memory(None), zone=ZoneInfo(zone) if zone else None, now=lambda: NOW_S)
    (alert,) = watch.take(Lines([f"P,{text},50"]))
    assert (alert.time, alert.episode_start) == (said, said)
    assert observation(alert)["effectiveDateTime"] == detected_issue(alert)["identifiedDateTime"] == said
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(render(watch.sights, RULES, "", 40, NOW_S))
    assert clock in console.export_text()


@given(st.binary(max_size=200))
def test_no_bytes_can_stop_the_stream(content: bytes) -> None:
    text = content.decode("utf-8", "replace")
    assert isinstance(parse_line(text, None, NOW_S), Fate | Reading)


# What a forecast looks back on.


def test_the_window_is_what_intake_would_have_stored(tmp_path: Path) -> None:
    """Oracle: intake and the task's own view of its store, on a record with a short gap and with doses."""
    rows, history = ["patient_id,timestamp,glucose_mg_dl,insulin_units,carbohydrate_g"], History()
    for k in range(200):
        units, grams = (1.5 if k % 17 == 0 else 0.0), (30.0 if k % 23 == 0 else 0.0)
        if 185 <= k < 190:
            continue
        rows.append(f"P,{stamp(5 * k)},{110 + k % 29},{units or ''},{grams or ''}")
        if units or grams:
            history.dose(300 * k, units, grams)
        history.add(300 * k, 110.0 + k % 29)
    (tmp_path / "e.csv").write_text("\n".join(rows))
    prepare_glucose(tmp_path / "e.csv", tmp_path / "store", bytes(32))
    store = RecordStore.open(tmp_path / "store")
    window = history.window()
    assert window is not None
    expected = readings_at(store, np.array([len(store.arrays["glucose"])]))[0].numpy()
    np.testing.assert_allclose(window, expected)


def test_gaps_stuck_sensors_and_contradictions_are_not_forecast_from() -> None:
    history = History()
    for k in range(HISTORY):
        assert history.window() is None
        history.add(300 * k, 100.0 + k)
    assert history.window() is not None
    assert history.add(300 * 34, 999.0) is Fate.CONFLICT
    assert history.add(300 * 34, 134.0) is Fate.CONFLICT
    assert history.add(300 * 35, 135.0) is Fate.DUPLICATE
    window = history.window()
    assert window is not None
    assert window[-2, 0] == pytest.approx(134.0)  # between its neighbours
    history.add(300 * 35 + 60 * 46, 100.0)
    assert history.after_gap()
    assert history.window() is None
    stuck = History()
    for k in range(60):
        stuck.add(300 * k, 123.0)
    assert stuck.window() is None
    for k in range(60, 120):
        stuck.add(300 * k, 400.0)  # a sensor's limit
    assert stuck.window() is not None
    assert stuck.readings[0][0] >= 300 * 119 - KEPT_S
    assert stuck.add(0, 100.0) is Fate.TOO_LATE
    assert History.from_json(json.loads(json.dumps(stuck.to_json()))) == stuck


# What the monitor makes of a stream.


@settings(max_examples=8)
@given(st.integers(0, 1000), st.lists(st.integers(1, 40), min_size=50, max_size=50))
def test_batches_do_not_matter(trained: Trained, seed: int, sizes: list[int]) -> None:
    rows = messy(waves(steps=70), seed)
    said: list[list[str]] = []
    for cut in (iter(sizes * 20), iter([1] * 5000)):
        memory = Memory(None)
        memory.secret = bytes(32)
        watch = Watch(trained, DEFAULT_RULES, memory, now=lambda: NOW_S)
        said.append(sorted(alert.id for batch in batches(rows, cut) for alert in watch.take(Lines(batch))))
    assert said[0] == said[1]
    assert len(said[0]) > 4


def test_every_line_has_one_fate(trained: Trained) -> None:
    rows = messy(waves(), 3)
    watch = watch_all(trained, rows)
    assert sum(watch.fates.values()) == len(rows)
    assert {Fate.READ, Fate.LATE, Fate.DUPLICATE, Fate.BAD_ROW} <= set(watch.fates)


def test_a_late_reading_warns_nobody_of_the_past(trained: Trained) -> None:
    rows = [f"P,{stamp(5 * k)},{120 + k % 2}" for k in range(40)]
    watch = Watch(trained, DEFAULT_RULES, Memory(None), now=lambda: NOW_S)
    assert watch.take(Lines(rows)) == []
    assert watch.take(Lines([f"P,{stamp(5 * 39 - 2)},50"])) == []
    assert watch.fates[Fate.LATE] == 1


def test_a_clock_in_the_future_does_not_make_all_others_late(trained: Trained) -> None:
    watch = watch_all(trained, [f"P,{stamp(0)},120", "P,2031-01-01T00:00,120", f"P,{stamp(5)},50"])
    assert watch.fates == {Fate.READ: 2, Fate.AHEAD: 1}
    assert watch.sights["P"].stages["low"] is Stage.PRESENT


def live(trained: Trained, folder: Path, crash_at: int = -1, where: str = "") -> bool:
    """Run one life of a monitor on a file, five lines at a time; say whether it reached the end.

    It ends at the ``crash_at``-th batch with an alert: before the alert is written, between that and the state, or
    after both.
    """
    left = crash_at

    def crash(point: str, alerts: object) -> None:
        nonlocal left
        if alerts and point == where:
            left -= 1
            if left == 0:
                raise Crash

    with Memory(folder / "state") as memory:
        alerts = AlertFile(folder / "alerts.jsonl")
        writers = [lambda new: crash("before", new), alerts.append, lambda new: crash("between", new)]
        watch = Watch(trained, DEFAULT_RULES, memory, writers=writers, now=lambda: NOW_S)
        try:
            for lines in growing_file(folder / "stream.csv", memory.position, follow=False):
                for at in range(0, len(lines.texts), 5):
                    last = at + 5 >= len(lines.texts)
                    crash("after", watch.take(Lines(lines.texts[at : at + 5], lines.position if last else "")))
        except Crash:
            return False
    return True


@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_a_monitor_that_dies_anywhere_loses_and_repeats_no_alert(trained: Trained, tmp_path: Path, where: str) -> None:
    rows = "\n".join(messy(waves(1, 100), 5)) + "\n"
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "stream.csv").write_text(rows)
    assert live(trained, whole)
    expected = [alert["id"] for alert in alerts_in(whole / "alerts.jsonl")]
    assert len(expected) > 5
    with Memory(whole / "state") as memory:
        secret = memory.secret  # ids can be compared only under one secret
    for crash_at in range(1, len(expected)):
        folder = tmp_path / str(crash_at)
        folder.mkdir()
        (folder / "stream.csv").write_text(rows)
        with Memory(folder / "state") as memory:
            memory._set("secret", secret.hex())
        if live(trained, folder, crash_at, where):
            break  # fewer batches than alerts
        with (folder / "alerts.jsonl").open("ab") as handle:
            handle.write(b'{"id": "cut o')  # the power went while it was written
        assert live(trained, folder)
        assert [alert["id"] for alert in alerts_in(folder / "alerts.jsonl")] == expected
    assert crash_at > 3


def test_a_growing_file_is_read_on_over_restarts_rotation_and_cut_lines(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("one\ntw")
    source = growing_file(path, follow=True, poll_s=0.0)
    first = next(source)
    assert first.texts == ["one"]
    with path.open("a") as handle:
        handle.write("o\nthree\n")
    second = next(lines for lines in source if lines.texts)
    assert second.texts == ["two", "three"]
    again = growing_file(path, first.position, follow=False)
    assert [text for lines in again for text in lines.texts] == ["two", "three"]
    path.rename(tmp_path / "s.csv.1")
    path.write_text("four\n")
    assert next(lines for lines in source if lines.texts).texts == ["four"]
    path.write_text("5\n")
    assert next(lines for lines in source if lines.texts).texts == ["5"]
    source.close()
    with pytest.raises(StorageError, match="No such file"):
        next(growing_file(tmp_path / "absent"))


def test_another_file_in_the_old_ones_place_is_read_from_its_beginning(tmp_path: Path) -> None:
    path, head = tmp_path / "s.csv", "patient_id,timestamp,glucose_mg_dl\n"

    def read(position: str = "", key: bytes = bytes(32)) -> Lines:
        return next(growing_file(path, position, key=key, follow=False))

    path.write_text(head + "P-17,1,1\nP-17,2,2\n")
    inode, position = path.stat().st_ino, read().position
    assert "P-17" not in position
    assert read(position).texts == []
    path.write_text(head + "".join(f"P-17,{k},{k}\n" for k in range(3, 9)))
    assert path.stat().st_ino == inode  # as a file system may give it to a new file
    assert len(read(position).texts) == 7
    position = read().position
    with path.open("a") as handle:
        handle.write("P-17,9,9\n")
    assert read(position).texts == ["P-17,9,9"]
    of_old_state, of_other_file = f"{inode}:64", f"{inode + 1}:{position.partition(':')[2]}"
    assert len(read(of_old_state).texts) == len(read(of_other_file).texts) == 8
    assert len(read(position, key=b"x" * 32).texts) == 8


def test_standard_input_gives_whole_lines_and_drops_endless_ones() -> None:
    read, write = os.pipe()
    content = b"a,b,c\n" + b"y" * 200_000 + b"\nd,e,f\r\n\ng"
    sender = Thread(
        target=lambda: (os.write(write, content[:60_000]), os.write(write, content[60_000:]), os.close(write))
    )
    sender.start()
    found = list(standard_input(read))
    sender.join()
    os.close(read)
    assert [text.strip() for lines in found for text in lines.texts] == ["a,b,c", "\0", "d,e,f"]
    assert [lines.cut_off for lines in found if lines.cut_off] == [1]  # the g may be the beginning of anything


LONG = "y" * 5000
PIECES = st.lists(st.sampled_from(["P,2024-01-01T00:00,230", "P,2024-01-01T00:05,95", "", LONG]), max_size=6)


@given(PIECES, st.floats(0.0, 1.0))
def test_a_file_is_cut_into_the_same_lines_wherever_it_ended_for_a_while(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], share: float
) -> None:
    path, content = tmp_path_factory.mktemp("grown") / "s.csv", "".join(piece + "\n" for piece in pieces).encode()
    cut = round(share * len(content))
    path.write_bytes(content[:cut])
    first = list(growing_file(path, follow=False))
    path.write_bytes(content)
    position = "".join(lines.position for lines in first)  # of the one part that so short a file has
    found = [text for lines in [*first, *growing_file(path, position, follow=False)] for text in lines.texts]
    assert [text.replace(LONG, "\0") for text in found] == [piece.replace(LONG, "\0") for piece in pieces if piece]
    assert sum(lines.cut_off for lines in first) == int(not content[:cut].endswith(b"\n") and cut > 0)


def test_a_number_cut_short_is_no_reading(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text(f"P,{stamp(0)},120\nP,{stamp(5)},23")
    with Memory(tmp_path / "state") as memory:
        watch = Watch(trained, DEFAULT_RULES, memory, now=lambda: NOW_S)
        said: list[str] = []
        for rest in ("", "0\n"):
            with path.open("a") as handle:
                handle.write(rest)
            for lines in growing_file(path, memory.position, follow=False):
                said += [alert.kind for alert in watch.take(lines)]
    assert said == ["high"]
    assert watch.fates == {Fate.READ: 2, Fate.CUT_OFF: 1}
    assert watch.sights["P"].history[-1][1] == 230.0


def test_two_monitors_do_not_share_a_state_and_no_other_file_is_one(tmp_path: Path) -> None:
    with Memory(tmp_path / "state"), pytest.raises(StorageError, match="another monitor"):
        Memory(tmp_path / "state")
    (tmp_path / "text").write_text("not a database, and long enough not to be empty" * 50)
    with pytest.raises(StorageError, match="no state"):
        Memory(tmp_path / "text")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600


def test_a_monitor_told_another_threshold_warns_afresh_and_takes_up_old_states(
    trained: Trained, tmp_path: Path
) -> None:
    def kinds(threshold: float, *rows: str) -> list[tuple[str, float]]:
        low = replace(DEFAULT_RULES[0], threshold_mg_dl=threshold)
        with Memory(tmp_path / "state") as memory:
            watch = Watch(trained, [low, DEFAULT_RULES[1]], memory, now=lambda: NOW_S)
            return [(alert.kind, alert.threshold_mg_dl) for alert in watch.take(Lines(list(rows)))]

    assert kinds(70.0, f"P,{stamp(0)},65") == [("low", 70.0)]
    assert kinds(70.0, f"P,{stamp(5)},64") == []
    assert kinds(54.0, *(f"P,{stamp(5 * k)},45" for k in range(2, 21))) == [("low", 54.0)]
    with sqlite3.connect(tmp_path / "state") as database:  # as it was written before thresholds were kept
        database.execute("UPDATE patients SET state = replace(state, ',\"threshold_mg_dl\":54.0', '')")
    database.close()
    assert kinds(54.0, f"P,{stamp(105)},45") == [("low", 54.0)]


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\x00 a picture without an end of line",
        b"patient_id,timestamp,glucose_mg_dl\nP,2024-01-01T00:00,100\n",
        b'{"id": "of something else"}\n',
        b'[{"id": 1}]\n{"id": "',
        b"[" * 100_000 + b"\n",
        b"{}",
    ],
)
def test_a_file_that_holds_no_alerts_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(StorageError, match=r"a\.jsonl is no file of .* --alerts"):
        AlertFile(tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == content


def test_alerts_cut_anywhere_are_taken_up_again(some_alerts: list, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    AlertFile(path).append(some_alerts[:3])
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(len(whole) - last, len(whole) + 1):
        path.write_bytes(whole[:cut])
        AlertFile(path).append(some_alerts[:3])
        assert path.read_bytes() == whole


def test_the_state_names_nobody(trained: Trained, tmp_path: Path) -> None:
    with Memory(tmp_path / "state") as memory:
        Watch(trained, DEFAULT_RULES, memory, now=lambda: NOW_S).take(Lines(waves()))
    assert b"P-0" not in (tmp_path / "state").read_bytes()


# HTTP.


def post(port: int, content: bytes, **headers: str) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", content, headers, method="POST")
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_posts_are_answered_when_their_outcome_is_on_the_disk(trained: Trained, tmp_path: Path) -> None:
    with Memory(tmp_path / "state") as memory, listening(0) as (port, posts):
        alerts = AlertFile(tmp_path / "a.jsonl")
        watch = Watch(trained, DEFAULT_RULES, memory, writers=[alerts.append], now=lambda: NOW_S)
        found: list[tuple[int, dict[str, object]]] = []
        content = f"P,{stamp(0)},60\nP,{stamp(5)},junk\n".encode()
        for _ in range(2):
            sender = Thread(target=lambda: found.append(post(port, content)))
            sender.start()
            watch.take(next(lines for lines in posts if lines.texts))
            sender.join()
        assert found == [(200, {"read": 1, "bad-row": 1}), (200, {"duplicate-reading": 1, "bad-row": 1})]
        assert [alert["kind"] for alert in alerts_in(tmp_path / "a.jsonl")] == ["low"]
        assert post(port, content, Origin="https://evil.example")[0] == 403
        assert post(port, content, Host="evil.example")[0] == 403
        assert post(port, b"x" * (MOST_BYTES + 1))[0] == 413


def test_a_post_that_ends_early_is_left_out_as_a_whole(trained: Trained) -> None:
    content = f"P,{stamp(0)},120\nP,{stamp(5)},230".encode()
    with listening(0) as (port, posts), socket.create_connection(("127.0.0.1", port), timeout=30) as sender:
        head = f"POST / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        sender.sendall(head + content[:-1])
        sender.shutdown(socket.SHUT_WR)
        watch = Watch(trained, DEFAULT_RULES, Memory(None), now=lambda: NOW_S)
        assert watch.take(next(lines for lines in posts if lines.texts or lines.cut_off)) == []
        with sender.makefile("rb") as answer:
            assert b" 400 " in answer.readline()
    assert watch.fates == {Fate.CUT_OFF: 1}
    assert not watch.sights


# What is made of alerts.


@pytest.fixture
def some_alerts(trained: Trained) -> list:
    watch = Watch(trained, DEFAULT_RULES, Memory(None), zone=ZoneInfo("Europe/Vienna"), now=lambda: NOW_S)
    return watch.take(Lines(waves()))


def test_fhir_resources_have_what_r4_requires(some_alerts: list, tmp_path: Path) -> None:
    """The required elements, and the bindings of required strength, of R4's Observation and DetectedIssue."""
    write_fhir(tmp_path, some_alerts)
    assert len(list(tmp_path.iterdir())) == 2 * len(some_alerts)
    for alert in some_alerts:
        seen, issue = observation(alert), detected_issue(alert)
        assert json.loads((tmp_path / f"Observation-{alert.id}.json").read_text()) == seen
        assert (tmp_path / f"DetectedIssue-{alert.id}.json").stat().st_mode & 0o777 == 0o600
        for resource, kind in ((seen, "Observation"), (issue, "DetectedIssue")):
            assert resource["resourceType"] == kind
            assert resource["status"] in {"registered", "preliminary", "final", "amended"}
            assert 0 < len(resource["id"]) <= 64
            assert resource["id"].isalnum()
        coding = seen["code"]["coding"][0]
        assert (coding["system"], coding["code"]) == ("http://loinc.org", "99504-3")
        quantity = seen["valueQuantity"]
        assert (quantity["system"], quantity["code"]) == ("http://unitsofmeasure.org", "mg/dL")
        assert isinstance(quantity["value"], float)
        assert datetime.fromisoformat(seen["effectiveDateTime"]).utcoffset() is not None
        assert datetime.fromisoformat(issue["identifiedDateTime"]).utcoffset() is not None
        assert issue["severity"] in {"high", "moderate", "low"}
        assert issue["implicated"] == [{"reference": f"Observation/{seen['id']}"}]
        assert seen["subject"] == issue["patient"] == {"identifier": {"value": alert.patient_id}}


def test_the_screen_shows_the_most_urgent_first_and_survives_what_is_missing(trained: Trained) -> None:
    rows = [f"calm,{stamp(5 * k)},120" if k % 2 else f"calm,{stamp(5 * k)},122" for k in range(40)]
    rows += [f"falling,{stamp(5 * k)},{200 - 3.5 * k}" for k in range(40)] + [f"new,{stamp(0)},100"]
    watch = watch_all(trained, rows)
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(render(watch.sights, RULES, "counts", 40, 1_704_067_200 + 300 * 40))
    text = console.export_text()
    assert text.index("falling") < text.index("calm")
    assert "in range" in text
    assert "no forecast" in text
    assert "not reviewed" in text
    assert "low now" in text  # within the refractory time of the alert that foretold it
    assert sparkline([40.0, None, 300.0, 900.0, -5.0]) == "▁ ██▁"
    console.print(render({}, RULES, "", 40, NOW_S))


@pytest.mark.parametrize(
    ("offset", "age_min", "first"),
    [("Z", 44, "GONE"), ("Z", 46, "HERE"), ("Z", 7 * 1440, "HERE"), ("", 46, "GONE"), ("", 12 * 60 + 46, "HERE")],
)
def test_whoever_was_not_seen_for_long_comes_last(trained: Trained, offset: str, age_min: int, first: str) -> None:
    """Local clocks of an unknown zone can be 12 hours behind."""
    watch = watch_all(trained, [f"GONE,{stamp(0)}{offset},50", f"HERE,{stamp(age_min)}{offset},120"])
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(render(watch.sights, RULES, "", 40, datetime.fromisoformat(f"{stamp(age_min)}Z").timestamp()))
    text = console.export_text()
    assert (text.index("HERE") < text.index("GONE")) == (first == "HERE")
    assert ("low now" in text, "last seen low" in text) == (first == "GONE", first == "HERE")


# One patient's own model, and the command.


def test_a_personal_model_serves_one_patient_and_starts_no_run(tmp_path: Path) -> None:
    path, salt = tmp_path / "mine.safetensors", bytes(range(32))
    content = save_personal(TASK.build().state_dict())
    path.write_bytes(content)
    described = {
        "task": TASK.name, "sha256": hashlib.sha256(content).hexdigest(), "personal": True, "salt": salt.hex(),
        "patient": pseudonym(salt, PatientIdentity("", "P-1")).hex(),
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(described))
    watch = watch_all(load_trained(path, TASK.name, "forecast glucose", fitted=True), waves())
    assert (watch.fates[Fate.READ], watch.fates[Fate.OTHER_PATIENT]) == (120, 120)
    with pytest.raises(StorageError, match="stay there"):
        load_weights(path, TASK.build())
    with pytest.raises(PlanError, match="does not score"):
        load_trained(path, "nodule-classification", "score nodules", fitted=True)


def post_to_the_dying(port: int, content: bytes) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        post(port, content)


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return the command: what it ends with, and what it says on standard output and standard error."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedward-site", "monitor", *map(str, arguments)])
        try:
            with pytest.raises(SystemExit) as end:
                cli.main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        return end.value.code, *capfd.readouterr()

    return run


def test_the_command_survives_kill_9_and_says_nothing_of_patients(
    checkpoint: Path, trained: Trained, tmp_path: Path, monitor: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, alerts, rows = tmp_path / "s.csv", tmp_path / "a.jsonl", [f"{row}\n" for row in waves(steps=60)]
    command = [sys.executable, "-m", "client.cli", "monitor", checkpoint, "--from", "http://127.0.0.1:0"]
    with subprocess.Popen([*command, "--alerts", alerts], stderr=subprocess.PIPE, text=True) as first:
        try:
            port = int(next(line for line in first.stderr if line.startswith("listening")).rpartition(":")[2])
            assert post(port, "".join(rows[:60]).encode())[0] == 200
            before = alerts_in(alerts)
            sender = Thread(target=post_to_the_dying, args=(port, "".join(rows[60:90]).encode()))
            sender.start()
        finally:
            first.kill()  # wherever it is with what was sent last
        sender.join()
        assert "P-" not in first.stderr.read()
    assert before

    stream.write_text("".join(rows))
    code, out, err = monitor(checkpoint, "--from", stream, "--alerts", alerts, "--once")
    assert code == 0, err
    assert "P-" not in out + err
    assert err.count("--time-zone is not given") == 1
    found = alerts_in(alerts)
    assert found[: len(before)] == before
    with Memory(tmp_path / "a.jsonl.state") as memory:
        never_killed = Watch(trained, DEFAULT_RULES, Memory(None))
        never_killed._memory.secret = memory.secret
    expected = [json.loads(json.dumps(alert.to_json())) for alert in never_killed.take(Lines(rows))]
    assert sorted(found, key=lambda alert: alert["id"]) == sorted(expected, key=lambda alert: alert["id"])
    assert len(found) > len(before)

    _, _, err = monitor(checkpoint, "--from", stream, "--alerts", alerts, "--once", "--time-zone", "UTC")
    doubt, counted = err.splitlines()
    assert doubt.startswith("Nobody answers for round-00001.safetensors")
    assert counted == "no lines yet; alerts: none"
    with stream.open() as standard_input:
        monkeypatch.setattr(sys, "stdin", standard_input)
        _, out, _ = monitor(checkpoint, "--from", "-")
    drop = {"id"}  # of another secret
    assert [{k: v for k, v in json.loads(line).items() if k not in drop} for line in out.splitlines()] == [
        {k: v for k, v in alert.items() if k not in drop} for alert in expected
    ]


@pytest.mark.parametrize("end", ["end of input", signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_with_a_count_of_its_alerts(
    end: signal.Signals | str, checkpoint: Path, tmp_path: Path
) -> None:
    alerts, stuck = tmp_path / "a.jsonl", [f"P-9,{stamp(5 * k)},{100 + min(k, 36) % 2}" for k in range(120)]
    rows = "".join(f"{row}\n" for row in (*waves(steps=60), *stuck)).encode()
    source = "-" if end == "end of input" else "http://127.0.0.1:0"
    command = [sys.executable, "-m", "client.cli", "monitor", checkpoint, "--from", source, "--alerts", alerts]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stderr
        if isinstance(end, signal.Signals):
            port = int(next(line for line in child.stderr if line.startswith(b"listening")).rpartition(b":")[2])
            assert post(port, rows)[0] == 200
            child.send_signal(end)
        else:
            child.stdin.write(rows)
        child.stdin.close()
        counted = child.stderr.read().decode().splitlines()[-1]
    assert child.returncode == 0
    kinds = Counter(str(alert["kind"]) for alert in alerts_in(alerts))
    assert set(kinds) == {"low", "high", NO_FORECAST}
    said = dict(reversed(part.split()) for part in counted.partition("; alerts: ")[2].split(", "))
    assert said == {kind: str(number) for kind, number in kinds.items()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "http://0.0.0.0:80"], "this machine only"),
        (["--from", "x", "--fhir", "f"], "--time-zone"),
        (["--from", "x", "--time-zone", "Mars/Olympus"], "no such --time-zone"),
        (["--from", "x", "--low", "200"], "--low"),
        (["--from", "x", "--low-quantile", "0.01"], "quantile"),
        (["--from", "absent.csv", "--once"], "absent.csv"),
        (["--from", "x", "--state", "."], "--state"),
    ],
)
def test_what_cannot_be_watched_is_one_sentence(
    arguments: list[str],
    said: str,
    checkpoint: Path,
    tmp_path: Path,
    monitor: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = monitor(checkpoint, *arguments)
    assert code == 1
    assert said in error
    assert "Traceback" not in error


# A monitor that cannot forecast says so.


class Blind(nn.Module):
    """Forecasts as a fresh model does, but not where the last reading is above 150 mg/dL."""

    def __init__(self) -> None:
        super().__init__()
        self.sighted = TASK.build()

    def forward(self, readings: Tensor) -> Tensor:
        found: Tensor = self.sighted(readings)
        return torch.where(readings[:, -1, 0].view(-1, 1, 1) > 150.0, torch.nan, found)


def blind_rows() -> list[str]:
    """Return 36 readings that can be forecast, 12 that cannot, and 36 that can."""
    values = [120 + k % 2 for k in range(48)] + [160 + k % 2 for k in range(12)] + [120 + k % 2 for k in range(36)]
    return [f"P,{stamp(5 * k)},{value}" for k, value in enumerate(values)]


def test_a_forecast_that_is_no_number_is_an_alert_of_its_own_kind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blind = Trained(Blind().eval(), "0" * 64)
    watch = Watch(blind, DEFAULT_RULES, Memory(None), zone=ZoneInfo("UTC"), now=lambda: NOW_S)
    alerts = watch.take(Lines(blind_rows()))
    told = [alert for alert in alerts if alert.kind == NO_FORECAST]
    assert [(alert.reason, alert.glucose_mg_dl) for alert in told] == [(MODEL_FAILED, 160.0), (MODEL_FAILED, 160.0)]
    assert len({alert.id for alert in told}) == 2  # an hour without forecasts: told, and told again after 30 minutes
    assert {alert.episode_start for alert in told} == {told[0].time}
    write_fhir(tmp_path, told)
    for alert in told:
        line = json.loads(json.dumps(alert.to_json()))
        assert (line["kind"], line["threshold_mg_dl"], line["forecast_mg_dl"]) == (NO_FORECAST, None, None)
        issue = detected_issue(alert)
        assert issue["severity"] == "high"
        assert "not a number" in issue["detail"]
        assert issue["implicated"] == [{"reference": f"Observation/{observation(alert)['id']}"}]


def test_the_screen_shows_that_nothing_is_foreseen() -> None:
    torch.manual_seed(0)
    watch = Watch(Trained(Blind().eval(), "0" * 64), DEFAULT_RULES, Memory(None), now=lambda: NOW_S)
    watch.take(Lines(blind_rows()[:60]))
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(render(watch.sights, RULES, "counts", 40, 1_704_067_200 + 300 * 60))
    text = console.export_text()
    assert "no-forecast now" in text
    assert "nan" not in text


def test_a_stuck_sensor_is_told_and_a_record_that_begins_is_not(trained: Trained) -> None:
    watch = Watch(trained, DEFAULT_RULES, Memory(None), now=lambda: NOW_S)
    assert watch.take(Lines([f"P,{stamp(5 * k)},{120 + k % 2}" for k in range(20)])) == []
    alerts = watch.take(Lines([f"Q,{stamp(5 * k)},120" for k in range(60)]))
    assert {(alert.patient_id, alert.kind, alert.reason) for alert in alerts} == {("Q", NO_FORECAST, SENSOR_STUCK)}


def test_how_a_stream_is_cut_does_not_change_who_is_told_to_be_blind() -> None:
    torch.manual_seed(0)
    blind, memory = Trained(Blind().eval(), "0" * 64), Memory(None)
    whole = Watch(blind, DEFAULT_RULES, memory, now=lambda: NOW_S)
    expected = whole.take(Lines(blind_rows()))
    pieces = Memory(None)
    pieces.secret = memory.secret
    cut = Watch(blind, DEFAULT_RULES, pieces, now=lambda: NOW_S)
    found = [alert for row in blind_rows() for alert in cut.take(Lines([row]))]
    assert [alert.id for alert in found] == [alert.id for alert in expected]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_the_command_refuses_weights_that_would_forecast_nothing(
    value: float, checkpoint: Path, tmp_path: Path, monitor: Callable
) -> None:
    """Such a monitor took every reading and warned nobody."""
    model = TASK.build()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = value
    path = save_checkpoint(tmp_path / "h", model, run="r", number=1, task=TASK.name, plan_digest="p").path
    (tmp_path / "s.csv").write_text("\n".join(blind_rows()) + "\n")
    code, out, err = monitor(path, "--from", tmp_path / "s.csv", "--once")
    assert (code, out) == (1, "")
    assert "not finite or above" in err


def test_the_command_verifies_the_model_by_the_keys_of_the_site(
    checkpoint: Path, tmp_path: Path, monitor: Callable
) -> None:
    (tmp_path / "s.csv").write_text("")
    for name in ("ours", "theirs", "site"):
        (tmp_path / name).mkdir()
    rules = SitePolicy(name="h1", declared_patients=10, tasks=(TASK.name,), max_epsilon=8.0)
    rules.write(tmp_path / "site" / "site.toml")
    ours, theirs = ensure_signing_key(tmp_path / "ours"), ensure_signing_key(tmp_path / "theirs")
    watched = [checkpoint, "--from", tmp_path / "s.csv", "--once", "--site", tmp_path / "site"]
    assert "Nobody answers" in monitor(*watched)[2]  # the site trusts nobody yet
    (tmp_path / "site" / SIGNING_PUB).write_bytes(public_line(ours.public_key()))
    code, _, err = monitor(*watched)
    assert (code, "is not signed" in err) == (1, True)
    sidecar = checkpoint.with_suffix(".json")
    plain = read_sidecar(sidecar)
    write_sidecar(sidecar, signed(plain, theirs))
    code, _, err = monitor(*watched)
    assert (code, "not trusted here" in err) == (1, True)
    write_sidecar(sidecar, signed(plain, ours))
    code, _, err = monitor(*watched)
    assert (code, "Nobody answers" in err) == (0, False)
    replace(rules, max_weights_norm=0.1).write(tmp_path / "site" / "site.toml")
    code, _, err = monitor(*watched)
    assert (code, "above max-weights-norm 0.1" in err) == (1, True)
    rules.write(tmp_path / "site" / "site.toml")
    sidecar.write_text(sidecar.read_text().replace('"round": 1', '"round": 2'))
    code, _, err = monitor(*watched)
    assert (code, "signature is wrong" in err) == (1, True)
