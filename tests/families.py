"""Tiny random models of several families, with a chat template in the family's public format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEMPLATES = Path(__file__).parent / "data" / "templates"
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "chatml": ("qwen2", {}, CHATML),
    "llama3": ("llama", {}, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": ("gemma2", {"head_dim": 16}, ("<start_of_turn>", "<end_of_turn>")),
    "mistral": ("mistral", {"sliding_window": 24}, ("[INST]", "[/INST]")),
    "phi3": ("phi3", {}, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "qwen3": ("qwen3", {"head_dim": 16}, CHATML),
    "zephyr": ("mistral", {}, ("<|system|>", "<|user|>", "<|assistant|>")),
    "words": ("llama", {}, ()),
}
"""By template: the architecture, its own settings, and the template's special tokens."""


def tokenizer_of(family: str, base: Path) -> Any:
    """The tokenizer of the tiny base, of single bytes, with the family's tokens and template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokens = list(FAMILIES[family][2])
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return tokenizer


def write_family(family: str, base: Path, folder: Path) -> Path:
    """A model of two layers with that tokenizer, as ``from_pretrained`` reads it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tokenizer_of(family, base)
    kind, own, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **own,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
