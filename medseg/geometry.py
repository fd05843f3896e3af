"""Geometry: where voxels lie in the world. Shape and affine, no pixels.

The world is RAS+ in millimetres (x to the right, y to the front, z to the head), as NIfTI and nibabel have it; LPS
exists only inside ``medseg.io``. The affine maps voxel indices (i, j, k) of voxel centres to world points.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
AXIS_LETTERS = ("LR", "PA", "IS")
"""For each world axis, the letter of its negative and of its positive end."""

SHEAR_TOLERANCE = 1e-3
"""Cosine between two voxel axes below which a grid counts as orthogonal: over 500 mm that moves a voxel by 0.5 mm."""

LATTICE_TOLERANCE = 0.1
"""Part of a voxel by which the voxels of two grids may miss each other and count as the same."""


@dataclass(frozen=True)
class Box:
    """A block of voxels: ``start`` inclusive, ``stop`` exclusive, one entry an axis."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of voxels along each axis."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Slices that cut the box out of an array's last axes: ``array[(..., *box.slices)]``."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box of a whole grid."""
        return cls((0,) * len(shape), tuple(int(n) for n in shape))

    @classmethod
    def around(cls, mask: NDArray[np.bool_]) -> Box:
        """The smallest box that holds every true voxel; the whole grid where none is true."""
        ranges = []
        for axis in range(mask.ndim):
            others = tuple(a for a in range(mask.ndim) if a != axis)
            hits = np.flatnonzero(mask.any(axis=others))
            if not len(hits):
                return cls.whole(mask.shape)
            ranges.append((int(hits[0]), int(hits[-1]) + 1))
        return cls(tuple(a for a, _ in ranges), tuple(b for _, b in ranges))

    def grown(self, margin: int, shape: Sequence[int]) -> Box:
        """The box with ``margin`` voxels more on every side, clipped to a grid of ``shape``."""
        return Box(
            tuple(max(0, a - margin) for a in self.start),
            tuple(min(n, b + margin) for b, n in zip(self.stop, shape, strict=True)),
        )


@dataclass(frozen=True)
class Reorientation:
    """A permutation and flips of the three voxel axes; exactly undone by ``inverse``.

    ``axes[n]`` is the old axis that becomes new axis n; ``flips[n]`` says whether new axis n runs backwards.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @property
    def inverse(self) -> Reorientation:
        """The reorientation that undoes this one."""
        axes = tuple(self.axes.index(n) for n in range(3))
        flips = tuple(self.flips[n] for n in axes)
        return Reorientation(axes, flips)  # type: ignore[arg-type]

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """Reorient the last three axes of an array (a view, no copy)."""
        lead = array.ndim - 3
        moved = array.transpose(*range(lead), *(lead + a for a in self.axes))
        i, j, k = (slice(None, None, -1 if flip else 1) for flip in self.flips)
        return moved[..., i, j, k]


@dataclass(frozen=True, eq=False)
class Geometry:
    """Shape (I, J, K) and 4x4 affine (voxel index -> world RAS+ mm) of a grid."""

    shape: tuple[int, int, int]
    affine: Float

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        affine.flags.writeable = False
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    def __eq__(self, other: object) -> bool:
        """Equal shape and bit-equal affine; ``close_to`` is the tolerant question."""
        if not isinstance(other, Geometry):
            return NotImplemented
        return self.shape == other.shape and np.array_equal(self.affine, other.affine)

    def __hash__(self) -> int:
        return hash((self.shape, self.affine.tobytes()))

    @cached_property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between voxel centres along each voxel axis, mm."""
        i, j, k = (float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))
        return i, j, k

    @property
    def origin(self) -> Float:
        """World position of the centre of voxel (0, 0, 0), mm."""
        return self.affine[:3, 3]

    @cached_property
    def direction(self) -> Float:
        """3x3 matrix whose columns are the unit directions of the voxel axes."""
        return np.asarray(self.affine[:3, :3] / np.array(self.spacing))

    @property
    def shear(self) -> float:
        """Largest cosine between two voxel axes: 0 for an orthogonal grid."""
        gram = self.direction.T @ self.direction
        return float(np.abs(gram - np.diag(np.diag(gram))).max())

    @property
    def is_sheared(self) -> bool:
        """Whether the voxel axes are further from orthogonal than ``SHEAR_TOLERANCE``."""
        return self.shear > SHEAR_TOLERANCE

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @property
    def diagonal_mm(self) -> float:
        """Length of the image's diagonal, voxel edge to voxel edge, mm; of a picture (K = 1) without its thickness."""
        lengths = np.array(self.shape) * np.array(self.spacing)
        return float(np.linalg.norm(lengths[:2] if self.shape[2] == 1 else lengths))

    @property
    def orientation(self) -> str:
        """Three letters: the world direction nearest to each voxel axis, as "RAS" or "LPS"."""
        axes, signs = _nearest_world_axes(self.direction)
        return "".join(AXIS_LETTERS[a][1 if s > 0 else 0] for a, s in zip(axes, signs, strict=True))

    @property
    def corners(self) -> Float:
        """Indices (8, 3) of the voxels in the corners."""
        return np.array(list(itertools.product(*((0, n - 1) for n in self.shape))), dtype=np.float64)

    def to(self, orientation: str) -> Reorientation:
        """The reorientation whose result has the given orientation letters.

        Raises:
            ValueError: ``orientation`` does not name the three axes once each.
        """
        target = [_axis_and_sign(letter) for letter in orientation]
        if sorted(axis for axis, _ in target) != [0, 1, 2]:
            raise ValueError(f"orientation must name each of L/R, P/A and I/S once, as 'RAS'; got {orientation!r}")
        axes, signs = _nearest_world_axes(self.direction)
        order = [axes.index(axis) for axis, _ in target]
        flips = [signs[old] != sign for old, (_, sign) in zip(order, target, strict=True)]
        return Reorientation(tuple(order), tuple(flips))  # type: ignore[arg-type]

    def reoriented(self, reorientation: Reorientation) -> Geometry:
        """The geometry of an array after ``reorientation.apply``: the same voxels at the same world points."""
        matrix = np.zeros((4, 4))
        matrix[3, 3] = 1.0
        for new, (old, flip) in enumerate(zip(reorientation.axes, reorientation.flips, strict=True)):
            matrix[old, new] = -1.0 if flip else 1.0
            matrix[old, 3] = self.shape[old] - 1 if flip else 0.0
        shape = tuple(self.shape[a] for a in reorientation.axes)
        return Geometry(shape, self.affine @ matrix)  # type: ignore[arg-type]

    def cropped(self, box: Box) -> Geometry:
        """The geometry of the voxels inside a box."""
        affine = self.affine.copy()
        affine[:3, 3] = self.affine[:3, :3] @ np.array(box.start, dtype=float) + self.affine[:3, 3]
        return Geometry(box.shape, affine)  # type: ignore[arg-type]

    def resampled(self, shape: Sequence[int]) -> Geometry:
        """The geometry of the same block of space cut into ``shape`` voxels (outer voxel edges stay in place)."""
        ratio = np.array(self.shape, dtype=float) / np.array(shape, dtype=float)
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, :3] * ratio
        affine[:3, 3] = self.affine[:3, :3] @ ((ratio - 1.0) / 2.0) + self.affine[:3, 3]
        return Geometry(tuple(shape), affine)  # type: ignore[arg-type]

    def orthogonalised(self) -> Geometry:
        """An orthogonal grid with the same spacing that holds every voxel centre of this (sheared) one.

        The axes are the orthogonal ones nearest to the voxel axes (polar decomposition of the direction matrix).
        """
        u, _, vt = np.linalg.svd(self.direction)
        matrix = (u @ vt) * np.array(self.spacing)
        local = (self.world(self.corners) - self.origin) @ np.linalg.inv(matrix).T
        low, high = np.floor(local.min(axis=0) + 1e-6), np.ceil(local.max(axis=0) - 1e-6)
        affine = np.eye(4)
        affine[:3, :3] = matrix
        affine[:3, 3] = self.origin + matrix @ low
        shape = tuple(int(n) for n in high - low + 1)
        return Geometry(shape, affine)  # type: ignore[arg-type]

    def world(self, voxels: Float) -> Float:
        """World points (N, 3) in mm of voxel indices (N, 3)."""
        return np.asarray(voxels @ self.affine[:3, :3].T + self.affine[:3, 3])

    def placed(self, target: Geometry) -> tuple[Reorientation, tuple[int, int, int]] | None:
        """How the voxels of this grid lie on those of another; None where they do not.

        Looked at within this grid alone: what a few slices say of places far from them is not sure.

        Returns:
            What turns the axes of this grid into those of ``target``, and on which of its voxels, perhaps outside of
            it, the first voxel of the turned grid lies then; all others follow.
        """
        between = np.linalg.inv(target.direction) @ self.direction
        score = {axes: sum(abs(between[n, a]) for n, a in enumerate(axes)) for axes in itertools.permutations(range(3))}
        axes = max(score, key=lambda axes: score[axes])
        turn = Reorientation(axes, tuple(bool(between[n, a] < 0) for n, a in enumerate(axes)))  # type: ignore[arg-type]
        grid = self.reoriented(turn)
        places = (grid.world(grid.corners) - target.origin) @ np.linalg.inv(target.affine[:3, :3]).T
        offsets = places - grid.corners
        start = np.rint(offsets[0])
        if np.abs(offsets - start).max() > LATTICE_TOLERANCE:
            return None
        return turn, tuple(int(n) for n in start)  # type: ignore[return-value]

    def close_to(self, other: Geometry, tolerance: float = 1e-2) -> bool:
        """Same shape, and every corner within ``tolerance`` of the smallest spacing of the other's."""
        if self.shape != other.shape:
            return False
        distance = np.abs(self.world(self.corners) - other.world(self.corners)).max()
        return bool(distance <= tolerance * min(self.spacing))


def _axis_and_sign(letter: str) -> tuple[int, int]:
    for axis, ends in enumerate(AXIS_LETTERS):
        if letter in ends:
            return axis, 1 if letter == ends[1] else -1
    raise ValueError(f"an orientation letter is one of L R P A I S; got {letter!r}")


def _nearest_world_axes(direction: Float) -> tuple[list[int], list[int]]:
    """For each voxel axis the nearest world axis and its sign, each world axis used once.

    A grid turned by exactly 45 degrees has two equally near assignments. The small extra term breaks the tie by the
    world direction of the axes alone (it does not change when an axis is flipped), so that all 48 orientations of one
    image are brought to the same array.
    """
    x, y, z = direction
    tie = 1e-6 * np.array([[1.0], [2.0], [4.0]]) * (x * y + 2.0 * y * z + 4.0 * x * z)
    score = np.abs(direction) + tie
    axes = max(itertools.permutations(range(3)), key=lambda p: sum(score[p[v], v] for v in range(3)))
    signs = [1 if direction[axis, voxel] >= 0 else -1 for voxel, axis in enumerate(axes)]
    return list(axes), signs
