"""Primary colon cancer in CT (Medical Segmentation Decathlon, Task10).

What and where from: 190 patients of Memorial Sloan Kettering Cancer Center before the removal of a primary tumour of
the colon, 126 of them with labels.

How acquired: CT in the portal venous phase, slices of 1 to 7.5 mm, in-plane about 0.8 mm, abdomen and pelvis.

Labels: 1 tumour.

What is hard: the hardest of the ten. A tumour is a thickening of a wall that folds, moves and is filled with
anything; most of the bowel looks suspicious. Readers disagree, and networks find a normal stretch somewhere else or
nothing at all.

Trap: cases without any found tumour are frequent. They count as 0, and are not to be dropped from the mean.
"""

from __future__ import annotations

from medseg.cli import run_recipe
from medseg.recipe import Recipe

RECIPE = Recipe(
    task="Task10_Colon",
    configuration="3d_fullres",
    tolerance_mm=4.0,
)

if __name__ == "__main__":
    run_recipe(RECIPE)
