"""Parcels as Flower's records. Names, shapes and dtypes survive; bfloat16 travels as its bits."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedalt.flower.parcel import Parcel

VALUES = "values"
_BITS = "|bfloat16"


def to_records(parcel: Parcel) -> RecordDict:
    """A parcel as the content of a message."""
    content = RecordDict({VALUES: ConfigRecord({"json": json.dumps(parcel.values)})})
    for group, state in parcel.states.items():
        content[group] = ArrayRecord({k: v for name in state for k, v in _array(name, state[name])})
    return content


def from_records(content: RecordDict) -> Parcel:
    """The parcel that a message holds."""
    values = json.loads(str(content.config_records[VALUES]["json"]))
    return Parcel(values, {group: _state(r) for group, r in content.array_records.items()})


def _array(name: str, tensor: Tensor) -> list[tuple[str, Array]]:
    """NumPy knows no bfloat16, so that its bits go as int16."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return [(name + _BITS, Array(tensor.view(torch.int16).numpy()))]
    return [(name, Array(tensor.numpy()))]


def _state(record: Mapping[str, Array]) -> dict[str, Tensor]:
    state = {}
    for name, array in record.items():
        tensor = torch.from_numpy(np.array(array.numpy()))
        if name.endswith(_BITS):
            name, tensor = name.removesuffix(_BITS), tensor.view(torch.bfloat16)
        state[name] = tensor
    return state
