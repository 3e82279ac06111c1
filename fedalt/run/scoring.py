"""Every client scored with what it uses, and what a finished run leaves behind."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedalt.errors import InputError, RunFailed
from fedalt.evaluation import Answers
from fedalt.model import INDIVIDUAL, REST_OF_WORLD, GateMeter, adapter_alone, load_adapter_state
from fedalt.report import read_results, write_report
from fedalt.run.join import score, told
from fedalt.run.ledger import Ledger
from fedalt.run.stage import Member, Stage
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
from fedalt.training import out_of_memory


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
    parts = (INDIVIDUAL, REST_OF_WORLD) if last else ()
    ends = last or number == 0
    stage.load_base(draft)
    for member in stage.known:
        started = time.perf_counter()
        load_adapter_state(stage.model, draft.state(CLIENTS, member.id).read())
        meter = GateMeter(stage.model)
        kept = Answers(stage.config.evaluate.answers) if ends else None
        try:
            scores = score(stage, member, meter, kept)
            alone = {part: _score_alone(stage, member, part) for part in parts if apart}
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            size = stage.config.evaluate.batch_size
            if number == 0:
                raise RunFailed(
                    f"out of memory while scoring {member.id}; lower evaluate.batch_size ({size})"
                ) from None
            journal.fail(number, member.id, error)
            continue
        journal.write("evaluate", number, member.id, **scores)
        if kept is not None:
            journal.write("answers", number, member.id, **told(stage, member, kept))
        if stage.method.rest_of_world:
            journal.write("gates", number, member.id, layers=meter.means())
        for part, own in alone.items():
            journal.write("part", number, member.id, part=part, **own)
        journal.time(number, "evaluate", member.id, time.perf_counter() - started)
        progress.evaluated(member.id, scores)


def _score_alone(stage: Stage, member: Member, part: str) -> dict[str, float]:
    with adapter_alone(stage.model, part):
        return score(stage, member)


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
