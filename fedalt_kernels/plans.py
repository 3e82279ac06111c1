"""Plans: what is worked out once for every kind of call, and looked up by every call.

A kind of call is all that shapes what is done: sizes, strides, dtypes, device, settings, and which
gradients are wanted.  Values, addresses and the tensors themselves are not in a plan.
"""

from collections.abc import Callable, Hashable
from typing import TypeVar

Plan = TypeVar("Plan")

MOST = 1024  # kept by one table; lengths of prompts alone make hundreds
_tables: list["Plans"] = []


class Plans(dict[Hashable, Plan]):
    """Plans by kind of call; when it is full it begins anew."""

    def __init__(self) -> None:
        super().__init__()
        _tables.append(self)

    def made(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """Makes and keeps the plan of a kind of call that has none."""
        plan = make()
        if len(self) >= MOST:
            self.clear()
        self[key] = plan
        return plan


def forget() -> None:
    """Drops every plan, for whoever changes what plans are made by, such as tables of tiles."""
    for table in _tables:
        table.clear()
