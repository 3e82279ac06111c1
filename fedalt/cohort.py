"""Who takes part: held out of a run, drawn for a round, late in it. All from (seed, round, id)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from fedalt.config import Config


def held_out(clients: Sequence[str], config: Config) -> list[str]:
    """The clients kept out of training, ``holdout`` of all, rounded down, in their order."""
    return _drawn(clients, math.floor(config.federation.holdout * len(clients)), config.seed, -1)


def drawn(clients: Sequence[str], number: int, config: Config) -> list[str]:
    """The clients of round ``number`` in their order: ``participation`` of all, at least one.

    Clients that are away cannot be drawn; those at hand fill their places where there are enough.
    """
    away = config.federation.away
    here = [client for client in clients if number not in away.get(client, ())]
    return _drawn(here, min(places(len(clients), config), len(here)), config.seed, number)


def places(clients: int, config: Config) -> int:
    """How many of ``clients`` a round draws."""
    return max(1, round(config.federation.participation * clients))


def late(clients: Sequence[str], number: int, config: Config) -> list[str]:
    """Those of the drawn ``clients`` whose update misses the round: ``stragglers`` of them."""
    count = math.floor(config.federation.stragglers * len(clients))
    return _drawn(clients, count, config.seed + 1, number)


def derive_seed(seed: int, round_number: int, client_id: str) -> int:
    """A 63-bit seed that belongs to one client's round, whatever ran before it."""
    digest = hashlib.sha256(f"{seed}/{round_number}/{client_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _drawn(clients: Sequence[str], count: int, seed: int, number: int) -> list[str]:
    ranked = sorted(clients, key=lambda client: derive_seed(seed, number, client))
    chosen = set(ranked[:count])
    return [client for client in clients if client in chosen]
