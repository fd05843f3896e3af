"""Recipes: what a script in ``pipelines/`` adds to the facts of a dataset, and sets of plan settings with a name."""

from __future__ import annotations

from medseg.errors import PlanError
from medseg.plan import ConfigurationName
from medseg.records import Record


class Recipe(Record):
    """The choices that suit one task.

    Attributes:
        task: the folder's name, as "Task04_Hippocampus".
        configuration: of the plan.
        tolerance_mm: of NSD.
        regions: unions of labels to score beside the labels.
        overrides: plan settings, as ``plan.batch_size=4``.
    """

    task: str
    configuration: ConfigurationName
    tolerance_mm: float
    regions: dict[str, tuple[int, ...]] = {}
    overrides: tuple[str, ...] = ()


RECIPES: dict[str, tuple[str, ...]] = {
    "classic": (
        # Ronneberger et al. 2015 (U-Net): ReLU, max-pooling
        "plan.act=relu",
        "plan.downsampling=pool",
        # Cicek et al. 2016 (3D U-Net): batch norm before each ReLU; with it, no dropout
        "plan.norm=batch",
        "plan.dropout=0",
        # One output at the highest resolution, as in both; deep supervision came with Zhou et al. 2018 (U-Net++)
        "plan.deep_supervision=false",
        # Kingma and Ba 2015 (Adam): first beta 0.9, no warm-up; rate, decay and batch as reimplementations have them
        "plan.optimiser=adam",
        "plan.learning_rate=1e-4",
        "plan.weight_decay=1e-5",
        "plan.momentum=0.9",
        "plan.warmup=0",
        "plan.batch_size=8",
        # torch's ReduceLROnPlateau: factor 0.1, patience 5
        "plan.schedule=plateau",
        "plan.average=0",
        # Cross-entropy of a sigmoid, and the Dice of Milletari et al. 2016 (V-Net)
        "plan.loss=bce_dice",
        # Ronneberger et al. 2015: turns, elastic deformation, grey values; mirroring where the plan allows it
        "plan.augmentation=classic",
    ),
}
"""Plan settings by the name of their recipe; ``classic`` is the usual configuration of the U-Net's literature."""


def settings_of(recipe: str | None) -> tuple[str, ...]:
    """The plan settings of a recipe, to stand before the user's own, which win; none for None.

    Raises:
        PlanError: no recipe has this name.
    """
    if recipe is None:
        return ()
    if recipe not in RECIPES:
        raise PlanError("recipe", f"there is no {recipe!r}", " or ".join(RECIPES))
    return RECIPES[recipe]
