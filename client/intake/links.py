"""Identifiers that are one person: a steward's table, kept as pseudonyms.

A person under two identifiers would be two units of privacy: twice the epsilon. The table has one link a row::

    P-17,4711              two identifiers, each under whatever issuer
    NORTH,P-17,SOUTH,0815  issuer and identifier, twice; an empty issuer means any

Links join: of A,B and B,C all three are one person. An identifier is compared as intake writes it, and is also that
of an export that names no patient (its folder or file). The table itself is not kept. ``LINKS`` in the site's folder
holds HMACs only, is the owner's alone, and every later intake honours it; a further table adds to it.
"""

import csv
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from client.intake.files import DELIMITERS, cells_of, lines_of, open_table
from client.intake.pseudonyms import PatientIdentity, pseudonym
from shared.errors import IntakeError, StorageError
from shared.files import storage_errors, write_atomic
from shared.records import KEY_BYTES

LINKS: Final = "same-patient.json"
MAX_ROWS: Final = 1_000_000
_FORMAT: Final = 1

Name = tuple[bytes, bytes]
"""An identifier's pseudonym, and the pseudonym of the same identifier under any issuer; equal where none is named."""
Link = tuple[Name, Name]


@dataclass(frozen=True, repr=False)
class Links:
    """The groups of linked pseudonyms.

    Attributes:
        group: Pseudonym to the group's own, the smallest in it; without those that nothing is linked to.
    """

    group: Mapping[bytes, bytes] = field(default_factory=dict)

    def together(self, own: bytes, any_issuer: bytes) -> bytes:
        """Return the one pseudonym of all that is linked to an identifier; ``own`` if nothing is."""
        return self.group.get(own) or self.group.get(any_issuer) or own

    @classmethod
    def read(cls, path: Path, *, any_issuer: bool = False) -> "Links":
        """Read what ``add_links`` keeps; no file means no links. Raises StorageError.

        Args:
            path: The file.
            any_issuer: Whether the site's rule ignores issuers, so that a link under an issuer holds under all.
        """
        return cls.of(_read_kept(path), any_issuer=any_issuer)

    @classmethod
    def of(cls, links: Iterable[Link], *, any_issuer: bool = False) -> "Links":
        """Join links to groups: the transitive closure, by union and find."""
        links = list(links)
        leader: dict[bytes, bytes] = {}

        def find(key: bytes) -> bytes:
            while (above := leader.setdefault(key, key)) != key:
                leader[key] = key = leader[above]
            return key

        def join(one: bytes, other: bytes) -> None:
            low, high = sorted((find(one), find(other)))
            leader[high] = low

        everywhere = {own for link in links for own, bare in link if own == bare}
        for one, other in links:
            join(one[0], other[0])
            for own, bare in (one, other):
                if any_issuer or bare in everywhere:  # an identifier under any issuer is also that under this one
                    join(own, bare)
        return cls({key: find(key) for key in list(leader)})


def read_links(path: Path, secret: bytes) -> list[Link]:
    """Read a steward's table; no message quotes an identifier.

    Raises:
        IntakeError: If it cannot be read, or naming the line that is no link.
    """
    problem, links = "", []
    try:
        with open_table(path) as handle:
            for number, line in enumerate(lines_of(handle), start=1):
                if line is not None and not line.strip():
                    continue
                link = _parse(line or "", secret)
                if link is None or number > MAX_ROWS:
                    problem = f"Line {number} of {path.name} does not link two identifiers. {_FORM}"
                    break
                links.append(link)
    except OSError as error:
        problem = f"Cannot read {path.name}: {error.strerror or type(error).__name__}."
    if not problem and not links:
        problem = f"{path.name} links nobody. {_FORM}"
    if problem:  # raised outside the handler: a cause could quote the file
        raise IntakeError(problem)
    return links


_FORM: Final = "Write two identifiers a row, or four cells: issuer, identifier, issuer, identifier."


def add_links(path: Path, links: Iterable[Link]) -> int:
    """Keep further links at ``path``, for the owner's eyes only; return how many are kept. Raises StorageError."""
    kept = sorted({*_read_kept(path), *(tuple(sorted(link)) for link in links)})
    text = {"format": _FORMAT, "links": [[[key.hex() for key in name] for name in link] for link in kept]}
    write_atomic(path, json.dumps(text).encode(), private=True)
    return len(kept)


def _parse(line: str, secret: bytes) -> Link | None:
    """Return the link of one row, or None if it is none."""
    cells: list[str] = []
    with suppress(csv.Error):
        delimiter = next((mark for mark in DELIMITERS if mark in line), ",")
        cells = [cell.strip() for cell in cells_of(line, delimiter)]
    if len(cells) == 2:
        cells = ["", cells[0], "", cells[1]]
    if len(cells) != 4 or not cells[1] or not cells[3] or "\0" in line:
        return None
    return _name(secret, cells[0], cells[1]), _name(secret, cells[2], cells[3])


def _name(secret: bytes, issuer: str, identifier: str) -> Name:
    return tuple(pseudonym(secret, PatientIdentity(part, identifier)) for part in (issuer, ""))  # type: ignore[return-value]


def _read_kept(path: Path) -> list[Link]:
    with storage_errors(path):
        if not path.exists():
            return []
        text = path.read_bytes()
    try:
        kept = json.loads(text)
        if kept["format"] != _FORMAT:
            raise StorageError(f"{path} is of another version. Use the version that made it.")
        links = [tuple(tuple(bytes.fromhex(key) for key in name) for name in link) for link in kept["links"]]
        if any(len(link) != 2 or any([len(key) for key in name] != [KEY_BYTES] * 2 for name in link) for link in links):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StorageError(f"{path} is damaged. Move it away and give the table again with --same-patient.") from error
    return links  # type: ignore[return-value]
