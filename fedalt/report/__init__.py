"""What a run tells: tables, one page, TensorBoard events, trackers."""

from fedalt.report.client_sheets import unseen_table
from fedalt.report.comparison import compare_page
from fedalt.report.events import read_events, read_times
from fedalt.report.method_sheets import compare_csv, compare_table
from fedalt.report.points import points_of
from fedalt.report.report import write_report
from fedalt.report.summary import read_results
from fedalt.report.tables import Results, console_text, count, digits_of, number, table
from fedalt.report.tensorboard import write_tensorboard
from fedalt.report.trackers import TRACKERS, Account, Tracker
from fedalt.report.words import method_verdict, wrapped

__all__ = [
    "TRACKERS",
    "Account",
    "Results",
    "Tracker",
    "compare_csv",
    "compare_page",
    "compare_table",
    "console_text",
    "count",
    "digits_of",
    "method_verdict",
    "number",
    "points_of",
    "read_events",
    "read_results",
    "read_times",
    "table",
    "unseen_table",
    "wrapped",
    "write_report",
    "write_tensorboard",
]
