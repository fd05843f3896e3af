"""Gliomas in four MR contrasts (Medical Segmentation Decathlon, Task01).

What and where from: 750 patients with low-grade glioma or glioblastoma, 484 of them with labels. The cases are those
of the BraTS challenges of 2016 and 2017, scanned at 19 institutions on whatever machine stood there.

How acquired: FLAIR, T1, T1 with gadolinium and T2, in this order in the file's fourth dimension. The organisers
brought the four to one grid of 240 x 240 x 155 voxels at 1 mm and removed the skull, so most voxels are exactly 0:
intensities are standardised over the brain alone.

Labels: 1 edema, 2 non-enhancing tumour (with necrosis), 3 enhancing tumour.

What is hard: edema fades into healthy tissue, and the core falls into small parts of different kind. Low-grade
tumours may have nothing that enhances, so that the third class is missing from whole cases.

Trap: these numbers are not BraTS's own. There, 1 is the necrotic core, 2 the edema and 4 (later 3) the enhancing
part; code written for BraTS gives wrong regions here. Tumour core is {2, 3}, whole tumour {1, 2, 3}.
"""

from __future__ import annotations

from medseg.cli import run_recipe
from medseg.recipe import Recipe

RECIPE = Recipe(
    task="Task01_BrainTumour",
    configuration="3d_fullres",
    tolerance_mm=5.0,
    regions={"whole tumour": (1, 2, 3), "tumour core": (2, 3)},
)

if __name__ == "__main__":
    run_recipe(RECIPE)
