"""A client as one plain LoRA: exact where its gates are fixed, and its cost told where not."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fedalt
from fedalt.cli import main
from fedalt.errors import InputError
from fedalt.model import fixed_gates, mixed_layers
from fedalt.serving import export_flat
from tests.conftest import write_client
from tests.kernels.budget import excess
from tests.store.peft_cases import assert_same_logits, load_with_peft, logits

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def finished(config, method="fedalt"):
    """A run whose mixers and adapters have grown large enough to matter."""
    train = replace(config.train, learning_rate=0.05)
    config = replace(config, method=method, train=train)
    fedalt.Federation(config).run()
    return config


def assert_near(theirs, ours):
    """PEFT's float32 logits are within ours' budget of our float64 ones."""
    truth = ours(torch.float64)
    for kind, share in excess(theirs(torch.float32), ours(torch.float32), truth, 48).items():
        assert share <= 1, f"{kind} error is {share:.2f} times its budget"


def gates_of(folder, client):
    """By layer, how the exported B splits: the weights that its halves were multiplied by."""
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, layer in mixed_layers(client):
        b = tensors[f"base_model.model.{name}.lora_B.weight"]
        halves = b.double().split(layer.rank, 1)
        ups = [layer.individual.b.double(), layer.rest_of_world.b.double()]
        found[name] = tuple(
            (h.mul(u).sum() / u.square().sum()).item() for h, u in zip(halves, ups, strict=True)
        )
    return found


@pytest.mark.parametrize("method", ["fedalt-scalar", "fedalt-half"])
def test_gates_that_are_the_same_for_every_token_fold_exactly(method, tiny_config, tmp_path):
    config = finished(tiny_config, method)
    told = export_flat(config.out, "ann", tmp_path / "flat")
    assert sorted(os.listdir(tmp_path / "flat")) == FILES
    assert "folding the gates costs +0.0000 nats of loss" in told.replace("-0.0000", "+0.0000")
    settings = json.loads((tmp_path / "flat" / FILES[1]).read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)

    def ours(dtype):
        return logits(fedalt.load_client(config.out, "ann")[0].to(dtype), dtype)

    def theirs(dtype):
        return logits(load_with_peft(base, tmp_path / "flat", dtype), dtype)

    def base():
        return AutoModelForCausalLM.from_pretrained(config.model.path).eval()

    assert_near(theirs, ours)
    if method == "fedalt-half":  # halves are exact in float32
        assert_same_logits(ours, theirs, longest=48)
    model, _ = fedalt.load_client(config.out, "ann")
    alone, _ = fedalt.load_client(config.out, "bob")
    assert (logits(model) - logits(alone)).abs().max() > 0.1


def test_gates_by_the_token_fold_to_their_means(tiny_config, tmp_path, capsys):
    config = finished(tiny_config)
    to = tmp_path / "flat"
    assert main(["export", config.out, "ann", "--to", str(to), "--flat"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == f"ann: one PEFT adapter in {to}"
    rows = [[cell.strip() for cell in line.split("|")] for line in told[2:5]]
    assert [row[1] for row in rows] == ["mixed", "flat", "individual alone"]
    cost = float(rows[1][-2]) - float(rows[0][-2])
    assert told[-2] == f"folding the gates costs {told[-2].split()[4]} nats of loss"
    assert float(told[-2].split()[4]) == pytest.approx(cost, abs=1.1e-3)
    client, _ = fedalt.load_client(config.out, "ann")
    gates = gates_of(to, client)
    assert all(0 < own < 1 and abs(own + world - 1) < 1e-5 for own, world in gates.values())
    assert any(abs(own - 0.5) > 1e-3 for own, _ in gates.values())

    def ours(dtype):
        with fixed_gates(client.to(dtype), gates):
            return logits(client, dtype)

    def theirs(dtype):
        base = AutoModelForCausalLM.from_pretrained(config.model.path).eval()
        return logits(load_with_peft(lambda: base, to, dtype), dtype)

    assert_near(theirs, ours)
    with pytest.raises(AssertionError, match="times its budget"):
        assert_near(theirs, lambda dtype: logits(client.to(dtype), dtype))


def test_what_cannot_be_folded_leaves_nothing_behind(tiny_config, tmp_path):
    config = finished(tiny_config, "local")
    to = tmp_path / "to"
    with pytest.raises(InputError, match="ann has one plain LoRA; export it without --flat"):
        export_flat(config.out, "ann", to)
    with pytest.raises(InputError, match="no client 'dan'; known: ann, bob, cyd"):
        export_flat(config.out, "dan", to)
    assert not to.exists()


def test_records_may_be_elsewhere(tiny_config, tmp_path):
    config = finished(tiny_config)
    write_client(tmp_path / "other" / "bob", "b", 5)
    with pytest.raises(InputError, match="no records of 'ann' there; name them with --data"):
        export_flat(config.out, "ann", tmp_path / "to", str(tmp_path / "other"))
    assert "bob: one PEFT" in export_flat(config.out, "bob", tmp_path / "to", tmp_path / "other")
