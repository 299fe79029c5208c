import os
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve

from client.keys import make_key, read_authority, read_key, server_fingerprint
from shared.errors import PolicyError, StorageError


def test_the_public_key_is_the_private_ones_and_says_who_and_how_many(tmp_path):
    make_key(tmp_path, "st-elsewhere", 200)
    line = (tmp_path / "site.pub").read_bytes()
    public = serialization.load_ssh_public_key(line)
    assert uses_nist_ec_curve(public), "Flower enrols no other"
    assert public == read_key(tmp_path).public_key()
    assert line.decode().split()[2:] == ["st-elsewhere", "declared-patients=200"]


def test_the_private_key_is_its_owners_from_the_first_byte(tmp_path, monkeypatch):
    modes = []
    write = os.fsync

    def spy(descriptor):
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        write(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    umask = os.umask(0)
    try:
        make_key(tmp_path, "h1", 10)
    finally:
        os.umask(umask)
    assert modes[0] == 0o600
    assert stat.S_IMODE((tmp_path / "site.key").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site.key", "site.pub"]


def test_a_key_is_never_overwritten(tmp_path):
    make_key(tmp_path, "h1", 10)
    before = (tmp_path / "site.key").read_bytes(), (tmp_path / "site.pub").read_bytes()
    with pytest.raises(StorageError, match="already"):
        make_key(tmp_path, "h1", 20)
    assert ((tmp_path / "site.key").read_bytes(), (tmp_path / "site.pub").read_bytes()) == before


@pytest.mark.parametrize("name", ["", "two words", "line\nbreak", "a=b", "-x", "x" * 64])
def test_a_name_that_would_break_the_line_is_refused(tmp_path, name):
    with pytest.raises(PolicyError):
        make_key(tmp_path, name, 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("declared", [0, -1])
def test_no_patients_are_refused(tmp_path, declared):
    with pytest.raises(PolicyError):
        make_key(tmp_path, "h1", declared)


def test_a_missing_key_says_how_to_make_one(tmp_path):
    with pytest.raises(StorageError, match="fedward-site init"):
        read_key(tmp_path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_may_read_is_refused(tmp_path, mode):
    make_key(tmp_path, "h1", 10)
    (tmp_path / "site.key").chmod(mode)
    with pytest.raises(StorageError, match="chmod 600"):
        read_key(tmp_path)


@pytest.mark.parametrize("other", [ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()])
def test_a_key_of_another_kind_is_refused(tmp_path, other):
    make_key(tmp_path, "h1", 10)
    form = serialization.PrivateFormat.OpenSSH
    content = other.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    (tmp_path / "site.key").write_bytes(content)
    with pytest.raises(StorageError, match="P-384"):
        read_key(tmp_path)


def test_a_broken_key_is_refused(tmp_path):
    make_key(tmp_path, "h1", 10)
    (tmp_path / "site.key").write_bytes(b"-----BEGIN OPENSSH PRIVATE KEY-----\n")
    with pytest.raises(StorageError, match="OpenSSH"):
        read_key(tmp_path)


def test_a_missing_or_broken_authority_is_refused(tmp_path):
    with pytest.raises(StorageError):
        read_authority(tmp_path)
    (tmp_path / "ca.crt").write_text("nothing")
    with pytest.raises(StorageError, match=r"ca\.crt"):
        server_fingerprint(tmp_path)
