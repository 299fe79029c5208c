"""The guard alone: what it lets out, what it turns into a code, and what it says to the local log."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, Metadata, RecordDict

from client.guard import release
from shared.errors import BudgetExceeded, ErrorCode, FederationError, PolicyError, ProtocolError
from shared.messages import PlanQuery, SiteOffer, TrainReply, TrainRequest, error_code
from shared.plan import RunPlan

SECRET = "Kanarienvogel^Anna, born 19471122, /export/anna.dcm"
REQUEST = Message(content=RecordDict(), metadata=Metadata(1, "question", 1, 5, "", "g", 0.0, 3600.0, "train"))  # type: ignore[call-overload]
OFFER = SiteOffer("h1", 200, "d" * 64)
REPLY = TrainReply(3, "d" * 64, np.arange(4, dtype=np.float32))
PLAN = RunPlan(
    task="nodule-classification",
    rounds=1,
    local_steps=1,
    sample_rate=0.5,
    records_per_patient=1,
    max_grad_norm=1.0,
    noise_multiplier=1.0,
    delta=1e-3,
    learning_rate=0.5,
)


@dataclass(frozen=True)
class Chatty(SiteOffer):
    """A kind of offer that says more than an offer may."""

    def to_content(self) -> RecordDict:
        return PlanQuery(SECRET, PLAN).to_content()


class Lookalike:
    """Has the method that the guard calls, and no permission."""

    def to_content(self) -> RecordDict:
        return OFFER.to_content()


@pytest.mark.parametrize("reply", [OFFER, REPLY], ids=["offer", "weights"])
def test_the_two_allow_listed_replies_leave_as_they_are(reply: SiteOffer | TrainReply) -> None:
    message = release(REQUEST, lambda: reply)
    assert not message.has_error()
    assert message.content == reply.to_content()
    assert message.metadata.reply_to_message_id == "question"


@pytest.mark.parametrize(
    "answer",
    [
        Chatty("h1", 200, "d" * 64),
        Lookalike(),
        PlanQuery("run", PLAN),
        TrainRequest("run", 1, PLAN, np.zeros(4, np.float32)),
        OFFER.to_content(),
        {"site": "h1"},
        SECRET,
        None,
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_whatever_is_not_of_an_allow_listed_type_leaves_as_a_bare_code(answer: Any) -> None:
    """A subclass too: it may have fields and words of its own."""
    assert_refused(release(REQUEST, lambda: answer), ErrorCode.INTERNAL)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PolicyError(SECRET), ErrorCode.POLICY_REFUSED),
        (BudgetExceeded(SECRET), ErrorCode.BUDGET_EXCEEDED),
        (ProtocolError(SECRET, ErrorCode.REPLAY_MISMATCH), ErrorCode.REPLAY_MISMATCH),
        (RuntimeError(SECRET), ErrorCode.INTERNAL),
        (KeyError(SECRET), ErrorCode.INTERNAL),
        (MemoryError(SECRET), ErrorCode.INTERNAL),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failure_leaves_as_its_code_and_the_log_has_its_kind_alone(
    error: Exception, code: ErrorCode, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "client.guard"):
        assert_refused(release(REQUEST, raising(error)), code)
    (record,) = caplog.records
    known = isinstance(error, FederationError)
    assert (record.getMessage(), record.levelno) == (
        ("refused", logging.WARNING) if known else ("failed", logging.ERROR)
    )
    assert record.__dict__["code"] == code.value
    assert record.__dict__.get("kind") == (None if known else type(error).__name__)
    assert record.exc_info is None
    assert SECRET not in repr(record.__dict__)


def test_a_reply_that_cannot_be_written_leaves_as_a_bare_code() -> None:
    assert_refused(release(REQUEST, lambda: TrainReply(1, "d", SECRET)), ErrorCode.INTERNAL)  # type: ignore[arg-type]


def assert_refused(message: Message, code: ErrorCode) -> None:
    """Check that nothing but the code is in the message."""
    assert message.has_error()
    assert not message.has_content()
    assert message.error.reason == code.value
    assert error_code(message) is code
    assert message.metadata.reply_to_message_id == "question"
    assert SECRET not in repr(message.error)


def raising(error: Exception) -> Callable[[], SiteOffer]:
    """Return an answer that fails."""

    def answer() -> SiteOffer:
        raise error

    return answer
