"""Reports: what training and evaluation found, as pictures, tables and text for people."""

from __future__ import annotations

from medseg.report.contact_sheet import Panel, save_contact_sheet
from medseg.report.curves import save_curve
from medseg.report.scores import markdown_summary, score_table

__all__ = ["Panel", "markdown_summary", "save_contact_sheet", "save_curve", "score_table"]
