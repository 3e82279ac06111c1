"""The server: it greets the sites, broadcasts one sum a round, and keeps sums, counts and updates.

It has no model and no data. Its folder is a run directory: the same command goes on from its newest
checkpoint, and every site from its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedalt.config import Config, federation_part
from fedalt.errors import InputError, RunFailed
from fedalt.flower.mail import Mail
from fedalt.flower.parcel import LAST, Link
from fedalt.flower.played import LEAST_SECURE, Played
from fedalt.flower.roll import Roll
from fedalt.methods import Method, get_method
from fedalt.run import write_end
from fedalt.store import (
    CONFIG,
    Checkpoint,
    Draft,
    Journal,
    claim_run_dir,
    load_latest,
    refuse_changes,
    settings_of,
    sole_writer,
    write_atomic,
    writing,
)
from fedalt_kernels import __version__


def check_sites(config: Config) -> Method:
    """Refuses, with ``InputError``, what a federation of sites cannot be."""
    method, federation = get_method(config.method), config.federation
    if not method.sum_is_enough:
        raise InputError(
            f"method: {method.name} wants more of a server than one sum, so it is not for sites; "
            "fedalt, its relay, fedit and others are (docs/sites.md)"
        )
    if federation.aggregate != "mean":
        raise InputError(
            f"federation.aggregate: {federation.aggregate} wants every update side by side, and "
            "sites get one sum; use mean"
        )
    if federation.holdout:
        raise InputError("federation.holdout: sites come by themselves; leave it out")
    if config.partition.by:
        raise InputError("partition.by: every site brings its own data; leave it out")
    if federation.secure and method.by_examples and method.leaves_one_out:
        raise InputError(f"federation.secure: {method.name} weights its own part; use fedalt")
    if federation.secure and federation.min_clients < LEAST_SECURE:
        raise InputError(
            f"federation.min_clients is {federation.min_clients}, and of fewer than {LEAST_SECURE} "
            "a sum hides nobody; raise it"
        )
    return method


class Server:
    """A federation of sites, from the first hello to the last round."""

    def __init__(
        self, link: Link, config: Config, sites: int, wait: float, registered: bool = False
    ) -> None:
        """
        Args:
            config: of the run; what a site keeps to itself is not read.
            sites: how many to wait for before the first round, ``wait`` seconds at most.
            registered: nodes have registered keys, so a client stays with its node for ever.

        Raises:
            InputError: a method or setting that is not for sites. Nothing has been written.
        """
        self._method = check_sites(config)
        self._link, self._config = link, config
        self._sites, self._wait, self._registered = sites, wait, registered

    def run(self) -> None:
        """Play what is left of the rounds.

        Raises:
            InputError: the folder is another run's, or damaged.
            RunFailed: too few sites came, or none of a round's could train.
        """
        config = self._config
        out = claim_run_dir(config, resume=True)
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        with sole_writer(out):
            saved = load_latest(out)
            if saved:
                refuse_changes(saved.record["settings"], settings_of(config), saved.path)
            write_atomic(out / CONFIG, config.to_yaml())
            kept = saved.record["metrics_bytes"] if saved else 0
            with Journal(out, kept) as journal:
                self._play(out, saved, journal)

    def _play(self, out: Path, saved: Checkpoint | None, journal: Journal) -> None:
        config = self._config
        first = saved.round + 1 if saved else 1
        roll = Roll(saved.record["roll"] if saved else {}, self._registered)
        classes = saved.record["classes"] if saved else []
        base = {"version": __version__, "federation": federation_part(config)}
        mail = Mail(self._link, roll, journal, base, classes, config.data.kind == "image")
        journal.start(first, 0.0, "server")
        for line in _opening(self._method, config, out, first):
            print(line, file=sys.stderr, flush=True)
        mail.greet(self._sites, self._wait, first)
        if len(roll.clients) < config.federation.min_clients:
            raise RunFailed(
                f"{len(roll.clients)} sites came in {self._wait:g} s, federation.min_clients is "
                f"{config.federation.min_clients}; start more and give the same command again"
            )
        for number in range(first, config.rounds + 1):
            draft = Draft(out, number)
            played = Played(self._link, mail, config, number, saved, draft, journal)
            record = played.run()
            journal.sync()
            record |= {
                "roll": roll.record(),
                "classes": mail.classes,
                "settings": settings_of(config),
                "metrics_bytes": journal.size,
            }
            saved = draft.commit(record, keep=config.save_total_limit)
            if played.spent == len(roll.clients):
                print("no site may train further: privacy.epsilon", file=sys.stderr, flush=True)
                break
            print(
                f"round {number}/{config.rounds}: {played.summary()}", file=sys.stderr, flush=True
            )
        assert saved is not None
        played = Played(self._link, mail, config, saved.round, saved, None, journal)
        told = mail.gather(
            {client: played.order(client, LAST) for client in roll.clients},
            LAST,
            saved.round,
            config.federation.round_timeout,
        )
        for client, answer in sorted(told.items()):
            played.note_scores(client, answer)
        journal.sync()
        if any(answer.values.get("scores") for answer in told.values()):
            write_end(out, f"{self._method.name} on {len(roll.clients)} sites")


def _opening(method: Method, config: Config, out: Path, first: int) -> list[str]:
    """What is about to be run, and what its server will see."""
    line = f"{config.rounds} rounds, {method.name}, sites -> {out}"
    line += f", from round {first} on" if first > 1 else ""
    if not config.federation.secure:
        return [line, "the server sees what every site hands in (federation.secure: sums only)"]
    return [
        line,
        "secure sums by SecAgg+: masks of 32-bit seeds, no signatures; numbers of records, losses "
        "and norms in the clear. It hides updates from logs and honest servers, not from a "
        "determined one (docs/sites.md)",
    ]
