"""The rivals' own promises: FedIT is FedAvg, products are exact, ranks are cut back at their best."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedalt
from fedalt import stage
from fedalt.checkpoint import load_latest
from fedalt.cohort import derive_seed
from fedalt.methods import get_method
from fedalt.states import mixed_layers
from tests.kernels.budget import FACTORS, excess

from .method_cases import (
    EXAMPLES,
    SCALE,
    A,
    B,
    Counted,
    assert_product,
    integers,
    round_of,
    run_nudged,
    toys,
    truncated,
)

IDS = torch.tensor([[1, 10, 20, 30, 40], [1, 50, 60, 70, 80]])


@pytest.fixture
def config(tiny_config):
    """Two rounds of three steps on the q and v projections, whose learning rate goes ½, 1, ½."""
    lora = replace(tiny_config.lora, dropout=0.0, target_modules=("q_proj", "v_proj"))
    train = replace(tiny_config.train, warmup_steps=1, weight_decay=0.01, learning_rate=1e-2)
    return replace(tiny_config, lora=lora, train=train)


def test_fedit_by_hand():
    """(10 · 1 + 6 · 5 + 4 · -10) / 20 = 0 and (10 · 2 + 6 · 0 + 4 · 5) / 20 = 2."""
    clients = {
        client: {f"q.{A}": torch.tensor([[a]]), f"q.{B}": torch.tensor([[b]])}
        for client, a, b in (("ann", 1.0, 2.0), ("bob", 5.0, 0.0), ("cyd", -10.0, 5.0))
    }
    install = get_method("fedit").combine(round_of("fedit", clients)).install
    for client in ("ann", "bob", "cyd", ""):
        assert (install(client)[f"q.{A}"].item(), install(client)[f"q.{B}"].item()) == (0, 2)
    base = get_method("fedex-lora").combine(round_of("fedex-lora", clients)).base["q"].item()
    assert base == pytest.approx(2 * (10 * 2 + 6 * 0 - 4 * 50) / 20, rel=2**-23)  # 2 · 0 off it
    base = get_method("flora").combine(round_of("flora", clients)).base["q"].item()
    assert base == pytest.approx(-18, rel=2**-23)


class PlainFedAvg:
    """McMahan's algorithm on plain LoRA, without a line of the project's: hooks, AdamW, a mean."""

    def __init__(self, config, dtype):
        self.config, self.dtype = config, dtype
        model = AutoModelForCausalLM.from_pretrained(config.model.path)
        self.model = model.to(dtype).requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        self.factors = {}

    def hook(self, name):
        def add(module, inputs, output):
            a, b = self.factors[f"{name}.{A}"], self.factors[f"{name}.{B}"]
            linear = torch.nn.functional.linear
            return output + SCALE * linear(linear(inputs[0], a), b)

        return add

    def examples(self, client):
        path = Path(self.config.data.path) / client / "train.jsonl"
        for row in map(json.loads, path.read_text().splitlines()):
            prompt = f"### Instruction:\n{row['instruction']}\n\n### Response:\n"
            ids = [self.tokenizer(text, add_special_tokens=False) for text in (prompt, row["output"])]
            yield [1, *ids[0]["input_ids"]], [*ids[1]["input_ids"], 2]

    def loss(self, batch):
        """Mean cross entropy of all answer tokens, one unpadded record at a time."""
        total, count = 0.0, 0
        for prompt, answer in batch:
            logits = self.model(torch.tensor([prompt + answer])).logits[0]
            at = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            wanted = logits.log_softmax(-1)[list(at), answer]
            total, count = total - wanted.sum(), count + len(answer)
        return total / count

    def train(self, client, number, start):
        self.factors = {n: t.clone().requires_grad_() for n, t in start.items()}
        settings, examples = self.config.train, list(self.examples(client))
        adamw = torch.optim.AdamW(
            self.factors.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, number, client))
        queue = []
        for factor in (0.5, 1.0, 0.5):
            if not queue:
                order = torch.randperm(len(examples), generator=generator).tolist()
                queue = [order[i : i + 4] for i in range(0, len(order), 4)]
            loss = self.loss([examples[i] for i in queue.pop(0)])
            for parameter, gradient in zip(
                self.factors.values(),
                torch.autograd.grad(loss, list(self.factors.values())),
                strict=True,
            ):
                parameter.grad = gradient
            norm = math.sqrt(sum(float(t.grad.square().sum()) for t in self.factors.values()))
            for parameter in self.factors.values():
                parameter.grad *= min(1.0, 1.0 / norm)
            adamw.param_groups[0]["lr"] = settings.learning_rate * factor
            adamw.step()
        return {n: t.detach() for n, t in self.factors.items()}

    def run(self, start):
        state = {name: tensor.to(self.dtype) for name, tensor in start.items()}
        for name in [n.removesuffix(f".{A}") for n in state if n.endswith(A)]:
            self.model.get_submodule(name).register_forward_hook(self.hook(name))
        for number in (1, 2):
            ends = {client: self.train(client, number, state) for client in EXAMPLES}
            state = {
                name: sum(EXAMPLES[c] * ends[c][name] for c in EXAMPLES) / 20 for name in state
            }
        return state


def flat(state, start):
    """What was learned, as one vector."""
    return torch.cat([(state[n].double() - start[n].double()).flatten() for n in sorted(start)])


def loss64(model, batch):
    kept = batch.labels.shape[1]
    logits = model(**batch.inputs()).logits[:, -kept:-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())


def test_fedit_is_plain_fedavg(config, monkeypatch, tmp_path):
    """In fp64 to fp64's rounding, and in fp32 within the error budget.

    A computation's rounding errors grow with the unit roundoff, so what two fp64 runs may differ
    by is what the fp32 run loses times 2⁻⁵³ / 2⁻²⁴, from each of the two, at a factor of luck.
    """
    config = replace(config, method="fedit", evaluate=replace(config.evaluate, every=2))
    fedalt.Federation(config).run()
    start = load_latest(Path(config.out)).path.parent / "round-0000"
    single = load_latest(Path(config.out)).used("ann").read()
    model, _ = stage.load_model(config, ())
    first = {n: t.detach() for n, t in model.named_parameters() if n.endswith((A, B))}
    assert not start.exists()  # the start is the seed's, and was not kept

    load = stage.load_model

    def in_double(*arguments):
        model, task = load(*arguments)
        return model.double(), task

    with monkeypatch.context() as patch:
        patch.setattr(stage, "load_model", in_double)
        patch.setattr("fedalt.tasks.answer_loss", loss64)
        patch.setattr(stage.states, "fresh_state", lambda model, seed: widened(model, first))
        double = replace(config, out=str(tmp_path / "double"))
        fedalt.Federation(double).run()
        exact = load_latest(Path(double.out)).used("ann").read()

    truth = flat(PlainFedAvg(config, torch.float64).run(first), first)
    eager = flat(PlainFedAvg(config, torch.float32).run(first), first)
    assert truth.abs().max() > 1e-2  # six steps of about 1e-2
    lost = (eager - truth).abs().max()
    allowed = 2 * FACTORS["max"] * 2.0**-29 * lost
    print((flat(exact, first) - truth).abs().max() / allowed, lost, excess(flat(single, first).float(), eager.float(), truth, length=48))
    assert (flat(exact, first) - truth).abs().max() <= allowed
    over = excess(flat(single, first).float(), eager.float(), truth, length=48)
    assert max(over.values()) <= 1
