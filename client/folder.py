"""A hospital's folder: its rules and its books. What trains is in ``client.site``; nothing here needs it.

site.toml        the policy (client.config)
stores/KIND/     the prepared stores, one of each kind (shared.records)
ledger.sqlite    the privacy ledger (client.ledger)
audit.jsonl      the audit log (client.audit)
signing.pub      the keys trusted to sign checkpoints, if any (shared.provenance.keys)
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from client.audit import AuditLog
from client.config import SitePolicy
from client.ledger import Ledger
from shared.provenance.keys import SIGNING_PUB, Trusted, read_trusted

LEDGER, AUDIT, POLICY = "ledger.sqlite", "audit.jsonl", "site.toml"
HEALTH_PORT_FILE = "health-port"
"""The port of the daemon's health endpoint, which the system may have chosen."""
SELFTEST_FILE = "selftest.json"
"""What the last self-test of the daemon said, by task."""


def open_books(folder: Path) -> None:
    """Begin the ledger and the audit log of a new site; what is there is left as it is. Raises StorageError."""
    AuditLog.create(folder / AUDIT, Ledger.create(folder / LEDGER))


@dataclass(frozen=True)
class Folder:
    """A hospital's folder, opened.

    Attributes:
        folder: See the module.
    """

    folder: Path

    @cached_property
    def policy(self) -> SitePolicy:
        """The hospital's rules."""
        return SitePolicy.read(self.folder / POLICY)

    @cached_property
    def ledger(self) -> Ledger:
        """The hospital's privacy ledger."""
        return Ledger(self.folder / LEDGER)

    @cached_property
    def audit(self) -> AuditLog:
        """The hospital's audit log."""
        return AuditLog(self.folder / AUDIT, self.ledger)

    @property
    def trusted(self) -> Trusted:
        """The keys that this hospital trusts to sign checkpoints; none if it was given none."""
        return read_trusted(self.folder / SIGNING_PUB)
