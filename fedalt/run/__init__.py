"""The loop: everything set up, round by round, newcomers, methods side by side."""

from fedalt.run.cohort import drawn, late
from fedalt.run.comparison import compare
from fedalt.run.federation import Federation
from fedalt.run.groups import most_together
from fedalt.run.join import folder_of, join_run, joined_clients
from fedalt.run.ledger import Ledger
from fedalt.run.rounds import size_of
from fedalt.run.scores import score, score_clients, scoring_groups
from fedalt.run.scoring import begin, evaluate_clients, record_of, refuse_changed, write_end
from fedalt.run.stage import Stage, check_base, put_adapters
from fedalt.run.turns import installed, turn

__all__ = [
    "Federation",
    "Ledger",
    "Stage",
    "begin",
    "check_base",
    "compare",
    "drawn",
    "evaluate_clients",
    "folder_of",
    "installed",
    "join_run",
    "joined_clients",
    "late",
    "most_together",
    "put_adapters",
    "record_of",
    "refuse_changed",
    "score",
    "score_clients",
    "scoring_groups",
    "size_of",
    "turn",
    "write_end",
]
