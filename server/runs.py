"""The folders of the aggregator's runs, ``SRV/runs/NAME/``, and what the operator wants of each.

    plan.json         the agreed plan
    start.safetensors the checkpoint to start from, if the plan names one
    start.json        what that comes from (server/lineage.py)
    sensitivity       the share of positives that the threshold must find, if this run has its own
    wanted            'running' or 'stopped'
    registry.sqlite   what came of it; a folder without it is no run
    checkpoints/      the model
    run.log           the ServerApp's log, JSON lines
    lock              held by the ServerApp that is at work on the run

Commands only write here; the service follows. So they work whether or not it runs, and no crash loses a request.
"""

import fcntl
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from server.lineage import record_start, start_words
from server.registry import FAILED, RUNNING, STOPPED, Registry, RunRecord
from shared.errors import FederationError, PlanError, StorageError
from shared.files import storage_errors, write_atomic
from shared.plan import RunPlan
from shared.provenance.ancestry import Ancestry

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FAILURE_NOTE = "failure"
START_NOTE = "start"
_LOG_BYTES = 5_000_000
_LOCK_PATIENCE_S = 1.0


class RunFolder:
    """One run's folder."""

    def __init__(self, server: Path, name: str) -> None:
        self.name = name
        self.path = server / "runs" / name
        self.log = self.path / "run.log"
        self.start = self.path / "start.safetensors"

    @property
    def plan(self) -> RunPlan:
        """The agreed plan.

        Raises:
            StorageError: If it is damaged.
        """
        try:
            return RunPlan.from_json((self.path / "plan.json").read_text())
        except (OSError, ValueError, PlanError) as error:
            raise StorageError(
                f"The plan of {self.name} is damaged or of another version. Restore {self.path} from the back-up, or "
                "go on with the version that made it."
            ) from error

    @property
    def sensitivity(self) -> float | None:
        """The run's own share of positives that its threshold must find; ``None`` to go by ``server.toml``.

        Raises:
            StorageError: If the file is damaged.
        """
        path = self.path / "sensitivity"
        if not path.exists():
            return None
        try:
            return float(path.read_text())
        except (OSError, ValueError) as error:
            raise StorageError(f"{path} is damaged; write one number there, or remove it.") from error

    @property
    def exists(self) -> bool:
        """Whether there is such a run."""
        return (self.path / "registry.sqlite").exists()

    @property
    def changed_ns(self) -> int:
        """When the registry last changed."""
        with storage_errors(self.path):
            return (self.path / "registry.sqlite").stat().st_mtime_ns

    def registry(self) -> Registry:
        """Open the run's registry."""
        return Registry(self.path / "registry.sqlite")

    def record(self) -> RunRecord:
        """Return all that is known of the run."""
        return self.registry().read(self.name)

    @property
    def wanted(self) -> str:
        """What the operator wants: ``running`` or ``stopped``."""
        with storage_errors(self.path):
            return (self.path / "wanted").read_text().strip()

    def want(self, state: str) -> None:
        """Record what the operator wants."""
        write_atomic(self.path / "wanted", state.encode())

    def fail(self, error: FederationError) -> None:
        """End the run as failed, and keep for the operator the sentence that says why."""
        registry = self.registry()
        registry.add_note(self.name, FAILURE_NOTE, str(error))
        registry.end(self.name, FAILED, error.code.value)

    def stop(self) -> None:
        """Ask for the run to stop where it stands.

        Raises:
            StorageError: If it is not running.
        """
        status = self.record().status
        if status != RUNNING:
            raise StorageError(f"{self.name} is not running: it is {status}.")
        self.want(STOPPED)
        if worker(self.path) is None:
            self.registry().end(self.name, STOPPED)

    def resume(self) -> None:
        """Ask for the run to go on from its last checkpoint.

        Raises:
            StorageError: If it is running already, or has all its rounds.
        """
        record = self.record()
        if record.status == RUNNING and self.wanted == RUNNING:
            raise StorageError(f"{self.name} is running already. Follow it with: fedward-server status")
        if record.rounds_completed >= record.plan.rounds:
            raise StorageError(f"{self.name} has all its {record.plan.rounds} rounds; there is nothing to resume.")
        self.want(RUNNING)
        self.registry().begin(self.name, record.plan)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the run's lock, so that no two processes ever work on one run.

        Raises:
            StorageError: If another process holds it.
        """
        with storage_errors(self.path), (self.path / "lock").open("a+") as handle:
            take_lock(handle, f"Another process is at work on {self.name}.")
            if self.log.exists() and self.log.stat().st_size > _LOG_BYTES:
                self.log.replace(self.log.with_suffix(".log.1"))
            yield


def submit(
    server: Path,
    plan: RunPlan,
    name: str | None,
    start: Path | None,
    ancestry: Ancestry | None = None,
    *,
    sensitivity: float | None = None,
) -> RunFolder:
    """Make a new run's folder; the service takes it up when it sees it.

    Args:
        server: The aggregator's folder.
        plan: The agreed plan.
        name: The run's name; by default the next of run-1, run-2 …
        start: The checkpoint that the plan names, copied so that it cannot vanish.
        ancestry: What that comes from; None starts from random weights.
        sensitivity: The run's own, in place of that of ``server.toml``. It is no part of the plan: the threshold is
            chosen after training, on reference patients, and no hospital need agree to it.

    Raises:
        StorageError: If the name is taken or impossible, or the folder cannot be written.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise StorageError(f"{name!r} cannot name a run: letters, digits, '.', '_' and '-', at most 64.")
    folder = _claim(server, name)
    write_atomic(folder.path / "plan.json", plan.to_json().encode())
    if sensitivity is not None:
        write_atomic(folder.path / "sensitivity", f"{sensitivity!r}\n".encode())
    folder.want(RUNNING)
    with storage_errors(folder.path):
        if start is not None:
            shutil.copyfile(start, folder.start)
    record_start(folder.path, ancestry or Ancestry())
    folder.registry().begin(folder.name, plan)
    if start is not None and ancestry:
        folder.registry().add_note(folder.name, START_NOTE, start_words(ancestry, start.name, plan.init))
    return folder


def all_runs(server: Path) -> list[RunFolder]:
    """Return the runs, oldest first."""
    folders = [RunFolder(server, path.name) for path in (server / "runs").iterdir() if path.is_dir()]
    return sorted((folder for folder in folders if folder.exists), key=lambda f: (f.path / "plan.json").stat().st_mtime)


def running_runs(server: Path) -> list[str]:
    """Return the names of the runs that go on."""
    return [folder.name for folder in all_runs(server) if folder.registry().status(folder.name) == RUNNING]


def find_run(server: Path, name: str) -> RunFolder:
    """Return the run called ``name``.

    Raises:
        StorageError: If there is none, with the names there are.
    """
    folder = RunFolder(server, name)
    if not _NAME.fullmatch(name) or not folder.exists:
        known = ", ".join(run.name for run in all_runs(server)) or "none"
        raise StorageError(f"There is no run {name!r}; the runs are: {known}.")
    return folder


def worker(run: Path) -> int | None:
    """Return the process id of the ServerApp that is at work on a run; ``None`` if none is."""
    return lock_holder(run / "lock")


def lock_holder(path: Path) -> int | None:
    """Return the process id written in a lock file that is held; the kernel frees it when its holder dies."""
    try:
        with path.open("r") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(handle.read() or 0)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise StorageError(f"The lock {path} cannot be read.") from error
    return None


def take_lock(handle: TextIO, otherwise: str) -> None:
    """Lock an open file until it is closed, and write this process's id into it.

    Raises:
        StorageError: Saying ``otherwise``, if another process holds it.
    """
    end = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:  # perhaps only one who looks whether it is held
            if time.monotonic() > end:
                raise StorageError(otherwise) from error
            time.sleep(0.02)
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()


def end_worker(run: Path) -> None:
    """End the ServerApp that is at work on a run, if one is. What it was doing is crash-safe."""
    if process := worker(run):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            return


def _claim(server: Path, name: str | None) -> RunFolder:
    number = 1
    while True:
        folder = RunFolder(server, name or f"run-{number}")
        try:
            with storage_errors(folder.path.parent):
                folder.path.parent.mkdir(exist_ok=True)
            folder.path.mkdir()
            return folder
        except FileExistsError as error:
            if name is not None:
                raise StorageError(f"There is a run called {name} already. Choose another name.") from error
            number += 1
        except OSError as error:
            raise StorageError(f"Cannot make {folder.path}: {error.strerror}.") from error
