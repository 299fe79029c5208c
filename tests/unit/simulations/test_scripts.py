"""Every program that is run with ``python -m`` says in one line what it cannot do."""

import importlib
import signal
import sys
from pathlib import Path

import pytest

from shared.errors import IntakeError
from simulations.scripts import FAILED, INTERRUPTED, run_script

FOLDER = Path(__file__).resolve().parents[3] / "simulations"
MISSING = "TMP/not-there"
REFUSED = {
    "forecast_bound": [f"{MISSING}.csv"],
    "hostile_site": [*(f"{MISSING}-{number}" for number in range(5)), "--out", "TMP/out"],
    "light_sites": ["localhost:1", MISSING],
    "monitor_bench": [f"{MISSING}.safetensors"],
    "personal_gains": [f"{MISSING}.safetensors", f"{MISSING}.csv"],
    "phantom_start": ["TMP/file/start.safetensors"],
    "public_start": ["glucose-forecast", f"{MISSING}.safetensors"],
    "step_cost": [MISSING],
    "synthesis_study": ["--data", MISSING, "--heldout", MISSING, "--out", "TMP/out"],
    "warnings": [f"{MISSING}.safetensors", f"{MISSING}.csv"],
}
"""Arguments that name what is not there, or what cannot be written."""
WRONG = {"warm_start": ["ct-synthesis"], "warnings": ["a", "b", "--quantiles", "half"]}
"""Arguments that are wrong in themselves: usage and a sentence, as of any program."""


def refusal(monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str], folder: Path) -> int:
    (folder / "file").touch()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *(word.replace("TMP", str(folder)) for word in arguments)])
    main = importlib.import_module(f"simulations.{name}").main
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("name", REFUSED)
def test_a_missing_file_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(monkeypatch, name, REFUSED[name], tmp_path) == FAILED
    said = capsys.readouterr()
    assert said.out == ""
    (sentence,) = (line for line in said.err.splitlines() if "━" not in line)  # a bar of progress may stand before it
    assert sentence.startswith(f"{name}: ")
    assert "not-there" in sentence or "file" in sentence


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_with_the_usage(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(monkeypatch, name, WRONG[name], tmp_path) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"usage: {name}.py")
    assert WRONG[name][-1] in said.splitlines()[-1]


def test_no_program_was_forgotten() -> None:
    programs = {path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text()}
    programs -= {"stock_server", "cli"}  # they end as fedward-server and fedward-sim do
    assert programs == REFUSED.keys() | WRONG.keys()
    assert [name for name in programs if "    run_script(main)\n" not in (FOLDER / f"{name}.py").read_text()] == []


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (IntakeError("Nobody. [Give] somebody."), FAILED, "p: Nobody. [Give] somebody.\n"),
        (FileNotFoundError(2, "No such file", "x"), FAILED, "p: No such file (x). Check the path, its permissions"),
        (OSError(), FAILED, "p: OSError. Check"),
        (KeyboardInterrupt(), INTERRUPTED, "p: stopped.\n"),
    ],
)
def test_each_way_to_end(error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_script(fails, "p")
    assert caught.value.code == code
    assert capsys.readouterr().err.startswith(said)


def test_a_mistake_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)
    run_script(lambda: None)


def test_a_program_that_is_told_to_end_cleans_up(capsys: pytest.CaptureFixture[str]) -> None:
    cleaned: list[bool] = []

    def main() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_script(main, "bench")
    assert (caught.value.code, cleaned, capsys.readouterr().err) == (INTERRUPTED, [True], "bench: stopped.\n")
    assert signal.getsignal(signal.SIGTERM) is before
