"""Bases of few bits: loaded, known by their bits and scales, and a whole run on each."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedalt
from fedalt.config.schema import BUILTIN_BASE, BUILTIN_VIT, ModelConfig
from fedalt.errors import InputError
from fedalt.model import base as models
from fedalt.model.quantized import is_quantized
from fedalt.model.states import adapter_state, base_fingerprint
from fedalt.model.vision import load_image_base
from fedalt.serving.export import export_client, load_export
from fedalt.training.loss import answer_loss, class_loss
from fedalt_kernels import MixedLoRALinear
from tests.data.test_images import DIGIT_NAMES as NAMES
from tests.run.test_run import cut_short, events_of, quick, record_of
from tests.training.memory_cases import gradients, same_bits, some_batch, stirred

pytest.importorskip("bitsandbytes")

KINDS = {"nf4": "Linear4bit", "int8": "Linear8bitLt", "fp8": "Fp8Linear"}


def load(kind, path=BUILTIN_BASE):
    return models.load_base(ModelConfig(path, quantization=kind))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_layers_but_the_head_are_quantized(kind, tiny_base):
    model = load(kind, str(tiny_base))
    block = model.model.layers[0]
    for layer in (block.self_attn.q_proj, block.mlp.down_proj):
        assert type(layer).__name__ == KINDS[kind]
    assert type(model.lm_head) is torch.nn.Linear
    assert model.fedalt_chunkable
    assert not any(parameter.requires_grad for parameter in model.parameters())
    fedalt.inject(model, rank=2, target_modules="all-linear")
    layers = [m for m in model.modules() if isinstance(m, MixedLoRALinear)]
    assert len(layers) == 14
    assert all(is_quantized(layer.base) for layer in layers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_known_by_its_bits_and_its_scales(kind, tiny_base):
    one, other = load(kind, str(tiny_base)), load(kind, str(tiny_base))
    first = base_fingerprint(one)
    assert base_fingerprint(other) == first
    assert first != base_fingerprint(load("none", str(tiny_base)))
    layer = other.model.layers[1].mlp.up_proj
    scale = {
        "nf4": lambda: layer.weight.quant_state.state2.absmax,
        "int8": lambda: layer.state.SCB,
        "fp8": lambda: layer.scale,
    }[kind]()
    scale[0] *= 2
    assert base_fingerprint(other) != first


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_leaves_the_layers_without_adapters_as_they_were(kind, tiny_base):
    """Else a resumed run, which trains before it scores, would end in other bits."""
    model = stirred(fedalt.inject(load(kind, str(tiny_base)), rank=2, target_modules=("q_proj",)))
    batch = some_batch(4)

    def loss(model):
        return answer_loss(model, batch)

    before, grads = base_fingerprint(model), gradients(model, loss)
    with torch.no_grad():
        scored = loss(model)
    assert base_fingerprint(model) == before
    assert same_bits(gradients(model, loss), grads)
    with torch.no_grad():
        assert torch.equal(loss(model), scored)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run_on_a_quantized_base(kind, tiny_config, tmp_path):
    """With all that saves memory on a CPU, kept moments of eight bits among it: it trains, resumes
    to the same bits, and a client of it is loaded and exported with the same logits."""
    config = quick(tiny_config, method="fedalt-kept-optimizer")
    config = replace(
        config,
        evaluate=replace(config.evaluate, parts=False),
        model=replace(config.model, quantization=kind),
        lora=replace(config.lora, target_modules=("q_proj", "up_proj")),
        train=replace(
            config.train,
            optimizer="adamw_8bit",
            gradient_checkpointing=True,
            loss_chunk=2,
            micro_batch=1,
        ),
    )
    uncut = replace(config, out=str(tmp_path / "uncut"))
    results = fedalt.Federation(uncut).run().results
    cut_short(config)
    fedalt.Federation(config).run(resume=True)
    assert record_of(Path(config.out)) == record_of(Path(uncut.out))
    assert {event["micro_batch"] for event in events_of(config, "train")} == {1}
    for client in results["clients"].values():
        assert client["last"]["loss"] < client["curve"][0]["loss"]

    ids = torch.tensor([[1, 50, 60, 70]])
    model, _ = fedalt.load_client(config.out, "bob")
    again, _ = load_export(export_client(config.out, "bob", tmp_path / "bob"))
    assert same_bits(adapter_state(model), adapter_state(again))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_classifier_is_quantized_but_for_its_new_head(kind):
    where = ModelConfig(BUILTIN_VIT, quantization=kind)
    model = load_image_base(where, ["cat", "dog"], ("classifier",))[0]
    assert type(model.classifier) is torch.nn.Linear
    plain = load_image_base(ModelConfig(BUILTIN_VIT), ["cat", "dog"], ("classifier",))[0]
    assert torch.equal(model.classifier.weight, plain.classifier.weight)
    fedalt.inject(model, rank=2, target_modules=("all-linear",), modules_to_save=("classifier",))
    assert any(is_quantized(module) for module in model.modules())
    stirred(model)
    pixels = torch.zeros(2, model.config.num_channels, *[model.config.image_size] * 2)
    grads = gradients(model, lambda model: class_loss(model, pixels, [0, 1]))
    assert all(grad.isfinite().all() for grad in grads.values())
    assert grads["classifier.weight"].any()
    assert load_image_base(where, NAMES)[0].config.num_labels == 10


def test_a_method_that_adds_to_the_base_is_refused(tiny_config):
    config = replace(
        tiny_config, method="flora", model=replace(tiny_config.model, quantization="nf4")
    )
    message = "model.quantization: flora adds to the base weights, which nf4 cannot take; use none"
    with pytest.raises(InputError, match=message):
        fedalt.Federation(config).run()
    assert not Path(config.out).exists()


def test_a_quantized_module_cannot_be_trained_whole(tiny_base):
    model = load("fp8", str(tiny_base))
    with pytest.raises(InputError, match=r"lora.modules_to_save: 'model.layers' is quantized"):
        fedalt.inject(model, rank=2, modules_to_save=("model.layers",))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_without_bitsandbytes_one_line_says_what_to_install(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError) as caught:
        load(kind)
    assert str(caught.value) == (
        f"model.quantization={kind} wants bitsandbytes: pip install 'fedalt[quantized]'"
    )


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match=r"model.quantization must be one of none, nf4, int8, fp8"):
        ModelConfig(quantization="int4")
