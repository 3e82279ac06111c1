"""The answers' loss in chunks of tokens: the same numbers, and never more logits than a chunk's."""

import copy
import sys
import types

import pytest
import torch
from torch import nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

import fedalt
from fedalt.config.schema import DataConfig, EvaluateConfig, ModelConfig
from fedalt.data.records import Record
from fedalt.data.tokens import IGNORED, collate, encode
from fedalt.evaluation.evaluate import generate
from fedalt.model import base as models
from fedalt.model.base import load_base
from fedalt.model.gates import GateMeter
from fedalt.model.logits import mark_chunkable, take_back
from fedalt.training import loss as losses
from fedalt.training.loss import answer_loss, token_losses
from fedalt_kernels import MixedLoRALinear
from tests.kernels.budget import assert_within_budget
from tests.training.memory_cases import WIDEST, gradients, some_batch, stirred

LORA = {"rank": 2, "alpha": 4, "dropout": 0.0}


@pytest.fixture
def base(tiny_base):
    return models.load_base(ModelConfig(str(tiny_base)))[0]


def with_bias(model):
    head = nn.Linear(32, WIDEST)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.normal_(generator=torch.Generator().manual_seed(0))
    model.lm_head = head.requires_grad_(False)


def tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


HEADS = {
    "frozen": (None, {}),
    "with a bias": (with_bias, {}),
    "tied": (tied, {}),
    "trained": (None, {"modules_to_save": ("lm_head",)}),
    "adapted": (None, {"target_modules": ("q_proj", "lm_head")}),
}


@pytest.mark.parametrize("head", HEADS)
def test_chunks_lose_no_more_than_the_whole_does(base, head):
    """Loss and gradients, beside those of all logits at once in fp32 and in fp64."""
    change, options = HEADS[head]
    if change:
        change(base)
    model = stirred(fedalt.inject(base, **{**LORA, "target_modules": ("q_proj",), **options}))
    wide, batch = copy.deepcopy(model).double(), some_batch(6)

    def loss(chunk):
        return lambda model: answer_loss(model, batch, chunk=chunk)

    calls = []
    with model.get_output_embeddings().register_forward_pre_hook(lambda m, x: calls.append(x)):
        got = gradients(model, loss(4))
    assert len(calls) > 4
    whole, truth = gradients(model, loss(10**6)), gradients(wide, loss(10**6))
    assert_within_budget(got, whole, truth, WIDEST)


def test_a_small_batch_is_what_the_model_alone_makes_of_it(base):
    """Bit for bit: no chunk is made where one would hold all."""
    batch = some_batch(6)
    kept = batch.labels.shape[1]
    with torch.no_grad():
        logits = base(**batch.inputs(), logits_to_keep=kept).logits[:, :-1]
        expected = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="none"
        )
        got = token_losses(base, batch)
    assert torch.equal(got.flatten(), expected)


class Rows(TorchDispatchMode):
    """The most rows of any tensor [..., vocabulary] that is made, but for views of the weight."""

    def __init__(self, weight):
        super().__init__()
        self.most, self._weight = 0, weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            wide = isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (WIDEST,)
            if wide and tensor.untyped_storage().data_ptr() != self._weight:
                self.most = max(self.most, tensor.numel() // WIDEST)
        return made


@pytest.mark.parametrize("grad", [True, False], ids=["training", "scoring"])
def test_no_more_logits_are_ever_made_than_a_chunk_has(base, grad):
    model, batch = stirred(fedalt.inject(base, **LORA)), some_batch(12)
    places = batch.labels[:, 1:].numel()
    assert (batch.labels[:, 1:] != IGNORED).sum() > 2 * 13
    most = {}
    for chunk in (13, places):
        with torch.set_grad_enabled(grad), Rows(model.lm_head.weight) as rows:
            loss = answer_loss(model, batch, chunk=chunk)
            if grad:
                loss.backward()
        most[chunk] = rows.most
    assert most[13] == 13
    assert most[places] >= places


def test_the_default_chunk_goes_by_the_vocabulary(base, monkeypatch):
    monkeypatch.setattr(losses, "MOST_LOGITS", 10 * WIDEST + 7)
    with torch.no_grad(), Rows(base.lm_head.weight) as rows:
        token_losses(base, some_batch(9))
    assert rows.most == 10


def test_gates_are_seen_at_every_token_of_a_chunked_pass(base):
    model, batch = stirred(fedalt.inject(base, **LORA)), some_batch(6)
    means = []
    for chunk in (4, 10**6):
        with torch.no_grad(), GateMeter(model) as meter:
            token_losses(model, batch, chunk)
        means.append(meter.means())
    assert means[0] == means[1]


SMALL = {
    "vocab_size": WIDEST,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
OTHERS = {
    "capped": (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16)), False),
    "not capped": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=None)),
        True,
    ),
    "scaled": (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)), False),
    "without positions": (
        lambda: BloomForCausalLM(
            BloomConfig(vocab_size=WIDEST, hidden_size=32, n_layer=1, n_head=2)
        ),
        True,
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_logits_that_are_not_the_heads_alone_are_made_by_the_model(kind):
    """A cap or a scale after the head shows in a forward of two tokens; then nothing is chunked.

    It shows whatever the tokens are: the padding token's logits are zero in these models.
    """
    make, chunkable = OTHERS[kind]
    torch.manual_seed(0)
    model, batch = make().eval().requires_grad_(False), some_batch(6)
    expected = token_losses(model, batch, 4)  # not marked yet: at once
    mark_chunkable(model)
    assert model.fedalt_chunkable == chunkable
    got = token_losses(model, batch, 4)
    assert torch.equal(got, expected) or chunkable
    torch.testing.assert_close(got, expected, rtol=0, atol=2**-20)  # of a few nats: 5 ulp


def test_chunks_and_dropout_in_the_head_draw_one_mask_each(base):
    """An adapted head with dropout: what the backward makes again is what the forward made."""
    options = {**LORA, "dropout": 0.5, "target_modules": ("lm_head",), "mixer": None}
    model = stirred(fedalt.inject(base, **options))
    batch = some_batch(6)
    model.train()
    b = model.lm_head.individual.b.requires_grad_(True)

    def loss():
        torch.manual_seed(1)
        return answer_loss(model, batch, chunk=4)

    loss().backward()
    slope = (b.grad.double() ** 2).sum().sqrt()
    step = 1e-2 * b.grad / slope
    with torch.no_grad():
        b += step
    up = loss().double()
    with torch.no_grad():
        b -= 2 * step
    down = loss().double()
    assert abs((up - down) / 2e-2 / slope - 1) < 1e-2  # central differences of size 1e-2


class StandIn:
    """Called as Liger-Kernel's loss is; its kernels want a GPU."""

    calls = 0

    def __init__(self, reduction):
        assert reduction == "sum"

    def __call__(self, weight, hidden, labels, bias):
        StandIn.calls += 1
        assert (hidden.ndim, labels.ndim) == (2, 1)
        logits = nn.functional.linear(hidden, weight, bias)
        return nn.functional.cross_entropy(logits, labels, reduction="sum")


def test_liger_kernel_takes_the_chunks_place_where_it_is_installed_on_a_gpu(base, monkeypatch):
    package = types.SimpleNamespace(LigerFusedLinearCrossEntropyLoss=StandIn)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.SimpleNamespace(transformers=package))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    head, gpu = base.get_output_embeddings(), torch.device("cuda")
    assert losses._fused_loss(head, torch.device("cpu")) is None
    fused = losses._fused_loss(head, gpu)
    assert isinstance(fused, StandIn)
    head.weight.requires_grad_(True)  # a trained head's gradient is made by chunks
    assert losses._fused_loss(head, gpu) is None
    head.weight.requires_grad_(False)

    model, batch = stirred(fedalt.inject(base, **LORA)), some_batch(6)
    wide = copy.deepcopy(model).double()

    def loss(chunk):
        return lambda model: answer_loss(model, batch, chunk=chunk)

    whole, truth = gradients(model, loss(10**6)), gradients(wide, loss(10**6))
    monkeypatch.setattr(losses, "_fused_loss", lambda head, device: fused)
    got = gradients(model, loss(4))
    assert StandIn.calls == 1
    assert_within_budget(got, whole, truth, WIDEST)
    with torch.no_grad():
        answer_loss(model, batch, chunk=4)
    assert StandIn.calls == 1
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    assert losses._fused_loss(head, gpu) is None


def test_no_copy_of_the_head_is_made_in_16_bits(tiny_base):
    """A profile's, since PyTorch makes such copies below what Python can intercept."""
    model, tokenizer = load_base(ModelConfig(path=str(tiny_base), dtype="bfloat16"))
    head = model.get_output_embeddings()
    fedalt.inject(model, rank=2, target_modules=("q_proj",))
    records = [Record(f"say {i}", "abc" * (1 + i)) for i in range(4)]
    examples = encode(records, tokenizer, DataConfig())
    batch = collate(examples, tokenizer.pad_token_id, torch.device("cpu"))
    with profile(record_shapes=True) as seen:
        for chunk in (None, 3):
            answer_loss(model, batch, chunk=chunk).backward()
        generate(model, tokenizer, examples, EvaluateConfig(max_new_tokens=2))
    sides = sorted(head.weight.shape)
    shapes = [
        (event.name, shape)
        for event in seen.events()
        for shape in event.input_shapes or ()
        if len(shape) == 3 and sorted(shape[1:]) == sides
    ]
    assert shapes == []
    # Without it there is one for every product, which is what is looked for.
    take_back(head)
    with profile(record_shapes=True) as seen, torch.no_grad():
        token_losses(model, batch)
    copies = [e for e in seen.events() if e.name == "aten::copy_" and len(e.input_shapes[0]) == 3]
    assert any(sorted(event.input_shapes[0][1:]) == sides for event in copies)


def test_an_adapted_head_needs_no_rows_together(tiny_base):
    model, _ = load_base(ModelConfig(path=str(tiny_base), dtype="bfloat16"))
    ids = torch.arange(3, 15).view(2, 6)
    expected = model(ids, logits_to_keep=2).logits
    fedalt.inject(model, rank=2, target_modules=("lm_head",))
    assert isinstance(model.lm_head, MixedLoRALinear)
    assert torch.equal(model(ids, logits_to_keep=2).logits, expected)  # its B is zero
