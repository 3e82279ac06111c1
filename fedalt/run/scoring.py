"""Every client scored with what it uses, and what a finished run leaves behind."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedalt.errors import InputError, RunFailed
from fedalt.model import INDIVIDUAL, REST_OF_WORLD
from fedalt.report import read_results, write_report
from fedalt.run.join import told
from fedalt.run.ledger import Ledger
from fedalt.run.scores import score_clients, scoring_groups
from fedalt.run.stage import Stage
from fedalt.store import (
    CLIENTS,
    NEXT,
    RESULTS,
    Checkpoint,
    Draft,
    Journal,
    Progress,
    StateFolder,
    refuse_changes,
    settings_of,
    write_atomic,
    writing,
)


def begin(stage: Stage, draft: Draft) -> dict[str, int]:
    """Round 0: every client's first state."""
    for member in stage.known:
        state = stage.first_state(member.id)
        draft.put(CLIENTS, member.id, state)
        if stage.method.keeps_local:
            draft.put(NEXT, member.id, state)
    return {}


def refuse_changed(stage: Stage, saved: Checkpoint, out: Path) -> None:
    """``InputError`` where settings, data or base are not what a checkpoint was made with."""
    refuse_changes(saved.record["settings"], settings_of(stage.config), saved.path)
    before, now = saved.record["fingerprints"], stage.fingerprints
    for name in now.keys() | before.keys():
        if before.get(name) != now.get(name):
            raise InputError(f"{out}: the {name} is not what it was when the run began; restore it")


def evaluate_clients(
    stage: Stage,
    draft: StateFolder,
    number: int,
    journal: Journal,
    progress: Progress,
    last: bool,
) -> None:
    """Score every client with what it uses; after the last round, with each adapter alone too.

    Before the first round and after the last one, some answers are kept.
    """
    apart = stage.method.rest_of_world and stage.config.evaluate.parts
    parts = (INDIVIDUAL, REST_OF_WORLD) if last and apart else ()
    shown = stage.config.evaluate.answers if last or number == 0 else None
    stage.load_base(draft)
    for members in scoring_groups(stage):
        started = time.perf_counter()
        states = [draft.state(CLIENTS, member.id).read() for member in members]
        found = score_clients(stage, members, states, parts, shown)
        seconds = (time.perf_counter() - started) / len(members)
        for member, scored in zip(members, found, strict=True):
            if isinstance(scored, Exception):
                size = stage.config.evaluate.batch_size
                if number == 0:
                    raise RunFailed(
                        f"out of memory while scoring {member.id}; lower evaluate.batch_size "
                        f"({size})"
                    ) from None
                journal.fail(number, member.id, scored)
                continue
            journal.write("evaluate", number, member.id, **scored.scores)
            if scored.kept is not None:
                journal.write("answers", number, member.id, **told(stage, member, scored.kept))
            if stage.method.rest_of_world:
                journal.write("gates", number, member.id, layers=scored.gates)
            for part, own in scored.alone.items():
                journal.write("part", number, member.id, part=part, **own)
            journal.time(number, "evaluate", member.id, seconds)
            progress.evaluated(member.id, scored.scores)
        del found, scored  # an error's frames hold tensors, which the next clients may need


def record_of(
    stage: Stage,
    journal: Journal,
    sent: Mapping[str, int],
    micro_batch: int | None,
    ledger: Ledger,
) -> dict[str, Any]:
    """What a checkpoint says beside its states."""
    return {
        "clients": [member.id for member in stage.known],
        "classes": stage.classes,
        "fingerprints": stage.fingerprints,
        "settings": settings_of(stage.config),
        "metrics_bytes": journal.size,
        "sent": dict(sent),
        "micro_batch": micro_batch,
        "spent": ledger.record(),
    }


def write_end(out: Path, title: str) -> tuple[dict[str, Any], str, Path]:
    """A finished run's results on disk; and the table and the page of its report."""
    results = read_results(out)
    write_atomic(out / RESULTS, json.dumps(results, indent=1) + "\n")
    with writing(out / "report"):
        table, page = write_report(out, title)
    return results, table, page
