"""The loop: everything set up, round by round, newcomers, methods side by side."""

from fedalt.run.comparison import compare
from fedalt.run.federation import Federation
from fedalt.run.join import join_run, joined_clients, score
from fedalt.run.stage import Stage, check_base, put_adapters

__all__ = [
    "Federation",
    "Stage",
    "check_base",
    "compare",
    "join_run",
    "joined_clients",
    "put_adapters",
    "score",
]
