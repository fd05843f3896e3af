"""The zones of the prostate in MR (Medical Segmentation Decathlon, Task05).

What and where from: 48 patients of Radboud university medical center in Nijmegen, 32 of them with labels.

How acquired: a transverse T2 scan (0.6 x 0.6 x 4 mm) and the map of the apparent diffusion coefficient (2 x 2 x 4
mm), resampled to one grid; in this order in the file's fourth dimension. About 320 x 320 x 20 voxels.

Labels: 1 peripheral zone (PZ), 2 transition zone (TZ). The gland is {1, 2}.

What is hard: few cases, twenty thick slices in each, and two zones that touch, whose sizes change with age and
disease. The spacing along the head is six times that in the plane: kernels and strides must not treat the axes alike.

Trap: the second channel was moved to the grid of the first, and carries no detail finer than 2 mm.
"""

from __future__ import annotations

from medseg.cli import run_recipe
from medseg.recipe import Recipe

RECIPE = Recipe(
    task="Task05_Prostate",
    configuration="3d_fullres",
    tolerance_mm=4.0,
    regions={"prostate": (1, 2)},
)

if __name__ == "__main__":
    run_recipe(RECIPE)
