"""Who takes part: held out of a run, drawn for a round, late in it. All from (seed, round, id)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from fedalt.config import Config
from fedalt.errors import InputError
from fedalt.methods import Method, exact


def held_out(clients: Sequence[str], config: Config) -> list[str]:
    """The clients kept out of training, ``holdout`` of all, rounded down, in their order."""
    count = math.floor(exact(config.federation.holdout) * len(clients))
    return _drawn(clients, count, config.seed, -1)


def drawn(clients: Sequence[str], number: int, config: Config) -> list[str]:
    """The clients of round ``number`` in their order: ``participation`` of all, at least one.

    Clients that are away cannot be drawn; those at hand fill their places where there are enough.
    """
    away = config.federation.away
    here = [client for client in clients if number not in away.get(client, ())]
    return _drawn(here, min(places(len(clients), config), len(here)), config.seed, number)


def places(clients: int, config: Config) -> int:
    """How many of ``clients`` a round draws."""
    return max(1, round(exact(config.federation.participation) * clients))


def late(clients: Sequence[str], number: int, config: Config) -> list[str]:
    """Those of the drawn ``clients`` whose update misses the round: ``stragglers`` of them."""
    count = math.floor(exact(config.federation.stragglers) * len(clients))
    return _drawn(clients, count, config.seed + 1, number)


def check_cohort(clients: Sequence[str], config: Config, method: Method) -> None:
    """Refuses settings under which no round combines anything, or its updates are too few to trim.

    Args:
        clients: the ids of those that are not held out.
        config, method: of the run.

    Raises:
        InputError: the setting that lets too few updates count.
    """
    if not method.sends:
        return
    settings, known, least = config.federation, len(clients), config.federation.min_clients
    senders = sum(config.lora.client_ranks.get(client) != 0 for client in clients)
    handed = min(places(known, config), senders)
    punctual = handed - math.floor(exact(settings.stragglers) * handed)
    earlier = handed * min(settings.max_age, config.rounds - 1) if method.counts_absent else 0
    if known < least:
        raise InputError(
            f"{config.data.name}: {method.name} wants {least} clients or more, got {known}"
        )
    for most, what, cure in (
        (senders, f"lora.client_ranks: {senders} of {known} clients train adapters", "raise a 0"),
        (handed + earlier, f"federation.participation: a round draws {handed}", "raise it"),
        (punctual + earlier, f"federation.stragglers: {punctual} of {handed} on time", "lower it"),
    ):
        if most < least:
            raise InputError(f"{what}, federation.min_clients is {least}; {cure}")
    averaged = punctual - method.leaves_one_out
    if settings.aggregate == "trimmed" and exact(settings.trim) * averaged < 1:
        cure = "use median or let more clients count"
        if averaged > 2:  # of two, a half would be one, and trim is below that
            cure = f"raise it to {math.ceil(1000 / averaged) / 1000} or more"
        raise InputError(
            f"federation.trim: {settings.trim} of {averaged}, the updates that {method.name} "
            f"averages in a round, is nobody; {cure}"
        )


def derive_seed(seed: int, round_number: int, client_id: str) -> int:
    """A 63-bit seed that belongs to one client's round, whatever ran before it."""
    text = f"{seed}/{round_number}/{client_id}"  # an id may be a folder's name of any bytes
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _drawn(clients: Sequence[str], count: int, seed: int, number: int) -> list[str]:
    ranked = sorted(clients, key=lambda client: derive_seed(seed, number, client))
    chosen = set(ranked[:count])
    return [client for client in clients if client in chosen]
