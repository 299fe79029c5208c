"""Bad input: one clear sentence and a non-zero exit, never a traceback."""

import io
import json
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from rich.console import Console

from server import cli
from server.checkpoints import save_checkpoint
from server.operations import follow
from server.registry import ASKED, COMPLETED, STOPPED, RoundRow
from server.runs import find_run
from shared.errors import ErrorCode, FederationError
from shared.tasks.registry import find_task


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedward-server", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = str(tmp_path / "srv")
    assert call(monkeypatch, "init", folder, "--name", "localhost", "--fleet-port", "9092") == 0
    key = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (tmp_path / "h1.pub").write_bytes(key + b" h1 declared-patients=200\n")
    assert call(monkeypatch, "enrol", folder, str(tmp_path / "h1.pub"), "--name", "h1") == 0
    (tmp_path / "plan.toml").write_text('task = "nodule-classification"\nrounds = 2\nepsilon = 8.0\n')
    (tmp_path / "krum.toml").write_text((tmp_path / "plan.toml").read_text() + 'strategy = "krum"\n')
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["init", "SRV", "--name", "localhost"], "holds an aggregator already"),
        (["init", "SRV2", "--name", "two words"], "neither a DNS name"),
        (["init", "SRV2", "--name", "localhost", "--heldout", "nowhere"], "no prepared store"),
        (["enrol", "SRV", "TMP/h1.pub"], "enrolled as h1 already"),
        (["enrol", "SRV", "TMP/plan.toml"], "is no site.pub"),
        (["enrol", "SRV", "TMP/nothing.pub"], "nothing.pub"),
        (["enrol", "TMP", "TMP/h1.pub"], "holds no aggregator"),
        (["enrol", "SRV", "TMP/srv/ca.key"], "is a private key, which must never leave its hospital"),
        (["revoke", "SRV", "h2"], "No site called h2"),
        (["run", "SRV", "TMP/krum.toml"], "krum needs 5 sites; 1 are enrolled"),
        (["sites", "TMP"], "holds no aggregator"),
        (["start", "TMP"], "holds no aggregator"),
        (["run", "SRV", "TMP/nothing.toml"], "nothing.toml"),
        (["run", "SRV", "TMP/h1.pub"], "not valid TOML"),
        (["run", "SRV", "TMP/plan.toml", "--name", "../x"], "cannot name a run"),
        (["run", "SRV", "TMP/plan.toml", "--init", "TMP/h1.pub"], "not a checkpoint"),
        (["status", "SRV", "run-9"], "There is no run"),
        (["logs", "SRV", "run-9"], "There is no run"),
        (["stop", "SRV", "run-9"], "There is no run"),
        (["resume", "SRV", "run-9"], "There is no run"),
        (["report", "SRV", "run-9", "--out", "OUT"], "There is no run"),
        (["export", "SRV", "run-9", "--out", "OUT"], "There is no run"),
    ],
)
def test_wrong_input_is_one_sentence(
    arguments: list[str],
    said: str,
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    filled = [word.replace("SRV", server).replace("TMP", str(tmp_path)) for word in arguments]
    capfd.readouterr()
    assert call(monkeypatch, *filled) == 1
    error = capfd.readouterr().err
    assert said in error
    assert error.startswith("fedward-server: ")
    assert "Traceback" not in error
    assert not (tmp_path / "srv" / "runs" / "run-1").exists()


def test_a_run_is_submitted_stopped_and_reported_without_the_service(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert call(monkeypatch, "run", server, str(tmp_path / "plan.toml")) == 0
    said = capfd.readouterr()
    assert said.out == "run-1\n"
    assert "The service is not running" in said.err
    assert "nothing will be validated" in said.err
    assert find_run(Path(server), "run-1").sensitivity is None
    assert call(monkeypatch, "run", server, str(tmp_path / "plan.toml"), "--sensitivity", "0.9", "--name", "own") == 0
    assert find_run(Path(server), "own").sensitivity == 0.9
    for task, value in (("nodule-classification", "1.5"), ("glucose-forecast", "0.9")):
        (tmp_path / "other.toml").write_text(f'task = "{task}"\nrounds = 2\nepsilon = 8.0\n')
        assert call(monkeypatch, "run", server, str(tmp_path / "other.toml"), "--sensitivity", value) == 1
        assert "sensitivity" in capfd.readouterr().err
    assert call(monkeypatch, "stop", server, "run-1") == 0
    assert call(monkeypatch, "resume", server, "run-1") == 0
    run = find_run(Path(server), "run-1")
    model = find_task("nodule-classification").build()
    run.registry().add_round("run-1", RoundRow(2, 1.0, None, {"h1": "ok"}))
    save_checkpoint(
        run.path / "checkpoints", model, run="run-1", number=2, task=run.plan.task, plan_digest=run.plan.digest
    )
    run.registry().end("run-1", COMPLETED)
    assert call(monkeypatch, "report", server, "run-1", "--out", str(tmp_path / "out")) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rounds_completed"] == 2
    assert "warning: Nothing was validated. No held-out patients" in capfd.readouterr().err
    assert (tmp_path / "out" / "report.html").exists()
    capfd.readouterr()
    assert call(monkeypatch, "status", server, "run-1", "--json") == 0
    assert json.loads(capfd.readouterr().out)["status"] == COMPLETED
    assert call(monkeypatch, "status", server, "run-1") == 0
    assert "2/2" in capfd.readouterr().out


def test_a_followed_run_ends_with_its_warnings(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "run", server, str(tmp_path / "plan.toml")) == 0
    run = find_run(Path(server), "run-1")
    run.registry().add_round("run-1", RoundRow(2, 1.0, None, {"h1": "ok"}))
    run.registry().end("run-1", COMPLETED)
    said = io.StringIO()
    assert follow(run, Console(file=said)) is None
    assert said.getvalue().splitlines()[-1] == "warning: Nothing was validated. No held-out patients judged this model."


def test_a_run_is_waited_for_again_and_its_end_is_the_exit_code(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, end in (("run-1", lambda registry: registry.end("run-1", COMPLETED)), ("run-2", None)):
        assert call(monkeypatch, "run", server, str(tmp_path / "plan.toml")) == 0
        if end:
            registry = find_run(Path(server), name).registry()
            registry.add_round(name, RoundRow(2, 1.0, None, {"h1": "ok"}))
            end(registry)
    assert call(monkeypatch, "wait", server, "run-1") == 0
    assert "Nothing was validated" in capfd.readouterr().err
    assert call(monkeypatch, "stop", server, "run-2") == 0
    find_run(Path(server), "run-2").registry().end("run-2", STOPPED)
    assert call(monkeypatch, "wait", server, "run-2") == 1
    assert "Go on with: fedward-server resume" in capfd.readouterr().err
    assert call(monkeypatch, "wait", server, "run-9") == 1
    assert "run-9" in capfd.readouterr().err


def test_a_round_that_is_open_does_not_read_as_one_that_failed(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", server, str(tmp_path / "plan.toml")) == 0
    run = find_run(Path(server), "run-1")
    run.registry().add_round("run-1", RoundRow(0, 0.4, None, {}))
    run.registry().add_round("run-1", RoundRow(1, 7.25, None, {"h1": "ok", "h2": "late"}))
    run.registry().add_round("run-1", RoundRow(2, 0.0, None, {"h1": ASKED, "h2": ASKED}, aggregated=False))

    def rows() -> dict[str, str]:
        capfd.readouterr()
        assert call(monkeypatch, "status", server, "run-1") == 0
        lines = [line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines() if "/2 " in line]
        return {number: " ".join(rest.split()) for number, rest in lines if "/2" in number}

    assert rows() == {
        "0/2": "start not validated 0.4 s",
        "1/2": "1/2 not validated 7.2 s without h2 (late)",
        "2/2": "- - - open: waiting for h1, h2",
    }
    run.registry().end("run-1", STOPPED)
    assert rows()["2/2"] == "0/2 not validated 0.0 s interrupted; without h1 (no reply yet), h2 (no reply yet)"


def test_sites_are_shown_for_people_and_scripts(
    server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert call(monkeypatch, "sites", server, "--json") == 0
    (row,) = json.loads(capfd.readouterr().out)
    assert (row["name"], row["declared_patients"], row["revoked"], row["connected"]) == ("h1", 200, False, None)
    assert call(monkeypatch, "revoke", server, "h1") == 0
    assert call(monkeypatch, "sites", server) == 0
    assert "revoked" in capfd.readouterr().out


def test_another_declared_number_is_taken_between_runs(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "h1.pub"
    key.write_text(key.read_text().replace("=200", "=300"))
    assert call(monkeypatch, "run", server, str(tmp_path / "plan.toml")) == 0
    capfd.readouterr()
    assert call(monkeypatch, "enrol", server, str(key)) == 1
    assert "wait until no run goes on, or stop them: run-1" in capfd.readouterr().err
    assert call(monkeypatch, "stop", server, "run-1") == 0
    assert call(monkeypatch, "enrol", server, str(key)) == 0
    assert "h1 declares 300 patients from now on; before, 200." in capfd.readouterr().out
    capfd.readouterr()
    assert call(monkeypatch, "sites", server, "--json") == 0
    assert [row["declared_patients"] for row in json.loads(capfd.readouterr().out)] == [300]


def test_the_table_says_why_a_run_failed_and_is_whole_in_a_pipe(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    name = "a-name-that-is-long-" + "x" * 40
    assert call(monkeypatch, "run", server, str(tmp_path / "plan.toml"), "--name", name) == 0
    find_run(Path(server), name).fail(FederationError("Two of three hospitals refused.", ErrorCode.QUORUM_LOST))
    for arguments in (["status", server], ["status", server, name]):
        capfd.readouterr()
        assert call(monkeypatch, *arguments) == 0
        said = capfd.readouterr().out
        assert f"{name} failed after 0 of 2 rounds (quorum-lost): Two of three hospitals refused." in said
        assert any(name in line and "nodule-classification" in line and "0/2" in line for line in said.splitlines())


@pytest.mark.parametrize("arguments", [["fly"], ["init", "x"], ["run"]])
def test_wrong_usage_exits_with_two(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, *arguments) == 2


def test_help_shows_examples(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "run", "--help") == 0
    assert "plan.toml --wait" in capfd.readouterr().out
