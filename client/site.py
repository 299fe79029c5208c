"""A hospital's folder and what it answers: policy, store, ledger, audit log and training joined.

site.toml        the policy (client.config)
store/           the prepared store (shared.records)
ledger.sqlite    the privacy ledger (client.ledger)
audit.jsonl      the audit log (client.audit)
"""

import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict

from client.audit import CHACHA20, NOISELESS, SEEDED, AuditLog, AuditSession
from client.augmentation import Augmented, Synthetic, load_synthetic
from client.chain import Head
from client.config import SitePolicy, is_name
from client.ledger import Ledger, ReleaseRequest, Reservation
from client.policy import check_budget, check_engine, check_hours, check_plan, check_weights
from client.training import Randomness, check_room, rung_of, train_round
from shared.accounting import Mechanism, epsilon_of
from shared.dp.noise import KEY_BYTES
from shared.dp.rungs import Rung
from shared.errors import ErrorCode, PolicyError, ProtocolError
from shared.messages import PlanQuery, SiteOffer, TrainReply, TrainRequest
from shared.plan import RunPlan
from shared.records import RecordStore
from shared.tasks.base import Task
from shared.tasks.registry import find_task

LEDGER, AUDIT, POLICY, STORE = "ledger.sqlite", "audit.jsonl", "site.toml", "store"
_PARSERS: Mapping[str, Callable[[RecordDict], PlanQuery | TrainRequest]] = {
    "query": PlanQuery.from_content,
    "train": TrainRequest.from_content,
}


def open_books(folder: Path) -> None:
    """Begin the ledger and the audit log of a new site; what is there is left as it is. Raises StorageError."""
    AuditLog.create(folder / AUDIT, Ledger.create(folder / LEDGER))


@dataclass(frozen=True)
class Site:
    """One hospital, opened from its folder.

    Attributes:
        folder: See the module.
        simulation_seed: Makes noise repeatable and so worthless as privacy. It is an argument, not a setting in
            the folder, so that no hospital's file can hold it.
        server: Fingerprint of the server's certificate authority: two servers may both have a run of one name.
            Empty in a simulation.
    """

    folder: Path
    simulation_seed: int | None = None
    server: str = ""

    @cached_property
    def policy(self) -> SitePolicy:
        """The hospital's rules."""
        return SitePolicy.read(self.folder / POLICY)

    @cached_property
    def ledger(self) -> Ledger:
        """The hospital's privacy ledger."""
        return Ledger(self.folder / LEDGER)

    @cached_property
    def audit(self) -> AuditLog:
        """The hospital's audit log."""
        return AuditLog(self.folder / AUDIT, self.ledger)

    @cached_property
    def store(self) -> RecordStore:
        """The hospital's prepared patients."""
        return RecordStore.open(self.folder / STORE)

    def synthetic(self, task: Task) -> Synthetic | None:
        """The synthetic patients that ``augment-with`` adds to a task's; ``None`` if there are none.

        Raises:
            PolicyError: If the checkpoint is not one that may draw them.
            StorageError: If it is missing or damaged.
        """
        if not (self.policy.augment_with and task.augmented_by):
            return None
        return load_synthetic(self.folder / self.policy.augment_with, task, self.policy)

    def check_augmentation(self) -> None:
        """Check at the start that ``augment-with`` can be obeyed, rather than when a run begins.

        Raises:
            PolicyError: If no permitted task takes synthetic patients, or the checkpoint may not draw them.
            StorageError: If the checkpoint is missing or damaged.
        """
        if not self.policy.augment_with:
            return
        takers = [task for name in self.policy.tasks if (task := find_task(name)).augmented_by]
        if not takers:
            raise PolicyError("site.toml has augment-with, but no task of it takes synthetic patients. Take it out.")
        for task in takers:
            self.synthetic(task)

    def check_patients(self) -> None:
        """Check that a private step has room for all patients of the store, if there is one.

        Raises:
            PolicyError: If there are too many for the declared number.
            StorageError: If the store is damaged.
        """
        if (self.folder / STORE).exists():
            check_room(len(self.store), self.policy.declared_patients)

    def answer(self, kind: str, content: RecordDict) -> SiteOffer | TrainReply:
        """Answer a message of any type, or raise what the guard turns into a code.

        Raises:
            FederationError: For whatever reason nothing but a code leaves.
        """
        # The server's own word for the type is no more than that: the log holds none of it.
        with self.audit.failures("refused", kind=kind if kind in _PARSERS else "unknown"):
            if kind not in _PARSERS:
                raise ProtocolError("The server sent a message of an unknown type.")
            request = _PARSERS[kind](content)
            if not is_name(request.run):
                raise ProtocolError("The run's name has characters that no run's name may have.")
        return self.answer_query(request) if isinstance(request, PlanQuery) else self.answer_train(request)

    def answer_query(self, query: PlanQuery) -> SiteOffer:
        """Accept a plan, or raise what the guard turns into a code. Nothing is spent."""
        plan, run = query.plan, self._run(query.run)
        asked = {"kind": "query", "run": run, "plan": plan.digest}
        with self.audit.decision(**asked) as log:
            task = self._admit(plan)
            self._rung(task, plan, self.synthetic(task))  # an unsafe machine refuses before anything is spent
            if self.ledger.plan_of(run) not in (None, plan.digest):
                raise ProtocolError("This run began here under another plan.", ErrorCode.PLAN_CHANGED)
            earlier = self.ledger.mechanisms(except_run=run)
            total = check_budget(earlier, plan.mechanism(plan.rounds), plan, self.policy)
            log.note("accepted", **asked, policy=self.policy.digest, epsilon=_finite(total), delta=plan.delta)
        return SiteOffer(self.policy.name, self.policy.declared_patients, plan.digest)

    def answer_train(self, request: TrainRequest) -> TrainReply:
        """Train one round: reserve, train, commit, reply; a repeated request gets the stored reply."""
        plan = request.plan
        asked = {
            "kind": "train",
            "run": self._run(request.run),
            "round": request.round,
            "plan": plan.digest,
            "request": request.digest,
        }
        with self.audit.decision(**asked) as log:
            task = self._admit(plan)
            check_weights(request.weights, task, self.policy)
            reservation = self._reserve(request, task, log, asked)
        if reservation.reply is not None:
            return TrainReply(request.round, plan.digest, np.frombuffer(reservation.reply, np.float32))
        if reservation.key is None:
            raise ProtocolError("This release is closed.", ErrorCode.REPLAY_MISMATCH)
        with self.audit.failures("failed", **asked):
            own, synthetic = task.load(self.store), self.synthetic(task)
            # Drawn as the hospital's own are: X-rays, for one, are not turned.
            added = replace(synthetic.patients, attributes=self.store.attributes) if synthetic else None
            weights = train_round(
                task,
                Augmented(task.load(added), own) if added else own,
                plan,
                request.round,
                request.weights,
                declared_patients=self._declared(synthetic),
                randomness=self._randomness(reservation.key),
                rung=self._rung(task, plan, synthetic),
            )
            with self.audit.session() as log:
                announce = self._announcement(log, asked | _generator(synthetic), plan, None)
                self.ledger.commit(reservation, weights.tobytes(), announce)
        return TrainReply(request.round, plan.digest, weights)

    def _reserve(self, request: TrainRequest, task: Task, log: AuditSession, asked: Mapping[str, Any]) -> Reservation:
        plan, details = request.plan, dict(asked)
        release = ReleaseRequest(
            run=self._run(request.run),
            round=request.round,
            task=plan.task,
            store_digest=self.store.digest,
            plan_digest=plan.digest,
            digest=request.digest,
            mechanism=plan.mechanism(rounds=1),
            delta=plan.delta,
        )

        def check(earlier: tuple[Mechanism, ...]) -> None:
            """Only what is new is checked: a round that began may be repeated after hours, or its reply sent again."""
            check_hours(datetime.now(UTC), self.policy)
            check_budget(earlier, release.mechanism, plan, self.policy)
            details.update(_generator(synthetic := self.synthetic(task)))
            if rung := self._rung(task, plan, synthetic):
                details.update(rung=rung.name, threads=rung.threads)

        return self.ledger.reserve(
            release, self._key(request), check, self._announcement(log, details, plan, release.mechanism)
        )

    def _announcement(
        self, log: AuditSession, asked: Mapping[str, Any], plan: RunPlan, reserving: Mechanism | None
    ) -> Callable[[str], Head]:
        """Return how the audit log announces an act, with the epsilon after it."""
        earlier = self.ledger.mechanisms()  # cannot change: whoever would add to it has to hold the log

        def announce(act: str) -> Head:
            details: dict[str, Any] = {"delta": plan.delta}
            composed = earlier
            if act == "reserved" and reserving:
                composed = (*earlier, reserving)
                details |= {
                    "task": plan.task,
                    "store": self.store.digest,
                    "policy": self.policy.digest,
                    "sample_rate": reserving.sample_rate,
                    "noise_multiplier": reserving.noise_multiplier,
                    "steps": reserving.steps,
                    "noise": self._noise_source if plan.private else NOISELESS,
                }
            return log.announce(act, **asked, **details, epsilon=_finite(epsilon_of(composed, plan.delta)))

        return announce

    def _admit(self, plan: RunPlan) -> Task:
        check_plan(plan, self.policy)
        task = find_task(plan.task)
        check_engine(plan, task)
        if self.store.kind != task.store_kind:
            raise PolicyError(f"The prepared store holds {self.store.kind}, the task reads {task.store_kind}.")
        self.check_patients()
        return task

    def _declared(self, synthetic: Synthetic | None) -> int:
        """The public number of patients who train, synthetic ones included."""
        return self.policy.declared_patients + (len(synthetic.patients) if synthetic else 0)

    def _rung(self, task: Task, plan: RunPlan, synthetic: Synthetic | None) -> Rung | None:
        """How the private passes run on this machine; ``None`` without privacy.

        Raises:
            FederationError: With ``UNSAFE_KERNELS``, if no way is safe.
        """
        return rung_of(task, plan, self._declared(synthetic)) if plan.private else None

    def _run(self, name: str) -> str:
        return f"{self.server}/{name}" if self.server else name

    def _key(self, request: TrainRequest) -> bytes:
        """A fresh secret; in a simulation, one that a second run with the same seed repeats."""
        if self.simulation_seed is None:
            return secrets.token_bytes(KEY_BYTES)
        text = f"{self.simulation_seed}/{self.policy.name}/{request.digest}"
        return hashlib.sha256(text.encode()).digest()

    @property
    def _noise_source(self) -> str:
        """What the audit log calls the source of this site's noise."""
        return CHACHA20 if self.simulation_seed is None else SEEDED

    def _randomness(self, key: bytes) -> Randomness:
        return Randomness.secure(key) if self.simulation_seed is None else Randomness.simulated(key)


def _generator(synthetic: Synthetic | None) -> dict[str, str]:
    return {"augmented": synthetic.checkpoint} if synthetic else {}


def _finite(epsilon: float) -> float | None:
    """JSON has no infinity: ``null`` stands for no promise at all."""
    return epsilon if np.isfinite(epsilon) else None
