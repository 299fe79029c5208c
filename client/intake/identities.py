"""Who is one patient: the rule for issuers, and the identifiers that the steward says are one person.

The unit of privacy is what this module calls one patient. DICOM identifies a patient by PatientID and its issuer
(PS3.3 C.7.1.1), and many exports leave the issuer out. What that means is decided once, in ``site.toml``::

    [intake]
    issuer = "as-written"      # issuer and number together are the patient; no issuer is an issuer of its own
    # issuer = "ignore"        # the number alone is the patient
    # issuer = "required"      # a file without an issuer is left out
    # missing-issuer = "NORTH" # a file without an issuer is of this one

No rule looks at another patient's files. Under ``as-written`` and ``required``, and before ``missing-issuer``, a slice
without an issuer takes the one that its own series states for its number (``client.intake.series``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from client.intake.links import Links
from client.intake.pseudonyms import PatientIdentity, pseudonym
from client.intake.tables import read_table
from shared.errors import IntakeError
from shared.suggest import suggestion

AS_WRITTEN, IGNORE, REQUIRED = "as-written", "ignore", "required"
_RULES: Final = (AS_WRITTEN, IGNORE, REQUIRED)
_KEYS: Final = ("issuer", "missing-issuer")


@dataclass(frozen=True)
class IssuerRule:
    """What the issuer of a PatientID counts for.

    Attributes:
        issuer: One of ``as-written``, ``ignore``, ``required``.
        missing: The issuer of files that name none; "" for none.
    """

    issuer: str = AS_WRITTEN
    missing: str = ""

    def __post_init__(self) -> None:
        if self.issuer not in _RULES:
            raise IntakeError(
                f"The issuer in site.toml [intake] must be one of: {', '.join(_RULES)}."
                f"{suggestion(self.issuer, _RULES)}"
            )
        if self.missing and self.issuer != AS_WRITTEN:
            raise IntakeError(
                f'missing-issuer in site.toml [intake] does not go with issuer = "{self.issuer}". Take one of them out.'
            )

    def settle(self, patient: PatientIdentity) -> PatientIdentity | None:
        """Return who the patient of one file is; None if the file must be left out."""
        if self.issuer == IGNORE:
            return patient._replace(issuer="")
        if self.issuer == REQUIRED and not patient.issuer:
            return None
        return patient._replace(issuer=patient.issuer or self.missing)


def parse_rule(table: Mapping[str, Any]) -> IssuerRule:
    """Return the rule that a table ``[intake]`` of ``site.toml`` describes.

    Raises:
        IntakeError: If a key is unknown or not a text, or the values do not go together.
    """
    if unknown := sorted(set(table) - set(_KEYS)):
        raise IntakeError(f"site.toml [intake] has unknown keys: {', '.join(unknown)}. It takes: {', '.join(_KEYS)}.")
    if wrong := sorted(key for key, value in table.items() if not isinstance(value, str) or not value):
        raise IntakeError(f"site.toml [intake] needs a text for: {', '.join(wrong)}.")
    return IssuerRule(table.get("issuer", AS_WRITTEN), table.get("missing-issuer", ""))


@dataclass(frozen=True, repr=False)
class Identities:
    """A site's answer to the question who is one patient.

    Attributes:
        rule: For the issuers of DICOM files.
        links: The identifiers that are one person.
    """

    rule: IssuerRule = field(default_factory=IssuerRule)
    links: Links = field(default_factory=Links)

    def key(self, secret: bytes, patient: PatientIdentity) -> bytes:
        """Return the pseudonym of a settled identity: that of all identifiers linked to it, else its own."""
        own = pseudonym(secret, patient)
        return self.links.together(own, pseudonym(secret, patient._replace(issuer="")))


def read_identities(policy: Path, links: Path) -> Identities:
    """Return a site's rule and links, from its ``site.toml`` and its file of links.

    Raises:
        StorageError: If a file cannot be read or is damaged.
        IntakeError: If the table ``[intake]`` is wrong.
    """
    rule = parse_rule(read_table(policy, "intake"))
    return Identities(rule, Links.read(links, any_issuer=rule.issuer == IGNORE))
