"""A client as one plain LoRA, the mean gates of each layer folded in, and what that costs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedalt.config import Config
from fedalt.errors import InputError
from fedalt.model import (
    HEAD,
    INDIVIDUAL,
    REST_OF_WORLD,
    GateMeter,
    State,
    adapter_alone,
    adapter_state,
    fixed_gates,
    load_adapter_state,
    mixed_layers,
    select,
)
from fedalt.report import digits_of, number, table
from fedalt.run import Stage, score
from fedalt.serving.clients import client_state, records
from fedalt.serving.export import adapter_files, base_of, unchanged_base
from fedalt.store import free_folder, load_run, write_folder

Gates = dict[str, tuple[float, float]]
"""By layer, the weights of the individual adapter and of the Rest-of-World."""
UNSEEN = (0.5, 0.5)
"""Of a layer that no token reached, such as an expert: as of an untrained gate."""


def export_flat(run_dir: str | Path, client_id: str, to: str | Path, data: str = "") -> str:
    """Write a client as one PEFT LoRA of rank 2 r, for servers that know no gates.

    With g the mean gates of a layer over the tokens of the client's train records::

        A = [A_0; A_1]    [2 r, K]        B = [g_0 B_0, g_1 B_1]    [N, 2 r]

    That is the client itself where gates are the same for every token, as in ``fedalt-scalar``;
    else it is told what the folding costs.

    Args:
        run_dir: a finished or running run; its newest checkpoint is taken.
        client_id: a client of it, with a Rest-of-World.
        to: the folder to write, whole or not at all; not there yet, or empty.
        data: a folder with the client's records; empty: the run's own.

    Returns:
        Scores of the client on its test records, mixed, flat, and its individual adapter alone, and
        where the adapter is.

    Raises:
        InputError: no such run, checkpoint, client or records, one adapter is all the client has,
            or the folder is taken.
    """
    free_folder(to)
    config, saved = load_run(run_dir)
    state = client_state(Path(run_dir), saved, client_id)
    if not select(state, REST_OF_WORLD):
        raise InputError(f"{run_dir}: {client_id} has one plain LoRA; export it without --flat")
    where, clients = records(config, data)
    clients = [client for client in clients if client.id == client_id]
    if not clients:
        raise InputError(f"{where.name}: no records of {client_id!r} there; name them with --data")
    whole = replace(config, federation=replace(config.federation, holdout=0.0))
    stage = Stage(whole, clients, saved.record["classes"])
    stage.go_on_from(saved)
    load_adapter_state(stage.model, state)
    unchanged_base(run_dir, client_id, stage.model)

    (member,) = stage.known
    gates = _mean_gates(stage, stage.examples(member).train)
    scores = {"mixed": score(stage, member)}
    with fixed_gates(stage.model, gates):
        scores["flat"] = score(stage, member)
    with adapter_alone(stage.model, INDIVIDUAL):
        scores["individual alone"] = score(stage, member)
    stage.cuts.tell()
    folder = write_folder(to, _files(stage.model, config, client_id, gates))
    return f"{_told(scores)}\n{client_id}: one PEFT adapter in {folder}"


def flat_state(state: Mapping[str, Tensor], gates: Gates) -> State:
    """One adapter a layer, under the names of the individual ones, and the heads.

    Args:
        state: a whole client, its adapters with equal scales.
        gates: of every layer.
    """
    folded = select(state, HEAD)
    for name, (own, world) in gates.items():
        a, b = (
            [state[f"{name}.{part}.{factor}"] for part in (INDIVIDUAL, REST_OF_WORLD)]
            for factor in "ab"
        )
        folded[f"{name}.{INDIVIDUAL}.a"] = torch.cat(a)
        folded[f"{name}.{INDIVIDUAL}.b"] = torch.cat([own * b[0], world * b[1]], 1)
    return folded


@torch.no_grad()
def _mean_gates(stage: Stage, examples: Sequence[Any]) -> Gates:
    layers = dict(mixed_layers(stage.model))
    fixed: Gates = {}
    for name, layer in layers.items():
        if layer.mixer is None:
            own, world = layer.fixed or (1.0, 1.0)
            fixed[name] = own, world
    meter, size = GateMeter(stage.model), stage.config.evaluate.batch_size
    stage.model.eval()
    with meter:
        for start in range(0, len(examples), size):
            stage.task.loss(stage.model, examples[start : start + size])
    learned = {name: (mean, 1 - mean) for name, mean in meter.means().items()}
    return {name: fixed.get(name) or learned.get(name, UNSEEN) for name in layers}


def _files(model: nn.Module, config: Config, client: str, gates: Gates) -> dict[str, bytes]:
    state = flat_state(adapter_state(model), gates)
    readme = _README.format(client=client, base=base_of(model, config), dtype=config.model.dtype)
    return adapter_files(model, config, state, INDIVIDUAL) | {"README.md": readme.encode()}


def _told(scores: Mapping[str, Mapping[str, float]]) -> str:
    names = list(scores["mixed"])
    rows = [
        [way, *(number(own[name], digits_of(name)) for name in names)]
        for way, own in scores.items()
    ]
    cost = scores["flat"]["loss"] - scores["mixed"]["loss"]
    return f"{table(('adapters', *names), rows)}\nfolding the gates costs {cost:+.4f} nats of loss"


_README = """# Client {client} of a FedALT run, as one LoRA

Both adapters of the client side by side, each layer's mean gates folded in, in PEFT's
file format. The base is `{base}`, dtype {dtype}:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, ".")
```
"""
