"""What server and sites say to each other: the only file that knows Flower's record keys.

    query   plan                                → site, declared_patients, plan digest
    train   plan, run, round, weights           → weights, plan digest, round

A message holds one record, ``config``, in which weights are little-endian float32 bytes. Flower knows arrays, but one
small piece of an array may be named a million times, every piece costs a call, and their names, which are hashes,
would follow from the weights: a site that foresees them could spoil them at the SuperLink. For that reason a question
also holds a fresh ``nonce``.

An error travels as Flower's ``Error`` whose reason is one word of :class:`shared.errors.ErrorCode`.
"""

import hashlib
import secrets
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    ConfigRecordValues,
    Error,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import ErrorCode as FlowerErrorCode

from shared.errors import ErrorCode, ProtocolError
from shared.plan import RunPlan
from shared.weights import Vector

CONFIG, ARRAYS, WEIGHTS, METRICS, WEIGHT_KEY = "config", "arrays", "weights", "metrics", "num-examples"
_NONCE_BYTES = 16
_ERROR_NUMBER = 1000
_UNDELIVERED = frozenset(
    {
        FlowerErrorCode.MESSAGE_UNAVAILABLE,
        FlowerErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        FlowerErrorCode.NODE_UNAVAILABLE,
    }
)
_MAX_PLAN_CHARS = 16_384
_T = TypeVar("_T", str, int, bytes)
_Config = dict[str, ConfigRecordValues]


@dataclass(frozen=True)
class PlanQuery:
    """The server asks a site whether it would take part in ``run`` under ``plan``."""

    run: str
    plan: RunPlan

    def to_content(self) -> RecordDict:
        """Return the Flower payload."""
        return _question({"run": self.run, "plan": self.plan.to_json()})

    @classmethod
    def from_content(cls, content: RecordDict) -> "PlanQuery":
        """Parse the payload. Raises ProtocolError or PlanError."""
        config = _config(content)
        return cls(_text(config, "run"), _plan(config))


@dataclass(frozen=True)
class SiteOffer:
    """A site accepts a plan and states its public figures."""

    site: str
    declared_patients: int
    plan_digest: str

    def to_content(self) -> RecordDict:
        """Return the Flower payload."""
        config: _Config = {
            "site": self.site,
            "declared-patients": self.declared_patients,
            "plan-digest": self.plan_digest,
        }
        return RecordDict({CONFIG: ConfigRecord(config)})

    @classmethod
    def from_content(cls, content: RecordDict) -> "SiteOffer":
        """Parse the payload. Raises ProtocolError."""
        config = _config(content)
        declared = _field(config, "declared-patients", int)
        if declared < 1:
            raise ProtocolError("A site must declare at least one patient.")
        return cls(_text(config, "site"), declared, _text(config, "plan-digest"))


@dataclass(frozen=True, eq=False)
class TrainRequest:
    """The server asks for one round of training from ``weights``."""

    run: str
    round: int
    plan: RunPlan
    weights: Vector

    @property
    def digest(self) -> str:
        """SHA-256 over everything that the answer depends on: equal requests may share one answer."""
        head = f"{self.run}\n{self.round}\n{self.plan.digest}\n".encode()
        return hashlib.sha256(head + self.weights.tobytes()).hexdigest()

    def to_content(self) -> RecordDict:
        """Return the Flower payload."""
        config: _Config = {
            "run": self.run,
            "round": self.round,
            "plan": self.plan.to_json(),
            WEIGHTS: _bytes(self.weights),
        }
        return _question(config)

    @classmethod
    def from_content(cls, content: RecordDict) -> "TrainRequest":
        """Parse the payload. Raises ProtocolError or PlanError."""
        config = _config(content)
        plan, number = _plan(config), _field(config, "round", int)
        if not 1 <= number <= plan.rounds:
            raise ProtocolError(f"Round {number} is outside the plan's {plan.rounds} rounds.")
        return cls(_text(config, "run"), number, plan, _weights(config))


@dataclass(frozen=True, eq=False)
class TrainReply:
    """A site's new weights after one round."""

    round: int
    plan_digest: str
    weights: Vector

    def to_content(self) -> RecordDict:
        """Return the Flower payload."""
        config: _Config = {"round": self.round, "plan-digest": self.plan_digest, WEIGHTS: _bytes(self.weights)}
        return RecordDict({CONFIG: ConfigRecord(config)})

    @classmethod
    def from_content(cls, content: RecordDict) -> "TrainReply":
        """Parse the payload. Raises ProtocolError."""
        config = _config(content)
        return cls(_field(config, "round", int), _text(config, "plan-digest"), _weights(config))


def weighted_reply(weights: Vector, declared_patients: int = 1) -> Message:
    """Return the message that Flower's strategies aggregate: the server, not the site, sets the weight."""
    arrays = ArrayRecord({WEIGHTS: Array(weights)})
    content = RecordDict({ARRAYS: arrays, METRICS: MetricRecord({WEIGHT_KEY: declared_patients})})
    nowhere = Metadata(  # it is never sent
        run_id=0,
        message_id="",
        src_node_id=0,
        dst_node_id=0,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=1.0,
        message_type=MessageType.TRAIN,
    )
    return Message(content=content, metadata=nowhere)  # type: ignore[call-overload,no-any-return]


def global_weights(arrays: ArrayRecord) -> Vector:
    """Return the flat vector inside what a strategy aggregated."""
    return np.asarray(arrays[WEIGHTS].numpy(), dtype=np.float32)


def error_reply(code: ErrorCode, request: Message) -> Message:
    """Return an error that carries one word of the closed list and nothing else."""
    return Message(Error(_ERROR_NUMBER, code.value), reply_to=request)


def error_code(reply: Message) -> ErrorCode:
    """Return the code of a failed reply; anything outside the closed list counts as ``internal``."""
    try:
        return ErrorCode(reply.error.reason or "")
    except ValueError:
        return ErrorCode.INTERNAL


def is_undelivered(reply: Message) -> bool:
    """Return whether Flower says that a message or its reply was lost; the site then gave no answer."""
    return reply.has_error() and reply.error.code in _UNDELIVERED


def _question(config: _Config) -> RecordDict:
    return RecordDict({CONFIG: ConfigRecord({**config, "nonce": secrets.token_bytes(_NONCE_BYTES)})})


def _bytes(weights: Vector) -> bytes:
    return weights.astype("<f4").tobytes()


def _config(content: RecordDict) -> ConfigRecord:
    record = content.get(CONFIG)
    if not isinstance(record, ConfigRecord):
        raise ProtocolError("The message holds no configuration.")
    return record


def _field(config: ConfigRecord, key: str, kind: type[_T]) -> _T:
    value = config.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ProtocolError(f"The message's {key} is missing or of the wrong type.")
    return value


def _text(config: ConfigRecord, key: str) -> str:
    value = _field(config, key, str)
    if not 0 < len(value) <= 128:
        raise ProtocolError(f"The message's {key} is empty or too long.")
    return value


def _plan(config: ConfigRecord) -> RunPlan:
    text = _field(config, "plan", str)
    if len(text) > _MAX_PLAN_CHARS:
        raise ProtocolError("The message's plan is too long.")
    return RunPlan.from_json(text)


def _weights(config: ConfigRecord) -> Vector:
    content = _field(config, WEIGHTS, bytes)
    if len(content) % 4:
        raise ProtocolError("The message's weights are cut off.")
    return np.frombuffer(content, dtype="<f4").astype(np.float32)
