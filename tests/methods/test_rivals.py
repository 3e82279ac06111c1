"""The rivals' own promises: FedIT is FedAvg, products are exact, ranks are cut at their best."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedalt
from fedalt.methods.fedalt import get_method
from fedalt.model import states
from fedalt.model.states import mixed_layers
from fedalt.run import stage
from fedalt.run.cohort import derive_seed
from fedalt.store.checkpoint import load_checkpoint, load_latest
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
            ids = [
                self.tokenizer(text, add_special_tokens=False) for text in (prompt, row["output"])
            ]
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
                parameter.grad *= min(1.0, 1.0 / (norm + 1e-6))  # as PyTorch clips
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


def last(config):
    fedalt.Federation(config).run()
    return load_latest(Path(config.out)).used("ann").read()


def test_fedit_is_plain_fedavg(config, monkeypatch, tmp_path):
    """In fp64 to fp64's rounding, and in fp32 within the error budget.

    Rounding errors grow with the unit roundoff, so what two fp64 computations may differ by is what
    one in fp32 loses, times 2⁻⁵³ / 2⁻²⁴, from each of the two.
    """
    config = replace(config, method="fedit", save_total_limit=3)
    single = last(config)
    first = load_checkpoint(Path(config.out) / "checkpoints" / "round-0000").used("ann").read()
    load = stage.load_model

    def in_double(*arguments):
        model, task = load(*arguments)
        return model.double(), task

    def same_start(model, seed):
        states.load_adapter_state(model, first)
        return states.adapter_state(model)

    monkeypatch.setattr(stage, "load_model", in_double)
    monkeypatch.setattr(stage, "fresh_state", same_start)
    double = last(replace(config, out=str(tmp_path / "double")))

    truth = flat(PlainFedAvg(config, torch.float64).run(first), first)
    eager = flat(PlainFedAvg(config, torch.float32).run(first), first)
    assert truth.abs().max() > config.train.learning_rate
    allowed = 2 * FACTORS["max"] * 2.0**-29 * (eager - truth).abs().max()
    assert (flat(double, first) - truth).abs().max() <= allowed
    over = excess(flat(single, first).float(), eager.float(), truth, length=48)
    assert max(over.values()) <= 1


def weights_of(config):
    """By layer, the weight that ann's loaded model multiplies with, adapters merged in fp64."""
    model, _ = fedalt.load_client(config.out, "ann")
    merged = {}
    for name, layer in mixed_layers(model):
        low = layer.individual.b.double() @ layer.individual.a.double()
        merged[name] = (layer.weight.double() + layer.scaling * low).detach().numpy()
    return model, merged


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("fedex-lora", {}), ("flora", {}), ("flora", {"bob": 1, "cyd": 3})],
)
def test_a_round_ends_at_the_exact_mean_of_the_clients_models(name, ranks, config, monkeypatch):
    """``W + Σ p s_k B_k A_k``, as weights and as logits.

    The change is rounded to fp32, and its sum with W once more: ``2⁻²⁴ (|change| + |W'|)``. FedIT
    misses the same mean by far more.
    """
    lora = replace(config.lora, client_ranks=ranks)
    run = run_nudged(replace(config, lora=lora), monkeypatch, method=name, rounds=1)
    scales = {client: 4 / ranks.get(client, 2) for client in EXAMPLES}
    counted = Counted(run.counted(1).states, scales=scales)
    model, merged = weights_of(run.config)
    plain = AutoModelForCausalLM.from_pretrained(config.model.path)
    for layer, got in merged.items():
        first = plain.get_submodule(layer).weight.detach().double().numpy()
        wanted = first + counted.product(layer)
        change = model.get_submodule(layer).weight.detach().double().numpy() - first
        allowed = 2.0**-24 * (abs(change) * (1 + 2.0**-23) + abs(first + change)) + 2.0**-45
        assert (abs(got - wanted) <= allowed).all()
        if name == "fedex-lora":
            mean = counted.mean(A, B)
            b, a = (mean[f"{layer}.{part}"].double().numpy() for part in (B, A))
            assert abs(first + SCALE * b @ a - wanted).max() > 1000 * allowed.max()
        added = torch.from_numpy(counted.product(layer)).float()
        plain.get_submodule(layer).weight.data += added  # eager PyTorch's own two roundings
    exact = AutoModelForCausalLM.from_pretrained(config.model.path).double()
    for layer in merged:
        weight = exact.get_submodule(layer).weight.data
        weight += torch.from_numpy(counted.product(layer))
    with torch.no_grad():
        got, eager, truth = (m.eval()(IDS).logits for m in (model, plain, exact))
    over = excess(got, eager, truth, length=48)
    assert max(over.values()) <= 1


def test_flora_begins_again_with_one_new_draw_a_round_at_every_rank(config, monkeypatch):
    lora = replace(config.lora, client_ranks={"cyd": 3})
    run = run_nudged(replace(config, lora=lora), monkeypatch, method="flora")
    starts = {turn: {n: t for n, t in s.items() if n.endswith(A)} for turn, s in run.before.items()}
    for name, drawn in starts[2, "ann"].items():
        assert torch.equal(drawn, starts[2, "bob"][name])
        assert not torch.equal(drawn, starts[1, "ann"][name])
        assert drawn.abs().max() <= 32**-0.5  # Kaiming's bound for 32 inputs
        assert (drawn.shape[0], starts[2, "cyd"][name].shape[0]) == (2, 3)


def test_flexlora_cuts_the_mean_product_back_to_each_rank_as_well_as_any_factors_can(
    config, monkeypatch
):
    """Eckart and Young: the residual's singular values are those that were cut off.

    By Weyl they move no further than the norm of what rounding the factors changes,
    ``2⁻²² |B| |A|``.
    """
    ranks = {"ann": 1, "bob": 2, "cyd": 3}
    lora = replace(config.lora, client_ranks=ranks)
    run = run_nudged(replace(config, lora=lora), monkeypatch, method="flexlora", rounds=1)
    scales = {client: 4 / rank for client, rank in ranks.items()}
    counted = Counted(run.counted(1).states, scales=scales)
    for layer in counted.layers():
        product = counted.product(layer)
        values = np.linalg.svd(product)[1]
        assert values[3] > 1e-3 * values[0]  # even rank 3 is cut
        for client, rank in ranks.items():
            state = run.saved(1).used(client)
            b, a = (state[f"{layer}.{part}"].double().numpy() for part in (B, A))
            assert (b.shape, a.shape) == ((32, rank), (rank, 32))
            residual = np.linalg.svd(product - scales[client] * b @ a)[1]
            kept_back = np.concatenate([values[rank:], np.zeros(rank)])
            rounded = 2.0**-22 * scales[client] * np.linalg.norm(abs(b) @ abs(a))
            assert (abs(residual - kept_back) <= rounded + 2.0**-40 * values[0]).all()


def test_flexlora_is_exact_where_the_rank_suffices():
    """Clients that share A have a mean product of A's rank, 2: enough for 2 and 3, not for 1."""
    clients = toys()
    shared = {f"{layer}.{A}": clients["ann"][f"{layer}.{A}"] for layer in ("q", "v")}
    clients = {client: state | shared for client, state in clients.items()}
    ranks = {"bob": 1, "zoe": 3}
    combined = get_method("flexlora").combine(round_of("flexlora", clients, ranks=ranks))
    scales = {"bob": 4.0}
    for layer in ("q", "v"):
        product = Counted(clients, scales=scales).product(layer)
        for client, rank in (("ann", 2), ("bob", 1), ("zoe", 3)):
            got, names = combined.install(client), (f"{layer}.{A}", f"{layer}.{B}")
            wanted = product if rank > 1 else truncated(product, 1)
            assert_product(got, *names, 4 / rank, wanted)
        assert np.linalg.matrix_rank(product) == 2
        assert not combined.install("zoe")[f"{layer}.{B}"][:, 2].any()


@pytest.mark.parametrize(("method", "rank"), [("fedex-lora", 8), ("flora", 6)])
@pytest.mark.parametrize("size", [8, 64])
def test_a_change_of_the_base_is_sent_as_factors_or_whole_whichever_is_less(method, rank, size):
    """Three clients of rank 2; FedEx-LoRA's mean is two more."""
    clients = {
        client: {f"q.{A}": integers(i, 2, size), f"q.{B}": integers(i + 9, size, 2)}
        for i, client in enumerate(EXAMPLES)
    }
    combined = get_method(method).combine(round_of(method, clients))
    assert combined.extra_bytes == 4 * min(rank * 2 * size, size * size)
