"""What a steward's terminal shows of the books: the answer first, in words and units, within a terminal's width."""

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console

from client.books_view import ledger_view, rounds_view, status_view
from shared.terminal import ago

NOW = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)
SERVER = "9f3c" * 4
AT = {"noise_multiplier": 2.0, "sample_rate": 0.1, "delta": 4e-4, "steps": 10}


def release(run: str, number: int, minutes: float, *, open_: bool = False) -> dict[str, Any]:
    stamp = (NOW - timedelta(minutes=minutes)).isoformat()
    left = None if open_ else stamp
    return {
        "run": run,
        "round": number,
        "task": "nodule-classification",
        "reserved_at": stamp,
        "committed_at": left,
    } | AT


def books(admitted: str = "filter") -> dict[str, Any]:
    name = f"{SERVER}/run-2"
    return {
        "site": "h1",
        "releases": [
            release(f"{SERVER}/run-1", 1, 5 * 1440),
            release(name, 1, 60),
            release(name, 2, 3, open_=True),
        ],
        "runs": [{"run": name, "admitted": admitted, "planned_steps": 120, "planned_epsilon": 3.25}],
        "max_delta": 5e-4,
        "max_epsilon": 8.0,
        "epsilon": 3.5,
        "remaining": 4.5,
    }


def shown(parts: Any, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    for part in parts:
        console.print(part)
    return console.file.getvalue().splitlines()


def test_the_ledger_says_first_what_is_left_and_then_a_line_a_run() -> None:
    lines = shown(ledger_view(books(), NOW), 90)
    assert lines[0] == "epsilon 3.5 is spent and 4.5 of max-epsilon 8 left, at max-delta 0.0005"
    assert [line.split() for line in lines[2:4]] == [
        ["run-1", "nodule-classification", "1", "10", "unknown", "unknown", "5", "d", "ago"],
        ["run-2", "nodule-classification", "2,", "1", "open", "20/120", "3.25", "by", "round", "3", "min", "ago"],
    ]
    assert len(lines) == 5


def test_a_run_admitted_whole_is_explained() -> None:
    text = " ".join(shown(ledger_view(books("pld"), NOW), 100))
    assert "A run was admitted whole, as a fixed plan: all its rounds count as spent" in text
    assert "admitted whole" not in " ".join(shown(ledger_view(books(), NOW), 100))


def test_runs_of_two_servers_are_told_apart() -> None:
    both = books()
    both["releases"].append(release(f"{'77aa' * 4}/run-1", 1, 1))
    text = "\n".join(shown(ledger_view(both, NOW), 100))
    assert "run-1 @9f3c" in text
    assert "run-1 @77aa" in text


def test_an_empty_ledger_is_a_sentence_and_no_empty_table() -> None:
    nothing = books() | {"releases": [], "runs": []}
    assert shown(ledger_view(nothing, NOW), 100)[1:] == ["Nothing was ever released."]


def test_every_round_is_there_when_asked_for_and_an_open_one_reads_as_spent() -> None:
    lines = shown(rounds_view(books()), 80)
    assert max(map(len, lines)) <= 80
    assert sum("2026-03-" in line for line in lines) == 3
    assert sum("not (yet): counts as spent" in line for line in lines) == 1


@pytest.mark.parametrize("width", [80, 100])
def test_the_status_fits_a_terminal_and_gives_times_as_people_do(width: int) -> None:
    contact = (NOW - timedelta(seconds=190)).timestamp()
    state = {
        "budget": {"epsilon": 3.5, "remaining": 4.5, "max_epsilon": 8.0, "max_delta": 5e-4, "releases": 3},
        "daemon": {"answers": True, "ok": True, "connected": True, "last_contact": contact, "fault": None, "round": 2},
        "stores": {"cgm-5min": {"usable": True, "patients": 41, "digest": "ab" * 32}, "ct": {"usable": False}},
        "audit": {"ok": True, "lines": 12, "head": "cd" * 32},
        "selftest": {"glucose-forecast": "fast, 2 threads"},
        "policy": {"tasks": ("a", "b"), "proxy": "", "max-epsilon": None, "keep-alive-s": 60.0},
    }
    lines = shown(status_view(state, NOW), width)
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("budget     epsilon 3.5 is spent and 4.5")
    assert "connected, the server answered 3 min ago, last round 2" in text
    assert "cgm-5min: 41 patients, digest abababababab…" in text
    assert "ct: cannot be read; run intake again" in text
    assert "e+09" not in text
    fault = {"ok": False, "connected": False, "last_contact": None, "fault": "unreachable", "round": None}
    down = state | {"daemon": state["daemon"] | fault}
    assert "not connected (unreachable), no round yet" in " ".join(shown(status_view(down, NOW), 100))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-5, "now"), (0.4, "now"), (59, "59 s ago"), (60, "1 min ago"), (3599, "59 min ago"), (3600, "1 h ago"),
     (86_400 * 29, "29 d ago"), (86_400 * 30, "2026-02-08")],
)  # fmt: skip
def test_a_time_is_told_in_the_largest_whole_unit(seconds: float, said: str) -> None:
    assert ago(NOW - timedelta(seconds=seconds), NOW) == said
