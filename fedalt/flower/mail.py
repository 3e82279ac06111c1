"""The server's post: hellos, messages that are posted again where they fail, late answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedalt.flower.parcel import HELLO, Link, Parcel
from fedalt.flower.roll import Roll
from fedalt.store import Journal

ATTEMPTS = 5
"""Times that a message is posted in a round where its client's process fails."""


class Mail:
    """Messages out and answers in, over a link on which nodes come and go.

    Attributes:
        roll: who is who; ``classes``: of images, all labels, known after the greeting.
    """

    def __init__(
        self,
        link: Link,
        roll: Roll,
        journal: Journal,
        base: Mapping[str, Any],
        classes: list[str],
        wants_labels: bool,
    ) -> None:
        self.roll, self.classes = roll, classes
        self._link, self._journal, self._base = link, journal, dict(base)
        self._wants_labels = wants_labels and not classes
        self._hellos: dict[str, int] = {}
        self._owed: dict[str, tuple[str, int]] = {}
        self._rivals: dict[int, Mapping[str, Any]] = {}
        self._overdue: dict[str, tuple[int, Parcel]] = {}
        self._round = 0

    def addressed(
        self, values: Mapping[str, Any], states: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> Parcel:
        """A message with what every message says: version, settings, labels."""
        return Parcel({**self._base, "classes": self.classes, **values}, states or {})

    def here(self) -> dict[str, int]:
        """By client, its node, of those that can be reached."""
        return self.roll.here(self._link.nodes())

    def form_for(self, client: str) -> Mapping[str, list[Any]]:
        """Of what a client hands in: by name, dtype and shape."""
        return self.roll.form if self.roll.clients[client]["sends"] else {}

    def greet(self, sites: int, wait: float, number: int) -> None:
        """Wait for the first sites and take them in together."""
        self._round = number
        until = time.monotonic() + wait
        labels: dict[int, list[str]] = {}
        if self._wants_labels:
            labels = {
                node: said["labels"] for node, said in self._first(sites, until, "labels").items()
            }
            self.classes = sorted({label for own in labels.values() for label in own})
            for node in labels:
                self.roll.forget(node)
        hellos = self._first(sites, until, "client")
        for node, reason in self.roll.settle(hellos, self._link.nodes()).items():
            self._turn_away(node, reason, hellos[node])

    def _first(self, sites: int, until: float, key: str) -> dict[int, Mapping[str, Any]]:
        """Hellos that say ``key``, until there are enough of them or time is out."""
        found: dict[int, Mapping[str, Any]] = {}
        while len(found) < sites and time.monotonic() < until:
            found |= {node: said for node, said in self._heard().items() if key in said}
            if len(found) < sites:
                self._link.wait()
        return found

    def _heard(self) -> dict[int, Mapping[str, Any]]:
        """Greet who is new; by node, the hellos that have come."""
        nodes = self._link.nodes()
        for node in self.roll.strangers(nodes):
            self.roll.greet(node)
            self._hellos[self._link.send(node, HELLO, self.addressed({}))] = node
        found = {}
        for ticket, answer in self._link.replies(list(self._hellos)).items():
            node = self._hellos.pop(ticket)
            if isinstance(answer, str):
                self.roll.forget(node)
            elif "refused" in answer.values:
                self._turn_away(node, answer.values["refused"])
            else:
                found[node] = answer.values
        return found

    def _admit(self, hellos: Mapping[int, Mapping[str, Any]]) -> None:
        """Take in who came; and who claimed a client whose node has gone since."""
        nodes = self._link.nodes()
        for node, said in list(self._rivals.items()):
            if node not in nodes:
                del self._rivals[node]
            elif self.roll.is_free(said["client"], nodes):
                self.roll.admit(node, self._rivals.pop(node), nodes)
        for node, said in hellos.items():
            if reason := self.roll.admit(node, said, nodes):
                self._turn_away(node, reason, said)

    def _turn_away(self, node: int, reason: str, said: Mapping[str, Any] | None = None) -> None:
        if said and said["client"] in self.roll.clients:
            self._rivals[node] = said
        self._journal.write("refuse", self._round, "", reason=f"node {node}: {reason}")
        print(f"turned away, node {node}: {reason}", file=sys.stderr, flush=True)

    def gather(
        self, orders: Mapping[str, Parcel], kind: str, number: int, timeout: float
    ) -> dict[str, Parcel]:
        """By client, the answers that come within ``timeout`` seconds.

        A message whose process or node fails is posted again, once its node is there: the client
        answers from its disk if it has worked on it before. A client that still owes the answer to
        an earlier message gets this one afterwards.
        """
        self._round = number
        until, answers = time.monotonic() + timeout, dict[str, Parcel]()
        posted: dict[str, tuple[str, int]] = {}
        attempts = dict.fromkeys(orders, 0)
        while len(answers) < len(orders) and time.monotonic() < until:
            self._admit(self._heard())
            here = self.here()
            for ticket, (client, node) in list(posted.items()):
                if here.get(client, node) != node:  # its node was started again, as another one
                    del posted[ticket]
            busy = {client for client, _ in (*self._owed.values(), *posted.values())}
            for client, node in here.items():
                wanted = client in orders and client not in answers and client not in busy
                if wanted and attempts[client] < ATTEMPTS:
                    attempts[client] += 1
                    posted[self._link.send(node, kind, orders[client])] = (client, node)
            self._look_for_owed()
            for ticket, answer in self._link.replies(list(posted)).items():
                client, _ = posted.pop(ticket)
                if not isinstance(answer, str):
                    answers[client] = answer
                    continue
                print(f"{client}: {answer}; posted again", file=sys.stderr, flush=True)
                if attempts[client] == ATTEMPTS:
                    answers[client] = Parcel({"refused": answer})
            if len(answers) < len(orders):
                self._link.wait()
        self._owed |= {ticket: (client, number) for ticket, (client, _) in posted.items()}
        return answers

    def _look_for_owed(self) -> None:
        for ticket, answer in self._link.replies(list(self._owed)).items():
            client, number = self._owed.pop(ticket)
            if not isinstance(answer, str):
                self._overdue[client] = (number, answer)

    def overdue(self) -> dict[str, tuple[int, Parcel]]:
        """By client, the round and the answer of a message of before that has come by now."""
        self._look_for_owed()
        found, self._overdue = self._overdue, {}
        return found
