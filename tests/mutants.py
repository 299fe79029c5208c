"""Tries every mutant that mutmut made, prints what became of them, and fails below the share that must be killed.

mutmut makes the mutants and finds out which tests reach which function. To try one it starts pytest anew, which takes
longer than most tests. Here the tests are collected once, and a mutant is tried in a fork of that process: a tenth of
the time. Verdicts are kept where mutmut keeps its own, so ``mutmut results`` and ``mutmut show`` work as ever.

Run ``make mutants``; docs/mutants.md has the figures.
"""

import json
import os
import resource
import sys
import tempfile
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.stats import status_by_exit_code
from mutmut.utils.format_utils import mangled_name_from_mutant_name

LEAST_KILLED = 0.90
ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "mutants"
KILLED = ("killed", "timeout")
"""A mutant that never ends is found: the tests stop it at a time limit."""
NO_TESTS = 33
CPU_LIMIT_S = 60


class Trial:
    """A plugin of pytest that, in place of running the tests, tries each mutant on the tests that reach it."""

    def __init__(self, *, again: bool) -> None:
        stats = json.loads((FOLDER / "mutmut-stats.json").read_text(encoding="utf-8"))
        self._reaching, self._took = stats["tests_by_mangled_function_name"], stats["duration_by_test"]
        self._again = again

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Write each verdict into its module's file as soon as it is known."""
        items = {item.nodeid: item for item in session.items}
        if _in_a_fork("", list(items.values())):
            raise pytest.UsageError("The tests fail without a mutant. Run them by themselves first.")
        for path in sorted(FOLDER.rglob("*.py.meta")):
            meta = json.loads(path.read_text(encoding="utf-8"))
            for mutant, code in meta["exit_code_by_key"].items():
                if code is None or (self._again and status_by_exit_code[code] not in KILLED):
                    meta["exit_code_by_key"][mutant] = self._try(mutant, items)
                    path.write_text(json.dumps(meta, indent=4), encoding="utf-8")
        return True

    def _try(self, mutant: str, items: dict[str, pytest.Item]) -> int:
        reaching = self._reaching.get(mangled_name_from_mutant_name(mutant), [])
        tests = [items[name] for name in sorted(reaching, key=lambda name: self._took[name]) if name in items]
        if not tests:
            return NO_TESTS
        return _in_a_fork(mutant, tests)


def _in_a_fork(mutant: str, tests: list[pytest.Item]) -> int:
    """Return 0 if all tests pass with this mutant in place, and anything else if not."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S + 1))
    tests[0].config.pluginmanager.unregister(name="terminalreporter")
    set_mutant_under_test(mutant)
    os._exit(_fails(tests))


def _fails(tests: list[pytest.Item]) -> int:
    """Run the tests up to the first that fails; return 1 if one does."""
    session = tests[0].session
    try:
        for test, following in zip(tests, [*tests[1:], None], strict=True):
            test.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
            if session.testsfailed:
                return 1
    except BaseException:  # what ends pytest itself is a failure too
        return 1
    return 0


def main() -> int:
    """Try the mutants without a verdict (with ``--again`` the survivors too), print a row for each module."""
    os.chdir(FOLDER)
    sys.path.insert(0, str(FOLDER))
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [*settings["pytest_add_cli_args"], *settings["pytest_add_cli_args_test_selection"]]
        done = pytest.main(
            ["-q", "--basetemp", f"{scratch}/pytest", *arguments], plugins=[Trial(again="--again" in sys.argv)]
        )
    return int(_report() or done not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED))


def _report() -> bool:
    """Print the table; return whether mutants are left untried or too many survived."""
    total: Counter[str] = Counter()
    rows = ["| module | mutants | killed | survived | share |", "| --- | --- | --- | --- | --- |"]
    for path in sorted(FOLDER.rglob("*.py.meta")):
        codes = json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"].values()
        if found := Counter(status_by_exit_code[code] for code in codes):
            total += found
            rows.append(_row(f"`{path.relative_to(FOLDER).with_suffix('')}`", found))
    sys.stdout.write("\n".join([*rows, _row("all", total)]) + "\n")
    return total["not checked"] > 0 or _killed(total) < LEAST_KILLED * total.total()


def _killed(found: Counter[str]) -> int:
    return sum(found[status] for status in KILLED)


def _row(name: str, found: Counter[str]) -> str:
    killed, tried = _killed(found), found.total() - found["not checked"]
    return f"| {name} | {found.total()} | {killed} | {tried - killed} | {killed / max(1, tried):.1%} |"


if __name__ == "__main__":
    sys.exit(main())
