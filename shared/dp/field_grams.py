"""Gram matrices of a convolution's receptive fields, from those of the blocks that the fields share.

Fields overlap: taken field by field, the same pixels are multiplied again and again. A kernel of k pixels that moves
by s sees its field as a run of blocks of gcd(k, s) pixels, in every dimension; with a_p the block at which field p
begins

    ⟨field p, field q⟩ = Σ_d ⟨block a_p + d, block a_q + d⟩    over the blocks d of a field,

so one Gram matrix of the blocks and its shifted sum do. Two special cases: the blocks of a dilated kernel are single
pixels, and a kernel that overlaps nothing has one block per field.
"""

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from shared.dp.tape import gram, norm_of_grams
from shared.dp.unfolding import CHUNK_FLOATS, Geometry


@dataclass(frozen=True)
class Axis:
    """How fields are made of blocks along one dimension.

    Attributes:
        fields: How many there are.
        size: Pixels of a block.
        spacing: Pixels from one block's beginning to the next one's.
        step: Blocks from one field's beginning to the next one's.
        taps: Where a field's blocks are, from its beginning.
    """

    fields: int
    size: int
    spacing: int
    step: int
    taps: range

    @classmethod
    def of(cls, fields: int, kernel: int, stride: int, dilation: int) -> "Axis":
        """Choose the blocks."""
        if kernel <= stride and (dilation == 1 or kernel == 1):
            return cls(fields, kernel, stride, 1, range(1))
        if dilation > 1:
            return cls(fields, 1, 1, stride, range(0, kernel * dilation, dilation))
        size = math.gcd(kernel, stride)
        return cls(fields, size, size, stride // size, range(kernel // size))

    @property
    def blocks(self) -> int:
        """How many blocks the fields see."""
        return (self.fields - 1) * self.step + self.taps[-1] + 1

    def seen(self, tap: int) -> slice:
        """Return every field's block at ``tap``."""
        return slice(tap, tap + (self.fields - 1) * self.step + 1, self.step)


def axes(geometry: Geometry, out: tuple[int, ...]) -> tuple[Axis, ...]:
    """Return the blocks of a kernel that stops at positions ``out``."""
    each = zip(out, geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    return tuple(Axis.of(*numbers) for numbers in each)


def field_norms(wide: Tensor, gradients: Tensor, along: tuple[Axis, ...], *, bias: bool) -> Tensor:
    """Return ``(B,)`` squared norms of the kernel's gradient, and of a bias's if there is one.

    Args:
        wide: ``(N, ..., C)``, contiguous, with its border of zeros; a patient's records are consecutive rows.
        gradients: ``(B, T, p)`` of the outputs, T the fields of all of a patient's records.
        along: One axis per dimension.
        bias: Whether there is an input that is always 1.
    """
    records, (record, *lines, pixel) = len(wide) // len(gradients), wide.stride()
    blocks, sizes = [axis.blocks for axis in along], [axis.size for axis in along]
    between = [line * axis.spacing for line, axis in zip(lines, along, strict=True)]
    view = wide.as_strided(
        (len(gradients), records, *blocks, *sizes, wide.shape[-1]),
        (records * record, record, *between, *lines, pixel),
    )
    count, width = records * math.prod(blocks), math.prod(sizes) * wide.shape[-1]
    at_once = max(1, CHUNK_FLOATS // (count * max(count, width)))
    norms = []
    for part, gradient in zip(view.split(at_once), gradients.split(at_once), strict=True):
        products = gram(part.reshape(len(part), count, width))
        of_fields = _of_fields(products.view(len(part), *[records, *blocks] * 2), along)
        norms.append(norm_of_grams(of_fields.add_(bias), gram(gradient)))
    return torch.cat(norms)


def _of_fields(products: Tensor, along: tuple[Axis, ...]) -> Tensor:
    """Return the fields' Gram matrices ``(b, T, T)`` from the blocks' ``(b, K, ..., K, ...)``."""
    every = slice(None)
    sides = [
        (every, *(axis.seen(tap) for axis, tap in zip(along, taps, strict=True)))
        for taps in product(*(axis.taps for axis in along))
    ]
    total = products[(every, *sides[0], *sides[0])].clone()
    for side in sides[1:]:
        total += products[(every, *side, *side)]
    dimensions = len(along) + 1
    return total.flatten(dimensions + 1).flatten(1, dimensions)
