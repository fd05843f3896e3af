"""Reports: what training and evaluation found, as pictures, tables and text for people."""

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
