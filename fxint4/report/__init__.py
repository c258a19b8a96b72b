"""What was packed, what was left alone and why: records, totals, tables, differences."""

from fxint4.report.comparison import changes
from fxint4.report.core import SCHEMA, Report
from fxint4.report.graphs import graph_text, stdout_has_colour
from fxint4.report.records import GraphReport, Record

__all__ = [
    "SCHEMA",
    "GraphReport",
    "Record",
    "Report",
    "changes",
    "graph_text",
    "stdout_has_colour",
]
