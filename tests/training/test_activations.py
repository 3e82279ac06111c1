"""What is kept for the backward: blocks computed again, and tensors that wait in host memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaForCausalLM

import fedalt
from fedalt.config.schema import BUILTIN_VIT, ModelConfig
from fedalt.model.states import adapter_state, load_adapter_state
from fedalt.model.vision import load_image_base
from fedalt.training import activations
from fedalt.training.activations import offloading, recomputing
from fedalt.training.client import train_client
from fedalt.training.loss import answer_loss, class_loss
from tests.data.test_images import DIGIT_NAMES as NAMES
from tests.training.memory_cases import gradients, same_bits, some_batch, stirred
from tests.training.test_client import text_client


@pytest.fixture
def client(tiny_config):
    """Every linear layer adapted, half of each branch's input dropped; model, task, examples."""
    config = replace(tiny_config, lora=replace(tiny_config.lora, dropout=0.5))
    model, task, examples = text_client(config)
    return stirred(model), task, examples


def kept_bytes(step):
    """Bytes that a step's graph keeps beside what was there before."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


def test_blocks_that_are_computed_again_draw_their_dropout_again(client):
    model, batch = client[0], some_batch(6)

    def loss(model):
        return answer_loss(model, batch)

    plain = gradients(model, loss)
    with recomputing(model, True):
        again = gradients(model, loss)
    assert same_bits(plain, again)
    assert not same_bits(plain, gradients(model, loss, seed=8))  # the masks do matter
    sizes = []
    for wanted in (False, True):
        with recomputing(model, wanted):
            model.train()
            sizes.append(kept_bytes(lambda: loss(model)))
            model.eval()
    assert sizes[1] < sizes[0] / 2


def test_a_round_is_the_same_with_its_blocks_computed_again(client, tiny_config):
    model, task, examples = client
    start, ends = adapter_state(model), []
    for again in (False, True):
        load_adapter_state(model, start)
        config = replace(tiny_config.train, gradient_checkpointing=again)
        trains = [("individual", "mixer")]
        result = train_client(model, examples, config, task.loss, trains=trains, seed=7)
        ends.append((result.loss, adapter_state(model)))
        flags = [getattr(m, "gradient_checkpointing", False) for m in model.modules()]
        assert not any(flags)  # nor in evaluation
        assert not model.get_input_embeddings()._forward_hooks
    assert ends[0][0] == ends[1][0]
    assert same_bits(ends[0][1], ends[1][1])


def test_a_vision_transformer_computes_its_blocks_again_too():
    model = load_image_base(ModelConfig(BUILTIN_VIT), NAMES)[0]
    fedalt.inject(model, rank=2, alpha=4, dropout=0.5, target_modules="all-linear")
    stirred(model)
    size = model.config.image_size
    pixels = torch.randn(3, model.config.num_channels, size, size)

    def loss(model):
        return class_loss(model, pixels, [0, 3, 1])

    plain = gradients(model, loss)
    with recomputing(model, True):
        assert same_bits(plain, gradients(model, loss))


def test_a_model_that_cannot_is_refused_before_anything_is_written(tiny_config, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    config = replace(tiny_config, train=replace(tiny_config.train, gradient_checkpointing=True))
    message = "train.gradient_checkpointing: LlamaForCausalLM has none; turn it off"
    with pytest.raises(fedalt.InputError, match=message):
        fedalt.Federation(config).run()
    assert not Path(config.out).exists()


@pytest.mark.parametrize("again", [False, True], ids=["", "with recomputation"])
def test_offloaded_tensors_come_back_and_weights_stay(client, again, monkeypatch):
    """On a CPU the hook copies from host to host; all else is as on a GPU."""
    monkeypatch.setattr(activations, "SMALL", 256)
    model, batch = client[0], some_batch(6)
    taken, pack = [], activations.Offload.pack

    def watched(self, tensor):
        packed = pack(self, tensor)
        taken.append((tensor, packed))
        return packed

    monkeypatch.setattr(activations.Offload, "pack", watched)

    def offloaded(model):
        with offloading(model, True):
            return answer_loss(model, batch)

    plain = gradients(model, lambda model: answer_loss(model, batch))
    with recomputing(model, again):
        assert same_bits(plain, gradients(model, offloaded))
    copies = [(tensor, packed) for tensor, packed in taken if packed is not tensor]
    assert copies
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for tensor, (host, device) in copies:
        assert tensor.untyped_storage().data_ptr() not in weights
        assert tensor.numel() * tensor.element_size() >= 256
        assert host.data_ptr() != tensor.data_ptr()
        assert device == tensor.device
    assert any(tensor.untyped_storage().data_ptr() in weights for tensor, _ in taken) or again


def test_offload_is_followed_in_fake_tensors_too():
    """Where data have no addresses: ``fedalt memory`` counts on it."""
    with FakeTensorMode():
        offload = activations.Offload(torch.nn.Linear(4, 4))
        assert isinstance(offload.pack(torch.empty(1024, 1024)), tuple)
