"""Mean gates of models at work, against gates found by hand and from each layer's input."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import fedalt
from fedalt.config.schema import DataConfig, EvaluateConfig, ModelConfig
from fedalt.data import Record
from fedalt.data.tokens import collate, encode
from fedalt.evaluation.evaluate import evaluate_images, evaluate_text
from fedalt.model.base import load_base
from fedalt.model.gates import GateMeter
from fedalt.model.states import INDIVIDUAL, REST_OF_WORLD, adapter_alone, mixed_layers
from fedalt.training.loss import answer_loss

RECORDS = [Record("say " + "x" * n, "y" * (1 + n % 3)) for n in (1, 9, 4, 17, 2)]
LOG_3 = math.log(3)


class OneLayer(nn.Module):
    """A model that shows its layer the input in the form that a test asks for."""

    def __init__(self, form=lambda x: x, **settings):
        super().__init__()
        self.layer, self.form = nn.Linear(2, 2), form
        settings = {"rank": 1, "dropout": 0.0, "target_modules": "layer", **settings}
        fedalt.inject(self, **settings)

    def forward(self, x, attention_mask=None):
        return self.layer(self.form(x))


def one_layer(form=lambda x: x, **settings):
    """Its gate is sigmoid(x_0): 1/2 at 0, 3/4 at ln 3, 9/10 at ln 9."""
    model = OneLayer(form, **settings)
    with torch.no_grad():
        model.layer.mixer.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    return model


def inputs(*rows, dtype=torch.float32):
    """x [B, L, 2] from the rows' x_0; x_1 is to make no difference."""
    first = torch.tensor(rows, dtype=dtype)
    return torch.stack([first, torch.ones_like(first)], -1)


def measure(model, *calls):
    meter = GateMeter(model)
    for x, mask in calls:
        with meter:
            model(x, attention_mask=None if mask is None else torch.tensor(mask))
    return meter.means()


def test_every_token_counts_without_a_mask():
    means = measure(one_layer(), (inputs([0.0, LOG_3], [LOG_3, 2 * LOG_3]), None))
    assert means == pytest.approx({"layer": (1 / 2 + 3 / 4 + 3 / 4 + 9 / 10) / 4})


@pytest.mark.parametrize("filler", [-7.0, math.nan])
def test_padding_does_not_count(filler):
    x = inputs([filler, filler, LOG_3], [0.0, LOG_3, 2 * LOG_3])
    means = measure(one_layer(), (x, [[0, 0, 1], [1, 1, 1]]))
    assert means == pytest.approx({"layer": (3 / 4 + 1 / 2 + 3 / 4 + 9 / 10) / 4})


def test_passes_count_by_their_tokens():
    calls = [(inputs([-7.0, 0.0]), [[0, 1]]), (inputs([LOG_3, LOG_3]), None)]
    assert measure(one_layer(), *calls) == pytest.approx({"layer": (1 / 2 + 2 * 3 / 4) / 3})


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        (lambda x: x.flatten(0, 1), (3 / 4 + 1 / 2 + 9 / 10) / 3),
        (lambda x: x[:, -1:], (3 / 4 + 9 / 10) / 2),  # as in generation, over a cache
    ],
)
def test_the_mask_fits_other_forms_of_the_input(form, wanted):
    x = inputs([-7.0, LOG_3], [0.0, 2 * LOG_3])
    assert measure(one_layer(form), (x, [[0, 1], [1, 1]])) == pytest.approx({"layer": wanted})


@pytest.mark.parametrize(
    ("form", "mask"),
    [
        (lambda x: x.flatten(0, 1)[:1], [[0, 1, 1], [1, 1, 1]]),  # as an expert sees them
        (lambda x: x[:, 0], [[0, 1, 1], [1, 1, 1]]),  # one token a row, as a pooler
        (lambda x: x.transpose(0, 1), [[0, 1, 1], [1, 1, 1]]),
        (lambda x: x, [[[[0.0] * 3] * 3]] * 2),  # to be added to scores [B, heads, L, L]
        (lambda x: x, [[[[0.0] * 3]]] * 2),  # of as many numbers as there are tokens
        (lambda x: x, [[1, 1], [1, 1]]),  # shorter than x
    ],
)
def test_tokens_that_the_mask_does_not_tell_of_do_not_count(form, mask):
    x = inputs([-7.0, LOG_3, 0.0], [0.0, 0.0, LOG_3])
    assert measure(one_layer(form), (x, mask)) == {}


def test_padding_alone_gives_no_mean():
    assert measure(one_layer(), (inputs([0.0, LOG_3]), [[0, 0]])) == {}


def test_a_mask_does_not_outlive_its_pass():
    model = one_layer()
    with GateMeter(model) as meter:
        model(inputs([-7.0, 0.0]), attention_mask=torch.tensor([[False, True]]))
        model(inputs([LOG_3, LOG_3]))
    assert meter.means() == pytest.approx({"layer": (1 / 2 + 2 * 3 / 4) / 3})


def test_an_adapter_alone_has_the_whole_gate():
    model, call = one_layer(), (inputs([LOG_3]), None)
    for part, wanted in ((INDIVIDUAL, 1.0), (REST_OF_WORLD, 0.0)):
        with adapter_alone(model, part):
            assert measure(model, call) == {"layer": wanted}
    assert measure(model, call) == pytest.approx({"layer": 3 / 4})


def test_the_gate_of_half_precision_inputs_is_made_in_single():
    model = one_layer().bfloat16()
    model.layer.mixer.data = torch.tensor([[1.001, 0.0], [0.0, 0.0]])  # 1.0 in bfloat16
    means = measure(model, (inputs([2.0], dtype=torch.bfloat16), None))
    assert means["layer"] == pytest.approx(1 / (1 + math.exp(-2.002)), rel=1e-6)


def test_weights_that_are_the_same_for_all_tokens_are_reported():
    scalar = OneLayer(mixer="scalar")
    with torch.no_grad():
        scalar.layer.mixer.copy_(torch.tensor([LOG_3, 0.0]))
    for model, wanted in ((scalar, 3 / 4), (OneLayer(mixer=(0.25, 0.5)), 1 / 4)):
        assert measure(model) == pytest.approx({"layer": wanted})
        assert measure(model, (inputs([0.0]), None)) == pytest.approx({"layer": wanted})


def test_layers_without_a_gate_report_nothing():
    assert measure(OneLayer(rest_of_world=False), (inputs([0.0]), None)) == {}
    assert measure(one_layer()) == {}  # no token seen


def test_nothing_is_measured_after_the_meter_is_left_nor_are_results_changed():
    model, x = one_layer(), inputs([LOG_3])
    before, meter = model(x), GateMeter(model)
    with meter:
        assert torch.equal(model(x), before)
    model(inputs([0.0]))
    assert meter.means() == pytest.approx({"layer": 3 / 4})
    with pytest.raises(ZeroDivisionError), meter:
        raise ZeroDivisionError
    model(inputs([0.0]))
    assert meter.means() == pytest.approx({"layer": 3 / 4})


@pytest.fixture(scope="module")
def adapted(tiny_base):
    """The tiny base with adapters that let each client's tokens through in different parts."""
    model, tokenizer = load_base(ModelConfig(path=str(tiny_base)))
    fedalt.inject(model, rank=2, dropout=0.0, target_modules="all-linear")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in mixed_layers(model):
            layer.individual.b.normal_(std=0.1, generator=generator)
            layer.mixer.normal_(generator=generator)
    return model, tokenizer


@pytest.fixture
def by_hand(adapted):
    """Each layer's mean gate, from its inputs, one unpadded record at a time, in fp64."""
    model, tokenizer = adapted
    gates = {name: [] for name, _ in mixed_layers(model)}

    def keep(name):
        def hook(layer, args):
            logits = args[0].double() @ layer.mixer.double().T
            gates[name] += logits.softmax(-1)[..., 0].flatten().tolist()

        return hook

    handles = [layer.register_forward_pre_hook(keep(n)) for n, layer in mixed_layers(model)]
    with torch.no_grad():
        for example in encode(RECORDS, tokenizer, DataConfig()):
            answer_loss(model, collate([example], tokenizer.pad_token_id, torch.device("cpu")))
    for handle in handles:
        handle.remove()
    return {name: sum(values) / len(values) for name, values in gates.items()}


def test_gates_of_a_language_model_with_padding(adapted, by_hand):
    model, tokenizer = adapted
    batch = collate(
        encode(RECORDS, tokenizer, DataConfig()), tokenizer.pad_token_id, torch.device("cpu")
    )
    assert batch.attention_mask.min() == 0
    with GateMeter(model) as meter:
        answer_loss(model, batch)
    assert meter.means() == pytest.approx(by_hand, rel=1e-4)
    assert len(by_hand) == 14


def test_outputs_and_gradients_keep_their_bits_and_hooks_go(adapted):
    model, tokenizer = adapted
    examples = encode(RECORDS, tokenizer, DataConfig())
    batch = collate(examples, tokenizer.pad_token_id, torch.device("cpu"))

    def run():
        model.zero_grad()
        loss = answer_loss(model, batch)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    def hooks():
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    plain, meter = run(), GateMeter(model)
    with meter:
        watched = run()
        assert hooks() == 14 + 1
    assert hooks() == 0
    with pytest.raises(ZeroDivisionError), meter:
        raise ZeroDivisionError
    assert hooks() == 0
    assert len(plain) == len(watched) == 1 + 14 * 3  # A, B and mixer
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_evaluation_measures_its_loss_pass_and_nothing_else(adapted, by_hand):
    model, tokenizer = adapted
    records = [Record(r.instruction, r.output, options=(r.output, "no")) for r in RECORDS]
    examples = encode(records, tokenizer, DataConfig())
    meter, config = GateMeter(model), EvaluateConfig(batch_size=2, max_new_tokens=3)
    scores = evaluate_text(model, tokenizer, examples, records, config, meter)
    assert meter.means() == pytest.approx(by_hand, rel=1e-4)
    assert scores == evaluate_text(model, tokenizer, examples, records, config)


def test_gates_of_an_image_model():
    class Classifier(OneLayer):
        def forward(self, pixel_values):
            return SimpleNamespace(logits=self.layer(pixel_values).mean(1))

    model = Classifier()
    with torch.no_grad():
        model.layer.mixer.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    examples = [
        SimpleNamespace(label=0, patches=p) for p in ([0.0, 0.0], [0.0, LOG_3], [LOG_3] * 2)
    ]
    meter = GateMeter(model)
    evaluate_images(model, lambda chunk: inputs(*(e.patches for e in chunk)), examples, 2, meter)
    assert meter.means() == pytest.approx({"layer": (3 * 1 / 2 + 3 * 3 / 4) / 6})


def test_a_vision_transformer_counts_all_its_tokens():
    """4 patches and CLS an image, in fp64; without CLS the mean would be another."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=4,
        patch_size=2,
    )
    torch.manual_seed(0)
    model = ViTForImageClassification(config).double().eval()
    fedalt.inject(model, 2, 4, 0.0, "all-linear")
    name, layer = next(mixed_layers(model))
    nn.init.normal_(layer.mixer)
    seen = []
    layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    with torch.no_grad(), GateMeter(model) as meter:
        model(pixel_values=torch.randn(3, 3, 4, 4, dtype=torch.float64))
    gates = (seen[0] @ layer.mixer.T).softmax(-1)[..., 0]
    assert gates.shape == (3, 5)
    assert meter.means()[name] == pytest.approx(gates.mean().item(), rel=1e-14)
    assert len(meter.means()) == 6
    assert abs(gates[:, 1:].mean() - meter.means()[name]) > 1e-3
