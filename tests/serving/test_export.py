"""A client taken out of a run: PEFT loads each adapter, ``load_export`` the mixed model."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fedalt
from fedalt.errors import InputError
from fedalt.model.states import (
    INDIVIDUAL,
    MIXER,
    REST_OF_WORLD,
    adapter_alone,
    adapter_state,
    is_part,
)
from fedalt.serving.export import export_client, load_export
from tests.store.peft_cases import assert_same_logits, load_with_peft, logits

PEFT_FILES = ["adapter_config.json", "adapter_model.safetensors"]
IDS = torch.tensor([[1, 10, 20, 30, 40]])


@pytest.fixture
def finished(tiny_config):
    fedalt.Federation(tiny_config).run()
    return tiny_config


def test_a_client_of_fedalt_comes_out_as_two_peft_adapters_and_a_mixer(finished, tmp_path):
    to = export_client(finished.out, "ann", tmp_path / "ann")
    assert to == tmp_path / "ann"
    names = ["README.md", INDIVIDUAL, "mixer.json", "mixer.safetensors", REST_OF_WORLD]
    assert sorted(os.listdir(to)) == names
    assert sorted(os.listdir(to / INDIVIDUAL)) == sorted(os.listdir(to / REST_OF_WORLD))
    assert sorted(os.listdir(to / INDIVIDUAL)) == PEFT_FILES
    base = str(finished.model.path)
    assert (
        json.loads((to / INDIVIDUAL / PEFT_FILES[0]).read_text()).items()
        >= {
            "base_model_name_or_path": base,
            "task_type": "CAUSAL_LM",
            "r": 2,
            "lora_alpha": 4,
            "lora_dropout": 0.1,
            "fan_in_fan_out": False,
        }.items()
    )
    mixed = json.loads((to / "mixer.json").read_text())
    assert mixed["gates"] == "softmax(mixer @ x): row 0 individual, row 1 rest_of_world"
    assert (mixed["client"], mixed["scaling"], mixed["base"]) == ("ann", 2.0, base)
    readme = (to / "README.md").read_text()
    assert f"AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.float32)" in readme
    assert "load_export" in readme


@pytest.mark.parametrize("part", [INDIVIDUAL, REST_OF_WORLD])
def test_peft_computes_what_the_client_does_with_that_adapter_alone(part, finished, tmp_path):
    to = export_client(finished.out, "ann", tmp_path / "ann")

    def ours(dtype):
        model, _ = fedalt.load_client(finished.out, "ann")
        with adapter_alone(model, part):
            return logits(model.to(dtype), dtype)

    def base():
        return AutoModelForCausalLM.from_pretrained(finished.model.path).eval()

    def theirs(dtype):
        return logits(load_with_peft(base, to / part, dtype), dtype)

    assert_same_logits(ours, theirs, longest=48)


@pytest.mark.parametrize("method", ["fedalt", "fedalt-scalar", "fedalt-half"])
def test_the_exported_client_is_the_runs_own_to_the_bit(method, tiny_config, tmp_path):
    config = replace(tiny_config, method=method)
    fedalt.Federation(config).run()
    to = export_client(config.out, "bob", tmp_path / "bob")
    model, tokenizer = fedalt.load_client(config.out, "bob")
    again, same_tokenizer = load_export(to)
    ours, theirs = adapter_state(model), adapter_state(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert (to / "mixer.safetensors").exists() == any(is_part(name, MIXER) for name in ours)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert same_tokenizer.padding_side == tokenizer.padding_side == "left"
    assert again.generate(IDS, max_new_tokens=3, pad_token_id=0).shape[0] == 1


def test_a_client_whose_base_weights_were_changed_is_refused(tiny_config, tmp_path):
    config = replace(tiny_config, method="fedex-lora")
    fedalt.Federation(config).run()
    with pytest.raises(InputError, match=r"base weights are not those of .*; use fedalt.load_cl"):
        export_client(config.out, "ann", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_method_without_a_mixer_comes_out_as_one_adapter(tiny_config, tmp_path):
    config = replace(tiny_config, method="fedit")
    fedalt.Federation(config).run()
    to = export_client(config.out, "cyd", tmp_path / "cyd")
    assert sorted(os.listdir(to)) == ["README.md", INDIVIDUAL]
    assert "load_export" not in (to / "README.md").read_text()
    with pytest.raises(InputError, match=r"mixer.json: missing or damaged; export it again"):
        load_export(to)


def test_a_pattern_of_a_run_becomes_the_names_it_fits(tiny_config, tmp_path):
    lora = replace(tiny_config.lora, target_modules=r".*\.1\.self_attn\.(q|v)_proj")
    fedalt.Federation(replace(tiny_config, rounds=1, lora=lora)).run()
    to = export_client(tiny_config.out, "ann", tmp_path / "ann")
    names = [f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qv"]
    assert json.loads((to / "mixer.json").read_text())["layers"] == names
    own = json.loads((to / INDIVIDUAL / PEFT_FILES[0]).read_text())
    assert own["target_modules"] == names
    ours, _ = fedalt.load_client(tiny_config.out, "ann")
    theirs, _ = load_export(to)
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_what_cannot_be_exported_leaves_nothing_behind(finished, tmp_path):
    with pytest.raises(InputError, match="no client 'dan'; known: ann, bob, cyd"):
        export_client(finished.out, "dan", tmp_path / "to")
    with pytest.raises(InputError, match="choose another folder"):
        export_client(finished.out, "ann", finished.out)
    with pytest.raises(InputError, match="no-run"):
        export_client(tmp_path / "no-run", "ann", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def change_base(config):
    """Alters the first weight of the run's base on disk."""
    path = Path(config.model.path) / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_base_that_has_changed_is_refused(tiny_config, tiny_base, tmp_path):
    """An adapter of other base weights than those of the run would be another model."""
    own = shutil.copytree(tiny_base, tmp_path / "base")
    config = replace(tiny_config, model=replace(tiny_config.model, path=str(own)))
    fedalt.Federation(config).run()
    to = export_client(config.out, "ann", tmp_path / "ann")
    change_base(config)
    with pytest.raises(InputError, match="is not the base of the run; name that one with base="):
        load_export(to)
    assert load_export(to, base=str(tiny_base))
    with pytest.raises(InputError, match="base"):
        export_client(config.out, "ann", tmp_path / "again")
    assert not (tmp_path / "again").exists()
