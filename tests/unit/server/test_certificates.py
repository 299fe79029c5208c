"""The authority and the certificate that hospitals check: a handshake is the oracle."""

import datetime
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from server.certificates import expires, make_certificates, renew_certificate, write_secret
from shared.errors import PlanError, StorageError


def shake_hands(folder: Path, authority: Path, name: str) -> str:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    client = ssl.create_default_context(cafile=authority)
    ours, theirs = socket.socketpair()

    def answer() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except (ssl.SSLError, OSError):
            theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name) as connection:
            return str(connection.version())
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("name", ["fedward.example.org", "10.1.2.3", "localhost", "127.0.0.1", "::1"])
def test_a_hospital_with_the_authority_shakes_hands(tmp_path: Path, name: str) -> None:
    make_certificates(tmp_path, ["fedward.example.org", "10.1.2.3"])
    assert shake_hands(tmp_path, tmp_path / "ca.crt", name) == "TLSv1.3"


def test_another_name_or_authority_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_certificates(tmp_path / name, ["fedward.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path / "one", tmp_path / "one" / "ca.crt", "evil.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path / "one", tmp_path / "two" / "ca.crt", "fedward.example.org")


def test_keys_are_private_p384_and_the_authority_may_sign(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["localhost"])
    for name in ("ca", "server"):
        path = tmp_path / f"{name}.key"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        key = load_pem_private_key(path.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.curve.name == "secp384r1"
    authority, server = (x509.load_pem_x509_certificate((tmp_path / f"{n}.crt").read_bytes()) for n in ("ca", "server"))
    server.verify_directly_issued_by(authority)
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    days = expires(tmp_path / "server.crt") - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=824) < days < datetime.timedelta(days=826)


@pytest.mark.parametrize("name", ["", "two words", "a..b", "späte.de", "x" * 300, "host/path"])
def test_an_impossible_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PlanError, match="neither a DNS name"):
        make_certificates(tmp_path, [name])


def test_a_secret_is_never_overwritten(tmp_path: Path) -> None:
    write_secret(tmp_path / "x.key", b"one")
    with pytest.raises(StorageError):
        write_secret(tmp_path / "x.key", b"two")
    assert (tmp_path / "x.key").read_bytes() == b"one"
    with pytest.raises(StorageError):
        expires(tmp_path / "x.key")


def test_a_renewed_certificate_serves_hospitals_that_know_the_authority(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["fedward.example.org", "10.0.0.7"])
    key, before = (
        (tmp_path / "server.key").read_bytes(),
        x509.load_pem_x509_certificate((tmp_path / "server.crt").read_bytes()),
    )
    assert renew_certificate(tmp_path) == expires(tmp_path / "server.crt") >= before.not_valid_after_utc
    after = x509.load_pem_x509_certificate((tmp_path / "server.crt").read_bytes())
    assert after.serial_number != before.serial_number
    assert (tmp_path / "server.key").read_bytes() == key
    assert shake_hands(tmp_path, tmp_path / "ca.crt", "fedward.example.org") == "TLSv1.3"
    renew_certificate(tmp_path, ["other.example.org"])
    assert shake_hands(tmp_path, tmp_path / "ca.crt", "other.example.org") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, tmp_path / "ca.crt", "fedward.example.org")
    (tmp_path / "ca.key").write_text("not a key")
    with pytest.raises(StorageError, match=r"ca\.key is no readable private key"):
        renew_certificate(tmp_path)
