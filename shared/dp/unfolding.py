"""What a kernel sees: a convolution's receptive fields as matrices per patient.

The unfolding is a strided view of the padded, channels-last tensor, copied a few patients at a time into one buffer
that fits the cache. There are three ways to lay it out, each the fastest somewhere:

| layout | a matrix | for |
| --- | --- | --- |
| ``POSITIONS`` | positions × fields: a row is one receptive field | strides |
| ``FIELDS`` | fields × positions: a row is one tap of the kernel everywhere | few channels: memory's runs are long |
| ``LINES`` | positions × fields of one line of the kernel; other lines see it shifted | the rest: a third to copy |
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from torch import Tensor, nn

from shared.dp.tape import Tape

CHUNK_FLOATS = 1 << 18
"""Floats of an unfolding handled at once: one MiB, which stays in the second-level cache."""
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves.

    Attributes:
        kernel, stride, padding, dilation: One number per spatial dimension.
        output_padding: Of a transposed convolution.
        groups: Channel groups.
        transposed: Whether it is a transposed convolution.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    transposed: bool

    @classmethod
    def of(cls, module: Convolution) -> "Geometry":
        """Read a module's geometry; padding given as a word is worked out."""
        padding = module.padding
        if padding == "valid":
            padding = (0,) * len(module.kernel_size)
        elif padding == "same":
            padding = tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        return cls(
            tuple(module.kernel_size),
            tuple(module.stride),
            tuple(int(p) for p in padding),
            tuple(module.dilation),
            tuple(module.output_padding),
            module.groups,
            isinstance(module, nn.ConvTranspose2d),
        )


class Layout(Enum):
    """See the module."""

    POSITIONS = auto()
    FIELDS = auto()
    LINES = auto()


@dataclass(frozen=True, eq=False)
class Unfolding:
    """Receptive fields of every patient, to be copied chunk by chunk.

    Attributes:
        layout: See the module.
        view: Strided, ``(B, groups, ...)``.
        buffer: Where a chunk is copied: ``(b, groups, K, positions, fields)``, or the last two swapped. K is 1 where
            the records' positions are joined; with ``LINES``, positions are those of all padded lines.
        shifts: The first position that each line of the kernel sees.
        positions: How many positions it sees from there.
        ones: Whether the last field is one everywhere, so that its gradient is the bias's.
    """

    layout: Layout
    view: Tensor
    buffer: Tensor
    shifts: tuple[int, ...]
    positions: int
    ones: bool

    @property
    def fields(self) -> int:
        """Size of a receptive field, in one group and one line of the kernel."""
        return self.buffer.shape[3 if self.layout is Layout.FIELDS else 4]

    @property
    def patients_at_once(self) -> int:
        """Patients in a chunk; the last one may have fewer."""
        return len(self.buffer)

    def fields_first(self, outputs: int) -> bool:
        """Whether a gradient is kept by field: the wider side comes last, so that the products' rows are long."""
        return self.layout is Layout.FIELDS or self.fields < outputs

    def chunks(self) -> Iterator[Tensor]:
        """Yield the buffer, filled; the next chunk overwrites the last."""
        inside = self.buffer
        if self.ones:
            inside = inside[:, :, :, :-1] if self.layout is Layout.FIELDS else inside[..., :-1]
        inside = inside.view(self.patients_at_once, *self.view.shape[1:])
        for part in self.view.split(self.patients_at_once):
            inside[: len(part)].copy_(part)
            yield self.buffer[: len(part)]


def unfold(
    tensor: Tensor,
    out: tuple[int, ...],
    geometry: Geometry,
    patients: int,
    tape: Tape,
    layout: Layout,
    ones: bool,
) -> Unfolding:
    """Prepare the unfolding of ``(N, C, ...)`` for a kernel that stops at positions ``out``.

    Args:
        tensor: A patient's records are consecutive rows.
        out: Number of positions in every dimension.
        geometry: Of the kernel.
        patients: B.
        tape: Gives memory.
        layout: How; ``LINES`` takes a kernel whose lines move by one.
        ones: Whether a field of ones comes last.
    """
    groups, records, channels = geometry.groups, len(tensor) // patients, tensor.shape[1] // geometry.groups
    wide = padded(tensor, out, geometry, tape)
    record, *lines, pixel = wide.stride()
    stops = [line * stride for line, stride in zip(lines, geometry.stride, strict=True)]
    taps = [line * dilation for line, dilation in zip(lines, geometry.dilation, strict=True)]
    shifts: tuple[int, ...] = (0,)
    seen, kernel = out, geometry.kernel
    if layout is Layout.LINES:
        a_line = math.prod(out[1:])
        shifts = tuple(geometry.dilation[0] * line * a_line for line in range(kernel[0]))
        seen, kernel, taps = (wide.shape[1], *out[1:]), kernel[1:], taps[1:]
    where = (records, *seen), (record, *stops)
    what = (*kernel, channels), (*taps, pixel)
    first, last = (what, where) if layout is Layout.FIELDS else (where, what)
    view = wide.as_strided(
        (patients, groups, *first[0], *last[0]), (records * record, channels * pixel, *first[1], *last[1])
    )
    fields, positions = math.prod(what[0]) + ones, math.prod(where[0])
    at_once = min(patients, max(1, CHUNK_FLOATS // (positions * fields * groups)))
    if layout is Layout.FIELDS:
        buffer = tape.workspace((at_once, groups, 1, fields, positions), tensor)
    elif layout is Layout.LINES:
        buffer = tape.workspace((at_once, groups, records, positions // records, fields), tensor)
    else:
        buffer = tape.workspace((at_once, groups, 1, positions, fields), tensor)
    if ones:
        (buffer[:, :, :, -1] if layout is Layout.FIELDS else buffer[..., -1]).fill_(1.0)
    joined = math.prod(out) * (1 if layout is Layout.LINES else records)
    return Unfolding(layout, view, buffer, shifts, joined, ones)


def padded(tensor: Tensor, out: tuple[int, ...], geometry: Geometry, tape: Tape) -> Tensor:
    """Return the tensor channels-last, ``(N, ..., C)``, with its border of zeros."""
    spatial, channels = tensor.shape[2:], tensor.shape[1]
    # The last receptive field may not reach the far edge, or reach past it by output padding.
    needed = [
        max(s + 2 * p, (o - 1) * st + d * (k - 1) + 1)
        for s, p, o, st, d, k in zip(
            spatial, geometry.padding, out, geometry.stride, geometry.dilation, geometry.kernel, strict=True
        )
    ]
    moved = tensor.movedim(1, -1)
    if not any(geometry.padding) and list(spatial) == needed:
        return moved.contiguous()
    # The border is zero from the start and never written; the inside is written anew by every layer that shares it.
    shape = (len(tensor), *needed, channels)
    result = tape.scratch(("padded", shape, spatial, geometry.padding), shape, tensor)
    inner = tuple(slice(p, p + s) for p, s in zip(geometry.padding, spatial, strict=True))
    result[(slice(None), *inner)] = moved
    return result
