"""Who is enrolled: ``sites.json``, the one truth that ``enrol`` and ``revoke`` write and the service follows."""

import fcntl
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from shared.errors import ProtocolError, StorageError
from shared.files import storage_errors, write_atomic

SITES = "sites.json"
_ALGORITHM = "ecdsa-sha2-nistp384"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DECLARED = re.compile(r"declared-patients=([0-9]{1,9})")


@dataclass(frozen=True)
class SiteKey:
    """What a hospital's ``site.pub`` says.

    Attributes:
        public_key: ``ecdsa-sha2-nistp384 BASE64``, without the comment.
        name: The site's name, if the comment gives one.
        declared_patients: The coarse public number, if the comment gives one.
    """

    public_key: str
    name: str | None
    declared_patients: int | None


@dataclass(frozen=True)
class Member:
    """An enrolled site.

    Attributes:
        name: Its public name.
        public_key: As in :class:`SiteKey`.
        declared_patients: Fixed at enrolment and while a run goes on; its weight in the average.
        revoked: Whether it may no longer take part.
        node_id: Flower's number for its key, once the service has registered it.
    """

    name: str
    public_key: str
    declared_patients: int
    revoked: bool = False
    node_id: int | None = None


class Members:
    """Reads and writes ``sites.json``; every change is locked against other processes and atomic."""

    def __init__(self, server: Path) -> None:
        self._path = server / SITES

    @staticmethod
    def read(path: Path) -> tuple[Member, ...]:
        """Return everyone ever enrolled, in the order of enrolment; nobody if there is no file.

        Args:
            path: Of ``sites.json``.

        Raises:
            StorageError: If it is damaged.
        """
        try:
            return tuple(Member(**entry) for entry in json.loads(path.read_bytes())["sites"])
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StorageError(f"{path} is damaged. Restore it from the back-up.") from error

    def all(self) -> tuple[Member, ...]:
        """Return everyone ever enrolled."""
        return self.read(self._path)

    def enrol(self, key: SiteKey, name: str | None, declared_patients: int | None) -> Member:
        """Add a site.

        Args:
            key: From its ``site.pub``.
            name: Needed if the key's comment gives none, and equal to it if it does.
            declared_patients: Needed if the comment gives none; must agree with it.

        Raises:
            ProtocolError: If something is missing or does not fit, or name or key are enrolled already.
        """
        member = Member(_name(key, name), key.public_key, _declared(key, declared_patients))

        def add(members: tuple[Member, ...]) -> tuple[Member, ...]:
            for other in members:
                if other.public_key == member.public_key:
                    state = "and was revoked; a revoked key never comes back" if other.revoked else "already"
                    raise ProtocolError(f"This key is enrolled as {other.name} {state}.")
                if other.name == member.name and not other.revoked:
                    raise ProtocolError(
                        f"A site called {member.name} is enrolled already. Revoke it first if its key has changed."
                    )
            return (*members, member)

        self._change(add)
        return member

    def redeclare(
        self, key: SiteKey, name: str | None, declared_patients: int | None, running: Collection[str]
    ) -> Member | None:
        """Change the declared number of the enrolled site that holds ``key``; return its entry before.

        The number weighs in averages and bounds updates, so it stays the same while a run goes on. An offer of the
        site's that still declares the old one is refused. Epsilon does not hang on it.

        Args:
            key: From the site's new ``site.pub``.
            name: As for :meth:`enrol`.
            declared_patients: As for :meth:`enrol`.
            running: Names of the runs that go on.

        Returns:
            ``None``, and nothing is changed, if no site is enrolled under this key and name, or with this very number.

        Raises:
            ProtocolError: If something is missing or does not fit, or a run goes on.
        """
        wanted, declared = _name(key, name), _declared(key, declared_patients)
        changed: list[Member] = []

        def change(members: tuple[Member, ...]) -> tuple[Member, ...]:
            for member in active(members):
                holder = (member.public_key, member.name) == (key.public_key, wanted)
                if holder and member.declared_patients != declared:
                    changed.append(member)
            if changed and running:
                raise ProtocolError(
                    f"{wanted} is enrolled with {changed[0].declared_patients} declared patients; to change that to "
                    f"{declared}, wait until no run goes on, or stop them: {', '.join(sorted(running))}."
                )
            return tuple(replace(m, declared_patients=declared) if m in changed else m for m in members)

        self._change(change)
        return changed[0] if changed else None

    def revoke(self, name: str) -> None:
        """Mark a site as revoked; its entry stays, so that its key never comes back.

        Raises:
            ProtocolError: If no such site is enrolled.
        """

        def mark(members: tuple[Member, ...]) -> tuple[Member, ...]:
            if name not in {member.name for member in active(members)}:
                raise ProtocolError(f"No site called {name} is enrolled. See: fedward-server sites")
            return tuple(replace(m, revoked=True) if m.name == name else m for m in members)

        self._change(mark)

    def note_nodes(self, nodes: dict[str, int]) -> None:
        """Record Flower's node ids by public key."""
        self._change(
            lambda members: tuple(replace(m, node_id=nodes.get(m.public_key, m.node_id)) for m in members),
        )

    def _change(self, change: Callable[[tuple[Member, ...]], tuple[Member, ...]]) -> None:
        with self._locked():
            sites = [asdict(member) for member in change(self.read(self._path))]
            write_atomic(self._path, json.dumps({"sites": sites}, indent=1).encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A file of its own: sites.json itself is replaced at every change.
        with storage_errors(self._path), self._path.with_name(f".{SITES}.lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def read_site_key(path: Path) -> SiteKey:
    """Read a hospital's ``site.pub``.

    Raises:
        StorageError: If it cannot be read.
        ProtocolError: If it is no EC P-384 public key.
    """
    with storage_errors(path):
        content = path.read_bytes()
    if b"PRIVATE KEY" in content:
        raise ProtocolError(
            f"{path} is a private key, which must never leave its hospital: delete this copy. The hospital makes a new "
            "one (fedward-site new-key) and sends the site.pub that stands beside it."
        )
    try:
        return parse_site_key(content.decode())
    except (UnicodeDecodeError, ProtocolError) as error:
        raise ProtocolError(
            f"{path} is no site.pub: it must be one line, '{_ALGORITHM} KEY NAME declared-patients=N'."
        ) from error


def parse_site_key(text: str) -> SiteKey:
    """Parse the one line of a ``site.pub``.

    Raises:
        ProtocolError: If it is no EC P-384 public key with an optional comment of the agreed form.
    """
    lines = text.strip().splitlines()
    words = lines[0].split() if len(lines) == 1 else []
    if len(words) < 2 or words[0] != _ALGORITHM:
        raise ProtocolError("It is no public key of the agreed kind.")
    try:
        key = load_ssh_public_key(" ".join(words[:2]).encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ProtocolError("The key itself cannot be parsed.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ProtocolError("The key is not EC P-384.")
    name, declared = None, None
    for word in words[2:]:
        if match := _DECLARED.fullmatch(word):
            declared = int(match[1])
        elif name is None and _NAME.fullmatch(word):
            name = word
        else:
            raise ProtocolError("The comment is not 'NAME declared-patients=N'.")
    return SiteKey(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(), name, declared)


def active(members: tuple[Member, ...]) -> tuple[Member, ...]:
    """Return the members that may take part."""
    return tuple(member for member in members if not member.revoked)


def key_digest(member: Member) -> str:
    """Return the SHA-256 of a member's public key, by which two runs' hospitals are told to be one."""
    return hashlib.sha256(member.public_key.encode()).hexdigest()


def _name(key: SiteKey, name: str | None) -> str:
    if name is not None and key.name is not None and name != key.name:
        raise ProtocolError(f"The key calls its site {key.name}, not {name}. Enrol it under the name it carries.")
    chosen = name or key.name
    if chosen is None or not _NAME.fullmatch(chosen):
        raise ProtocolError("Give the site a name with --name: letters, digits, '.', '_' and '-', at most 64.")
    return chosen


def _declared(key: SiteKey, declared_patients: int | None) -> int:
    if None not in (declared_patients, key.declared_patients) and declared_patients != key.declared_patients:
        raise ProtocolError(
            f"The hospital's own key declares {key.declared_patients} patients, not {declared_patients}. To change "
            "it, the hospital runs fedward-site declare and sends its new site.pub."
        )
    declared = key.declared_patients if declared_patients is None else declared_patients
    if declared is None or not 1 <= declared < 10**9:
        raise ProtocolError("Say with --declared-patients how many patients the site declares: 1 or more.")
    return declared


def require_members(server: Path) -> tuple[Member, ...]:
    """Return the sites that may take part.

    Raises:
        StorageError: If there is none.
    """
    members = active(Members(server).all())
    if not members:
        raise StorageError(f"No site is enrolled. Enrol one with: fedward-server enrol {server} site.pub")
    return members
