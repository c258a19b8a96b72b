"""What was packed, what was left alone and why: records, totals, tables, differences."""

from fxint4.report.diff import changes, compare
from fxint4.report.graph_text import stdout_has_colour
from fxint4.report.html_diff import save_diff_page
from fxint4.report.parameters import Parameter, Place
from fxint4.report.records import GraphReport, Record
from fxint4.report.report import SCHEMA, Report

__all__ = [
    "SCHEMA",
    "GraphReport",
    "Parameter",
    "Place",
    "Record",
    "Report",
    "changes",
    "compare",
    "save_diff_page",
    "stdout_has_colour",
]
