"""A site that trains nothing says what a site says."""

import time
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Message, Metadata, RecordDict
from flwr.app.message import make_message

from server.replies import check_offer, check_reply
from shared.drafting import draft_plan
from shared.errors import ProtocolError
from shared.messages import PlanQuery, SiteOffer, TrainRequest
from simulations.light_sites import DECLARED_PATIENTS, answer

PLAN = draft_plan("nodule-classification", epsilon=8.0, delta=1e-3, overrides={"rounds": 2})


def question(content: RecordDict, kind: str) -> Message:
    return make_message(metadata=Metadata(1, "m", 1, 7, "", "g", time.time(), 3600.0, kind), content=content)


def test_it_accepts_any_plan_under_its_name() -> None:
    for plan in (PLAN, replace(PLAN, noise_multiplier=0.0)):
        reply = answer("site-001", question(PlanQuery("r", plan).to_content(), "query"))
        assert check_offer(reply, plan) == SiteOffer("site-001", DECLARED_PATIENTS, plan.digest)


def test_the_server_takes_the_weights_that_it_sent() -> None:
    request = TrainRequest("r", 2, PLAN, np.arange(9, dtype=np.float32))
    reply = answer("site-001", question(request.to_content(), "train"))
    assert reply.metadata.src_node_id == 7
    taken = check_reply(reply, request, DECLARED_PATIENTS, cap=1e-9)
    assert not isinstance(taken, str)
    assert taken.tobytes() == request.weights.tobytes()


def test_what_is_no_question_is_not_answered() -> None:
    with pytest.raises(ProtocolError):
        answer("site-001", question(RecordDict(), "train"))
