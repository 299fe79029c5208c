"""The consortium's certificate authority and the aggregator's certificate.

Keys are EC P-384. A site trusts the authority's certificate alone, so the aggregator's own can be renewed without
touching a hospital.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import PlanError, StorageError
from shared.files import write_atomic, write_secret

CA_DAYS, SERVER_DAYS = 3653, 825
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_SKEW = datetime.timedelta(days=1)
"""A certificate is valid from a day ago: hospitals' clocks differ."""


def make_certificates(folder: Path, names: Sequence[str]) -> None:
    """Write ``ca.crt``, ``ca.key``, ``server.crt`` and ``server.key`` into ``folder``.

    The aggregator's own loopback connections are verified like any other, so its certificate always names
    ``localhost``, ``127.0.0.1`` and ``::1`` too.

    Args:
        folder: Exists and holds none of them.
        names: DNS names or IP addresses under which hospitals reach the aggregator.

    Raises:
        PlanError: If a name is neither a DNS name nor an address.
        StorageError: If a file cannot be written or exists.
    """
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    authority = _authority(ca_key)
    certificate = _server(key, authority, ca_key, names)
    for name, private in (("ca.key", ca_key), ("server.key", key)):
        write_secret(folder / name, _pem(private))
    for name, public in (("ca.crt", authority), ("server.crt", certificate)):
        write_atomic(folder / name, public.public_bytes(serialization.Encoding.PEM))


def renew_certificate(folder: Path, names: Sequence[str] = ()) -> datetime.datetime:
    """Write a new ``server.crt`` for the key that is there, by the same authority; return when it ends, in UTC.

    Args:
        folder: The aggregator's.
        names: As of :func:`make_certificates`; those of the certificate that is there if none are given.

    Raises:
        PlanError: If a name is neither a DNS name nor an address.
        StorageError: If a key or certificate cannot be read or written.
    """
    authority, present = _read_certificate(folder / "ca.crt"), _read_certificate(folder / "server.crt")
    ca_key, key = _read_key(folder / "ca.key"), _read_key(folder / "server.key")
    alternatives = present.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    certificate = _server(key, authority, ca_key, names or [str(alternative.value) for alternative in alternatives])
    write_atomic(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))
    return certificate.not_valid_after_utc


def expires(path: Path) -> datetime.datetime:
    """Return when the certificate at ``path`` ends, in UTC.

    Raises:
        StorageError: If there is no certificate.
    """
    return _read_certificate(path).not_valid_after_utc


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is no readable certificate. Restore it from the back-up.") from error


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(f"{path} is no readable private key. Restore it from the back-up.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StorageError(f"{path} holds a key of another kind. Restore it from the back-up.")
    return key


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fedward consortium")])
    usage = x509.KeyUsage(
        key_cert_sign=True,
        crl_sign=True,
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        _builder(name, name, key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )


def _server(
    key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    names: Sequence[str],
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fedward aggregator")])
    alternatives = [_alternative(name) for name in dict.fromkeys((*names, *LOOPBACK_NAMES))]
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return (
        _builder(subject, authority.subject, key, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .sign(ca_key, hashes.SHA384())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        labels = name.split(".")
    plain = all(label.replace("-", "").isalnum() and label.isascii() and len(label) < 64 for label in labels)
    if not plain or len(name) > 253:
        raise PlanError(f"{name!r} is neither a DNS name nor an IP address; give --name as hospitals will type it.")
    return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
