"""What a hospital answers: policy, store, ledger, audit log (``client.folder``) and training joined."""

import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from flwr.app import RecordDict

from client.audit import CHACHA20, NOISELESS, SEEDED, AuditSession
from client.augmentation import Augmented, Synthetic, load_synthetic
from client.budget import Admission, Proposal, Spending, admit
from client.folder import Folder
from client.ledger import ReleaseRequest, Reservation
from client.patients import Patients
from client.policy import check_engine, check_hours, check_plan, check_weights
from client.training import Randomness, check_room, rung_of, train_round
from shared.accounting import Mechanism
from shared.dp.noise import KEY_BYTES
from shared.dp.rungs import Rung
from shared.errors import ErrorCode, PolicyError, ProtocolError
from shared.messages import PlanQuery, SiteOffer, TrainReply, TrainRequest
from shared.plan import RunPlan
from shared.provenance.bounded import is_name
from shared.records import RecordStore, stores_in
from shared.tasks.base import Task
from shared.tasks.registry import find_task

_PARSERS: Mapping[str, Callable[[RecordDict], PlanQuery | TrainRequest]] = {
    "query": PlanQuery.from_content,
    "train": TrainRequest.from_content,
}


@dataclass(frozen=True)
class Site(Folder):
    """One hospital, opened from its folder, as it answers the server.

    Attributes:
        folder: See :mod:`client.folder`.
        simulation_seed: Makes noise repeatable and so worthless as privacy. It is an argument, not a setting in
            the folder, so that no hospital's file can hold it.
        server: Fingerprint of the server's certificate authority: two servers may both have a run of one name.
            Empty in a simulation.
        patients: What was opened by earlier messages.
    """

    simulation_seed: int | None = None
    server: str = ""
    patients: Patients = field(default_factory=Patients, compare=False)

    def store_of(self, kind: str) -> RecordStore:
        """The hospital's prepared patients of one kind, opened once: see :mod:`client.patients`.

        Raises:
            PolicyError: If only other kinds are prepared.
            StorageError: If nothing is, or the store is damaged.
        """
        return self.patients.store_of(self.folder, kind)

    def open_patients(self) -> None:
        """Open the patients of every permitted task that are prepared: see :mod:`client.patients`.

        Raises:
            StorageError: If a store is damaged.
        """
        prepared = stores_in(self.folder)
        for task in map(find_task, self.policy.tasks):
            if task.store_kind in prepared:
                self.patients.of_task(self.folder, task)

    def synthetic(self, task: Task) -> Synthetic | None:
        """The synthetic patients that ``augment-with`` adds to a task's; ``None`` if there are none.

        Raises:
            PolicyError: If the checkpoint is not one that may draw them.
            StorageError: If it is missing or damaged.
        """
        if not (self.policy.augment_with and task.augmented_by):
            return None
        return load_synthetic(self.folder / self.policy.augment_with, task, self.policy, self.trusted)

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
        """Check that a private step has room for all patients of every store that is there.

        Raises:
            PolicyError: If there are too many for the declared number.
            StorageError: If a store is damaged.
        """
        for kind in stores_in(self.folder):
            if kind:
                check_room(len(self.store_of(kind)), self.policy.declared_patients)

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
            whole, spending = plan.mechanism(plan.rounds), self.ledger.spending()
            admission = admit(spending, Proposal(run, whole, plan.delta), self.policy.cap)
            others = tuple(release for release in spending.releases if release[0] != run)
            spent = self._spent(plan, Spending(others, spending.admissions).after(run, whole, admission))
            facts = {"policy": self.policy.digest, "store_kind": task.store_kind, "admitted": admission.rule.value}
            log.note("accepted", **asked, **facts, **spent)
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
            store, synthetic = self.store_of(task.store_kind), self.synthetic(task)
            own = self.patients.of_task(self.folder, task)
            # Drawn as the hospital's own are: X-rays, for one, are not turned.
            added = replace(synthetic.patients, attributes=store.attributes) if synthetic else None
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
                details = asked | _generator(synthetic) | self._spent(plan, self.ledger.spending())
                self.ledger.commit(reservation, weights.tobytes(), lambda act: log.announce(act, **details))
        return TrainReply(request.round, plan.digest, weights)

    def _reserve(self, request: TrainRequest, task: Task, log: AuditSession, asked: Mapping[str, Any]) -> Reservation:
        plan, mechanism = request.plan, request.plan.mechanism(rounds=1)
        proposal = Proposal(self._run(request.run), plan.mechanism(plan.rounds), plan.delta, mechanism)
        release = ReleaseRequest(
            run=proposal.run,
            round=request.round,
            task=plan.task,
            store_digest=self.store_of(task.store_kind).digest,
            plan_digest=plan.digest,
            digest=request.digest,
            mechanism=mechanism,
            delta=plan.delta,
        )
        # The ledger cannot change before the line is written: a writer of the ledger holds the log.
        details = dict(asked) | self._spent(plan, self.ledger.spending())

        def check(spending: Spending) -> Admission:
            """Only what is new is checked: a round that began may be repeated after hours, or its reply sent again."""
            check_hours(datetime.now(UTC), self.policy)
            admission = admit(spending, proposal, self.policy.cap)
            details.update(_generator(synthetic := self.synthetic(task)))
            details.update(self._reserved(plan, task, mechanism, admission))
            if rung := self._rung(task, plan, synthetic):
                details.update(rung=rung.name, threads=rung.threads)
            details.update(self._spent(plan, spending.after(proposal.run, mechanism, admission)))
            return admission

        return self.ledger.reserve(release, self._key(request), check, lambda act: log.announce(act, **details))

    def _reserved(self, plan: RunPlan, task: Task, mechanism: Mechanism, admission: Admission) -> dict[str, Any]:
        """Return what a line ``reserved`` says beside what every line says."""
        return {
            "task": plan.task,
            "store": self.store_of(task.store_kind).digest,
            "store_kind": task.store_kind,
            "policy": self.policy.digest,
            "sample_rate": mechanism.sample_rate,
            "noise_multiplier": mechanism.noise_multiplier,
            "steps": mechanism.steps,
            "noise": self._noise_source if plan.private else NOISELESS,
            "admitted": admission.rule.value,
        }

    def _spent(self, plan: RunPlan, spending: Spending) -> dict[str, Any]:
        """Return the plan's delta, and what is spent of the cap, at the cap's own delta."""
        cap = self.policy.cap
        return {"delta": plan.delta, "max_delta": cap.delta, "epsilon": _finite(spending.epsilon(cap))}

    def _admit(self, plan: RunPlan) -> Task:
        check_plan(plan, self.policy)
        task = find_task(plan.task)
        check_engine(plan, task)
        check_room(len(self.store_of(task.store_kind)), self.policy.declared_patients)
        return task

    def _declared(self, synthetic: Synthetic | None) -> int:
        """The public number of patients who train, synthetic ones included."""
        return self.policy.declared_patients + (self.policy.augment_patients if synthetic else 0)

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
