"""Liver vessels and tumours in CT (Medical Segmentation Decathlon, Task08).

What and where from: 443 patients of Memorial Sloan Kettering Cancer Center with primary or metastatic liver tumours,
303 of them with labels.

How acquired: CT in the portal venous phase, slices of 2.5 to 5 mm, in-plane about 0.8 mm.

Labels: 1 vessel (hepatic and portal veins), 2 tumour. The liver itself has no label.

What is hard: thin branching tubes beside compact masses. A vessel is one to three voxels wide, so its Dice falls with
any shift by a voxel, and how far into the periphery it was traced differs from case to case.

Trap: Dice rewards the thick trunks; the surface measure at 3 mm tells more about the branches.
"""

from __future__ import annotations

from medseg.cli import run_recipe
from medseg.recipe import Recipe

RECIPE = Recipe(
    task="Task08_HepaticVessel",
    configuration="3d_fullres",
    tolerance_mm=3.0,
)

if __name__ == "__main__":
    run_recipe(RECIPE)
