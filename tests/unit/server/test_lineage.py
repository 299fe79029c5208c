"""What a run starts from is verified or said out loud, and stays in every model that comes of it."""

import json
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server import cli
from server.app import job_from
from server.checkpoints import latest_checkpoint, save_checkpoint
from server.lineage import ancestry_of, descent, record_start, start_of
from server.registry import COMPLETED, LATE, OK, Registry, RoundRow, SiteRow
from server.report import render
from server.runs import find_run
from server.summary import summarise
from shared.drafting import draft_plan
from shared.errors import PlanError, StorageError
from shared.provenance.ancestry import OPERATOR, PUBLIC, RANDOM, UNKNOWN, Ancestry, PastRun, Share
from shared.provenance.card import card_of
from shared.provenance.keys import SIGNING_KEY, SIGNING_PUB, read_trusted
from shared.provenance.sidecar import read_sidecar
from shared.provenance.signing import is_signed_by
from shared.tasks.registry import find_task

TASK = "glucose-forecast"
SIGNER = Ed25519PrivateKey.generate()
TRUSTED = (SIGNER.public_key(),)
PAST = PastRun("pilot", "p", 0.1, 1.0, 1e-3, (Share("h1", 40),))
NOISELESS = PastRun("pilot", "p", 0.1, 0.0, 1e-3, (Share("h1", 40),))


def model_of(folder: Path, *runs: PastRun, signer: Ed25519PrivateKey | None = SIGNER) -> Path:
    ancestry = Ancestry(runs=runs)
    model = find_task(TASK).build()
    return save_checkpoint(
        folder, model, run="pilot", number=1, task=TASK, plan_digest="p", ancestry=ancestry, signer=signer
    ).path


def test_a_verified_start_brings_its_runs_along(tmp_path: Path) -> None:
    assert ancestry_of(model_of(tmp_path, PAST), TASK, TRUSTED, is_public=False).runs == (PAST,)


def test_a_start_of_unknown_origin_needs_the_operators_word(tmp_path: Path) -> None:
    unsigned = model_of(tmp_path / "a", PAST, signer=None)
    stranger = model_of(tmp_path / "b", PAST, signer=Ed25519PrivateKey.generate())
    bare = model_of(tmp_path / "c", PAST)
    bare.with_suffix(".json").unlink()
    forged = model_of(tmp_path / "d", PAST)
    forged.with_suffix(".json").write_text(forged.with_suffix(".json").read_text().replace("40", "41"))
    swapped, other = model_of(tmp_path / "e", PAST), model_of(tmp_path / "f", PAST)
    swapped.write_bytes(other.read_bytes())
    for path in (unsigned, stranger, bare, forged, swapped):
        with pytest.raises(PlanError, match="--init-is-public"):
            ancestry_of(path, TASK, TRUSTED, is_public=False)
        said = ancestry_of(path, TASK, TRUSTED, is_public=True)
        assert (said.origin, said.said_by, said.runs) == (PUBLIC, OPERATOR, ())


def test_a_signed_model_of_hospitals_cannot_be_called_public(tmp_path: Path) -> None:
    for name, runs in (("private", (PAST,)), ("mixed", (NOISELESS, PAST))):
        with pytest.raises(PlanError, match="it is not public"):
            ancestry_of(model_of(tmp_path / name, *runs), TASK, TRUSTED, is_public=True)


def test_a_noiseless_start_makes_the_card_say_not_private_unless_it_is_called_public(tmp_path: Path) -> None:
    """A run without noise on public data is a good start; on patients it is none, and only people know which."""
    start = model_of(tmp_path, NOISELESS)
    inherited = ancestry_of(start, TASK, TRUSTED, is_public=False)
    assert "pilot added no noise" in card_of(inherited).sentence()
    assert card_of(ancestry_of(start, TASK, TRUSTED, is_public=True)).private


def plan_from(init: str = RANDOM) -> object:
    return draft_plan(TASK, epsilon=8.0, delta=1e-3, overrides={"rounds": 3, "local_steps": 2, "init": init})


def test_a_run_composes_with_what_its_start_cost_the_hospitals_in_both(tmp_path: Path) -> None:
    plan = plan_from("a" * 64)
    record_start(tmp_path, Ancestry(runs=(PAST,)))
    ancestry = descent(tmp_path, "next", plan, {"h1": 3, "h2": 2, "h3": 0}, {"h2": "e" * 64})
    assert [run.run for run in ancestry.runs] == ["pilot", "next"]
    whole = plan.rounds * plan.local_steps  # which rounds a site missed may depend on what others gave
    assert ancestry.runs[-1].sites == (Share("h1", whole), Share("h2", whole, "e" * 64))
    card = card_of(ancestry)
    assert card.by_site["h1"] > plan.epsilon() == card.by_site["h2"]


def test_a_run_of_an_earlier_version_goes_on_and_its_start_is_unknown(tmp_path: Path) -> None:
    assert start_of(tmp_path, plan_from()) == Ancestry()
    assert start_of(tmp_path, plan_from("a" * 64)).origin == UNKNOWN


def test_a_damaged_start_is_said(tmp_path: Path) -> None:
    (tmp_path / "start.json").write_text("[" * 10_000)
    with pytest.raises(StorageError, match="too deeply"):
        start_of(tmp_path, plan_from())


def registry_of(folder: Path, ancestry: Ancestry) -> tuple[Registry, object]:
    plan = plan_from("a" * 64)
    registry = Registry(folder / "registry.sqlite")
    registry.begin("next", plan)
    registry.add_site("next", SiteRow("h1", 100, None))
    for number in range(1, 4):
        registry.add_round("next", RoundRow(number, 1.0, None, {"h1": OK, "h2": "policy-refused"}))
    registry.end("next", COMPLETED)
    record_start(folder, ancestry)
    lineage = descent(folder, "next", plan, registry.rounds_by_site("next", 3), {})
    card = card_of(lineage)
    checkpoint = save_checkpoint(
        folder / "checkpoints", find_task(TASK).build(), run="next", number=3, task=TASK, plan_digest=plan.digest,
        ancestry=lineage, epsilon=card.epsilon if card.private else None, delta=card.delta, signer=SIGNER,
    )  # fmt: skip
    return registry, checkpoint


def test_summary_and_report_state_the_composed_epsilon(tmp_path: Path) -> None:
    registry, checkpoint = registry_of(tmp_path, Ancestry(runs=(PAST,)))
    record = registry.read("next")
    card = summarise(record, checkpoint)["card"]
    assert card["private"] is True
    assert card["composed"] == ["h1"]
    assert card["epsilon"] == pytest.approx(card_of(checkpoint.ancestry).epsilon)
    assert card["epsilon"] > record.plan.epsilon(3)
    page = render(record, checkpoint)
    assert "The model comes from earlier training" in page
    assert f"{card['epsilon']:.2f}" in page


def test_summary_and_report_of_a_model_that_is_not_private_say_so(tmp_path: Path) -> None:
    registry, checkpoint = registry_of(tmp_path, Ancestry(runs=(NOISELESS,)))
    assert checkpoint.epsilon is None
    summary = summarise(registry.read("next"), checkpoint)
    assert summary["card"]["private"] is False
    page = render(registry.read("next"), checkpoint)
    assert "This model gives no privacy guarantee" in page
    assert "Not private: the run pilot added no noise." in page


def test_only_rounds_up_to_the_models_own_are_charged(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r.sqlite")
    registry.begin("r", plan_from())
    for number, outcome in ((1, OK), (2, LATE), (3, "budget-exceeded"), (4, OK)):
        registry.add_round("r", RoundRow(number, 1.0, None, {"a": outcome}))
    assert [registry.rounds_by_site("r", up_to) for up_to in (0, 1, 3, 4)] == [{}, {"a": 1}, {"a": 2}, {"a": 3}]
    assert registry.rounds_by_site("r", 4) == {"a": registry.read("r").rounds_of("a")}


# The operator's commands.


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fedward-server", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "srv"
    assert call(monkeypatch, "init", folder, "--name", "localhost") == 0
    key = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (tmp_path / "h1.pub").write_bytes(key + b" h1 declared-patients=200\n")
    assert call(monkeypatch, "enrol", folder, tmp_path / "h1.pub") == 0
    (tmp_path / "plan.toml").write_text(f'task = "{TASK}"\nrounds = 2\nepsilon = 8.0\n')
    return folder


def test_init_makes_the_key_pair_and_says_who_gets_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server = tmp_path / "srv"
    assert call(monkeypatch, "init", server, "--name", "localhost") == 0
    assert (server / SIGNING_KEY).stat().st_mode & 0o777 == 0o600
    assert len(read_trusted(server / SIGNING_PUB)) == 1
    assert str(server / SIGNING_PUB) in capfd.readouterr().out


def test_the_command_asks_for_the_operators_word_and_records_it(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    start, plan = model_of(tmp_path / "c", PAST, signer=None), tmp_path / "plan.toml"
    assert call(monkeypatch, "run", server, plan, "--init", start) == 1
    assert "--init-is-public" in capfd.readouterr().err
    assert not (server / "runs" / "run-1").exists()
    assert call(monkeypatch, "run", server, plan, "--init", start, "--init-is-public") == 0
    folder = find_run(server, "run-1")
    assert start_of(folder.path, folder.plan) == Ancestry(PUBLIC, folder.plan.init, OPERATOR)
    assert OPERATOR in folder.record().notes["start"]


def test_another_aggregators_model_is_taken_by_its_key_and_a_job_signs_by_its_own(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    start, plan, key = model_of(tmp_path / "c", PAST), tmp_path / "plan.toml", tmp_path / "theirs.pub"
    key.write_bytes(SIGNER.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
    assert call(monkeypatch, "run", server, plan, "--init", start, "--init-key", key, "--name", "next") == 0
    folder = find_run(server, "next")
    assert start_of(folder.path, folder.plan).runs == (PAST,)
    assert "a model of pilot" in folder.record().notes["start"]
    job = job_from({"server": str(server), "run": "next"})
    assert job.signer is not None
    assert job.signer.public_key() == read_trusted(server / SIGNING_PUB)[0]
    assert set(job.keys) == {"h1"}


def test_a_folder_of_an_earlier_version_gets_its_key_and_resumes(server: Path, tmp_path: Path) -> None:
    """Its checkpoints have today's fields without a version: they are read, and what follows is signed."""
    (server / SIGNING_KEY).unlink()
    (server / SIGNING_PUB).unlink()
    folder = server / "runs" / "old"
    saved = save_checkpoint(
        folder / "checkpoints", find_task(TASK).build(), run="old", number=2, task=TASK, plan_digest="p"
    )
    before = {
        "run": "old", "round": 2, "task": TASK, "plan_digest": "p", "sha256": saved.sha256, "path": saved.path.name,
        "strategy_sha256": None, "epsilon": 3.5, "delta": 1e-3,
    }  # fmt: skip
    saved.path.with_suffix(".json").write_text(json.dumps(before, indent=1, sort_keys=True))
    found = latest_checkpoint(folder / "checkpoints")
    assert found is not None
    assert (found.round, found.epsilon, found.ancestry) == (2, 3.5, None)
    signer = job_from({"run": "old", "plan": plan_from().to_json(), "folder": str(server)}).signer
    assert signer is not None
    again = save_checkpoint(
        folder / "checkpoints", find_task(TASK).build(), run="old", number=3, task=TASK, plan_digest="p", signer=signer
    )
    assert is_signed_by(read_sidecar(again.path.with_suffix(".json")), read_trusted(server / SIGNING_PUB))


@pytest.mark.parametrize("path", ["../round-00002.safetensors", "/etc/passwd", "round-00001.safetensors"])
def test_a_sidecar_cannot_name_weights_elsewhere(path: str, tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path / "c", find_task(TASK).build(), run="r", number=2, task=TASK, plan_digest="p")
    sidecar = saved.path.with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "path": path}))
    with pytest.raises(StorageError, match="damaged"):
        latest_checkpoint(tmp_path / "c")


def test_a_link_to_weights_elsewhere_is_not_followed(tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path / "c", find_task(TASK).build(), run="r", number=2, task=TASK, plan_digest="p")
    saved.path.rename(tmp_path / "elsewhere")
    saved.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="not the file beside it"):
        latest_checkpoint(tmp_path / "c")
