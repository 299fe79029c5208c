import io
import json
import logging

import pytest

from shared.logs import configure_logs


@pytest.fixture
def stream():
    root = logging.getLogger()
    kept = root.handlers[:], root.level, {n: logging.getLogger(n).level for n in ("client", "server", "flwr")}
    flower = logging.getLogger("flwr").handlers[:]
    lines = io.StringIO()
    configure_logs(lines)
    yield lines
    root.handlers[:] = kept[0]
    root.setLevel(kept[1])
    logging.getLogger("flwr").handlers[:] = flower
    for name, level in kept[2].items():
        logging.getLogger(name).setLevel(level)


def _last(stream):
    return json.loads(stream.getvalue().splitlines()[-1])


def test_permitted_fields_pass_and_others_are_dropped(stream):
    logging.getLogger("client.guard").warning("refused", extra={"code": "bad-plan", "patient": "CANARY"})
    line = _last(stream)
    assert (line["event"], line["code"], line["level"]) == ("refused", "bad-plan", "warning")
    assert "CANARY" not in stream.getvalue()


def test_an_exceptions_text_and_formatted_arguments_are_dropped(stream):
    try:
        raise ValueError("CANARY in the text")
    except ValueError:
        logging.getLogger("client.site").exception("failed")
    logging.getLogger("client.site").error("reading %s", "CANARY")
    assert "CANARY" not in stream.getvalue()
    assert json.loads(stream.getvalue().splitlines()[0])["kind"] == "ValueError"


def test_a_librarys_words_are_dropped_and_its_level_kept(stream):
    logging.getLogger("flwr").error("could not read CANARY")
    logging.getLogger("pydicom").warning("bad value CANARY")
    assert "CANARY" not in stream.getvalue()
    assert _last(stream)["origin"] == "pydicom"
