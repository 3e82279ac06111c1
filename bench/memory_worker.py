"""One candidate of `memory`, in a process of its own: it steps when it is told to.

    python -m bench.memory_worker '{"model": ..., "base": ..., "make": ...}'

It writes a line of JSON when it is ready, after every ``step`` (ms) and at the ``end`` (peak, in
bytes), or an error's one line.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .device import brief, missing
from .measure import saved_bytes
from .peers import Unfused, mixed_layer, one_peft_lora, two_peft_loras
from .worker import say

Job = dict[str, Any]

RANK, ALPHA = 8, 16
FEDALT, PEFT = "FedALT", "one PEFT LoRA"
SHAPES: dict[str, dict[str, int]] = {
    "Llama 0.1B": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 32000,
    },
    "Llama-2-7B": {},  # transformers' own defaults
}
BATCHES = {"built-in": (8, 128), "Llama 0.1B": (2, 128), "Llama-2-7B": (8, 512)}  # rows, tokens
TARGETS = ("q_proj", "v_proj")
SAVED_TOKENS, SAVED_WIDTH = 1024, 1024


def base_of(job: Job) -> nn.Module:
    """The frozen base as it is stored; a shape gets random weights, quantized layer by layer."""
    from fedalt.config.schema import ModelConfig
    from fedalt.model.base import load_base

    quantized = job["base"] in ("int8", "nf4", "fp8")
    narrow = "float32" if job["device"] == "cpu" and quantized else "bfloat16"
    dtype = narrow if quantized else job["base"]
    quantization = job["base"] if quantized else "none"
    config = ModelConfig(dtype=dtype, device=job["device"], quantization=quantization)
    if job["model"] == "built-in":
        return load_base(config)[0]
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fedalt.model.logits import mark_chunkable

    torch.manual_seed(0)
    with torch.device(job["device"]):
        shape = LlamaConfig(**SHAPES[job["model"]])
        model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype))
    _pack(model, config)
    mark_chunkable(model.requires_grad_(False))
    return model


def _pack(model: Any, config: Any) -> None:
    """Quantizes a model's linear layers as loading it does."""
    from fedalt.model.base import output_head
    from fedalt.model.quantized import finish_loading

    head = output_head(model)
    linears = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and m is not head]
    if config.quantization in ("int8", "nf4"):
        _pack_by_bitsandbytes(model, linears, config)
    finish_loading(model, [name for name, m in model.named_modules() if m is head], config)


def _pack_by_bitsandbytes(model: Any, linears: list[tuple[str, nn.Linear]], config: Any) -> None:
    import bitsandbytes as bnb

    for name, linear in linears:
        size = (linear.in_features, linear.out_features)
        weight = linear.weight.data.cpu()
        packed: Any
        if config.quantization == "nf4":
            packed = bnb.nn.Linear4bit(
                *size, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
            )
            packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            packed = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False, device="meta")
            packed.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed.to(config.device))
    model.is_loaded_in_4bit = config.quantization == "nf4"  # by which PEFT knows
    model.is_loaded_in_8bit = config.quantization == "int8"


def dress(model: nn.Module, make: str) -> None:
    """Puts the adapters in, in place."""
    if make == FEDALT:
        from fedalt import inject

        inject(model, RANK, ALPHA, 0.0, TARGETS)
        return
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    peft.get_peft_model(model, config)


class Stepper:
    """A client's training step on one batch, over and over."""

    def __init__(self, job: Job) -> None:
        from fedalt.data.tokens import Example, collate
        from fedalt.training.activations import recomputing

        self.cuda = job["device"] == "cuda"
        if not self.cuda:  # libraries load now: what they take is nobody's peak
            dress(base_of({**job, "model": "built-in"}), job["make"])
            gc.collect()
        self._before = 0 if self.cuda else resident("VmRSS")
        self.model = base_of(job)
        dress(self.model, job["make"])
        rows, tokens = BATCHES[job["model"]]
        half = tokens // 2
        example = Example((5,) * half, (6,) * half)
        self.batch = collate([example] * rows, 0, torch.device(job["device"]))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        self.kept = recomputing(self.model, True) if job["checkpointing"] else nullcontext()
        self.model.train()

    def step(self) -> float:
        """Milliseconds of one step."""
        from fedalt.training.loss import answer_loss

        started = time.perf_counter()
        answer_loss(self.model, self.batch).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        if self.cuda:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - started)

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int:
        """Bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return resident("VmHWM") - self._before


def resident(field: str) -> int:
    """Bytes of this process, now (``VmRSS``) or at most (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)[field].split()[0])


def saved_rows() -> list[dict[str, Any]]:
    """What each make of one layer keeps, beside its input and parameters."""
    size = SAVED_WIDTH
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for dropout in (0.0, 0.05):
            layer = mixed_layer(size, size, RANK, dropout, dtype)
            makes: dict[str, nn.Module] = {"MixedLoRALinear": layer, "unfused": Unfused(layer)}
            if not missing("peft"):
                makes |= {PEFT: one_peft_lora(layer), "two PEFT LoRAs": two_peft_loras(layer)}
            for name, make in makes.items():
                x = torch.randn(SAVED_TOKENS, size).to(dtype).requires_grad_()
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "dropout": str(dropout),
                        "layer": name,
                        "bytes a token": saved_bytes(make, x) / SAVED_TOKENS,
                    }
                )
    return rows


def main() -> None:
    try:
        job = json.loads(sys.argv[1])
        torch.set_num_threads(2)
        torch.manual_seed(0)
        stepper = Stepper(job)
        with stepper.kept:
            stepper.step()  # libraries set themselves up
            stepper.forget_peak()
            say({"ready": True})
            for line in sys.stdin:
                say({"ms": stepper.step()} if line == "step\n" else {"peak": stepper.peak()})
    except Exception as error:  # whatever it is, the table goes on without this row
        say({"error": brief(error)})


if __name__ == "__main__":
    main()
