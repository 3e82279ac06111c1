"""Which node is which client: greeted, found fit, and bound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

BOUND = ("node", "examples", "base", "frame", "quantization", "sends")
"""What is kept of a client from its hello."""


class Roll:
    """The clients by id, bound to their nodes.

    Attributes:
        clients: by id, what its hello said; ``node`` among it.
        form: of what a client hands in, by name dtype and shape; the same for all.
    """

    def __init__(self, kept: Mapping[str, Any], registered: bool) -> None:
        """
        Args:
            kept: what ``record`` gave before; empty: nobody is known yet.
            registered: nodes have keys and keep their ids, so that a client never changes its own.
        """
        self.clients: dict[str, dict[str, Any]] = {
            client: dict(said) for client, said in kept.get("clients", {}).items()
        }
        self.form: dict[str, list[Any]] = dict(kept.get("form", {}))
        self._registered = registered
        self._greeted: set[int] = set()

    def record(self) -> dict[str, Any]:
        return {"clients": self.clients, "form": self.form}

    def strangers(self, nodes: list[int]) -> list[int]:
        """The nodes that have not been greeted."""
        return [node for node in nodes if node not in self._greeted]

    def greet(self, node: int) -> None:
        self._greeted.add(node)

    def forget(self, node: int) -> None:
        """Greet a node again: its hello was lost."""
        self._greeted.discard(node)

    def here(self, nodes: list[int]) -> dict[str, int]:
        """By client, its node, of those that are there and were greeted."""
        there = set(nodes) & self._greeted
        return {
            c: said["node"] for c, said in sorted(self.clients.items()) if said["node"] in there
        }

    def settle(self, hellos: Mapping[int, Mapping[str, Any]], nodes: list[int]) -> dict[int, str]:
        """Take in the first hellos together: what most of them say is what the federation is.

        Returns:
            By node, why it was turned away.
        """
        if not self.clients and hellos:
            frames = Counter(said["frame"] for _, said in sorted(hellos.items()))
            most = frames.most_common(1)[0][0]
            order = sorted(hellos, key=lambda node: (hellos[node]["frame"] != most, node))
        else:
            order = sorted(hellos)
        away = {}
        for node in order:
            if reason := self.admit(node, hellos[node], nodes):
                away[node] = reason
        return away

    def admit(self, node: int, said: Mapping[str, Any], nodes: list[int]) -> str | None:
        """Take a client in, or say why not."""
        client = str(said["client"])
        if reason := self._unlike(client, said):
            return reason
        before = self.clients.get(client)
        if before and before["node"] != node:
            if self._registered:
                return f"client {client!r} is bound to node {before['node']}, this is {node}"
            if before["node"] in nodes and before["node"] in self._greeted:
                return f"client {client!r} is node {before['node']}, which is there"
        if before and before["examples"] != said["examples"]:
            return f"client {client!r} had {before['examples']} records, now {said['examples']}"
        if said["form"] and not self.form:
            self.form = dict(said["form"])
        known = {**said, "node": node, "sends": bool(said["form"])}
        self.clients[client] = {key: known[key] for key in BOUND}
        return None

    def is_free(self, client: str, nodes: list[int]) -> bool:
        """Whether a client's own node is gone, so that another one may be it."""
        return not self._registered and self.clients[client]["node"] not in nodes

    def _unlike(self, client: str, said: Mapping[str, Any]) -> str | None:
        """Why its base is not the federation's, or what it hands in not what the others do."""
        for other, known in sorted(self.clients.items()):
            same = known["quantization"] == said["quantization"]
            if known["frame"] != said["frame"] or (same and known["base"] != said["base"]):
                return f"client {client!r} is on another base than {other!r}; give it the same one"
        if said["form"] and self.form and said["form"] != self.form:
            names = said["form"].keys() | self.form.keys()
            name = min(n for n in names if said["form"].get(n) != self.form.get(n))
            return f"client {client!r} hands in another {name} than the others"
        return None
