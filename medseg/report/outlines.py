"""Outlines of labels along the edges of their voxels: nothing is smoothed away, and one voxel is a square."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.geometry import Float

_Whole = NDArray[np.intp]
_CORNERS = ((0, 0), (0, 1), (1, 1), (1, 0))  # (row, column) of those of a voxel, clockwise from the upper left
_RIGHT, _STRAIGHT, _LEFT = 1, 0, 3  # turns, in quarters of a circle


def outlines(values: NDArray[Any]) -> dict[int, list[Float]]:
    """The outlines of each label.

    Args:
        values: (rows, columns) of label values; 0 is outside.

    Returns:
        Label value -> its closed loops (n, 2) of corners (column, row) in voxels, (0, 0) being the upper left corner of
        the first voxel; the last corner is the first again. Outer loops run clockwise, holes the other way. Voxels that
        only share a corner have loops of their own.
    """
    starts, ways, inside, next_edge = _edges(values)
    after, seen = next_edge.tolist(), bytearray(len(starts))
    found: dict[int, list[Float]] = {}
    for first in range(len(after)):
        loop, edge = [], first
        while not seen[edge]:
            seen[edge] = 1
            loop.append(edge)
            edge = after[edge]
        if loop:
            bends = ways[loop] != np.roll(ways[loop], 1)
            corners = starts[loop][bends]
            rows, columns = np.divmod(np.append(corners, corners[0]), values.shape[1] + 1)
            found.setdefault(int(inside[first]), []).append(np.stack([columns, rows], axis=1).astype(np.float64))
    return found


def _edges(values: NDArray[Any]) -> tuple[_Whole, _Whole, NDArray[Any], _Whole]:
    """All edges between a label and something else, which run clockwise around the label.

    Returns:
        Of each edge the first corner (numbered row by row), the way (0 right, 1 down, 2 left, 3 up), the label inside,
        and which edge comes next.
    """
    padded, width = np.pad(values, 1), values.shape[1] + 1
    beyond = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])  # above, right, below, left
    places = [np.nonzero((values != 0) & (values != other)) for other in beyond]
    ways = np.repeat(np.arange(4), [len(rows) for rows, _ in places])
    rows, columns = np.concatenate(places, axis=1)
    shifts = np.array(_CORNERS) @ (width, 1)
    starts = rows * width + columns + shifts[ways]
    ends = rows * width + columns + shifts[(ways + 1) % 4]
    keys = 4 * starts + ways  # no two edges leave a corner the same way
    order = np.argsort(keys)
    following = np.full(len(keys), -1)
    for turn in (_LEFT, _STRAIGHT, _RIGHT):  # the last that there is counts: to the right is around the same voxel
        wanted = 4 * ends + (ways + turn) % 4
        near = order[np.searchsorted(keys, wanted, sorter=order) % max(1, len(keys))]
        following = np.where(keys[near] == wanted, near, following)
    return starts, ways, values[rows, columns], following
