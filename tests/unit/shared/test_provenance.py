"""Ancestry composes what hospitals spent, and a signature covers every word of it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from shared.accounting import Mechanism, epsilon_of
from shared.errors import PlanError, StorageError
from shared.provenance.ancestry import MOST_RUNS, PUBLIC, UNKNOWN, Ancestry, PastRun, Share
from shared.provenance.card import card_of
from shared.provenance.keys import SIGNING_KEY, SIGNING_PUB, ensure_signing_key, fingerprint, public_line, read_trusted
from shared.provenance.sidecar import Sidecar, parse_sidecar
from shared.provenance.signing import is_signed_by, require_signature, signed
from shared.renyi import adaptive_epsilon_of

FIRST = PastRun("first", "1" * 64, 0.1, 1.0, 1e-3, (Share("h1", 40), Share("h2", 40)))
SECOND = PastRun("second", "2" * 64, 0.2, 1.5, 1e-4, (Share("h1", 20), Share("h3", 20)))
KEY = Ed25519PrivateKey.generate()


def test_a_hospital_in_two_runs_spends_both_and_one_in_a_single_run_only_that() -> None:
    card = card_of(Ancestry(runs=(FIRST, SECOND)))
    assert card.delta == 1e-4  # what holds at the smallest delta holds at the others
    alone = {"h2": Mechanism(0.1, 1.0, 40), "h3": Mechanism(0.2, 1.5, 20)}
    for site, mechanism in alone.items():
        assert card.by_site[site] == pytest.approx(epsilon_of([mechanism], 1e-4))
    both = [Mechanism(0.1, 1.0, 40), Mechanism(0.2, 1.5, 20)]
    assert card.by_site["h1"] == pytest.approx(adaptive_epsilon_of(both, 1e-4))
    assert card.by_site["h1"] >= epsilon_of(both, 1e-4) > max(card.by_site["h2"], card.by_site["h3"])
    assert (card.epsilon, card.composed) == (card.by_site["h1"], ("h1",))
    assert "h1" in card.sentence()


def test_the_adaptive_figure_is_never_below_the_tight_one() -> None:
    for mechanisms in ([Mechanism(1.0, 2.0, 5)], [Mechanism(0.05, 0.8, 200), Mechanism(0.3, 3.0, 50)]):
        tight = epsilon_of(mechanisms, 1e-5)
        assert tight <= adaptive_epsilon_of(mechanisms, 1e-5) <= 1.5 * tight
    # The plain Gaussian's Rényi divergence is order / (2 σ²) (Mironov, 2017, Corollary 3).
    rough = min(order * 5 / (2 * 2.0**2) + math.log(1e5) / (order - 1) for order in range(2, 500))
    assert adaptive_epsilon_of([Mechanism(1.0, 2.0, 5)], 1e-5) <= rough
    assert adaptive_epsilon_of([], 1e-5) == 0.0
    assert adaptive_epsilon_of([Mechanism(0.1, 0.0, 1)], 1e-5) == math.inf


@pytest.mark.parametrize(
    ("ancestry", "why"),
    [
        (Ancestry(runs=(replace(FIRST, noise_multiplier=0.0), SECOND)), "first added no noise"),
        (Ancestry(UNKNOWN, runs=(SECOND,)), "unknown origin"),
    ],
)
def test_a_model_of_a_noiseless_run_or_of_unknown_origin_is_not_private(ancestry: Ancestry, why: str) -> None:
    card = card_of(ancestry)
    assert not card.private
    assert card.by_site["h1"] == math.inf
    assert why in card.sentence()
    assert card.to_json()["epsilon"] is None


def test_a_public_start_costs_nothing_and_a_run_without_a_round_neither() -> None:
    assert card_of(Ancestry(PUBLIC, "a" * 64, "us", (FIRST,))).by_site == card_of(Ancestry(runs=(FIRST,))).by_site
    before = replace(SECOND, sites=())
    assert card_of(Ancestry(runs=(FIRST, before))).epsilon == pytest.approx(epsilon_of([Mechanism(0.1, 1.0, 40)], 1e-4))
    assert card_of(Ancestry()).epsilon == 0.0


def test_a_hospital_is_known_again_by_its_name_or_its_key() -> None:
    renamed = replace(SECOND, sites=(Share("new-name", 20, "e" * 64),))
    keyed = replace(FIRST, sites=(Share("h1", 40, "e" * 64),))
    assert card_of(Ancestry(runs=(keyed, renamed))).composed == ("new-name",)
    new_key = replace(SECOND, sites=(Share("h1", 20, "f" * 64),))
    assert card_of(Ancestry(runs=(keyed, new_key))).composed == ("h1",)
    # By way of a third: the key of one, the name of the other.
    third = replace(SECOND, run="third", sites=(Share("h1", 20, "a" * 64),))
    assert card_of(Ancestry(runs=(keyed, renamed, third))).composed == ("h1",)
    stranger = replace(SECOND, sites=(Share("h9", 20, "f" * 64),))
    assert card_of(Ancestry(runs=(keyed, stranger))).composed == ()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=3))
def test_more_runs_never_cost_less(steps: list[int]) -> None:
    runs = [replace(FIRST, run=f"r{n}", sites=(Share("h1", count),)) for n, count in enumerate(steps)]
    epsilons = [card_of(Ancestry(runs=tuple(runs[:count]))).epsilon for count in range(len(runs) + 1)]
    assert epsilons == sorted(epsilons)


def test_an_ancestry_does_not_grow_without_end() -> None:
    with pytest.raises(PlanError, match="at most"):
        Ancestry(runs=(FIRST,) * (MOST_RUNS + 1))


# Signatures.


def sidecar(**fields: object) -> Sidecar:
    described = {"task": "t", "sha256": "a" * 64, "run": "r", "round": 1, "epsilon": 2, "delta": 1e-3}
    return Sidecar(**{**described, "ancestry": Ancestry(runs=(FIRST,)), **fields})  # type: ignore[arg-type]


def test_a_signature_holds_after_the_file_was_written_and_read() -> None:
    read = parse_sidecar(signed(sidecar(), KEY).to_json(), "it")
    require_signature(read, (KEY.public_key(),), "it")
    again = parse_sidecar(read.to_json(), "it")
    assert is_signed_by(again, (Ed25519PrivateKey.generate().public_key(), KEY.public_key()))


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 1.9}, {"delta": 1e-9}, {"sha256": "b" * 64}, {"task": "u"}, {"round": 2}, {"run": "s"},
        {"ancestry": Ancestry()}, {"ancestry": None}, {"ancestry": Ancestry(PUBLIC, runs=(FIRST,))}, {"version": 0},
        {"path": "w.safetensors"}, {"personal": True}, {"metrics": {"auroc": 1.0}},
    ],
    ids=str,
)  # fmt: skip
def test_every_field_is_under_the_signature(change: dict[str, object]) -> None:
    forged = replace(signed(sidecar(), KEY), **change)  # type: ignore[arg-type]
    assert not is_signed_by(forged, (KEY.public_key(),))
    with pytest.raises(StorageError, match="signature is wrong"):
        require_signature(forged, (KEY.public_key(),), "it")


def test_a_missing_or_a_strangers_signature_is_said() -> None:
    with pytest.raises(StorageError, match="not signed"):
        require_signature(sidecar(), (KEY.public_key(),), "it")
    with pytest.raises(StorageError, match="not trusted here"):
        require_signature(signed(sidecar(), Ed25519PrivateKey.generate()), (KEY.public_key(),), "it")


def test_the_key_pair_is_made_once_and_the_private_half_is_its_owners(tmp_path: Path) -> None:
    key = ensure_signing_key(tmp_path)
    assert (tmp_path / SIGNING_KEY).stat().st_mode & 0o777 == 0o600
    assert ensure_signing_key(tmp_path).private_bytes_raw() == key.private_bytes_raw()
    (trusted,) = read_trusted(tmp_path / SIGNING_PUB)
    assert fingerprint(trusted) == fingerprint(key.public_key())
    (tmp_path / SIGNING_PUB).unlink()
    ensure_signing_key(tmp_path)
    assert (tmp_path / SIGNING_PUB).read_bytes() == public_line(key.public_key())


@pytest.mark.parametrize("content", [b"", b"rubbish", b"ssh-rsa AAAA", b"\xff"])
def test_what_is_no_public_key_is_not_trusted(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "k.pub").write_bytes(content)
    with pytest.raises(StorageError, match=r"no signing\.pub"):
        read_trusted(tmp_path / "k.pub")
    ensure_signing_key(tmp_path)
    with pytest.raises(StorageError, match="delete this copy"):
        read_trusted(tmp_path / SIGNING_KEY)
    assert read_trusted(tmp_path / "nowhere") == ()
