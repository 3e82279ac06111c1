"""Which layers take adapters: names and patterns as in PEFT; what is refused or told by name."""

import re
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fedalt
from fedalt.errors import InputError, InputWarning
from fedalt.methods import get_method
from fedalt.model import states
from fedalt.model.targets import SHOWN, in_short
from fedalt_kernels import MixedLoRALinear, unused_layers

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
IDS = torch.arange(3, 12)[None]


def llama(**settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **settings)).eval()


def layers_of(model):
    return [name for name, m in model.named_modules() if isinstance(m, MixedLoRALinear)]


def stirred(model):
    """The model with adapters that change its output."""
    with torch.no_grad():
        for _, layer in states.mixed_layers(model):
            layer.individual.b.normal_()
    return model


@pytest.mark.parametrize(
    "wanted",
    [
        r".*layers\.0\.self_attn\.(q|v)_proj",
        r"model\.layers\.[01]\.mlp\..*_proj",
        r".*\.self_attn\.(?!o_).*_proj",
        "All-Linear",
        ["q_proj", "layers.1.mlp.up_proj"],
    ],
)
def test_names_and_patterns_mean_what_they_mean_to_peft(wanted):
    ours = layers_of(fedalt.inject(llama(), rank=2, target_modules=wanted))
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=wanted))
    assert set(ours) == set(theirs.base_model.targeted_module_names)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (
            "q_proj",
            "the pattern 'q_proj' is the whole name of no linear layer; a list takes endings",
        ),
        (
            r".*\.self_atn\.q_proj",
            r"no linear layer; did you mean model.layers.\d.self_attn.q",
        ),
        ("(q_proj", r"lora.target_modules: '\(q_proj' is no regular expression: missing \)"),
        (["q_porj"], "no linear layer is named 'q_porj'; did you mean q_proj"),
        (["embed_tokens"], "no linear layer is named 'embed_tokens'; known: down_proj, gate_proj"),
    ],
)
def test_what_fits_nothing_is_told_in_one_line_with_what_is_near(wanted, told):
    with pytest.raises(InputError, match=told) as caught:
        fedalt.inject(llama(), rank=2, target_modules=wanted)
    assert "\n" not in str(caught.value)


def test_a_tied_head_is_saved_and_tied_again(tmp_path):
    model = llama(tie_word_embeddings=True)
    fedalt.inject(model, rank=2, target_modules=("lm_head", "q_proj"))
    stirred(model).save_pretrained(tmp_path)
    model.tie_weights()
    assert model.lm_head.base.weight is model.model.embed_tokens.weight
    saved = transformers.modeling_utils.load_state_dict(tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" in saved
    assert "lm_head.base.weight" not in saved
    again = llama(tie_word_embeddings=True)
    fedalt.inject(again, rank=2, target_modules=("lm_head", "q_proj"))
    missing, unexpected = again.load_state_dict(saved, strict=False)
    assert (missing, unexpected) == (["lm_head.base.weight"], [])
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_tied_head_takes_no_change_of_base_weights():
    """Which would change the embeddings as well."""
    model = llama(tie_word_embeddings=True)
    fedalt.inject(model, rank=2, target_modules=("lm_head",))
    with pytest.raises(InputError, match="lm_head is tied to another module, and this method adds"):
        states.BaseWeights(model)
    assert get_method("flora").changes_base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings_can_be_trained_whole(dtype):
    model = llama().to(dtype)
    before = model(IDS).logits
    fedalt.inject(model, rank=2, modules_to_save=("model.embed_tokens",))
    after = model(IDS).logits
    assert torch.equal(after, before)
    after.sum().backward()
    assert model.model.embed_tokens.weight.grad.dtype == torch.float32
    tied = llama(tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"'model.embed_tokens' is tied to another module"):
        fedalt.inject(tied, rank=2, modules_to_save=("model.embed_tokens",))


def test_what_is_in_a_saved_module_takes_no_adapter():
    model = llama()
    saved = ("model.layers.1",)
    fedalt.inject(model, rank=2, target_modules="all-linear", modules_to_save=saved)
    assert {name.split(".")[2] for name in layers_of(model)} == {"0"}
    assert all(p.requires_grad for p in model.model.layers[1].parameters())


class Attentive(nn.Module):
    """PyTorch's own attention, before and after linear layers."""

    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 16)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0])


def test_the_projection_of_pytorchs_attention_is_refused_by_name():
    """Its weight is read; the layer is never called."""
    with pytest.raises(InputError, match=r"attention.out_proj: .* an adapter would never run"):
        fedalt.inject(Attentive(), rank=2, target_modules=("out_proj", "out"))
    with pytest.warns(InputWarning, match=r"leaves out 80.0 % of the parameters, .*: attention$"):
        model = fedalt.inject(Attentive(), rank=2, target_modules="all-linear")
    assert layers_of(model) == ["out"]


def test_all_linear_tells_of_experts_that_are_kept_as_stacks():
    """Of 71 thousand numbers 49 thousand are two layers' four experts', 3 x 64 x 32 each."""
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    )
    share = 100 * (2 * 4 * 3 * 64 * 32) / sum(p.numel() for p in model.parameters())
    told = re.escape(f"{share:.1f} % of the parameters, in modules that take no adapter: ")
    with pytest.warns(InputWarning, match=told + r"model\.layers\.\*\.mlp\.experts$"):
        fedalt.inject(model, rank=2, target_modules="all-linear")
    assert len(layers_of(model)) == 8


def test_all_linear_says_nothing_where_it_reaches_all(tiny_base):
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2))
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(**{k: v for k, v in SMALL.items() if k[:3] not in ("voc", "num")})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (AutoModelForCausalLM.from_pretrained(tiny_base), gpt2, vit):
            fedalt.inject(model, rank=2, target_modules="all-linear")


def test_names_in_one_line_are_few():
    assert (
        in_short(f"layers.{i}.{leaf}" for i in range(30) for leaf in "ab")
        == "layers.*.a, layers.*.b"
    )
    assert in_short("abcdefgh") == "a, b, c, d, e, f and 2 more"
    assert SHOWN == 6


class Doubled(nn.Linear):
    """Computes other than its weight says."""

    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, arguments, output: 2 * output)
    return layer


def replaced():
    layer = nn.Linear(4, 4)
    layer.forward = torch.zeros_like
    return layer


def pruned():
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (lambda: Doubled(4, 4), "1: base is a Doubled, whose forward is its own"),
        (replaced, "1: base is a Linear, whose forward is its own"),
        (hooked, "1: base has forward hooks, which would never run"),
        (pruned, "1: base.weight is computed at every call"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "computed at every call"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), "at every call"),
    ],
    ids=["own forward", "new forward", "hook", "pruned", "weight norm", "spectral norm"],
)
def test_a_layer_that_is_no_plain_product_is_refused_by_name(layer, told):
    with pytest.raises(InputError, match=told):
        fedalt.inject(nn.Sequential(nn.Linear(4, 4), layer()), rank=2, target_modules=("1",))
    model = nn.Sequential(nn.Linear(4, 4), layer())
    with warnings.catch_warnings(record=True):
        fedalt.inject(model, rank=2, target_modules="all-linear")
    assert layers_of(model) == ["0"]


def test_a_lazy_layer_is_refused_until_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(InputError, match=r"inject: 0.weight has no shape yet; call the model once"):
        fedalt.inject(model, rank=2, target_modules="all-linear")
    with pytest.raises(TypeError, match=r"base.weight has no shape yet; call the model once"):
        MixedLoRALinear(model[0])
    model(torch.zeros(1, 3))
    fedalt.inject(model, rank=2, target_modules="all-linear")


def test_falcons_linear_layer_is_a_plain_one():
    config = transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=100, bias=True
    )
    model = transformers.FalconForCausalLM(config).eval()
    before = model(IDS).logits
    fedalt.inject(model, rank=2, target_modules=("query_key_value",))
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-5)


def test_a_layer_under_two_names_takes_one_adapter_at_both():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(nn.ReLU(), shared)})
    fedalt.inject(model, rank=2, target_modules=("b.1",))
    assert isinstance(model["b"][1], MixedLoRALinear)
    assert model["a"][0] is model["b"][1]
    assert {name.rpartition(".")[0] for name in states.adapter_state(model)} == {
        "a.0",
        "a.0.individual",
        "a.0.rest_of_world",
    }


def test_a_model_with_peft_adapters_is_refused():
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"adapters of PEFT in it; take them out with its unload"):
        fedalt.inject(model, rank=2)
    fedalt.inject(model.unload(), rank=2)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(InputError, match="the model has no linear layer that takes adapters"):
        fedalt.inject(nn.Sequential(nn.Conv1d(2, 2, 1)), rank=2, target_modules="all-linear")


@pytest.mark.parametrize("padded", [False, True])
def test_pytorchs_encoder_calls_its_adapters_in_evaluation_too(padded):
    """Its fast path would compute with the base weights alone, adapters left aside."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    fedalt.inject(model, rank=2, target_modules=("linear1", "linear2"), dropout=0.0)
    stirred(model)
    x, mask = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    wanted = model.train()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        got = model.eval()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("context", ["device", "accelerate"])
def test_a_model_on_the_meta_device_is_made_real_afterwards(context):
    import accelerate

    real = fedalt.inject(llama(), rank=2, seed=3)
    inside = torch.device("meta") if context == "device" else accelerate.init_empty_weights()
    with inside:
        model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
        fedalt.inject(model, rank=2, impl="triton")
    assert all(p.is_meta for p in model.parameters())
    assert model(IDS.to("meta")).logits.shape == (1, 9, 100)
    model.to_empty(device="cpu")
    for name, buffer in real.named_buffers():  # in no state
        model.get_buffer(name).copy_(buffer)
    model.load_state_dict(real.state_dict())
    for _, layer in states.mixed_layers(model):
        layer.impl = "auto"
    assert torch.equal(model(IDS).logits, real(IDS).logits)
    first = states.fresh_state(model, 3)
    assert all(torch.equal(first[name], t) for name, t in states.adapter_state(real).items())


def test_unused_layers_are_named_after_a_backward():
    config = transformers.MambaConfig(**SMALL, state_size=4)
    model = transformers.MambaForCausalLM(config)
    fedalt.inject(model, rank=2, target_modules=("all-linear",))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert unused_layers(model) == [f"backbone.layers.{i}.mixer.dt_proj" for i in (0, 1)]
    states.set_trainable(model, ("rest_of_world",))
    model.requires_grad_(False)
    assert unused_layers(model) == []
