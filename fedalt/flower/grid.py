"""The server's link to its sites over Flower's grid."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid
from torch import Tensor

from fedalt.flower.parcel import HELLO, LAST, ROUND, Parcel
from fedalt.flower.secagg import masked_sum
from fedalt.flower.wire import from_records, to_records

TYPES = {HELLO: MessageType.QUERY, ROUND: MessageType.TRAIN, LAST: MessageType.EVALUATE}
POLL_S = 1.0


class GridLink:
    """Messages by ``push_messages`` and ``pull_messages``, so that an answer may come late."""

    def __init__(self, grid: Grid, context: Context) -> None:
        self._grid, self._context = grid, context

    def nodes(self) -> list[int]:
        return sorted(self._grid.get_node_ids())

    def send(self, node: int, kind: str, parcel: Parcel) -> str:
        group = str(parcel.values.get("round", HELLO))
        message = Message(to_records(parcel), node, TYPES[kind], group_id=group)
        (ticket,) = self._grid.push_messages([message])
        return ticket

    def replies(self, tickets: Collection[str]) -> Mapping[str, Parcel | str]:
        found: dict[str, Parcel | str] = {}
        for reply in self._grid.pull_messages(tickets) if tickets else ():
            # Of a lost node the error comes from SuperLink, so the sender's id is not to be read.
            ticket = reply.metadata.reply_to_message_id
            if reply.has_error():
                words = (reply.error.reason or f"Flower's error {reply.error.code}").strip()
                found[ticket] = words.splitlines()[-1]
            else:
                found[ticket] = from_records(reply.content)
        return found

    def wait(self) -> None:
        time.sleep(POLL_S)

    def secure_sum(
        self, parcels: Mapping[int, Parcel], form: Mapping[str, Sequence[Any]], timeout: float
    ) -> tuple[Mapping[str, Tensor], Mapping[int, Parcel]]:
        return masked_sum(self._grid, self._context, parcels, form, timeout)
