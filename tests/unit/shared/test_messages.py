from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ErrorCode, PlanError, ProtocolError
from shared.messages import (
    PlanQuery,
    SiteOffer,
    TrainReply,
    TrainRequest,
    error_reply,
    global_weights,
    is_undelivered,
    weighted_reply,
)
from shared.objects import content_from, object_names
from shared.plan import RunPlan

PLAN = RunPlan(
    task="nodule-classification",
    rounds=3,
    local_steps=1,
    sample_rate=0.5,
    records_per_patient=1,
    max_grad_norm=1.0,
    noise_multiplier=1.0,
    delta=1e-3,
    learning_rate=0.1,
)
WEIGHTS = np.arange(5, dtype=np.float32)


def test_every_message_survives_its_payload() -> None:
    assert PlanQuery.from_content(PlanQuery("r", PLAN).to_content()) == PlanQuery("r", PLAN)
    offer = SiteOffer("site", 40, PLAN.digest)
    assert SiteOffer.from_content(offer.to_content()) == offer
    request = TrainRequest.from_content(TrainRequest("r", 2, PLAN, WEIGHTS).to_content())
    assert (request.run, request.round, request.plan) == ("r", 2, PLAN)
    assert request.weights.tobytes() == WEIGHTS.tobytes()
    reply = TrainReply.from_content(TrainReply(2, PLAN.digest, WEIGHTS).to_content())
    assert (reply.round, reply.plan_digest, reply.weights.tobytes()) == (2, PLAN.digest, WEIGHTS.tobytes())


def test_a_request_digest_names_all_that_the_answer_depends_on() -> None:
    base = TrainRequest("r", 1, PLAN, WEIGHTS)
    others = [
        replace(base, run="s"),
        replace(base, round=2),
        replace(base, plan=replace(PLAN, seed=1)),
        replace(base, weights=WEIGHTS + np.float32(1e-6)),
    ]
    assert len({request.digest for request in [base, *others]}) == 5


def test_the_server_sets_the_weight_of_the_average() -> None:
    content = weighted_reply(WEIGHTS, 40).content
    assert dict(content["metrics"]) == {"num-examples": 40}
    assert global_weights(content["arrays"]).tobytes() == WEIGHTS.tobytes()


def test_what_flower_could_not_deliver_is_told_from_what_a_site_refused() -> None:
    question = weighted_reply(WEIGHTS)
    undelivered = [code for code in range(9) if is_undelivered(Message(Error(code, ""), reply_to=question))]
    assert undelivered == [3, 4, 5]
    assert not is_undelivered(error_reply(ErrorCode.BUDGET_EXCEEDED, question))
    assert not is_undelivered(question)


@pytest.mark.parametrize("weights", [WEIGHTS.tobytes()[:-1], "text", 7, [1.0], None])
def test_weights_that_are_no_float32_vector_are_refused(weights: object) -> None:
    content = TrainReply(1, PLAN.digest, WEIGHTS).to_content()
    del content["config"]["weights"]
    if weights is not None:
        content["config"]["weights"] = weights
    with pytest.raises(ProtocolError):
        TrainReply.from_content(content)


def test_every_sending_of_a_question_has_names_that_nobody_can_foresee() -> None:
    """A site that knew an object's name before the server sends it could register it at the SuperLink as another."""
    for question in (PlanQuery("r", PLAN), TrainRequest("r", 1, PLAN, WEIGHTS)):
        names = [set(get_all_nested_objects(question.to_content())) for _ in range(2)]
        assert len(names[0]) == 2
        assert not names[0] & names[1]
    assert TrainRequest.from_content(question.to_content()).digest == question.digest


def test_a_content_is_put_together_from_its_objects() -> None:
    content = TrainReply(2, PLAN.digest, WEIGHTS).to_content()
    objects = {name: item.deflate() for name, item in get_all_nested_objects(content).items()}
    assert sorted(object_names(get_object_tree(content))) == sorted(objects)
    assert content_from(content.object_id, objects) == content


def test_objects_of_other_kinds_too_many_or_broken_are_refused() -> None:
    many = RecordDict({f"r{number}": ConfigRecord({"n": number}) for number in range(8)})
    with pytest.raises(ProtocolError):
        object_names(get_object_tree(many))
    arrays = RecordDict({"arrays": ArrayRecord({"weights": Array(WEIGHTS)})})
    for content in (arrays, RecordDict({"m": MetricRecord({"x": 1})})):
        objects = {name: item.deflate() for name, item in get_all_nested_objects(content).items()}
        with pytest.raises(ProtocolError):
            content_from(content.object_id, objects)
    record = ConfigRecord({"x": 1})
    for objects in ({}, {"a": b""}, {"a": b"RecordDict x 3\x00abc"}, {record.object_id: record.deflate()}):
        with pytest.raises(ProtocolError):
            content_from(next(iter(objects), "a"), objects)


values = st.none() | st.text(max_size=5) | st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.floats()


@given(st.dictionaries(st.sampled_from(["run", "round", "plan", "site", "declared-patients"]), values))
def test_rubbish_is_refused_and_never_crashes(fields: dict[str, object]) -> None:
    content = RecordDict({"config": ConfigRecord({k: v for k, v in fields.items() if v is not None})})
    for message in (PlanQuery, SiteOffer, TrainRequest, TrainReply):
        with pytest.raises((ProtocolError, PlanError)):
            message.from_content(content)


def test_a_site_that_declares_nobody_is_refused() -> None:
    with pytest.raises(ProtocolError):
        SiteOffer.from_content(SiteOffer("site", 0, PLAN.digest).to_content())
