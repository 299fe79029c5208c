"""The key files by which an aggregator signs and a hospital trusts (Ed25519, RFC 8032).

    signing.key   private key, PEM, readable by its owner only
    signing.pub   one OpenSSH line, which hospitals get together with ca.crt

Whom a hospital trusts is the file ``signing.pub`` in its own folder, one line for each key.
"""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_public_key,
)

from shared.errors import StorageError
from shared.files import SecretExists, storage_errors, write_atomic, write_secret
from shared.provenance.bounded import read_bounded

SIGNING_KEY, SIGNING_PUB = "signing.key", "signing.pub"
_COMMENT: Final = b" fedward-signing\n"
_MOST_BYTES: Final = 2**16

Trusted = tuple[Ed25519PublicKey, ...]


def ensure_signing_key(folder: Path) -> Ed25519PrivateKey:
    """Return the signing key of an aggregator's folder, which is made if there is none.

    Raises:
        StorageError: If it is damaged or cannot be written.
    """
    path = folder / SIGNING_KEY
    if not path.exists():
        fresh = Ed25519PrivateKey.generate()
        with suppress(SecretExists):  # if another process was faster, its key counts
            write_secret(path, fresh.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    try:
        key = load_pem_private_key(read_bounded(path, _MOST_BYTES), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StorageError(f"{path} is no readable private key. Restore it from the back-up.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise StorageError(f"{path} holds a key of another kind. Restore it from the back-up.")
    if not (folder / SIGNING_PUB).exists():
        write_atomic(folder / SIGNING_PUB, public_line(key.public_key()))
    return key


def public_line(key: Ed25519PublicKey) -> bytes:
    """Return a public key as a line of ``signing.pub``."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + _COMMENT


def read_trusted(path: Path) -> Trusted:
    """Return the keys in a ``signing.pub``; none if there is no such file.

    Raises:
        StorageError: If it holds anything else.
    """
    with storage_errors(path):
        if not path.exists():
            return ()
    content = read_bounded(path, _MOST_BYTES)
    if b"PRIVATE KEY" in content:
        raise StorageError(
            f"{path.name} is a private key, which must never leave its aggregator: delete this copy. "
            "Ask the server's operator for signing.pub."
        )
    try:
        keys = [load_ssh_public_key(line) for line in content.splitlines() if line.strip()]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise StorageError(f"{path.name} is no signing.pub. Ask the server's operator for it.") from error
    trusted = tuple(key for key in keys if isinstance(key, Ed25519PublicKey))
    if not trusted or len(trusted) < len(keys):
        raise StorageError(
            f"{path.name} is no signing.pub: its keys must be Ed25519. Ask the server's operator for it."
        )
    return trusted


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return the SHA-256 of a public key, by which people compare it over the telephone."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()
