"""A whole model: a Llama-2-7B of random weights, bare, and with adapters of several makes.

A training step is forward, loss over every token, backward through the inputs (of the bare model
too, so that it is the floor) and, where there are adapters, a fused AdamW step, which is included.
Decoding is one token a sequence against a static cache of `SLOTS`, all attended, the whole step
captured as one CUDA graph and replayed; nothing of it is compiled by torch.compile.

    python -m bench model [--tiny]    (tiny: a smoke test on the CPU)
"""

from __future__ import annotations

import gc
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedalt_kernels import MixedLoRALinear

from .device import (
    Call,
    Unavailable,
    brief,
    captured,
    cuda_device,
    describe,
    event_times_us,
    missing,
)
from .measure import markdown, surroundings
from .peers import Unfused
from .report import write_table

RANK, ALPHA = 8, 16
QUERY_AND_VALUE = ("q_proj", "v_proj")
ALL_SEVEN = (*QUERY_AND_VALUE, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BARE, FEDALT, PEFT, UNFUSED = "bare frozen model", "FedALT", "one PEFT LoRA", "FedALT, unfused"
SLOTS = 640  # of the decoding's cache
STEPS = 5
DECODE_BATCHES = (1, 16)
TITLE = "A Llama of random weights, bfloat16, bare and with adapters"


class Size(NamedTuple):
    """Of the model and of a training batch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    length: int


LLAMA_2_7B = Size(4096, 11008, 32, 32, 32000, batch=8, length=512)
TINY = Size(64, 176, 2, 4, 256, batch=2, length=16)


def random_model(size: Size, device: torch.device) -> nn.Module:
    """Made on the device, frozen; its embeddings ask for a gradient, which then flows through."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        vocab_size=size.vocabulary,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(_ask_for_gradient)
    return model


def _ask_for_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def replace_layers(model: nn.Module, make: Callable[[str, nn.Module], nn.Module | None]) -> None:
    """Puts what `make` returns, if anything, in the place of each module."""
    for name, module in list(model.named_modules()):
        made = make(name, module)
        if made is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made)


@contextmanager
def dressed(model: nn.Module, variant: str, targets: Sequence[str]) -> Iterator[nn.Module]:
    """The model with adapters of one make on the targets; bare again afterwards."""
    if variant == PEFT:
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets))
        wrapped = peft.get_peft_model(model, config)
        try:
            yield wrapped
        finally:
            wrapped.unload()
        return
    if variant != BARE:
        _inject(model, targets)
    if variant == UNFUSED:
        replace_layers(model, lambda _, m: Unfused(m) if isinstance(m, MixedLoRALinear) else None)
    try:
        yield model
    finally:
        adapted = (MixedLoRALinear, Unfused)
        replace_layers(model, lambda _, m: m.base if isinstance(m, adapted) else None)


def _inject(model: nn.Module, targets: Sequence[str]) -> None:
    """`fedalt.inject`, or where fedalt's own needs are not installed, the same layers by hand."""
    try:
        from fedalt import inject
    except ImportError as error:
        print(f"fedalt.inject is done by hand here: {brief(error)}", file=sys.stderr)
        replace_layers(
            model,
            lambda name, module: (
                MixedLoRALinear(module, RANK, ALPHA, 0.0)
                if name.rpartition(".")[2] in targets and isinstance(module, nn.Linear)
                else None
            ),
        )
        return
    inject(model, RANK, ALPHA, 0.0, targets)


def training_call(model: nn.Module, size: Size, device: torch.device) -> Call:
    """One step on the same random batch."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None
    ids = torch.randint(size.vocabulary, (size.batch, size.length), device=device)
    model.train()

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def decoding_call(model: nn.Module, batch: int, device: torch.device) -> Call:
    """One more token for each of `batch` sequences; a CUDA graph's replay on a GPU."""
    from transformers import StaticCache

    model.eval()
    cache = StaticCache(config=model.config, max_cache_len=SLOTS)
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    position = torch.zeros(1, 1, dtype=torch.int64, device=device)
    # A ready mask of four dimensions: the model need not look at the cache to make one.
    everything = torch.zeros(batch, 1, 1, SLOTS, dtype=torch.bfloat16, device=device)
    rest = {}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "cache_position" in inspect.signature(inner.forward).parameters:  # older transformers
        rest["cache_position"] = position[0]

    @torch.no_grad()
    def step() -> Tensor:
        return model(
            input_ids=ids,
            attention_mask=everything,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            **rest,
        ).logits

    return captured([step]) if device.type == "cuda" else step


def times_ms(call: Call, device: torch.device, count: int) -> list[float]:
    """After two warm-up calls; the device's own time on a GPU."""
    for _ in range(2):
        call()
    if device.type == "cuda":
        return [each / 1e3 for each in event_times_us(call, count)]
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def measure(model: nn.Module, size: Size, device: torch.device) -> dict[str, Any]:
    """The figures of one variant."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step_ms = statistics.median(times_ms(training_call(model, size, device), device, STEPS))
    row: dict[str, Any] = {
        "step ms": step_ms,
        "training tokens/s": f"{1e3 * size.batch * size.length / step_ms:.0f}",
    }
    if cuda:
        row["peak GiB, model included"] = torch.cuda.max_memory_allocated() / 2**30
    for batch in DECODE_BATCHES:
        token_ms = statistics.median(times_ms(decoding_call(model, batch, device), device, 20))
        row[f"decode tokens/s, batch {batch}"] = f"{1e3 * batch / token_ms:.0f}"
    return row


def run(results: Path | None, tiny: bool = False, budget_s: float = 600.0) -> list[dict[str, Any]]:
    """Measures every variant while there is time; prints the table, writes it as it grows."""
    device = torch.device("cpu") if tiny else cuda_device()
    if reason := missing("transformers"):
        raise Unavailable(f"{reason}: pip install transformers")
    deadline = time.monotonic() + budget_s
    size = TINY if tiny else LLAMA_2_7B
    model = random_model(size, device)
    about = {
        "command": f"python -m bench model{' --tiny' if tiny else ''}",
        **surroundings(),
        **(describe(device) if device.type == "cuda" else {}),
        "sizes": ", ".join(f"{name} {value}" for name, value in size._asdict().items()),
        "adapters": f"rank {RANK}, no dropout",
        "step": "forward, loss, backward through the inputs, fused AdamW on the adapters",
        "decode": f"static cache of {SLOTS}, {'eager' if tiny else 'one CUDA graph a token'}",
    }
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    cases: list[tuple[str, tuple[str, ...]]] = [(BARE, ())]
    cases += [(v, t) for t in (QUERY_AND_VALUE, ALL_SEVEN) for v in (FEDALT, PEFT, UNFUSED)]
    for variant, targets in cases:
        adapted = {0: "nothing", len(ALL_SEVEN): "all seven"}.get(len(targets), "q and v")
        reason = missing("peft") if variant == PEFT else ""
        if time.monotonic() > deadline:
            reason = "the time is spent"
        if not reason:
            try:
                with dressed(model, variant, targets) as one:
                    row = measure(one, size, device)
                floor_ms = rows[0]["step ms"] if rows else row["step ms"]
                ratio = row["step ms"] / floor_ms
                rows.append({"adapted": adapted, "model": variant, **row, "step / bare": ratio})
            except RuntimeError as error:  # out of memory is one
                reason = brief(error)
        if reason:
            notes.append(f"{variant}, {adapted}: left out: {reason}")
        print(notes[-1] if reason else rows[-1], file=sys.stderr, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        if variant == BARE and not rows:
            raise Unavailable(f"the bare model does not run: {reason}")
        if results is not None:
            write_table(results, "model", TITLE, about, rows, notes)
    print("\n".join([markdown(rows[0], [row.values() for row in rows]), *notes]))
    return rows
