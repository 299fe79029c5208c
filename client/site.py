"""A hospital's folder and what it answers: policy, store, ledger and training joined.

site.toml        the policy (client.config)
store/           the prepared store (shared.records)
ledger.sqlite    the privacy ledger (client.ledger)
"""

import hashlib
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from client.config import SitePolicy
from client.ledger import Ledger, ReleaseRequest
from client.policy import check_budget, check_plan
from client.training import Randomness, train_round
from shared.dp.noise import KEY_BYTES
from shared.errors import ErrorCode, PolicyError, ProtocolError
from shared.messages import PlanQuery, SiteOffer, TrainReply, TrainRequest
from shared.plan import RunPlan
from shared.records import RecordStore
from shared.tasks.base import Task
from shared.tasks.registry import find_task
from shared.weights import unpack

LEDGER = "ledger.sqlite"


@dataclass(frozen=True)
class Site:
    """One hospital, opened from its folder.

    Attributes:
        folder: See the module.
        simulation_seed: Makes noise repeatable and so worthless as privacy. It is an argument, not a setting in
            the folder, so that no hospital's file can hold it.
    """

    folder: Path
    simulation_seed: int | None = None

    @cached_property
    def policy(self) -> SitePolicy:
        """The hospital's rules."""
        return SitePolicy.read(self.folder / "site.toml")

    @cached_property
    def ledger(self) -> Ledger:
        """The hospital's privacy ledger."""
        return Ledger(self.folder / LEDGER)

    @cached_property
    def store(self) -> RecordStore:
        """The hospital's prepared patients."""
        return RecordStore.open(self.folder / "store")

    def answer_query(self, query: PlanQuery) -> SiteOffer:
        """Accept a plan, or raise what the guard turns into a code. Nothing is spent."""
        plan = query.plan
        self._admit(plan)
        if self.ledger.plan_of(query.run) not in (None, plan.digest):
            raise ProtocolError("This run began here under another plan.", ErrorCode.PLAN_CHANGED)
        earlier = self.ledger.mechanisms(except_run=query.run)
        check_budget(earlier, plan.mechanism(plan.rounds), plan, self.policy)
        return SiteOffer(self.policy.name, self.policy.declared_patients, plan.digest)

    def answer_train(self, request: TrainRequest) -> TrainReply:
        """Train one round: reserve, train, commit, reply; a repeated request gets the stored reply."""
        plan = request.plan
        task = self._admit(plan)
        unpack(request.weights, task.build())  # refuse bad weights before anything is spent
        release = ReleaseRequest(
            run=request.run,
            round=request.round,
            task=plan.task,
            store_digest=self.store.digest,
            plan_digest=plan.digest,
            digest=request.digest,
            mechanism=plan.mechanism(rounds=1),
        )
        reservation = self.ledger.reserve(
            release,
            self._key(request),
            lambda earlier: check_budget(earlier, release.mechanism, plan, self.policy),
        )
        if reservation.reply is not None:
            return TrainReply(request.round, plan.digest, np.frombuffer(reservation.reply, np.float32))
        if reservation.key is None:
            raise ProtocolError("This release is closed.", ErrorCode.REPLAY_MISMATCH)
        patients = task.load(self.store)
        weights = train_round(
            task,
            patients,
            plan,
            request.round,
            request.weights,
            declared_patients=self.policy.declared_patients,
            randomness=self._randomness(reservation.key),
        )
        self.ledger.commit(reservation, weights.tobytes())
        return TrainReply(request.round, plan.digest, weights)

    def _admit(self, plan: RunPlan) -> Task:
        check_plan(plan, self.policy)
        task = find_task(plan.task)
        if self.store.kind != task.store_kind:
            raise PolicyError(f"The prepared store holds {self.store.kind}, the task reads {task.store_kind}.")
        return task

    def _key(self, request: TrainRequest) -> bytes:
        """A fresh secret; in a simulation, one that a second run with the same seed repeats."""
        if self.simulation_seed is None:
            return secrets.token_bytes(KEY_BYTES)
        text = f"{self.simulation_seed}/{self.policy.name}/{request.digest}"
        return hashlib.sha256(text.encode()).digest()

    def _randomness(self, key: bytes) -> Randomness:
        return Randomness.secure(key) if self.simulation_seed is None else Randomness.simulated(key)
