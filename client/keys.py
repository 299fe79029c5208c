"""A site's identity: its key pair, and the certificate authority of the server that it trusts.

site.key   EC P-384 private key, OpenSSH form, readable by its owner only
site.pub   the public key as one OpenSSH line whose comment is ``NAME declared-patients=N``
ca.crt     the certificate authority of the server, PEM
"""

import os
import re
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shared.errors import PolicyError, StorageError
from shared.files import storage_errors, write_atomic, write_secret

PRIVATE_KEY, PUBLIC_KEY, AUTHORITY = "site.key", "site.pub", "ca.crt"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def make_key(folder: Path, name: str, declared_patients: int) -> None:
    """Write a new ``site.key`` and its ``site.pub``, the file that the aggregator's operator enrols.

    Raises:
        PolicyError: If ``name`` does not fit on the public key's line, or ``declared_patients`` is below 1.
        StorageError: If there is a key already, or the folder cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise PolicyError(
            f"The name {name!r} does not fit a key: take at most 63 letters, digits, dots, dashes and underscores."
        )
    if declared_patients < 1:
        raise PolicyError("declared-patients must be at least 1.")
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    write_secret(folder / PRIVATE_KEY, private)
    write_public_key(folder, key, name, declared_patients)


def write_public_key(folder: Path, key: ec.EllipticCurvePrivateKey, name: str, declared_patients: int) -> None:
    """Write ``site.pub``, the file that the aggregator's operator enrols. Raises StorageError."""
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_atomic(folder / PUBLIC_KEY, public + f" {name} declared-patients={declared_patients}\n".encode())


def read_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    """Return the private key of the site in ``folder``.

    Raises:
        StorageError: If there is none, it cannot be read, is no EC P-384 key, or others may read it.
    """
    path = folder / PRIVATE_KEY
    try:
        with path.open("rb") as handle:
            mode = os.fstat(handle.fileno()).st_mode & 0o777
            content = handle.read()
    except FileNotFoundError as error:
        raise StorageError(f"There is no {path}; make one with fedward-site init.") from error
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror}. Run as the user who owns it.") from error
    if mode & 0o077:
        raise StorageError(f"Others may read {path} (mode {mode:03o}); run chmod 600 on it, or make a new key.")
    try:
        key = serialization.load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StorageError(f"{path} is not an OpenSSH private key; restore it or make a new one.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise StorageError(f"{path} is not an EC P-384 key; make one with fedward-site init.")
    return key


def read_authority(folder: Path) -> bytes:
    """Return the PEM of ``ca.crt``.

    Raises:
        StorageError: If it is missing or no certificate.
    """
    path = folder / AUTHORITY
    with storage_errors(path):
        content = path.read_bytes()
    _certificate(path, content)
    return content


def server_fingerprint(folder: Path) -> str:
    """Return the first 16 hex digits of the SHA-256 of the CA certificate: which server a run's name belongs to.

    Raises:
        StorageError: If ``ca.crt`` is missing or no certificate.
    """
    return _certificate(folder / AUTHORITY, read_authority(folder)).fingerprint(hashes.SHA256()).hex()[:16]


def _certificate(path: Path, content: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise StorageError(f"{path} is not a PEM certificate; copy the server's ca.crt again.") from error
