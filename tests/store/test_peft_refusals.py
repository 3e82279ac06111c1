"""PEFT adapters that are no plain LoRA for the model's layers are refused in one line."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedalt
from fedalt.errors import InputError
from fedalt.model.states import adapter_state
from fedalt.store.peft_files import read_peft_adapter
from tests.store.peft_cases import ALPHA, RANK, SCALING, change_tensors, llama, saved_by_peft


@pytest.fixture
def like():
    """The client of a model that adapts q and v."""
    return adapter_state(fedalt.inject(llama(), RANK, ALPHA))


def change_config(**changes):
    def apply(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def rename(pattern, new):
    return lambda folder: change_tensors(
        folder, lambda key, tensor: (re.sub(pattern, new, key, count=1), tensor)
    )


def cut(leaf, rows):
    return lambda folder: change_tensors(
        folder, lambda key, t: (key, t[:rows].contiguous() if leaf in key else t)
    )


def drop(leaf):
    def apply(folder):
        path = folder / "adapter_model.safetensors"
        save_file({k: t for k, t in load_file(path).items() if leaf not in k}, path)

    return apply


def pickle_it(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change_config(use_dora=True), "use_dora is True, no plain LoRA; convert it with PEFT"),
        (change_config(bias="lora_only"), "bias is 'lora_only', no plain LoRA"),
        (change_config(lora_bias=True), "lora_bias is True, no plain LoRA"),
        (change_config(peft_type="IA3"), "peft_type is 'IA3', no plain LoRA"),
        (change_config(init_lora_weights="pissa"), "init_lora_weights is 'pissa', no plain"),
        (change_config(alora_invocation_tokens=[1]), "alora_invocation_tokens is [1], no plain"),
        (change_config(target_parameters=["x"]), "target_parameters is ['x'], no plain"),
        (change_config(a_later_variant=1), "a_later_variant is 1, no plain LoRA"),
        (change_config(r="3"), f"{CONFIG}: r or lora_alpha of {Q0} is no positive number"),
        (change_config(r=0), f"{CONFIG}: r or lora_alpha of {Q0} is no positive number"),
        (change_config(r=4), f"{WEIGHTS}: {Q0}.individual.a has shape [3, 32], wanted [4, 32]"),
        (cut("0.self_attn.q_proj.lora_B", 9), "q_proj.individual.b has shape [9, 3], wanted [32,"),
        (rename("0.self_attn.q_proj", "0.self_attn.k_proj"), "k_proj has no adapter here; add it"),
        (drop("1.self_attn.v_proj.lora_A"), "has no model.layers.1.self_attn.v_proj.individual.a"),
        (rename(r"lora_A\.weight", "lora_embedding_A"), "lora_embedding_A is no LoRA of a linear"),
        (rename(r".*lora_B\.weight", "lm_head.weight"), "lm_head.weight is no LoRA of a linear"),
        (pickle_it, "adapter_model.bin: pickled, which is never loaded; save it as safetensors"),
        (write(WEIGHTS, b"half"), f"{WEIGHTS}: missing or damaged; save the adapter again"),
        (write(CONFIG, b"{"), f"{CONFIG}: missing or not readable; name a PEFT adapter's folder"),
        (write(CONFIG, b"[]"), f"{CONFIG}: holds no settings; save the adapter again"),
    ],
)
def test_what_is_no_plain_lora_for_these_layers_is_refused(spoil, message, like, tmp_path):
    saved_by_peft(tmp_path, r=RANK)
    spoil(tmp_path)
    with pytest.raises(InputError) as refused:
        read_peft_adapter(tmp_path, like, SCALING)
    assert str(refused.value).startswith(str(tmp_path))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_two_adapters_in_one_file_are_refused(like, tmp_path):
    saved_by_peft(tmp_path, r=RANK)
    path = tmp_path / WEIGHTS
    tensors = load_file(path)
    key = next(iter(tensors))
    save_file({**tensors, key.replace(".weight", ".other.weight"): tensors[key].clone()}, path)
    with pytest.raises(InputError, match="is there twice; save one adapter at a time"):
        read_peft_adapter(tmp_path, like, SCALING)
