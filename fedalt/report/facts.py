"""What was run, as short facts for the top of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fedalt.report import tables
from fedalt.report.events import Event
from fedalt.report.method_sheets import Runs
from fedalt.report.tables import Results, count

Settings = Mapping[str, Any]
PACKAGES = ("fedalt", "torch", "transformers")


def settings_in(config: str) -> dict[str, Any]:
    """The settings of a ``config.yaml``; none where it is empty or of another kind."""
    found = yaml.safe_load(config)
    return found if isinstance(found, dict) else {}


def facts_of_run(
    results: Results, times: Sequence[Event], settings: Settings, finished: bool
) -> dict[str, str]:
    """Facts by name; what an older run directory does not tell is left out."""
    metric, mean, traffic = results["metric"], results["mean"], results["traffic"]
    ends = (tables.number(mean.get(when, {}).get(metric), 1) for when in ("base", "last"))
    rounds = f"{results['round']}" if finished else f"{results['round']} so far"
    facts = {
        **_setting_facts(settings),
        "clients": str(len(results["clients"])),
        "records": _records(results),
        "rounds": rounds + _length(settings),
        "seed": str(settings.get("seed", "")),
        f"mean {tables.label(metric)}": " → ".join(ends),
        **_machine_facts(times),
        "wall time": tables.duration(sum(row["seconds"] for row in times)) if times else "-",
        "sent by clients": f"{tables.mib(traffic['sent'])} MiB",
        "received by clients": f"{tables.mib(traffic['received'])} MiB",
    }
    if parts := [c["micro_batch"] for c in results["clients"].values() if "micro_batch" in c]:
        facts["examples run at once"] = str(min(parts))
    return {name: value for name, value in facts.items() if value}


def facts_of_comparison(
    runs: Runs, seeds: Sequence[int], times: Sequence[Event], settings: Settings
) -> dict[str, str]:
    """Facts by name; ``times`` are those of all runs."""
    every = [run for results in runs.values() for run in results]
    first = _setting_facts(settings)
    first.pop("method", "")
    facts = {
        **first,
        "methods": str(len(runs)),
        "seeds": ", ".join(map(str, seeds)),
        "clients": str(len({client for run in every for client in run["clients"]})),
        "records": _records(every[0]),
        "rounds": f"{every[0]['round']}{_length(settings)}",
        **_machine_facts(times),
        "time of all runs": tables.duration(sum(row["seconds"] for row in times)) if times else "",
    }
    return {name: value for name, value in facts.items() if value}


def _setting_facts(settings: Settings) -> dict[str, str]:
    model, data, lora = (settings.get(key, {}) for key in ("model", "data", "lora"))
    quantized = model.get("quantization", "none")
    stored = [model.get("path"), model.get("dtype"), quantized if quantized != "none" else ""]
    sources = ", ".join(data.get("sources", ()))
    facts = {
        "method": settings.get("method", ""),
        "model": ", ".join(filter(None, stored)),
        "data": sources or data.get("path", ""),
        "LoRA": f"rank {lora['rank']}, alpha {lora['alpha']:g}" if lora else "",
    }
    return {name: str(value) for name, value in facts.items() if value}


def _records(results: Results) -> str:
    found = [c["records"] for c in results["clients"].values() if "records" in c]
    train, test = (sum(own[part] for own in found) for part in ("train", "test"))
    return f"{train} train, {test} test" if found else ""


def _length(settings: Settings) -> str:
    """How long a client trains in a round."""
    train = settings.get("train", {})
    if train.get("max_steps"):
        return f", {count(train['max_steps'], 'step')} each"
    return f", {count(train['epochs'], 'epoch')} each" if "epochs" in train else ""


def _machine_facts(times: Sequence[Event]) -> dict[str, str]:
    """Device, date and versions, of every start if they differ."""
    starts = [row for row in times if "date" in row]
    versions = [
        ", ".join([*(f"{name} {row[name]}" for name in PACKAGES), f"Python {row['python']}"])
        for row in starts
    ]
    dates = sorted(row["date"].replace("T", " ")[:16] for row in starts)
    return {
        "device": "; ".join(dict.fromkeys(row["device"] for row in starts)),
        "date": " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]])),
        "versions": "; ".join(dict.fromkeys(versions)),
    }
