"""``site.toml``: every key is explained, and what a steward may get wrong is said."""

import tomllib
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.config import COMMENTS, SitePolicy, is_address, is_name
from client.hours import Hours
from shared.errors import PolicyError

MINIMAL = 'name = "h1"\ndeclared-patients = 200\ntasks = ["nodule-classification"]\nmax-epsilon = 8.0\n'


def test_every_key_is_written_with_its_comment(tmp_path: Path) -> None:
    tasks = ("glucose-forecast", "nodule-classification")
    policy = SitePolicy(name="h1", declared_patients=200, tasks=tasks, max_epsilon=8.0, server="a.example:9092")
    policy.write(tmp_path / "site.toml")
    text = (tmp_path / "site.toml").read_text()
    keys = {field.name.replace("_", "-") for field in fields(SitePolicy)}
    assert set(tomllib.loads(text)) == keys == {key.replace("_", "-") for key in COMMENTS}
    assert all(comment in text for comment in COMMENTS.values())
    assert SitePolicy.read(tmp_path / "site.toml") == policy


def test_max_delta_is_by_default_a_tenth_of_one_over_the_patients(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(MINIMAL)
    assert SitePolicy.read(tmp_path / "site.toml").max_delta == pytest.approx(0.0005)


@pytest.mark.parametrize(
    "line",
    [
        'server = "nowhere"',
        'server = "host:0"',
        'server = "host:99999"',
        'server = "http://host/x:1"',
        'proxy = "proxy"',
        "keep-alive-s = 1.0",
        "keep-alive-s = nan",
        "health-port = 70000",
        "max-weights-norm = nan",
        "max-weights-norm = 0.0",
        "max-message-mib = 0",
        'hours = "night"',
        'hours = "22:00-06:00"',
        'hours = "25:00-06:00 +01:00"',
        'hours = "22:60-06:00 +01:00"',
        'days = ["monday"]',
        "days = []",
    ],
)
def test_a_wrong_key_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "site.toml").write_text(MINIMAL + line)
    with pytest.raises(PolicyError, match=r"site\.toml is wrong"):
        SitePolicy.read(tmp_path / "site.toml")


@pytest.mark.parametrize("key", ["name", "declared-patients", "tasks", "max-epsilon"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    kept = [line for line in MINIMAL.splitlines() if not line.startswith(f"{key} ")]
    (tmp_path / "site.toml").write_text("\n".join(kept))
    with pytest.raises(PolicyError, match=rf"site\.toml lacks {key}\."):
        SitePolicy.read(tmp_path / "site.toml")


def test_a_task_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(MINIMAL.replace('["nodule', '["no-such-task", "nodule'))
    with pytest.raises(PolicyError, match=r"site\.toml permits tasks that are not installed here: no-such-task\."):
        SitePolicy.read(tmp_path / "site.toml")


def test_names_and_addresses() -> None:
    assert all(is_name(name) for name in ("h1", "st-elsewhere", "run_2026.01", "A" * 128))
    assert not any(is_name(name) for name in ("", "a b", "a/b", "..", "-", "é", "a\n", "a" * 129))
    assert all(is_address(text) for text in ("localhost:9092", "[::1]:1", "10.0.0.1:65535"))
    assert not any(is_address(text) for text in ("localhost", ":9092", "a:b", "a b:1", "h:-1", "h:²"))


@pytest.mark.parametrize(
    ("text", "days", "moment", "open_"),
    [
        ("any", ("mon",), "2026-01-05T12:00", True),  # a Monday
        ("any", ("mon",), "2026-01-06T00:00", False),
        ("22:00-06:00 +00:00", ("mon",), "2026-01-05T22:00", True),
        ("22:00-06:00 +00:00", ("mon",), "2026-01-05T21:59", False),
        ("22:00-06:00 +00:00", ("mon",), "2026-01-06T05:59", True),  # opened on Monday
        ("22:00-06:00 +00:00", ("mon",), "2026-01-06T06:00", False),
        ("22:00-06:00 +00:00", ("mon",), "2026-01-05T05:00", False),  # opened on Sunday
        ("22:00-06:00 +01:00", ("mon",), "2026-01-05T21:00", True),
        ("22:00-06:00 -05:30", ("mon",), "2026-01-06T03:30", True),
        ("22:00-06:00 -05:30", ("mon",), "2026-01-06T03:29", False),
        ("08:00-08:00 +00:00", ("mon",), "2026-01-06T07:59", True),
        ("08:00-17:00 +00:00", ("sat", "sun"), "2026-01-10T12:00", True),
    ],
)
def test_hours(text: str, days: tuple[str, ...], moment: str, open_: bool) -> None:
    assert Hours.parse(text, days).permit(datetime.fromisoformat(moment).replace(tzinfo=UTC)) is open_


@given(
    opens=st.integers(0, 1439),
    closes=st.integers(0, 1439),
    offset=st.integers(-12 * 60, 14 * 60),
    start=st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)),
)
def test_a_day_has_as_many_open_minutes_as_the_window(opens: int, closes: int, offset: int, start: datetime) -> None:
    sign, ahead = "-" if offset < 0 else "+", abs(offset)
    clock = [f"{minute // 60:02}:{minute % 60:02}" for minute in (opens, closes, ahead)]
    hours = Hours.parse(f"{clock[0]}-{clock[1]} {sign}{clock[2]}")
    minutes = [start.replace(tzinfo=UTC, second=0, microsecond=0) + timedelta(minutes=n) for n in range(1440)]
    assert sum(map(hours.permit, minutes)) == ((closes - opens) % 1440 or 1440)


@pytest.mark.parametrize(
    ("line", "meant"), [("max-epsilonn = 8.0", "max-epsilon"), ("declared-patient = 3", "declared-patients")]
)
def test_a_mistyped_key_is_told_what_may_be_meant(tmp_path: Path, line: str, meant: str) -> None:
    (tmp_path / "site.toml").write_text(f"{MINIMAL}{line}\n")
    with pytest.raises(PolicyError, match=rf"unknown keys: .*Did you mean {meant}\?"):
        SitePolicy.read(tmp_path / "site.toml")


def test_a_mistyped_task_of_a_site_is_told_what_may_be_meant(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(MINIMAL.replace("nodule-classification", "nodule-classifier"))
    with pytest.raises(PolicyError, match=r"not installed here: .*Did you mean nodule-classification\?"):
        SitePolicy.read(tmp_path / "site.toml")
