"""Recipe: what a script in ``pipelines/`` adds to the facts in a dataset's ``dataset.json``."""

from __future__ import annotations

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
