"""The spleen in CT (Medical Segmentation Decathlon, Task09).

What and where from: 61 patients of Memorial Sloan Kettering Cancer Center treated by chemotherapy for liver
metastases, 41 of them with labels.

How acquired: CT in the portal venous phase, slices of 2.5 to 5 mm (some thinner), in-plane about 0.8 mm, from a few
dozen slices to the whole trunk.

Labels: 1 spleen.

What is hard: less than in the other tasks: the organ is large, compact and well contrasted. What varies is the field
of view, the slice distance, and the size of the organ, which treatment changes.

Trap: because of that spread in slice distance, the target spacing decides much; nnU-Net's rule gives 1.6 mm.
"""

from __future__ import annotations

from medseg.cli import run_recipe
from medseg.recipe import Recipe

RECIPE = Recipe(
    task="Task09_Spleen",
    configuration="3d_fullres",
    tolerance_mm=3.0,
)

if __name__ == "__main__":
    run_recipe(RECIPE)
