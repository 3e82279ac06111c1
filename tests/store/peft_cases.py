"""Tiny models to adapt, what PEFT makes of them, and how far its logits may be from ours."""

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import fedalt
from fedalt.model.states import adapter_state, load_adapter_state, select
from tests.kernels.budget import FACTORS, UNIT32, excess

RANK, ALPHA = 3, 5.0
SCALING = ALPHA / RANK
UNIT64 = torch.finfo(torch.float64).eps / 2


def llama():
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **shape)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64)).eval()


def vit():
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, image_size=8)
    config = ViTConfig(num_hidden_layers=2, patch_size=4, num_labels=5, **shape)
    return ViTForImageClassification(config).eval()


QUERY_VALUE = tuple(
    name
    for name, _ in vit().named_modules()
    if name.rpartition(".")[2] in ("query", "value", "q_proj", "v_proj")
)
CASES = {
    "llama": dict(make=llama, targets="all-linear", task_type="CAUSAL_LM", longest=48),
    "gpt2": dict(make=gpt2, targets=("c_attn", "mlp.c_fc"), task_type="CAUSAL_LM", longest=128),
    "vit": dict(make=vit, targets=QUERY_VALUE, task_type=None, longest=48),
}


@torch.no_grad()
def logits(model, dtype=torch.float32):
    """Of two short texts, or of two small images for a model that takes images."""
    if hasattr(model.config, "patch_size"):
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        return model(pixel_values=pixels.to(dtype)).logits
    return model(input_ids=torch.tensor([[1, 10, 20, 30, 40], [1, 3, 5, 7, 9]])).logits


def drawn(model, seed=0):
    """A whole client with no zero in it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) / 4
        for name, tensor in adapter_state(model).items()
    }


def alone(case, state, part, dtype=torch.float32, rank=RANK, heads=()):
    """Our model with one part of a client as its only adapter."""
    model = case["make"]().to(dtype)
    fedalt.inject(
        model, rank, ALPHA, 0, case["targets"], rest_of_world=False, modules_to_save=heads
    )
    own = {
        name.replace(f".{part}.", ".individual."): tensor
        for name, tensor in select(state, part, "head").items()
    }
    load_adapter_state(model, own)
    return model


def load_with_peft(make, folder, dtype=torch.float32):
    """A fresh base with the folder's adapter, by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of keys that fit nowhere
        return PeftModel.from_pretrained(make().to(dtype), folder).eval()


def assert_same_logits(ours, theirs, longest):
    """Both give logits in a dtype; ``longest`` is the number of products in their longest sum.

    In float32 we may be as far from PEFT in float64 as ``tests.kernels.budget`` allows, PEFT in
    float32 being the eager one. The same sums in float64 err 2^-29 times as much, so there the two
    may be apart by PEFT's own float32 error and what that allows us, both shrunk so.
    """
    truth, eager = theirs(torch.float64), theirs(torch.float32)
    got, got_double = ours(torch.float32), ours(torch.float64)
    assert got_double.dtype == truth.dtype == torch.float64
    assert got.dtype == eager.dtype == torch.float32
    for kind, share in excess(got, eager, truth, longest).items():
        assert share <= 1, f"{kind} error is {share:.2f} times its budget"
    allowed = (1 + FACTORS["max"]) * (eager - truth).abs().max() * (UNIT64 / UNIT32)
    apart = (got_double - truth).abs().max()
    assert apart <= allowed, f"float64 difference is {apart / allowed:.2f} times its budget"


def saved_by_peft(folder, dtype=torch.float32, targets=("q_proj", "v_proj"), **settings):
    """A PEFT model with no zero in its adapter, and the folder PEFT saved it to."""
    config = LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(llama(), config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            tensor.data = (torch.randn(tensor.shape, generator=generator) / 4).to(dtype)
    model.save_pretrained(folder)
    return model


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(dict(change(*item) for item in load_file(path).items()), path)
