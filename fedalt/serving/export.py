"""A client taken out of its run: its adapters in PEFT's file format, the mixer beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedalt.config import Config, ModelConfig
from fedalt.errors import InputError
from fedalt.model import (
    INDIVIDUAL,
    MIXER,
    REST_OF_WORLD,
    adapter_state,
    as_rest_of_world,
    base_fingerprint,
    inject,
    load_adapter_state,
    load_base,
    load_image_base,
    mixed_layers,
    select,
)
from fedalt.serving.clients import load_client
from fedalt.store import as_peft_files, free_folder, load_run, read_peft_adapter, write_folder

_MIXED, _MIXERS = "mixer.json", "mixer.safetensors"
_SCALAR = "scalar"  # a layer's word for a mixer that is two logits, whatever the token


def export_client(run_dir: str | Path, client_id: str, to: str | Path) -> Path:
    """Write a client of a run, from its newest checkpoint, into a folder of its own.

    ``individual/`` and, where the method has one, ``rest_of_world/`` are PEFT adapters.
    ``mixer.json`` says how they are joined; learned mixers of all layers, [2, K] or, where one
    serves all tokens, [2], are in ``mixer.safetensors``. ``README.md`` says how to load either. The
    tokenizer is the base's own.

    Args:
        run_dir: a finished or running run.
        client_id: a client of it.
        to: the folder to write, whole or not at all; not there yet, or empty.

    Returns:
        The folder.

    Raises:
        InputError: no such run, checkpoint or client, or the folder is taken.
    """
    free_folder(to)
    model, _ = load_client(run_dir, client_id)
    config, _ = load_run(run_dir)
    fingerprint = unchanged_base(run_dir, client_id, model)
    state = adapter_state(model)
    layers = [name.rsplit(".", 2)[0] for name in select(state, INDIVIDUAL) if name.endswith(".a")]
    layer: Any = model.get_submodule(layers[0])
    classes = _classes(model) if config.data.kind == "image" else []
    base = base_of(model, config)
    files = {}
    for part in (INDIVIDUAL, REST_OF_WORLD):
        if select(state, part):
            adapter = adapter_files(model, config, state, part)
            files.update({f"{part}/{name}": content for name, content in adapter.items()})
    readme = _readme(client_id, base, config.model.dtype, classes)
    if select(state, REST_OF_WORLD):
        mixed = {
            "client": client_id,
            **_gates(layer),
            "layers": layers,
            "modules_to_save": list(getattr(model, "fedalt_heads", ())),
            "rank": layer.rank,
            "alpha": layer.alpha,
            "scaling": layer.scaling,
            "dropout": layer.dropout,
            "classes": classes,
            "base": _absolute(config.model.path),
            "base_fingerprint": fingerprint,
            "dtype": config.model.dtype,
            "quantization": config.model.quantization,
        }
        files[_MIXED] = (json.dumps(mixed, indent=2) + "\n").encode()
        readme += _README_MIXED
    if mixers := select(state, MIXER):
        files[_MIXERS] = save(mixers)
    files["README.md"] = readme.encode()
    return write_folder(to, files)


def load_export(folder: str | Path, base: str = "", device: str = "cpu") -> tuple[nn.Module, Any]:
    """The mixed model that ``export_client`` wrote, and its tokenizer or image processor.

    Args:
        folder: the folder that has ``mixer.json``.
        base: where the base model is now; empty: where it was.
        device: such as ``cpu`` or ``cuda``.

    Raises:
        InputError: a file is missing or damaged, or the base is not the one of the run.
    """
    folder = Path(folder)
    try:
        mixed = json.loads((folder / _MIXED).read_text(encoding="utf-8"))
        path, mixer = base or mixed["base"], mixed["mixer"]
        rank, alpha, dropout = mixed["rank"], mixed["alpha"], mixed["dropout"]
        targets, heads = mixed["layers"], mixed["modules_to_save"]
        fingerprint, dtype = mixed["base_fingerprint"], mixed["dtype"]
        classes, quantization = mixed["classes"], mixed.get("quantization", "none")
        mixers = load_file(folder / _MIXERS) if mixer in (True, _SCALAR) else {}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        raise InputError(f"{folder / _MIXED}: missing or damaged; export it again") from None
    where = ModelConfig(path, dtype, device, quantization)
    if classes:
        model, tool = load_image_base(where, classes, heads)
    else:
        model, tool = load_base(where)
    mixer = tuple(mixer) if isinstance(mixer, list) else mixer
    inject(model, rank, alpha, dropout, targets, mixer=mixer, modules_to_save=heads)
    if base_fingerprint(model) != fingerprint:
        raise InputError(f"{folder}: {path} is not the base of the run; name that one with base=")
    like = adapter_state(model)
    own, world = (
        read_peft_adapter(folder / part, like, alpha / rank) for part in (INDIVIDUAL, REST_OF_WORLD)
    )
    try:
        load_adapter_state(model, {**own, **as_rest_of_world(world), **mixers})
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from None
    return model, tool


def unchanged_base(run_dir: str | Path, client_id: str, model: nn.Module) -> str:
    """The fingerprint of a run's base; ``InputError`` where a client's model has another."""
    config, saved = load_run(run_dir)
    fingerprint = base_fingerprint(model)
    if fingerprint != saved.record["fingerprints"]["base"]:
        raise InputError(
            f"{run_dir}: {client_id}'s base weights are not those of {config.model.path}, so no "
            "adapter holds it; use fedalt.load_client"
        )
    return fingerprint


def base_of(model: nn.Module, config: Config) -> str:
    """What the base of a run's model is loaded from."""
    return _absolute(str(getattr(model, "name_or_path", "")) or config.model.path)


def adapter_files(
    model: nn.Module, config: Config, state: Mapping[str, Tensor], part: str
) -> dict[str, bytes]:
    """A part of a client as a PEFT adapter, files by name, for the base of a run's model."""
    _, layer = next(mixed_layers(model))
    return as_peft_files(
        state,
        part,
        base=base_of(model, config),
        scaling=layer.scaling,
        dropout=layer.dropout,
        fan_in_fan_out=layer.transposed,
        task_type=None if config.data.kind == "image" else "CAUSAL_LM",
    )


def _gates(layer: Any) -> dict[str, Any]:
    """What the layers were made with as ``mixer``, and what the two adapters are multiplied by."""
    mixer = layer.mixer
    if mixer is None:
        return {
            "mixer": layer.fixed,
            "gates": f"individual, rest_of_world: {layer.fixed or (1, 1)}",
        }
    logits, kind = ("mixer @ x", True) if mixer.ndim == 2 else ("mixer", _SCALAR)
    return {"mixer": kind, "gates": f"softmax({logits}): row 0 individual, row 1 rest_of_world"}


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path


def _classes(model: Any) -> list[str]:
    """The class of every row of a classifier's logits."""
    return [model.config.id2label[row] for row in sorted(model.config.id2label)]


def _readme(client: str, base: str, dtype: str, classes: Sequence[str]) -> str:
    loader = "AutoModelForImageClassification" if classes else "AutoModelForCausalLM"
    head = f", num_labels={len(classes)}, ignore_mismatched_sizes=True" if classes else ""
    rows = f"\nThe classes, in the order of the logits: {', '.join(classes)}.\n" if classes else ""
    return f"""# Client {client} of a FedALT run

`individual/` is what the client learned itself and `rest_of_world/`, where there is one, the mean
of the others: LoRA adapters in PEFT's file format. PEFT alone loads one at a time:

```python
import torch
from peft import PeftModel
from transformers import {loader}

base = {loader}.from_pretrained({base!r}, dtype=torch.{dtype}{head})
model = PeftModel.from_pretrained(base, "individual")
```
{rows}"""


_README_MIXED = """
FedALT mixes both as `mixer.json` says; learned gates are in `mixer.safetensors`:

```python
from fedalt import load_export

model, tool = load_export(".")  # the tool is the tokenizer, or the image processor
```
"""
