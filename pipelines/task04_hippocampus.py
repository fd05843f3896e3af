"""The two parts of the hippocampus in MR (Medical Segmentation Decathlon, Task04).

What and where from: 195 adults of Vanderbilt University Medical Center, 90 of them healthy and 105 with a psychotic
disorder; left and right hippocampus each make a case, 260 with labels and 130 without.

How acquired: T1-weighted MPRAGE at 3 T, 1 mm in all directions, cut to a block of about 36 x 50 x 35 voxels around
the structure. The task is small enough to train on a laptop.

Labels: 1 anterior (head), 2 posterior (body and tail).

What is hard: the border between the two parts is a convention and hardly visible; one voxel is a large part of the
structure, which is why its tolerance is 1 mm.

Trap: the largest intensity of an image runs from about a hundred to more than a million, so each image must be scaled
by itself. Some labels are stored as floating-point numbers.
"""

from __future__ import annotations

from medseg.cli import run_recipe
from medseg.recipe import Recipe

RECIPE = Recipe(
    task="Task04_Hippocampus",
    configuration="3d_fullres",
    tolerance_mm=1.0,
    regions={"hippocampus": (1, 2)},
)

if __name__ == "__main__":
    run_recipe(RECIPE)
