"""Lung tumours in CT (Medical Segmentation Decathlon, Task06).

What and where from: 95 patients with non-small-cell lung cancer from a radiogenomics collection of The Cancer Imaging
Archive, 63 of them with labels.

How acquired: CT before treatment with slices thinner than 1.5 mm, chest as a whole, 512 x 512 voxels and a few
hundred slices.

Labels: 1 tumour, outlined by a thoracic radiologist.

What is hard: the tumour fills less than one voxel in a thousand. It may hang in the lung, where it is easy, or lie on
the chest wall or the mediastinum, where nothing but texture tells them apart. Vessels and nodules look alike in small
patches.

Trap: without extra patches around the tumour, training sees almost only background.
"""

from __future__ import annotations

from medseg.cli import run_recipe
from medseg.recipe import Recipe

RECIPE = Recipe(
    task="Task06_Lung",
    configuration="3d_fullres",
    tolerance_mm=2.0,
)

if __name__ == "__main__":
    run_recipe(RECIPE)
