"""Outlines: they are exact, whatever touches, and filling them gives the labels again."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from medseg.report.outlines import outlines


def test_the_outline_of_one_voxel_is_its_square() -> None:
    ((loop,),) = outlines(np.array([[0, 300], [0, 0]])).values()
    assert loop.tolist() == [[1, 0], [2, 0], [2, 1], [1, 1], [1, 0]]


def test_straight_edges_have_no_corners_between() -> None:
    mask = np.zeros((4, 6), dtype=bool)
    mask[1:3, 1:5] = True
    mask[1, 4] = False
    (loop,) = outlines(mask)[1]
    assert sorted(map(tuple, loop[:-1])) == [(1, 1), (1, 3), (4, 1), (4, 2), (5, 2), (5, 3)]
    assert tuple(loop[0]) == tuple(loop[-1])


def test_voxels_that_share_a_corner_have_loops_of_their_own_and_holes_run_the_other_way() -> None:
    assert [len(loop) for loop in outlines(np.eye(2, dtype=int))[1]] == [5, 5]
    ring = np.ones((3, 3), dtype=int)
    ring[1, 1] = 0
    assert sorted(signed_area(loop) for loop in outlines(ring)[1]) == [-1.0, 9.0]
    assert outlines(np.zeros((3, 3), dtype=int)) == {}


def test_labels_that_touch_have_each_an_outline() -> None:
    found = outlines(np.array([[7, 7, 300]]))
    assert [sorted(map(tuple, loop[:-1])) for loop in found[7]] == [[(0, 0), (0, 1), (2, 0), (2, 1)]]
    assert [sorted(map(tuple, loop[:-1])) for loop in found[300]] == [[(2, 0), (2, 1), (3, 0), (3, 1)]]


def signed_area(loop: NDArray[np.float64]) -> float:
    x, y = loop.T
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) / 2


@given(arrays(np.uint16, array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.sampled_from([0, 1, 7, 300])))
def test_filling_the_outlines_gives_the_labels_again(values: NDArray[np.uint16]) -> None:
    filled = np.zeros_like(values)
    for value, loops in outlines(values).items():
        inside = np.zeros(values.shape, dtype=bool)
        for loop in loops:
            for (x0, y0), (x1, y1) in itertools.pairwise(loop.astype(int)):
                assert (x0 == x1) != (y0 == y1)
                if x0 == x1:  # what is to the right of an upright edge changes sides
                    inside[min(y0, y1) : max(y0, y1), x0:] ^= True
        assert sum(map(signed_area, loops)) == inside.sum()
        filled[inside] = value
    assert np.array_equal(filled, values)
