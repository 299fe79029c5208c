"""Enrolment: whose key, under which name, with which number; and that nothing is lost or comes back."""

from pathlib import Path
from threading import Thread

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from server.members import Member, Members, SiteKey, active, parse_site_key, read_site_key, require_members
from shared.errors import ProtocolError, StorageError


def new_key(curve: ec.EllipticCurve | None = None) -> str:
    public = ec.generate_private_key(curve or ec.SECP384R1()).public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


KEY = new_key()


@given(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    declared=st.integers(1, 10**9 - 1),
    tail=st.sampled_from(["", "\n", "\r\n", "  \n"]),
)
def test_what_a_hospital_writes_is_read(name: str, declared: int, tail: str) -> None:
    assert parse_site_key(f"{KEY} {name} declared-patients={declared}{tail}") == SiteKey(KEY, name, declared)


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: raw.decode("latin-1")))
def test_anything_else_is_refused_and_nothing_worse(text: str) -> None:
    with pytest.raises(ProtocolError):
        parse_site_key(text)


@pytest.mark.parametrize(
    "text",
    [
        new_key(ec.SECP256R1()),
        ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
        f"{KEY} two names",
        f"{KEY} ../name",
        f"{KEY} h1 declared-patients=-5",
        f"{KEY}\n{KEY}",
        KEY[:-20],
    ],
    ids=["another-curve", "another-algorithm", "two-words", "a-path", "a-negative-number", "two-keys", "cut-off"],
)
def test_another_key_or_comment_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError):
        parse_site_key(text)
    (tmp_path / "site.pub").write_text(text)
    with pytest.raises(ProtocolError, match=r"is no site\.pub"):
        read_site_key(tmp_path / "site.pub")


def test_enrol_and_revoke_are_remembered(tmp_path: Path) -> None:
    members = Members(tmp_path)
    assert members.all() == ()
    members.enrol(SiteKey(KEY, "h1", 200), "h1", None)
    members.note_nodes({KEY: 7})
    assert members.all() == (Member("h1", KEY, 200, revoked=False, node_id=7),)
    members.revoke("h1")
    assert active(members.all()) == ()
    assert members.all()[0].revoked
    with pytest.raises(ProtocolError, match="never comes back"):
        members.enrol(SiteKey(KEY, "h1", 200), None, None)
    members.enrol(SiteKey(new_key(), "h1", 200), None, None)  # a new key under the old name: key rotation
    assert [member.revoked for member in members.all()] == [True, False]


@pytest.mark.parametrize(
    ("key", "name", "declared", "said"),
    [
        (SiteKey("k", "h1", 5), "h2", None, "calls its site h1"),
        (SiteKey("k", None, 5), None, None, "--name"),
        (SiteKey("k", None, 5), "../x", None, "--name"),
        (SiteKey("k", "h1", None), None, None, "--declared-patients"),
        (SiteKey("k", "h1", 0), None, None, "--declared-patients"),
        (SiteKey("old", "h9", 5), None, None, "enrolled as h0"),
        (SiteKey("k", "h0", 5), None, None, "h0 is enrolled already"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    tmp_path: Path, key: SiteKey, name: str | None, declared: int | None, said: str
) -> None:
    members = Members(tmp_path)
    members.enrol(SiteKey("old", "h0", 5), None, None)
    with pytest.raises(ProtocolError, match=said):
        members.enrol(key, name, declared)
    assert len(members.all()) == 1


def test_the_option_fills_in_for_the_key_and_must_not_contradict_it(tmp_path: Path) -> None:
    members = Members(tmp_path)
    with pytest.raises(ProtocolError, match="declares 5 patients, not 50"):
        members.enrol(SiteKey("k", "h1", 5), None, 50)
    assert members.enrol(SiteKey("k", "h1", None), None, 50).declared_patients == 50
    with pytest.raises(ProtocolError, match="already"):
        members.enrol(SiteKey("k", "h1", 5), None, None)
    assert members.enrol(SiteKey("k3", "h3", 5), None, 5).declared_patients == 5
    with pytest.raises(ProtocolError, match="No site called h2"):
        members.revoke("h2")


def test_the_declared_number_changes_between_runs_only(tmp_path: Path) -> None:
    members, key = Members(tmp_path), SiteKey(KEY, "h1", 300)
    assert members.redeclare(key, None, None, []) is None
    members.enrol(SiteKey(KEY, "h1", 200), None, None)
    members.enrol(SiteKey(new_key(), "h2", 300), None, None)
    with pytest.raises(
        ProtocolError, match=r"enrolled with 200 .* to 300, wait until no run goes on.*: pilot, run-1\."
    ):
        members.redeclare(key, None, None, ["run-1", "pilot"])
    assert [member.declared_patients for member in members.all()] == [200, 300]
    before = members.redeclare(key, None, None, [])
    assert before is not None
    assert before.declared_patients == 200
    assert [(member.name, member.declared_patients) for member in members.all()] == [("h1", 300), ("h2", 300)]
    assert members.redeclare(key, None, None, ["run-1"]) is None, "nothing is to be changed"
    with pytest.raises(ProtocolError, match="declares 300 patients, not 5"):
        members.redeclare(key, None, 5, [])
    assert members.redeclare(SiteKey(KEY, None, 400), "h2", None, []) is None, "that name has another key"
    members.revoke("h1")
    assert members.redeclare(SiteKey(KEY, "h1", 400), None, None, []) is None
    assert members.all()[0].declared_patients == 300


def test_a_private_key_is_told_apart(tmp_path: Path) -> None:
    private = ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    (tmp_path / "site.key").write_bytes(private)
    with pytest.raises(ProtocolError, match=r"private key, which must never leave its hospital.*sends the site\.pub"):
        read_site_key(tmp_path / "site.key")


def test_enrolments_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    threads = [
        Thread(target=Members(tmp_path).enrol, args=(SiteKey(f"k{n}", f"h{n}", 5), None, None)) for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {member.name for member in Members(tmp_path).all()} == {f"h{n}" for n in range(12)}


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No site is enrolled"):
        require_members(tmp_path)
    (tmp_path / "sites.json").write_text('{"sites": [{"name": "h1"}]}')
    with pytest.raises(StorageError, match="damaged"):
        Members(tmp_path).all()
