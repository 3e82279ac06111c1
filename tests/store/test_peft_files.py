"""Adapters in PEFT's file format: what PEFT makes of ours, and what we make of PEFT's."""

import json
import os

import pytest
import torch
from peft.tuners.lora import LoraLayer

import fedalt
from fedalt.errors import InputError
from fedalt.model.states import adapter_state, select
from fedalt.store.peft_files import as_peft_files, read_peft_adapter, write_folder
from tests.kernels.budget import UNIT32
from tests.store.peft_cases import (
    ALPHA,
    CASES,
    RANK,
    SCALING,
    UNIT64,
    alone,
    assert_same_logits,
    change_tensors,
    drawn,
    llama,
    load_with_peft,
    logits,
    saved_by_peft,
    vit,
)

WEIGHTS = "adapter_model.safetensors"


def write(folder, state, part, scaling, **settings):
    return write_folder(folder, as_peft_files(state, part, base="", scaling=scaling, **settings))


def peft_layers(model):
    return [name for name, module in model.model.named_modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("part", ["individual", "rest_of_world"])
@pytest.mark.parametrize("name", CASES)
def test_peft_computes_what_our_model_does_with_that_adapter_alone(name, part, tmp_path):
    case = CASES[name]
    mixed = fedalt.inject(case["make"](), RANK, ALPHA, 0, case["targets"])
    state = drawn(mixed)
    written = {"fan_in_fan_out": name == "gpt2", "task_type": case["task_type"]}
    folder = write(tmp_path / "to", state, part, SCALING, **written)
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    adapted = [n for n, m in mixed.named_modules() if hasattr(m, "rest_of_world")]
    assert peft_layers(load_with_peft(case["make"], folder)) == adapted
    assert_same_logits(
        lambda dtype: logits(alone(case, state, part, dtype), dtype),
        lambda dtype: logits(load_with_peft(case["make"], folder, dtype), dtype),
        case["longest"],
    )


def test_a_trained_head_goes_along_whole(tmp_path):
    case = CASES["vit"]
    mixed = fedalt.inject(vit(), RANK, ALPHA, 0, case["targets"], modules_to_save=("classifier",))
    state = drawn(mixed)
    folder = write(tmp_path / "to", state, "individual", SCALING)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    assert_same_logits(
        lambda dtype: logits(alone(case, state, "individual", dtype, heads=("classifier",)), dtype),
        lambda dtype: logits(load_with_peft(case["make"], folder, dtype), dtype),
        case["longest"],
    )
    back = read_peft_adapter(folder, adapter_state(mixed), SCALING)
    assert back.keys() == select(state, "individual", "head").keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())


def test_layers_of_several_ranks_keep_one_scaling(tmp_path):
    case = CASES["llama"]
    state = drawn(fedalt.inject(llama(), RANK, ALPHA, 0, case["targets"]))
    a = "model.layers.1.mlp.up_proj.individual.a"
    state[a], state[a[:-1] + "b"] = state[a][:2], state[a[:-1] + "b"][:, :2]
    folder = write(tmp_path / "to", state, "individual", SCALING)
    model = load_with_peft(case["make"], folder)
    scalings = [m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)]
    assert set(scalings) == {SCALING}
    back = read_peft_adapter(folder, state, SCALING)
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())


@pytest.fixture
def like():
    """The client of a model that adapts q and v."""
    return adapter_state(fedalt.inject(llama(), RANK, ALPHA))


@pytest.mark.parametrize(
    "settings",
    [
        dict(r=RANK, lora_alpha=ALPHA),
        dict(r=RANK, lora_alpha=16),
        dict(r=RANK, targets=r".*\.(q|v)_proj"),
        dict(r=5, lora_alpha=7, use_rslora=True),
        dict(r=4, lora_alpha=8, rank_pattern={"v_proj": 2}, alpha_pattern={r"1\..*.q_proj": 5}),
        dict(r=2, lora_alpha=3, dtype=torch.bfloat16),
        dict(r=2, lora_alpha=3, dtype=torch.float16, init_lora_weights="gaussian"),
    ],
)
def test_what_peft_saved_adds_the_same_here(settings, like, tmp_path):
    """B alone is rescaled, and rounded once to float32: half a unit of each product |B| |A|."""
    theirs = saved_by_peft(tmp_path, **settings).double()
    state = read_peft_adapter(tmp_path, like, SCALING)
    assert list(state) == [name for name in like if ".individual." in name]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    for name, layer in theirs.model.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (state[f"{name}.individual.{factor}"].double() for factor in "ab")
            sums = (a.shape[0] + 4) * UNIT64  # of both products in float64
            allowed = SCALING * (b.abs() @ a.abs()) * (UNIT32 + 2 * sums)
            off = (SCALING * (b @ a) - layer.get_delta_weight("default")).abs()
            assert (off <= allowed).all(), f"{name}: {(off / allowed).max():.2f}"


def test_what_peft_saved_gives_the_same_logits_here(like, tmp_path):
    case = dict(CASES["llama"], targets=("q_proj", "v_proj"))
    saved_by_peft(tmp_path, r=RANK, lora_alpha=2 * ALPHA)
    state = read_peft_adapter(tmp_path, like, SCALING)
    assert_same_logits(
        lambda dtype: logits(alone(case, state, "individual", dtype), dtype),
        lambda dtype: logits(load_with_peft(case["make"], tmp_path, dtype), dtype),
        case["longest"],
    )


def test_an_adapters_name_in_the_keys_is_ignored(like, tmp_path):
    saved_by_peft(tmp_path, r=RANK)
    expected = read_peft_adapter(tmp_path, like, SCALING)
    change_tensors(tmp_path, lambda key, tensor: (key.replace("A.w", "A.mine.w"), tensor))
    again = read_peft_adapter(tmp_path, like, SCALING)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.items())


def test_a_part_that_the_client_lacks_is_refused(like, tmp_path):
    own = select(like, "individual")
    with pytest.raises(InputError, match="rest_of_world: this client has no such adapter"):
        write(tmp_path / "to", own, "rest_of_world", 1.0)
    assert os.listdir(tmp_path) == []


def test_a_taken_folder_is_refused_and_left_alone(like, tmp_path):
    (tmp_path / "to").mkdir()
    write(tmp_path / "to", like, "individual", 1.0)
    before = (tmp_path / "to" / WEIGHTS).read_bytes()
    with pytest.raises(InputError, match="to: is there already; choose another folder"):
        write(tmp_path / "to", like, "rest_of_world", 1.0)
    assert (tmp_path / "to" / WEIGHTS).read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another folder"):
        write(tmp_path / "file" / "to", like, "individual", 1.0)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_folder_cut_short_never_appears_under_its_name(step, like, tmp_path, monkeypatch):
    """Cut at each file's sync and at the rename; the next try cleans up and succeeds."""
    steps = []

    def cut_short(real):
        def call(*arguments):
            steps.append(real)
            if len(steps) > step:
                raise KeyboardInterrupt
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", cut_short(os.fsync))
        patch.setattr(os, "rename", cut_short(os.rename))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "to", like, "individual", 1.0)
    assert not (tmp_path / "to").exists()
    write(tmp_path / "to", like, "individual", 1.0)
    assert os.listdir(tmp_path) == ["to"]
