"""From single headers to series: who the patient is, what belongs together, and where each slice lies.

Every decision here is about one series and looks at that series' own slices only.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from client.intake.dicom import SliceHeader
from client.intake.identities import IssuerRule
from client.intake.patches import Floats, StackGeometry
from client.intake.pseudonyms import PatientIdentity
from client.intake.rejects import RejectCode, Rejected

SAME: Final = 1e-3
"""Orientation (unit vectors) and pixel spacing (mm) may differ this much within a series."""
SAME_PLACE_MM: Final = 0.01
OFF_LINE_MM: Final = 0.5
"""Slices may lie this far beside the line through the first and the last; more means a moved table."""
MIN_TILT_COSINE: Final = 0.7


@dataclass(frozen=True, repr=False)
class Series:
    """A series that passed: one patient's parallel slices, in the order of their position."""

    uid: str
    patient: PatientIdentity
    vendor: int
    slices: tuple[SliceHeader, ...]
    geometry: StackGeometry


def settle_patients(headers: Iterable[SliceHeader], rule: IssuerRule) -> tuple[list[SliceHeader], int]:
    """Give every slice its patient's identity under the site's rule; return the slices and how many are left out.

    A slice without an issuer takes the only one that its own series states for its PatientID. Nothing outside the
    series is looked at: what another patient's files say cannot change whose slice this is.
    """
    headers = list(headers)
    stated: dict[tuple[str, str], set[str]] = defaultdict(set)
    for header in headers:
        stated[header.series_uid, header.patient.patient_id] |= {header.patient.issuer} - {""}
    settled = []
    for header in headers:
        patient, known = header.patient, stated[header.series_uid, header.patient.patient_id]
        if not patient.issuer and len(known) == 1:
            patient = patient._replace(issuer=next(iter(known)))
        if (decided := rule.settle(patient)) is not None:
            settled.append(replace(header, patient=decided))
    return settled, len(headers) - len(settled)


def split_numbers(headers: Iterable[SliceHeader]) -> int:
    """Count the PatientIDs that stand both with an issuer and without; it is only told, and no record depends on it."""
    named: dict[str, set[bool]] = defaultdict(set)
    for header in headers:
        named[header.patient.patient_id].add(bool(header.patient.issuer))
    return sum(len(both) == 2 for both in named.values())


def group_series(
    headers: Iterable[SliceHeader], key: Callable[[PatientIdentity], bytes]
) -> tuple[dict[str, Series | RejectCode], int]:
    """Group slices by series; return each one or why it is rejected, and the number of copies.

    What becomes of a series, and whose it is, is a function of its own slices. So another patient's files matter only
    if they state this very series; the series is then refused for both, for nothing says whose it is.

    Args:
        headers: Slices, with settled patients.
        key: Patient to pseudonym, the same for identifiers of one person.
    """
    members: dict[str, list[SliceHeader]] = defaultdict(list)
    for header in headers:
        members[header.series_uid].append(header)
    result: dict[str, Series | RejectCode] = {}
    copies = 0
    for series_uid in sorted(members):
        distinct = _without_copies(members[series_uid])
        copies += len(members[series_uid]) - len(distinct)
        try:
            result[series_uid] = _build(series_uid, distinct, key)
        except Rejected as outcome:
            result[series_uid] = outcome.code
    return result, copies


def _without_copies(slices: Sequence[SliceHeader]) -> list[SliceHeader]:
    """Drop byte-identical files of one instance UID; sort by UID, so that file names no longer matter."""
    same_uid = Counter(header.instance_uid for header in slices)
    distinct: dict[tuple[str, bytes], SliceHeader] = {}
    for header in slices:
        digest = _digest(header) if same_uid[header.instance_uid] > 1 else b""
        distinct.setdefault((header.instance_uid, digest), header)
    return [distinct[key] for key in sorted(distinct)]


def _digest(header: SliceHeader) -> bytes:
    try:
        with header.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:  # gone since it was listed: no copy of anything
        return bytes(header.path)


def _build(series_uid: str, slices: Sequence[SliceHeader], key: Callable[[PatientIdentity], bytes]) -> Series:
    """Check that the slices form one stack.

    Raises:
        Rejected: With the code of the first rule of the series that is broken.
    """
    if _differ(slices, lambda header: key(header.patient)):
        raise Rejected(RejectCode.MIXED_PATIENTS)
    if _differ(slices, lambda header: header.instance_uid, expected=len(slices)):
        raise Rejected(RejectCode.DUPLICATE_SLICES)
    numbers = np.array([(*header.orientation, *header.spacing_mm) for header in slices])
    mixed = _differ(slices, lambda header: (header.shape, header.frame_uid, header.vendor))
    if mixed or np.ptp(numbers, axis=0).max() > SAME:
        raise Rejected(RejectCode.MIXED_SERIES)
    if len(slices) < 2:
        raise Rejected(RejectCode.TOO_FEW_SLICES)
    order, geometry = _stack(slices)
    return Series(series_uid, slices[0].patient, slices[0].vendor, tuple(slices[k] for k in order), geometry)


def _differ(slices: Sequence[SliceHeader], of: Callable[[SliceHeader], Hashable], expected: int = 1) -> bool:
    return len({of(header) for header in slices}) != expected


def _stack(slices: Sequence[SliceHeader]) -> tuple[list[int], StackGeometry]:
    """Order slices along their normal, never by name or number, and find the affine map.

    The stack's own axis is the line through the first pixels; with a tilted gantry it is not the normal.
    """
    across, down = (_unit(np.array(part)) for part in (slices[0].orientation[:3], slices[0].orientation[3:]))
    normal = np.cross(across, down)
    positions = np.array([header.position_mm for header in slices])
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    if np.diff(positions @ normal).min() < SAME_PLACE_MM:
        raise Rejected(RejectCode.DUPLICATE_SLICES)
    axis = _unit(positions[-1] - positions[0])
    depths = (positions - positions[0]) @ axis
    beside = positions - positions[0] - depths[:, None] * axis
    if axis @ normal < MIN_TILT_COSINE or np.linalg.norm(beside, axis=1).max() > OFF_LINE_MM:
        raise Rejected(RejectCode.IRREGULAR_STACK)
    spacing_mm = (slices[0].spacing_mm[0], slices[0].spacing_mm[1])
    axes = np.stack([axis, down, across], axis=1)
    return order.tolist(), StackGeometry(positions[0], axes, depths, spacing_mm, slices[0].shape)


def _unit(vector: Floats) -> Floats:
    unit: Floats = vector / np.linalg.norm(vector)
    return unit
