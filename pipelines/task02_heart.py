"""The left atrium in MR (Medical Segmentation Decathlon, Task02).

What and where from: 30 patients of King's College London, 20 of them with labels, known from a challenge on the left
atrium in 2013.

How acquired: one free-breathing scan of the whole heart each, gated by ECG and navigator, of about 320 x 320 x 110
voxels at 1.25 x 1.25 x 1.37 mm.

Labels: 1 left atrium, with the first stretch of the pulmonary veins.

What is hard: few cases, and no two atria alike: the number of veins and their branching differ. Where the atrium ends
and a vein begins, and where the mitral valve lies, is an agreement rather than an edge.

Trap: with so few cases a score on four held-out ones says little; look at all five folds.
"""

from __future__ import annotations

from medseg.cli import run_recipe
from medseg.recipe import Recipe

RECIPE = Recipe(
    task="Task02_Heart",
    configuration="3d_fullres",
    tolerance_mm=4.0,
)

if __name__ == "__main__":
    run_recipe(RECIPE)
