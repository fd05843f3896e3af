"""The liver and its tumours in CT (Medical Segmentation Decathlon, Task03).

What and where from: 201 patients, 131 of them with labels: the data of the LiTS challenge, from seven clinical sites,
with primary cancers and metastases.

How acquired: CT with contrast agent, from the upper abdomen to the whole trunk, in-plane 0.5 to 1 mm, between slices
0.45 to 6 mm. Volumes of up to a thousand slices make it the largest task of the ten.

Labels: 1 liver, 2 tumour. The tumour lies inside the liver and is not counted as liver: the organ is {1, 2}.

What is hard: a big organ with tumours of a few voxels in it, before and after treatment, brighter or darker than
their surroundings; and many protocols. A model has to see a wide field to know the liver, and fine detail to find a
lesion.

Trap: the patients of the 3D-IRCADb collection and of LiTS are among these. A model that was trained on either has
seen them, and its score here means nothing.
"""

from __future__ import annotations

from medseg.cli import run_recipe
from medseg.recipe import Recipe

RECIPE = Recipe(
    task="Task03_Liver",
    configuration="3d_fullres",
    tolerance_mm=7.0,
    regions={"liver with tumours": (1, 2)},
)

if __name__ == "__main__":
    run_recipe(RECIPE)
