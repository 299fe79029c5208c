"""Does the audit log tell the truth? Its chain, its end, and its agreement with the ledger."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from client.audit import NOISELESS, SEEDED, AuditLog, may_be_unconfirmed
from client.chain import MAX_TORN_BYTES, RECOVERED, Chain, Entry, Head, lines_between
from client.ledger import Release

_ACTS = ("reserved", "resumed", "replayed", "released")
_LEFT = ("replayed", "released")


@dataclass(frozen=True)
class Verification:
    """The result of a check.

    Attributes:
        problems: One sentence each; empty if the log is whole and agrees with the ledger.
        remarks: What a crash left and the next start settles, and releases without secret noise; no problem.
        head: The end of the chain, worth noting outside this machine.
    """

    problems: tuple[str, ...]
    remarks: tuple[str, ...]
    head: Head


def verify(log: AuditLog) -> Verification:
    """Check the whole log. Writes nothing, and may run beside a running daemon.

    Raises:
        StorageError: If log or ledger cannot be read at all.
    """
    chain, head, releases = log.read()
    problems, remarks, unconfirmed = _end_of_chain(chain, head)
    remarks = [*remarks, *_unprotected(chain.entries)]
    problems = [*chain.faults, *problems, *_disagreements(chain.entries, unconfirmed, releases)]
    end = chain.entries[-1].head if chain.entries else Head()
    return Verification(tuple(problems), tuple(remarks), end)


def _end_of_chain(chain: Chain, head: Head) -> tuple[list[str], list[str], tuple[Entry, ...]]:
    """Compare the chain's end with the head that the ledger remembers: problems, remarks, unconfirmed lines."""
    entries = chain.entries
    last = entries[-1].sequence if entries else 0
    known = [n for n, e in enumerate(entries, start=1) if (e.sequence, e.head.sha256) == (head.sequence, head.sha256)]
    if head.sequence and not known:
        if last < head.sequence:
            return [f"Missing at the end: {lines_between(last + 1, head.sequence)}."], [], ()
        return [f"Line {head.sequence} is not the one that the ledger remembers."], [], ()
    ahead = entries[known[-1] if known else 0 :]
    if not may_be_unconfirmed(ahead) or len(chain.torn) > MAX_TORN_BYTES:
        behind = lines_between(head.sequence + 1, max(last, head.sequence + 1))
        return [f"The ledger is older than the audit log: it does not know {behind}. Was it put back?"], [], ahead
    left = [f"{len(ahead)} unconfirmed line(s)"] * bool(ahead) + [f"{len(chain.torn)} torn bytes"] * bool(chain.torn)
    return [], [f"A crash left {' and '.join(left)} at the end; the next start settles it."] * bool(left), ahead


def _disagreements(entries: Sequence[Entry], unconfirmed: Sequence[Entry], releases: Sequence[Release]) -> list[str]:
    """Compare what the log announces with what the ledger holds, both ways."""
    rows = {(row.run, str(row.round), row.digest): row for row in releases}
    said: dict[str, dict[tuple[str, str, str], Entry]] = {act: {} for act in _ACTS}
    for entry in entries:
        if entry.event in said:
            said[entry.event][_release_of(entry)] = entry
    problems = []
    for key, row in rows.items():
        name = f"round {row.round} of run {row.run}"
        reserved = said["reserved"].get(key)
        if reserved is None:
            problems.append(f"The ledger holds {name}, which the audit log never reserved.")
        elif _mechanism_of(reserved) != _mechanism_of_row(row):
            problems.append(f"The ledger holds {name} under another mechanism than the audit log.")
        elif row.committed_at and key not in said["released"]:
            problems.append(f"The ledger released {name}, of which the audit log knows nothing.")
    exempt = {entry.sequence for entry in (*unconfirmed, *_never_confirmed(entries))}
    for entry in entries:
        if entry.event not in _ACTS or entry.sequence in exempt:
            continue
        held = rows.get(_release_of(entry))
        name = f"round {entry.fields.get('round')} of run {entry.fields.get('run')}"
        if held is None:
            problems.append(f"Line {entry.sequence} says that {name} was {entry.event}; the ledger does not hold it.")
        elif entry.event in _LEFT and held.committed_at is None:
            problems.append(f"Line {entry.sequence} says that {name} was {entry.event}; the ledger never released it.")
    return problems


def _unprotected(entries: Sequence[Entry]) -> list[str]:
    """Name the reservations whose noise protects nobody, as the log itself says."""
    means = {SEEDED: "with a simulation's seeded noise, which protects nobody", NOISELESS: "without noise"}
    return [
        f"Line {entry.sequence} reserved round {entry.fields.get('round')} of run {entry.fields.get('run')} {meaning}."
        for entry in entries
        if entry.event == "reserved" and (meaning := means.get(str(entry.fields.get("noise"))))
    ]


def _never_confirmed(entries: Sequence[Entry]) -> list[Entry]:
    """Return the lines whose act a crash prevented, as the ``recovered`` line behind them says."""
    found: list[Entry] = []
    for number, entry in enumerate(entries):
        if entry.event == RECOVERED:
            count = 2 if entry.fields.get("unconfirmed") == 2 else bool(entry.fields.get("unconfirmed"))
            before = (earlier for earlier in reversed(entries[:number]) if earlier.event != RECOVERED)
            found += islice(before, count)
    return found


def _release_of(entry: Entry) -> tuple[str, str, str]:
    run, number, request = (str(entry.fields.get(key)) for key in ("run", "round", "request"))
    return run, number, request


def _mechanism_of(entry: Entry) -> tuple[object, ...]:
    return tuple(entry.fields.get(key) for key in ("sample_rate", "noise_multiplier", "steps", "delta"))


def _mechanism_of_row(row: Release) -> tuple[object, ...]:
    return row.mechanism.sample_rate, row.mechanism.noise_multiplier, row.mechanism.steps, row.delta
