"""A client's LoRA in the file format of PEFT, and LoRAs that PEFT has written, read back.

A PEFT adapter is a folder of ``adapter_config.json`` and ``adapter_model.safetensors``, whose keys
are ``base_model.model.<module>.lora_A.weight`` [r, K] and ``.lora_B.weight`` [N, r]: what is called
``<module>.individual.a`` and ``.b`` here, whichever way the base stores its weight. PEFT scales
B A by ``lora_alpha / r`` (``lora_alpha / √r`` under ``use_rslora``), for some layers by numbers of
their own (``rank_pattern``, ``alpha_pattern``). The format is written and read without PEFT.
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
import reprlib
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedalt.errors import InputError
from fedalt.model import HEAD, INDIVIDUAL, State, is_part
from fedalt.store.checkpoint import DRAFT

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.[^.]+)?\.weight")
# Settings that leave what a plain LoRA computes alone; any other must be unset.
_PLAIN = set(
    "alpha_pattern auto_mapping base_model_name_or_path ensure_weight_tying eva_config "
    "exclude_modules fan_in_fan_out inference_mode layers_pattern layers_to_transform lora_alpha "
    "lora_dropout megatron_core modules_to_save peft_version qalora_group_size r rank_pattern "
    "revision runtime_config target_modules task_type use_rslora".split()
)
# Settings that must be one of these. Other first values of A and B change the base weight.
_ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def as_peft_files(
    state: Mapping[str, Tensor],
    part: str,
    *,
    base: str,
    scaling: float,
    dropout: float = 0.0,
    fan_in_fan_out: bool = False,
    task_type: str | None = None,
) -> dict[str, bytes]:
    """The files of one part of a client as a PEFT adapter, by name.

    Args:
        state: a whole client. Tensors that are no adapter's and no mixer's, such as a trained
            head's ``classifier.weight``, go along whole under ``modules_to_save``.
        part: ``individual`` or ``rest_of_world``.
        base: what the base model is loaded from.
        scaling: what B A is multiplied by. Ranks are read from the tensors, layer by layer, and
            ``lora_alpha`` is ``scaling`` times the rank.
        dropout: of the adapter's input in training.
        fan_in_fan_out: the base stores weights as [K, N], as Conv1D does.
        task_type: PEFT's word for the model, ``CAUSAL_LM`` for one that generates.

    Raises:
        InputError: the state has no such part.
    """
    ranks: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    heads = []
    for name, tensor in state.items():
        module, _, factor = name.rpartition(".")
        if is_part(name, part):
            module = module.rpartition(".")[0]
            tensors[f"{PREFIX}{module}.lora_{factor.upper()}.weight"] = tensor.contiguous()
            if factor == "a":
                ranks[module] = tensor.shape[0]
        elif is_part(name, HEAD):
            tensors[f"{PREFIX}{name}"] = tensor.contiguous()
            heads.append(module)
    if not ranks or min(ranks.values()) < 1:
        raise InputError(f"{part}: this client has no such adapter; export one that it has")
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: own for module, own in ranks.items() if own != rank}
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _alpha(scaling, rank),
        "rank_pattern": others,
        "alpha_pattern": {module: _alpha(scaling, own) for module, own in others.items()},
        "lora_dropout": dropout,
        "target_modules": list(ranks),
        "modules_to_save": list(dict.fromkeys(heads)) or None,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
    text = json.dumps(config, indent=2) + "\n"
    return {CONFIG: text.encode(), WEIGHTS: save(tensors, metadata={"format": "pt"})}


def read_peft_adapter(folder: str | Path, like: Mapping[str, Tensor], scaling: float) -> State:
    """A PEFT LoRA as individual adapters, with B such that ``scaling`` B A is what PEFT adds.

    Args:
        folder: an adapter's folder, written by PEFT or from ``peft_files``.
        like: a state of the model it is meant for, which says the adapted layers, their N and K,
            the dtype, and what else may come along, such as a trained head. Ranks may differ.
        scaling: what the model multiplies B A by.

    Returns:
        ``<module>.individual.a`` [r, K] and ``.b`` [N, r] of every adapted layer, in the order of
        ``like``, then the head if there is one.

    Raises:
        InputError: not readable, not a plain LoRA, or for other layers than those of ``like``.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    factors: dict[str, Tensor] = {}
    heads: State = {}
    for key, tensor in _read_tensors(folder).items():
        name = key.removeprefix(PREFIX)
        if match := _LORA_KEY.fullmatch(name):
            name = f"{match['module']}.{INDIVIDUAL}.{match['factor'].lower()}"
            if name in factors:
                raise InputError(f"{path}: {key} is there twice; save one adapter at a time")
            if name not in like:
                raise InputError(
                    f"{path}: {match['module']} has no adapter here; add it to lora.target_modules"
                )
            factors[name] = tensor
        elif name in like:
            heads[name] = _fitting(tensor, like[name].shape, like[name].dtype, f"{path}: {key}")
        else:
            raise InputError(f"{path}: {key} is no LoRA of a linear layer; save the adapter alone")
    state: State = {}
    for name in like:
        if is_part(name, INDIVIDUAL):
            if name not in factors:
                raise InputError(f"{path}: has no {name}; adapt the same lora.target_modules")
            module = name.rsplit(".", 2)[0]
            rank, theirs = _rank_and_scaling(config, module, folder / CONFIG)
            tensor = factors[name]
            if name.endswith(".a"):
                shape = torch.Size((rank, like[name].shape[1]))
            else:
                shape = torch.Size((like[name].shape[0], rank))
                tensor = tensor if theirs == scaling else tensor.double() * (theirs / scaling)
            state[name] = _fitting(tensor, shape, like[name].dtype, f"{path}: {name}")
    return {**state, **heads}


def write_folder(folder: str | Path, files: Mapping[str, bytes]) -> Path:
    """Write ``files``, contents by relative name, so that ``folder`` is whole or not there.

    Raises:
        InputError: the folder is taken or cannot be written.
    """
    final = free_folder(folder)
    draft = final.with_name(f"{DRAFT}{final.name}")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        for name, content in files.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            with open(draft / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        os.rename(draft, final)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; choose another folder") from None
    return Path(folder)


def free_folder(folder: str | Path) -> Path:
    """The absolute path of a folder that is not there yet, or is empty; else ``InputError``."""
    final = Path(folder).absolute()
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise InputError(f"{folder}: is there already; choose another folder")
    return final


def _alpha(scaling: float, rank: int) -> float:
    """``lora_alpha``: a whole number, which some readers of the format insist on, if it can be."""
    alpha = scaling * rank
    return round(alpha) if round(alpha) / rank == scaling else alpha


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{path}: missing or not readable; name a PEFT adapter's folder") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds no settings; save the adapter again")
    for key, value in {"peft_type": None, **config}.items():
        plain = value in _ALLOWED[key] if key in _ALLOWED else key in _PLAIN or not value
        if not plain:
            raise InputError(
                f"{path}: {key} is {reprlib.repr(value)}, no plain LoRA; convert it with PEFT first"
            )
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.exists() and (folder / PICKLED).exists():
        raise InputError(
            f"{folder / PICKLED}: pickled, which is never loaded; save it as safetensors with PEFT"
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        raise InputError(f"{path}: missing or damaged; save the adapter again") from None


def _rank_and_scaling(config: Mapping[str, Any], module: str, path: Path) -> tuple[int, float]:
    """What the config says of one layer; patterns are regular expressions for a name's ending."""

    def own(patterns: str, default: str) -> Any:
        for pattern, value in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return config.get(default, 8)  # PEFT's default of both

    try:
        rank, alpha = operator.index(own("rank_pattern", "r")), own("alpha_pattern", "lora_alpha")
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError, re.error):
        raise InputError(f"{path}: r or lora_alpha of {module} is no positive number") from None
    return rank, scaling


def _fitting(tensor: Tensor, shape: torch.Size, dtype: torch.dtype, name: str) -> Tensor:
    if tensor.shape != shape:
        shapes = f"{list(tensor.shape)}, wanted {list(shape)}"
        raise InputError(f"{name} has shape {shapes}; its config or base is another")
    return tensor.to(dtype)
