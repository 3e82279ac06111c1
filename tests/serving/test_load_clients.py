"""Several clients in one model: each row is what its own client's model gives alone."""

import pytest
import torch

import fedalt
from fedalt.config.settings import config_from_dict
from fedalt.errors import InputError
from tests.conftest import write_client

IDS = ("ann", "bob", "cyd")
PROMPTS = ["### Instruction:\nsay 1\n\n### Response:\n", "say 2", "say 1 or 2", "say 2", "say"]
CLIENTS = ["cyd", "ann", "cyd", "bob", "ann"]


def train(base, root, method="fedalt", **lora):
    """A run in which the clients' adapters grow large enough to matter."""
    for client in IDS:
        write_client(root / "data" / client, client[0], 4)
    settings = {
        "rounds": 2,
        "threads": 1,
        "method": method,
        "out": str(root / "run"),
        "model": {"path": str(base)},
        "lora": {"rank": 2, "alpha": 8, "dropout": 0.1, **lora},
        "data": {"path": str(root / "data")},
        "train": {"batch_size": 4, "max_steps": 6, "learning_rate": 0.05},
        "evaluate": {"max_new_tokens": 4},
    }
    fedalt.Federation(config_from_dict(settings)).run()
    return root / "run"


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    return train(tiny_base, tmp_path_factory.mktemp("finished"))


def answers(model, tokenizer, prompts, **settings):
    """The twelve tokens after the prompts."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    made = model.generate(
        **batch, min_new_tokens=12, max_new_tokens=12, do_sample=False, **settings
    )
    return made[:, batch["input_ids"].shape[1] :].tolist()


def assert_same_tokens(run, num_beams):
    model, tokenizer = fedalt.load_clients(run, IDS)
    got = answers(model, tokenizer, PROMPTS, num_beams=num_beams, clients=CLIENTS)
    want = []
    for client, prompt in zip(CLIENTS, PROMPTS, strict=True):
        want += answers(*fedalt.load_client(run, client), [prompt], num_beams=num_beams)
    assert got == want
    cacheless = {"num_beams": num_beams, "use_cache": False}
    assert answers(model, tokenizer, PROMPTS, clients=CLIENTS, **cacheless) == want
    one = answers(model, tokenizer, ["say 2"] * 3, num_beams=num_beams, clients=IDS)
    assert len(set(map(tuple, one))) == 3


@pytest.mark.parametrize("num_beams", [1, 4])
def test_each_row_is_generated_as_by_its_client_alone(finished, num_beams):
    assert_same_tokens(finished, num_beams)


@pytest.mark.parametrize("method", ["fedalt-scalar", "fedalt-half", "local"])
def test_other_gates(method, tiny_base, tmp_path):
    assert_same_tokens(train(tiny_base, tmp_path, method), 1)


def test_clients_of_other_ranks(tiny_base, tmp_path):
    ranks = {"client_ranks": {"ann": 1, "bob": 3}, "target_modules": "all-linear"}
    assert_same_tokens(train(tiny_base, tmp_path, "local", **ranks), 1)


@torch.no_grad()
def test_forward_and_its_rows(finished):
    model, _ = fedalt.load_clients(finished, IDS)
    assert model.ids == IDS
    ids = torch.tensor([[1, 10, 20], [1, 10, 20], [1, 30, 40]])
    clients = ["bob", "ann", "bob"]
    got = model(input_ids=ids, clients=clients).logits
    for row, client, logits in zip(ids, clients, got, strict=True):
        alone, _ = fedalt.load_client(finished, client)
        torch.testing.assert_close(logits, alone(row[None]).logits[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got[0], got[1], rtol=0.1)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_refusals(finished):
    for ids, match in (
        ([], r"ids must be a list of clients, got \[\]"),
        ("ann", r"ids must be a list of clients, got 'ann'"),
        (["ann", "bob", "ann"], "ids: 'ann' is there twice"),
        (["ann", "dan"], "no client 'dan'; known: ann, bob, cyd"),
    ):
        with pytest.raises(InputError, match=match):
            fedalt.load_clients(finished, ids)
    model, _ = fedalt.load_clients(finished, ["ann", "bob"])
    ids = torch.tensor([[1, 2], [1, 3]])
    for clients, match in (
        (["ann"], "clients must be 2, one a row, got 1"),
        ("ab", "clients must be a list, one a row, got 'ab'"),
        (["ann", "cyd"], "clients: no client 'cyd'; known: ann, bob"),
    ):
        with pytest.raises(InputError, match=match):
            model(ids, clients=clients)
    with pytest.raises(InputError, match=r"call the model with clients=\[...\]"):
        model.model(ids)
    layer = model.model.model.layers[0].self_attn.q_proj
    with model._told(["ann", "bob"], (ids,), {}):
        model.model(ids)
        with pytest.raises(InputError, match="a layer sees tokens in an order of its own"):
            layer(torch.zeros(6, 32))


def test_trained_heads_are_refused(tiny_base, tmp_path):
    run = train(tiny_base, tmp_path, modules_to_save=["lm_head"])
    with pytest.raises(InputError, match="every client has its own lm_head, which the rows of a"):
        fedalt.load_clients(run, IDS)
