"""What a run tells: tables, one page, TensorBoard events."""

from fedalt.report.page import FEW, Line, document, figures, line_chart, section, sheet_html
from fedalt.report.report import read_results, read_times, write_report
from fedalt.report.tables import (
    LOCAL,
    Results,
    Sheet,
    compare_sheet,
    csv_text,
    deviation,
    digits_of,
    label,
    mean_of,
    measures,
    number,
    sheet_text,
    table,
    unseen_table,
    wins,
)
from fedalt.report.tensorboard import write_tensorboard

__all__ = [
    "FEW",
    "LOCAL",
    "Line",
    "Results",
    "Sheet",
    "compare_sheet",
    "csv_text",
    "deviation",
    "digits_of",
    "document",
    "figures",
    "label",
    "line_chart",
    "mean_of",
    "measures",
    "number",
    "read_results",
    "read_times",
    "section",
    "sheet_html",
    "sheet_text",
    "table",
    "unseen_table",
    "wins",
    "write_report",
    "write_tensorboard",
]
