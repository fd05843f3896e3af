"""Reports: what training and evaluation found, as pictures, tables and text for people.

==================================  ============================================================================
``scores``, ``instances``           tables of text: scores of classes, of single objects
``curves``, ``contact_sheet``       single pictures as PNG: a training, objects of pictures
``view``, ``outlines``              a case turned to the standard layout, its window; borders of labels
``planes``                          pictures of a case in three planes, of many in a mosaic; ``medseg preview``
``plots``                           figures of an evaluation, as SVG
``viewer``                          the slices of a case for the page's viewer, and its scripts
``gather``                          reads what a run, an evaluation or a prediction left in its folder
``pictures``, ``results``           which cases a page shows; its tables and captions of results
``account``, ``methods``, ``words``  what was done; the paragraphs for a paper; numbers in words
``page``                            puts all of it into one HTML file, with ``assets/``
==================================  ============================================================================
"""

from __future__ import annotations

from medseg.report.contact_sheet import Panel, save_contact_sheet
from medseg.report.curves import save_curve
from medseg.report.instances import InstanceResult, save_instances, score_case, worst
from medseg.report.page import write_report
from medseg.report.scores import lesion_table, markdown_summary, score_table

__all__ = [
    "InstanceResult",
    "Panel",
    "lesion_table",
    "markdown_summary",
    "save_contact_sheet",
    "save_curve",
    "save_instances",
    "score_case",
    "score_table",
    "worst",
    "write_report",
]
