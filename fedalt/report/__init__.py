"""What a run tells: tables, one page, TensorBoard events."""

from fedalt.report.client_sheets import unseen_table
from fedalt.report.comparison import compare_page
from fedalt.report.events import read_events, read_times
from fedalt.report.method_sheets import compare_csv, compare_table
from fedalt.report.report import write_report
from fedalt.report.summary import read_results
from fedalt.report.tables import Results, console_text, count, digits_of, number, table
from fedalt.report.tensorboard import scalars_of, write_tensorboard
from fedalt.report.words import method_verdict, wrapped

__all__ = [
    "Results",
    "compare_csv",
    "compare_page",
    "compare_table",
    "console_text",
    "count",
    "digits_of",
    "method_verdict",
    "number",
    "read_events",
    "read_results",
    "read_times",
    "scalars_of",
    "table",
    "unseen_table",
    "wrapped",
    "write_report",
    "write_tensorboard",
]
