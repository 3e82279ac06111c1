"""The frozen base, the mixed-LoRA layers in it, and a client as a state of tensors."""

from fedalt.model.base import (
    checkpoint_of,
    inject,
    load_base,
    output_head,
    sum_dtype,
    usable_device,
)
from fedalt.model.extras import bitsandbytes
from fedalt.model.gates import GateMeter
from fedalt.model.gguf import gguf_options
from fedalt.model.grouped import ClientRows, HiddenRows, stack_clients, whose
from fedalt.model.logits import mark_chunkable
from fedalt.model.records import keeps_rows_apart, own_adapters
from fedalt.model.stacked import clients_in, stacked_clients
from fedalt.model.states import (
    HEAD,
    INDIVIDUAL,
    MIXER,
    REST_OF_WORLD,
    BaseWeights,
    State,
    adapter_alone,
    adapter_state,
    as_rest_of_world,
    base_fingerprint,
    client_tensors,
    fixed_gates,
    frame_fingerprint,
    fresh_state,
    individual_state,
    is_part,
    load_adapter_state,
    load_rest_of_world,
    mixed_layers,
    part_of,
    renamed,
    select,
    set_trainable,
    without_gradient,
)
from fedalt.model.targets import in_short, kind_of
from fedalt.model.tokenizer import fit_tokenizer, load_tokenizer
from fedalt.model.vision import fit_head, load_image_base

__all__ = [
    "HEAD",
    "INDIVIDUAL",
    "MIXER",
    "REST_OF_WORLD",
    "BaseWeights",
    "ClientRows",
    "GateMeter",
    "HiddenRows",
    "State",
    "adapter_alone",
    "adapter_state",
    "as_rest_of_world",
    "base_fingerprint",
    "bitsandbytes",
    "checkpoint_of",
    "client_tensors",
    "clients_in",
    "fit_head",
    "fit_tokenizer",
    "fixed_gates",
    "frame_fingerprint",
    "fresh_state",
    "gguf_options",
    "in_short",
    "individual_state",
    "inject",
    "is_part",
    "keeps_rows_apart",
    "kind_of",
    "load_adapter_state",
    "load_base",
    "load_image_base",
    "load_rest_of_world",
    "load_tokenizer",
    "mark_chunkable",
    "mixed_layers",
    "output_head",
    "own_adapters",
    "part_of",
    "renamed",
    "select",
    "set_trainable",
    "stack_clients",
    "stacked_clients",
    "sum_dtype",
    "usable_device",
    "whose",
    "without_gradient",
]
