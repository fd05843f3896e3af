"""Reports: what training and evaluation found, as pictures, tables and text for people."""

from __future__ import annotations

from medseg.report.curves import save_curve
from medseg.report.scores import markdown_summary, score_table

__all__ = ["markdown_summary", "save_curve", "score_table"]
