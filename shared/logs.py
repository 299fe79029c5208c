"""Operators' logs: JSON lines with a closed set of fields, so that no record content can slip in.

A log call names an event and gives its fields by ``extra``; a field that is not on the list is dropped, and so is an
exception's text, which can hold a patient's name or a path. Third parties' messages pass by level and origin only.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

FIELDS = frozenset(
    {"attempt", "child", "code", "delay_s", "kind", "node", "pid", "port", "returncode", "round", "run", "seconds"}
    | {"rung", "server", "site", "task", "threads"}
)
_OURS = ("client", "server", "shared", "simulations")


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and the permitted fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "origin": record.name,
        }
        if record.name.partition(".")[0] in _OURS:
            # The format string is a constant of our source; its arguments, if any, are not.
            line["event"] = record.msg if isinstance(record.msg, str) and not record.args else "malformed"
            line |= {key: value for key, value in record.__dict__.items() if key in FIELDS}
        if record.exc_info and record.exc_info[0]:
            line["kind"] = record.exc_info[0].__name__
        return json.dumps(line, default=lambda value: type(value).__name__)


def configure_logs(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send every log of this process as JSON lines to ``stream`` (standard error); libraries from warnings up."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    flower = logging.getLogger("flwr")  # it brings its own handler, which prints messages whole
    flower.handlers[:] = []
    flower.propagate = True
    flower.setLevel(logging.WARNING)
