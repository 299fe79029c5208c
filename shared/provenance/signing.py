"""The aggregator's signature under what its checkpoints say of themselves.

A signature says: the holder of this key wrote these fields, the weights' SHA-256, epsilon and ancestry among them. It
covers the canonical form of what the parser returned, so what is verified is what is used.
"""

from collections.abc import Sequence
from dataclasses import replace

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shared.errors import StorageError
from shared.provenance.keys import fingerprint
from shared.provenance.sidecar import Sidecar, Signature, parse_sidecar


def signed(sidecar: Sidecar, key: Ed25519PrivateKey) -> Sidecar:
    """Return the sidecar as the parser will read it, with a signature.

    Raises:
        StorageError: If the parser would refuse it, or it states an epsilon and not what that composes.
    """
    if sidecar.epsilon is not None and sidecar.ancestry is None:
        raise StorageError("An epsilon without an ancestry is not signed: nobody could tell what it composes.")
    read = parse_sidecar(replace(sidecar, signature=None).to_json(), "The checkpoint's description")
    return replace(read, signature=Signature(fingerprint(key.public_key()), key.sign(read.signed_bytes()).hex()))


def is_signed_by(sidecar: Sidecar, trusted: Sequence[Ed25519PublicKey]) -> bool:
    """Whether one of the keys signed exactly these fields."""
    if sidecar.signature is None:
        return False
    for key in trusted:
        if fingerprint(key) == sidecar.signature.key_sha256:
            try:
                key.verify(bytes.fromhex(sidecar.signature.value), sidecar.signed_bytes())
                return True
            except InvalidSignature:
                return False
    return False


def require_signature(sidecar: Sidecar, trusted: Sequence[Ed25519PublicKey], name: str) -> None:
    """Refuse a checkpoint that none of the trusted keys signed.

    Raises:
        StorageError: Saying whether a signature is missing, of a stranger, or wrong.
    """
    if is_signed_by(sidecar, trusted):
        return
    if sidecar.signature is None:
        raise StorageError(
            f"{name} is not signed, so nobody answers for it. Ask the server's operator for a signed copy."
        )
    if sidecar.signature.key_sha256 in map(fingerprint, trusted):
        raise StorageError(f"{name} was changed after it was signed: the signature is wrong. Copy it again.")
    raise StorageError(
        f"{name} is signed by a key that is not trusted here ({sidecar.signature.key_sha256[:16]}). If it is your "
        "consortium's, trust its signing.pub first."
    )
