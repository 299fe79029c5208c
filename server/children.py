"""A child process that is started again when it dies, with its output in a log of bounded size."""

import ctypes
import logging
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path

_LOG = logging.getLogger(__name__)
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_LOG_BYTES, _LOGS_KEPT = 2_000_000, 2
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.2, 30.0
_STEADY_S = 60.0
"""A child that lived so long is started again at once."""
_ROUTINE = b"[uvicorn.access]"
"""An HTTP access line of Flower's; a polling ServerApp causes dozens a second."""


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however that happens (Linux)."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@dataclass
class _Alive:
    process: subprocess.Popen[bytes]
    started: float


class Child:
    """One child; call :meth:`tend` often, from the main thread (the kernel watches the thread that started it)."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.restarts = 0
        self.generation = 0
        self._command, self._environment, self._log = command, environment, log
        self._alive: _Alive | None = None
        self._delay_s, self._next = 0.0, 0.0

    @property
    def pid(self) -> int | None:
        """Its process id; ``None`` if it is down."""
        return self._alive.process.pid if self._alive and self._alive.process.poll() is None else None

    def tend(self) -> bool:
        """Start the child if it is down and its pause is over; return whether it was found dead."""
        died = self._alive is not None and self._alive.process.poll() is not None
        if died:
            self._bury()
        if self._alive is None and time.monotonic() >= self._next:
            self._start()
        return died

    def ask_to_end(self) -> None:
        """Ask the child to end."""
        if self._alive is not None:
            self._alive.process.terminate()

    def end(self, deadline: float) -> None:
        """Wait for the child to end until ``deadline``, in monotonic seconds, then make it."""
        if self._alive is None:
            return
        try:
            self._alive.process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self._alive.process.kill()
            self._alive.process.wait()
        self._alive = None

    def _start(self) -> None:
        parent = os.getpid()

        def prepare() -> None:
            die_with_parent()
            if os.getppid() != parent:  # it died in between
                os._exit(1)

        process = subprocess.Popen(  # noqa: S603 - our own command line
            list(self._command),
            env=dict(self._environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=prepare,  # noqa: PLW1509 - one system call, prepared before the fork
            start_new_session=True,  # so that Ctrl-C reaches the supervisor only, which ends things in order
        )
        threading.Thread(target=_keep, args=(process, self._log), daemon=True).start()
        self._alive = _Alive(process, time.monotonic())
        self.generation += 1
        _LOG.info("child started", extra={"child": self.name, "pid": process.pid})

    def _bury(self) -> None:
        dead = self._alive
        if dead is None:
            return
        lived = time.monotonic() - dead.started
        grown = min(max(2 * self._delay_s, _FIRST_DELAY_S), _LONGEST_DELAY_S)
        self._delay_s = 0.0 if lived > _STEADY_S else grown
        pause = self._delay_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        self._next = time.monotonic() + pause
        self.restarts += 1
        _LOG.warning(
            "child died",
            extra={"child": self.name, "returncode": dead.process.returncode, "delay_s": round(pause, 2)},
        )
        self._alive = None


def _keep(process: subprocess.Popen[bytes], path: Path) -> None:
    """Copy a child's output to its log, without routine lines."""
    handler = RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=_LOGS_KEPT)
    handler.setFormatter(logging.Formatter("%(message)s"))
    with closing(handler), process:
        for line in process.stdout or ():
            if _ROUTINE not in line:
                text = line.decode(errors="replace").rstrip()
                handler.emit(logging.LogRecord("child", logging.INFO, "", 0, text, None, None))
