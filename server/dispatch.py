"""Keeps the aggregator's runs going: hands them to Flower, notices dead ServerApps, stops what is not wanted.

Flower's runs are attempts at ours. A ServerApp holds the lock of its run's folder while it works, so its death is
seen at once, where Flower's heartbeat takes about a minute.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from server.control import Control, LinkError, LinkRun
from server.registry import RUNNING, STOPPED
from server.runs import RunFolder, all_runs, end_worker, worker
from shared.errors import FederationError

_LOG = logging.getLogger(__name__)
_MOST_ATTEMPTS = 8
"""A run whose ServerApp ends so often without a new round and without a reason is broken, not unlucky."""
_LONGEST_PAUSE_S = 30.0


@dataclass
class _Track:
    """What this process has seen of one run."""

    changed_ns: int = -1
    status: str = ""
    rounds: int = -1
    attempts: int = 0
    next: float = 0.0
    executor: int = -1
    worked: bool = False

    def handed_over(self, executor: int) -> None:
        """Count an attempt; the next one waits longer."""
        self.next = time.monotonic() + min(2.0**self.attempts - 1.0, _LONGEST_PAUSE_S)
        self.attempts += 1
        self.executor, self.worked = executor, False


class Dispatcher:
    """Follows every run of one aggregator; :meth:`follow` is called at every tick."""

    def __init__(self, server: Path, control: Control) -> None:
        self._server, self._control = server, control
        self._tracks: dict[str, _Track] = {}
        self._troubles: dict[str, str] = {}

    @property
    def troubles(self) -> Mapping[str, str]:
        """The runs that could not be followed when last tried, each with its error code."""
        return self._troubles

    @property
    def runs(self) -> dict[str, tuple[str, int]]:
        """Status and completed rounds of each run, as last seen."""
        return {name: (track.status, max(track.rounds, 0)) for name, track in self._tracks.items()}

    def follow(self, executor: int) -> None:
        """Do once what is to be done.

        Args:
            executor: How often the executor has been started; a ServerApp dies with its executor.

        A run that cannot be followed, its files being damaged or of another version, does not hold up the others.

        Raises:
            LinkError: If Flower does not answer.
        """
        troubles: dict[str, str] = {}
        neglected: list[RunFolder] = []
        for folder in all_runs(self._server):
            with self._noting(folder, troubles):
                if not self._is_well(folder):
                    neglected.append(folder)
        live: dict[str, list[LinkRun]] = {}
        for link_run in self._control.unfinished_runs() if neglected else ():  # a question costs Flower's database much
            live.setdefault(link_run.run, []).append(link_run)
        for folder in neglected:
            with self._noting(folder, troubles):
                self._follow(folder, live.get(folder.name, []), executor)
        self._troubles = troubles

    @contextmanager
    def _noting(self, folder: RunFolder, troubles: dict[str, str]) -> Iterator[None]:
        """Note why a run cannot be followed, and say it once."""
        try:
            yield
        except LinkError:
            raise
        except FederationError as error:
            troubles[folder.name] = error.code.value
            if folder.name not in self._troubles:
                _LOG.error("run cannot be followed", extra={"run": folder.name, "code": error.code.value})

    def _is_well(self, folder: RunFolder) -> bool:
        """Whether a run has ended, or goes on as it should."""
        track = self._look(folder)
        if track.status != RUNNING:
            return True
        if folder.wanted != RUNNING or worker(folder.path) is None:
            return False
        track.worked = True
        return True

    def _follow(self, folder: RunFolder, live: list[LinkRun], executor: int) -> None:
        track, busy = self._tracks[folder.name], worker(folder.path) is not None
        if folder.wanted != RUNNING:
            self._stop(folder, live, busy)
        elif busy:
            track.worked = True
        elif dead := [run for run in live if not run.pending and (track.worked or track.executor != executor)]:
            self._forget(dead)
        elif not live and time.monotonic() >= track.next:
            self._hand_over(folder, track, executor)

    def _look(self, folder: RunFolder) -> _Track:
        """Read the registry if it has changed."""
        track = self._tracks.setdefault(folder.name, _Track())
        changed_ns = folder.changed_ns
        if changed_ns != track.changed_ns:
            try:
                record = folder.record()
            except FederationError:
                status = folder.registry().status(folder.name)
                if status in (RUNNING, None):
                    raise
                track.changed_ns, track.status = changed_ns, status  # it has ended: nobody needs the rest
                return track
            if record.rounds_completed > track.rounds or record.status != track.status:
                track.attempts, track.next = 0, 0.0
            track.changed_ns, track.status, track.rounds = changed_ns, record.status, record.rounds_completed
        return track

    def _stop(self, folder: RunFolder, live: list[LinkRun], busy: bool) -> None:
        self._forget(live)
        if busy:
            end_worker(folder.path)
            return  # the next tick sees it dead
        folder.registry().end(folder.name, STOPPED)
        _LOG.info("run stopped", extra={"run": folder.name})

    def _hand_over(self, folder: RunFolder, track: _Track, executor: int) -> None:
        if track.attempts >= _MOST_ATTEMPTS:
            folder.fail(
                FederationError(f"Its ServerApp ended {track.attempts} times without a round. See: fedward-server logs")
            )
            _LOG.error("run given up", extra={"run": folder.name, "attempt": track.attempts})
            return
        track.handed_over(executor)
        self._control.start_run(folder.name)
        _LOG.info("run handed over", extra={"run": folder.name, "attempt": track.attempts})

    def _forget(self, runs: list[LinkRun]) -> None:
        for link_run in runs:
            self._control.stop_run(link_run.run_id)
