"""Sites without Flower: a link that lets them answer in this process, and fail when told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from fedalt.config import Config, site_part
from fedalt.flower.parcel import ROUND, Parcel
from fedalt.flower.server import Server
from fedalt.flower.site import Site
from fedalt.model.states import State
from fedalt.report.events import read_events
from fedalt.store.checkpoint import load_checkpoint, load_latest

Answer = Parcel | str


def own_settings(config: Config, client: str, root: Path) -> dict[str, Any]:
    """A site's settings: the run's own, its client's folder alone, and a folder of its own."""
    path = str(Path(config.data.path) / client)
    return site_part(config) | {"data.path": path, "out": str(root / client)}


@dataclass
class Loopback:
    """A link to sites in this process, by node.

    ``fault`` may take the place of an answer: it is called with node, kind, message and a function
    that lets the site answer, and gives the answer, an error's text, or None for no answer yet.
    """

    sites: dict[int, Site]
    fault: Callable[[int, str, Parcel, Callable[[], Parcel]], Answer | None] | None = None
    gone: set[int] = field(default_factory=set)
    sent: list[tuple[int, str, Parcel]] = field(default_factory=list)
    box: dict[str, Answer] = field(default_factory=dict)
    waits: int = 0
    leaving: dict[int, int] = field(default_factory=dict)

    def nodes(self) -> list[int]:
        return [node for node in self.sites if node not in self.gone]

    def send(self, node: int, kind: str, parcel: Parcel) -> str:
        self.sent.append((node, kind, parcel))
        ticket = str(len(self.sent))
        answer: Answer | None

        def honest() -> Parcel:
            return self.sites[node].answer(kind, parcel)

        answer = self.fault(node, kind, parcel, honest) if self.fault else honest()
        if answer is not None:
            self.box[ticket] = answer
        return ticket

    def replies(self, tickets):
        return {ticket: self.box.pop(ticket) for ticket in tickets if ticket in self.box}

    def clock(self) -> float:
        """Seconds, of which only waiting takes some: no test depends on the machine's speed."""
        return 0.05 * self.waits

    def wait(self) -> None:
        self.waits += 1
        self.gone |= {node for node, last in self.leaving.items() if self.waits > last}

    def secure_sum(self, parcels, form, timeout):
        """What SecAgg+ comes to where nobody drops out: the sum of what is on its grid."""
        told = {node: self.sites[node].answer(ROUND, parcel) for node, parcel in parcels.items()}
        sums: State = {}
        for node in sorted(told):
            for name, t in told[node].states.get("update", {}).items():
                sums[name] = sums.get(name, torch.zeros_like(t)) + t
        return sums, {node: Parcel(answer.values) for node, answer in told.items()}


def federation(
    config: Config, root: Path, clients=("ann", "bob", "cyd"), **settings: Any
) -> Loopback:
    """Sites for the clients of a run, as nodes 1, 2, ..."""
    sites = {
        number: Site(own_settings(config, client, root) | settings)
        for number, client in enumerate(clients, start=1)
    }
    return Loopback(sites)


def serve(link: Loopback, config: Config, root: Path, wait: float = 5.0, **more: Any) -> None:
    server = Server(link, replace(config, out=str(root / "server")), len(link.sites), wait, **more)
    with patch("fedalt.flower.mail.time", SimpleNamespace(monotonic=link.clock)):
        server.run()


def last_states(root: Path, clients=("ann", "bob", "cyd")) -> dict[str, State]:
    found = {}
    for client in clients:
        saved = load_latest(root / client)
        assert saved is not None
        found[client] = saved.used(client).read()
    return found


def states_of_run(out: Path, number: int, clients=("ann", "bob", "cyd")) -> dict[str, State]:
    saved = load_checkpoint(out / "checkpoints" / f"round-{number:04d}")
    return {client: saved.used(client).read() for client in clients}


def alike(one: dict[str, State], other: dict[str, State]) -> bool:
    return one.keys() == other.keys() and all(
        one[client].keys() == other[client].keys()
        and all(torch.equal(one[client][name], other[client][name]) for name in one[client])
        for client in one
    )


def small(config: Config, **changes: Any) -> Config:
    """Three rounds with adapters in few layers, and few answers."""
    lora = replace(config.lora, target_modules=("q_proj",))
    train = replace(config.train, max_steps=2)
    evaluate = replace(config.evaluate, answers=1, max_new_tokens=2)
    given = {"lora": lora, "rounds": 3, "train": train, "evaluate": evaluate}
    return replace(config, **given | changes)


def events(root, kind, who="server"):
    return [e for e in read_events(root / who / "metrics.jsonl") if e["event"] == kind]
