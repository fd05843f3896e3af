"""The pancreas and its masses in CT (Medical Segmentation Decathlon, Task07).

What and where from: 420 patients of Memorial Sloan Kettering Cancer Center before the removal of a mass of the
pancreas (cysts, neuroendocrine tumours, ductal adenocarcinomas), 281 of them with labels.

How acquired: CT in the portal venous phase, slices of 2.5 mm, in-plane about 0.8 mm.

Labels: 1 pancreas, 2 mass (cyst or tumour). The organ with its mass is {1, 2}.

What is hard: large background, small organ, smaller mass. The pancreas changes its shape from patient to patient,
touches the bowel along its length, and a mass may differ from it by hardly any contrast.

Trap: one label stands for cysts, which are dark, and solid tumours, which are not.
"""

from __future__ import annotations

from medseg.cli import run_recipe
from medseg.recipe import Recipe

RECIPE = Recipe(
    task="Task07_Pancreas",
    configuration="3d_fullres",
    tolerance_mm=5.0,
    regions={"pancreas with masses": (1, 2)},
)

if __name__ == "__main__":
    run_recipe(RECIPE)
