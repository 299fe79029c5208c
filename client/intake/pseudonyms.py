"""Keyed pseudonyms: the same patient gets the same 16 bytes in this hospital, and nobody else can link them.

HMAC-SHA256 (RFC 2104) with a secret that never leaves the site. A plain hash would not do: hospital numbers
are few enough to try them all.
"""

import hashlib
import hmac
import os
import secrets
import stat
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from shared.errors import StorageError
from shared.files import SecretExists, storage_errors, write_secret
from shared.records import KEY_BYTES

SECRET_BYTES: Final = 32
_DOMAIN: Final = b"fedward patient v1"


class PatientIdentity(NamedTuple):
    """A hospital's own name for a patient: never stored, logged or shown."""

    issuer: str
    patient_id: str

    def __repr__(self) -> str:
        return "PatientIdentity(…)"


def pseudonym(secret: bytes, patient: PatientIdentity) -> bytes:
    """Return the patient's ``KEY_BYTES`` bytes under ``secret``: one identifier, one pseudonym, in any encoding.

    Raises:
        ValueError: If the secret has fewer than 128 bits.
    """
    if len(secret) < KEY_BYTES:
        raise ValueError(f"The secret must have at least {KEY_BYTES} bytes.")
    texts = (unicodedata.normalize("NFC", text) for text in patient)
    parts = [_DOMAIN, *(text.encode("utf-8", "surrogatepass") for text in texts)]
    # Lengths first: ("ab", "c") and ("a", "bc") are different patients.
    message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.digest(secret, message, hashlib.sha256)[:KEY_BYTES]


def load_or_create_secret(path: Path) -> bytes:
    """Return the site's secret at ``path``; create it once, readable by its owner only.

    An existing file is never overwritten: with another secret every patient would become a new one.

    Raises:
        StorageError: If the file cannot be read or written, is damaged, or others may read it.
    """
    with storage_errors(path):
        if not os.path.lexists(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(SecretExists):  # somebody else was first
                write_secret(path, secrets.token_bytes(SECRET_BYTES))
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as handle:
            shared_with_others = stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077
            secret = handle.read(SECRET_BYTES + 1)
    if shared_with_others:
        raise StorageError(f"Others may read the secret {path}. Restrict it with chmod 600.")
    if len(secret) != SECRET_BYTES:
        raise StorageError(f"The secret {path} is damaged. Restore it from the backup; do not make a new one.")
    return secret
