"""A local training step of FedALT on the built-in base, beside the same step with one PEFT LoRA.

Every linear layer is adapted at rank 8; the step is what a client runs: loss of the answers,
backward, clipping, AdamW. FedALT's holds two adapters and a mixer a layer, PEFT's one adapter.
The bare base, whose gradient flows back to the first layer, is the floor. One thread, as in
``fedalt compare --jobs 2``.

    python -m pytest bench/test_step.py
"""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from fedalt import inject
from fedalt.config.schema import DataConfig, ModelConfig, PartitionConfig, TrainConfig
from fedalt.data import load_clients
from fedalt.data.tokens import Batch, collate, encode
from fedalt.model.base import load_base
from fedalt.training.loss import answer_loss

from .measure import Interleaved, Step

RANK, ALPHA = 8, 16
ROUNDS, WARM_UP = 40, 5
PEFT, FEDALT = "one PEFT LoRA", "FedALT"


def with_fedalt(dropout: float) -> nn.Module:
    base, _ = load_base(ModelConfig())
    return inject(base, RANK, ALPHA, dropout, "all-linear")


def with_plain_lora(dropout: float) -> nn.Module:
    base, _ = load_base(ModelConfig())
    return inject(base, RANK, ALPHA, dropout, "all-linear", rest_of_world=False)


def with_peft(dropout: float) -> nn.Module:
    base, _ = load_base(ModelConfig())
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear"
    )
    return peft.get_peft_model(base, config)


def bare(dropout: float) -> nn.Module:
    base, _ = load_base(ModelConfig())
    base.get_input_embeddings().register_forward_hook(_ask_for_gradient)
    return base


def _ask_for_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()


CANDIDATES: dict[str, Callable[[float], nn.Module]] = {
    PEFT: with_peft,
    FEDALT: with_fedalt,
    "one LoRA, our layer": with_plain_lora,
    "bare base": bare,
}


def client_step(model: nn.Module, batch: Batch, config: TrainConfig) -> Step:
    """What `fedalt.training.train_client` does with every batch."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None
    model.train()

    def step() -> None:
        answer_loss(model, batch).backward()
        if optimizer is not None:
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_local_step(
    dropout: float, benchmark: Any, one_thread: None, step_results: list[dict[str, Any]]
) -> None:
    config = TrainConfig()
    _, tokenizer = load_base(ModelConfig())
    client = load_clients(DataConfig(), PartitionConfig(), seed=0)[0]
    examples = encode(client.read().train[: config.batch_size], tokenizer, DataConfig())
    batch = collate(examples, tokenizer.pad_token_id, torch.device("cpu"))

    models = {name: build(dropout) for name, build in CANDIDATES.items()}
    losses = [answer_loss(model.eval(), batch).item() for model in models.values()]
    assert max(losses) - min(losses) < 1e-4  # every B is zero yet: all are the base

    timing = Interleaved({n: client_step(m, batch, config) for n, m in models.items()})
    timing.warm_up(WARM_UP)
    benchmark.pedantic(timing.round, rounds=ROUNDS)
    for name in models:
        p20, median, p80 = timing.percentiles_ms(name)
        step_results.append(
            {
                "dropout": str(dropout),
                "step": name,
                "p20 ms": p20,
                "median ms": median,
                "p80 ms": p80,
                "time / one PEFT LoRA": timing.ratio(name, PEFT),
            }
        )
