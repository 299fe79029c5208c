"""Pulmonary vessels and bronchi: random trees, painted into a lung.

Tips are scattered through the lung and joined one by one to the nearest part of the tree, nearest the
hilum first; each branch then is as thick as the tips behind it demand (Murray's law, "The Physiological
Principle of Minimum Work", PNAS 12, 1926; exponent near 3).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from simulations.generators.thorax import AIR_HU, Body, Grid, Volume

_TIP_RADIUS_MM: Final = 0.4
_MURRAY: Final = 2.9
_TIPS_PER_CM3: Final = 1.6
_BEYOND_SLAB_MM: Final = 12.0
_THICK_MM: Final = 1.0
_CLEARANCE_MM: Final = 5.0
_WITH_BRONCHUS_MM: Final = 1.7
_VESSEL_HU: Final = 30.0
_BRONCHUS_WALL_HU: Final = -250.0
_STEP_MM: Final = 0.5
Points = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tree:
    """Straight branches: ``start`` and ``end`` are ``(n, 3)`` as x, y, z; ``radius`` is ``(n,)``; in mm."""

    start: Points
    end: Points
    radius: Points

    def giving_way(self, centre_mm: tuple[float, float, float], radius_mm: float) -> "Tree":
        """Return the tree without thick branches around a mass, which would hide its outline."""
        apart = np.linalg.norm((self.start + self.end) / 2 - np.array(centre_mm), axis=1)
        stays = (self.radius < _THICK_MM) | (apart > radius_mm + _CLEARANCE_MM)
        return Tree(self.start[stays], self.end[stays], self.radius[stays])


def grow_tree(body: Body, grid: Grid, rng: np.random.Generator) -> Tree:
    """Grow arteries and veins from the hilum through the slab and a little beyond it."""
    low, high = float(grid.z_mm[0]) - _BEYOND_SLAB_MM, float(grid.z_mm[-1]) + _BEYOND_SLAB_MM
    x, y = np.meshgrid(grid.across_mm, grid.across_mm)
    rows, columns = np.nonzero(body.lung_depth_mm(x, y) > 4)
    count = int(len(rows) * grid.spacing_mm**2 * (high - low) / 1000 * _TIPS_PER_CM3)
    chosen = rng.integers(len(rows), size=count)
    tips = np.stack([x[0, columns[chosen]], y[rows[chosen], 0], rng.uniform(low, high, count)], axis=1)
    middle = (low + high) / 2
    roots = np.array([[*body.hilum_mm, middle + offset] for offset in (-14.0, 0.0, 14.0)]) + rng.normal(0, 3, (3, 3))
    tips = tips[np.argsort(np.linalg.norm(tips - roots[1], axis=1), kind="stable")]
    return _join(roots, tips, rng)


def _join(roots: Points, tips: Points, rng: np.random.Generator) -> Tree:
    """Join each tip to the nearest node so far through a bent middle, then size the branches."""
    used = len(roots)
    nodes = np.full((used + 2 * len(tips), 3), np.inf)
    nodes[:used] = roots
    parent = np.full(len(nodes), -1)
    bends = rng.normal(0, 0.13, tips.shape)
    for tip, bend in zip(tips, bends, strict=True):
        nearest = int(np.argmin(((nodes[:used] - tip) ** 2).sum(axis=1)))
        span = tip - nodes[nearest]
        nodes[used] = nodes[nearest] + span / 2 + bend * np.sqrt(span @ span)
        nodes[used + 1] = tip
        parent[used : used + 2] = nearest, used
        used += 2
    supplied = np.zeros(len(nodes))
    supplied[len(roots) + 1 :: 2] = 1
    for child in range(len(nodes) - 1, len(roots) - 1, -1):  # children always follow their parents
        supplied[parent[child]] += supplied[child]
    branch = slice(len(roots), None)
    radius = _TIP_RADIUS_MM * supplied[branch] ** (1 / _MURRAY)
    return Tree(nodes[parent[branch]], nodes[branch], radius)


def paint_tree(lung: Volume, tree: Tree, grid: Grid) -> None:
    """Paint the branches into ``lung`` in place; thick ones get a bronchus beside them."""
    low, high = grid.z_mm[0] - grid.thickness_mm - 3, grid.z_mm[-1] + grid.thickness_mm + 3
    in_slab = (np.minimum(tree.start, tree.end)[:, 2] < high) & (np.maximum(tree.start, tree.end)[:, 2] > low)
    thick = tree.radius >= _THICK_MM
    share = np.clip(_thin_share(tree, in_slab & ~thick, grid), 0, 0.9)
    lung += share * (_VESSEL_HU - lung)
    for branch in np.flatnonzero(in_slab & thick):
        start, end, radius = tree.start[branch], tree.end[branch], float(tree.radius[branch])
        if radius >= _WITH_BRONCHUS_MM:
            aside = np.array([0.0, -2.1 * radius, 0.0])
            _paint_tube(lung, start + aside, end + aside, grid, radius=radius, hu=_BRONCHUS_WALL_HU)
            _paint_tube(lung, start + aside, end + aside, grid, radius=0.62 * radius, hu=AIR_HU)
        _paint_tube(lung, start, end, grid, radius=radius, hu=_VESSEL_HU)


def _thin_share(tree: Tree, chosen: npt.NDArray[np.bool_], grid: Grid) -> Volume:
    """Return the part of every voxel that branches thinner than a voxel fill.

    The branches' volume is spread over the eight voxels around each point of their axes, so that a
    vessel keeps its mass however it lies to the grid: partial volume without supersampling.
    """
    start, end, radius = tree.start[chosen], tree.end[chosen], tree.radius[chosen]
    length = np.linalg.norm(end - start, axis=1)
    steps = np.ceil(length / _STEP_MM).astype(int) + 1
    owner = np.repeat(np.arange(len(steps)), steps)
    place = (np.arange(steps.sum()) - np.repeat(np.cumsum(steps) - steps, steps) + 0.5) / steps[owner]
    points = start[owner] + place[:, None] * (end - start)[owner]
    mass = (np.pi * radius**2 * length / steps)[owner] / np.prod(grid.voxel_mm)
    origin = np.array([grid.across_mm[0], grid.across_mm[0], grid.z_mm[0]])
    position = ((points - origin) / np.array(grid.voxel_mm[::-1]))[:, ::-1]
    # One voxel of margin takes what lies just outside; the rest is clipped onto it and cut off.
    shape = np.array(grid.shape) + 2
    corner = np.floor(position).astype(int)
    fraction = position - corner
    share = np.zeros(int(np.prod(shape)))
    for offset in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(offset, fraction, 1 - fraction), axis=1)
        voxel = np.clip(corner + offset + 1, 0, shape - 1)
        share += np.bincount(np.ravel_multi_index(tuple(voxel.T), tuple(shape)), weight * mass, len(share))
    return share.reshape(shape)[1:-1, 1:-1, 1:-1].astype(np.float32)


def _paint_tube(lung: Volume, start: Points, end: Points, grid: Grid, *, radius: float, hu: float) -> None:
    """Paint one capsule with a soft edge a pixel wide."""
    reach = radius + grid.spacing_mm
    low, high = np.minimum(start, end) - reach, np.maximum(start, end) + reach
    rows, columns = (slice(*np.searchsorted(grid.across_mm, (low[i], high[i]))) for i in (1, 0))
    slices = slice(*np.searchsorted(grid.z_mm, (low[2], high[2])))
    box = lung[slices, rows, columns]
    if not box.size:
        return
    axis = (end - start).astype(np.float32)
    from_start = [
        grid.across_mm[columns] - np.float32(start[0]),
        (grid.across_mm[rows] - np.float32(start[1]))[:, None],
        (grid.z_mm[slices] - np.float32(start[2]))[:, None, None],
    ]
    along = sum(c * a for c, a in zip(from_start, axis, strict=True)) / max(float(axis @ axis), 1e-6)
    along = np.clip(along, 0, 1)
    distance = np.sqrt(sum((c - along * a) ** 2 for c, a in zip(from_start, axis, strict=True)))
    box += np.clip(0.5 + (radius - distance) / grid.spacing_mm, 0, 1) * (hu - box)
