"""Every error that Fedward raises on purpose.

    FederationError
    ├── PlanError            the run's plan is malformed or impossible
    ├── PolicyError          the hospital's own rules refuse it
    │   └── BudgetExceeded   the privacy budget would be overspent
    ├── IntakeError          a hospital's export cannot be prepared at all
    ├── ProtocolError        a message is not what the protocol allows
    └── StorageError         a file or database cannot be read or written

Two audiences: the message is for the person at this machine (what, why, what to do next) and never
leaves it; only the code crosses the wire, so codes are a closed list.
"""

from enum import StrEnum


class ErrorCode(StrEnum):
    """The words that may cross the wire when something is refused or fails."""

    BAD_PLAN = "bad-plan"
    UNKNOWN_TASK = "unknown-task"
    POLICY_REFUSED = "policy-refused"
    OUTSIDE_HOURS = "outside-hours"
    BUDGET_EXCEEDED = "budget-exceeded"
    BAD_INTAKE = "bad-intake"
    BAD_MESSAGE = "bad-message"
    PLAN_CHANGED = "plan-changed"
    REPLAY_MISMATCH = "replay-mismatch"
    QUORUM_LOST = "quorum-lost"
    UNSAFE_KERNELS = "unsafe-kernels"
    STORAGE_FAILED = "storage-failed"
    INTERNAL = "internal"


class FederationError(Exception):
    """Base of all deliberate errors.

    Args:
        message: What happened, why, and what to do next: for this machine's operator only.
        code: What may be told to the other side.
    """

    default_code = ErrorCode.INTERNAL

    def __init__(self, message: str, code: ErrorCode | None = None) -> None:
        super().__init__(message)
        self.code = code or self.default_code


class PlanError(FederationError):
    """A run plan is malformed, inconsistent or cannot meet what it promises."""

    default_code = ErrorCode.BAD_PLAN


class PolicyError(FederationError):
    """The hospital's policy refuses the request."""

    default_code = ErrorCode.POLICY_REFUSED


class BudgetExceeded(PolicyError):  # noqa: N818 - the name the field uses
    """The composed privacy loss would pass the hospital's ``max-epsilon``."""

    default_code = ErrorCode.BUDGET_EXCEEDED


class IntakeError(FederationError):
    """A hospital's export cannot be prepared at all (single bad files are counted, not raised)."""

    default_code = ErrorCode.BAD_INTAKE


class ProtocolError(FederationError):
    """A message or reply does not have the agreed form."""

    default_code = ErrorCode.BAD_MESSAGE


class StorageError(FederationError):
    """A file, folder or database cannot be read or written."""

    default_code = ErrorCode.STORAGE_FAILED
