"""Prints what became of each module's mutants, and fails below the share that must be killed: see docs/mutants.md."""

import json
import sys
from collections import Counter
from pathlib import Path

from mutmut.stats import status_by_exit_code

LEAST_KILLED = 0.90
FOLDER = Path("mutants")
KILLED = ("killed", "timeout")
"""A mutant that never ends is found: the tests stop it at a time limit."""


def main() -> int:
    """Print a row for each module and one for all; return 1 if too few mutants were killed."""
    total: Counter[str] = Counter()
    rows = ["| module | mutants | killed | survived | share |", "| --- | --- | --- | --- | --- |"]
    for path in sorted(FOLDER.rglob("*.py.meta")):
        codes = json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"].values()
        if found := Counter(status_by_exit_code[code] for code in codes):
            total += found
            rows.append(_row(f"`{path.relative_to(FOLDER).with_suffix('')}`", found))
    rows.append(_row("all", total))
    sys.stdout.write("\n".join(rows) + "\n")
    if unknown := total["not checked"]:
        sys.stdout.write(f"{unknown} mutants were not tried: 'make mutants' goes on where it was stopped.\n")
    return int(unknown > 0 or _killed(total) < LEAST_KILLED * total.total())


def _killed(found: Counter[str]) -> int:
    return sum(found[status] for status in KILLED)


def _row(name: str, found: Counter[str]) -> str:
    killed, tried = _killed(found), found.total() - found["not checked"]
    return f"| {name} | {found.total()} | {killed} | {tried - killed} | {killed / max(1, tried):.0%} |"


if __name__ == "__main__":
    sys.exit(main())
