"""The ready configs run whole, on small stand-ins of the models and data that they name."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fedalt
from fedalt.config.settings import load_config
from fedalt.data import load_clients
from fedalt.data.images import pixels
from fedalt.errors import InputError
from fedalt.model import states
from fedalt.run.federation import Result
from fedalt.serving.clients import evaluate_run
from fedalt.serving.export import export_client, load_export
from fedalt.store.checkpoint import load_checkpoint, load_latest
from tests.conftest import write_client
from tests.data.test_suites import ROWS

CONFIGS = Path(__file__).parents[2] / "configs"
SHORT = ("rounds=1", "threads=1", "train.epochs=1", "model.device=cpu", "evaluate.max_new_tokens=3")


def run(name: str, tmp_path: Path, *overrides: str, out: str = "run") -> Result:
    settings = (f"out={tmp_path / out}", *SHORT, *overrides)
    return fedalt.Federation(load_config(CONFIGS / f"{name}.yaml", settings)).run()


def test_llama_on_flan(tiny_base, tmp_path):
    for task in ("coreference", "entailment"):
        write_client(tmp_path / "flan" / task, task[0], 4)
    data = (f"data.path={tmp_path / 'flan'}", f"model.path={tiny_base}", "model.dtype=bfloat16")
    results = run("llama2-7b-flan", tmp_path, *data).results
    assert (results["metric"], list(results["clients"])) == (
        "rouge1",
        ["coreference", "entailment"],
    )
    layers = results["clients"]["coreference"]["gates"]
    assert sorted({name.rpartition(".")[2] for name in layers}) == ["q_proj", "v_proj"]
    assert all(0 < gate < 1 for gate in layers.values())


def test_commonsense_suites_as_clients(tiny_base, tmp_path):
    pytest.importorskip("datasets")
    names = ("boolq", "piqa")
    for name in names:
        rows = "".join(json.dumps(ROWS[name]) + "\n" for _ in range(12))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    sources = ", ".join(f"{name}: {tmp_path / name}.jsonl" for name in names)
    data = (f"data.sources={{{sources}}}", f"model.path={tiny_base}", "train.max_steps=1")
    results = run("commonsense", tmp_path, *data).results
    assert list(results["clients"]) == ["boolq", "piqa"]
    for client in results["clients"].values():
        assert {"accuracy", "choice", "choice_norm"} <= client["last"].keys()


def domain_net(root: Path) -> Path:
    """Two domains of two classes, six images a class: red and blue squares, dark in ``sketch``."""
    for domain, light in (("real", 255), ("sketch", 90)):
        for channel, label in ((0, "apple"), (2, "boat")):
            folder = root / domain / label
            folder.mkdir(parents=True)
            for number in range(6):
                square = np.zeros((8, 8, 3), np.uint8)
                square[:, :, channel] = light - 10 * number
                Image.fromarray(square).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize("method", ["fedalt", "fedit", "feddpa", "fedalt-relay"])
def test_image_domains_with_a_new_head(method, tmp_path):
    """Clients train the head; it is averaged where the method sends it and stays personal else."""
    data = (f"data.path={domain_net(tmp_path / 'net')}", "model.path=builtin-vit")
    small = ("partition.clients=2", "partition.min_records=2", f"method={method}")
    result = run("vit-domainnet", tmp_path, *data, *small, "model.dtype=float32")
    assert result.results["metric"] == "accuracy"
    saved = load_latest(result.out)
    heads = [states.select(saved.next(c), states.HEAD) for c in saved.record["clients"]]
    assert [tensor.shape for tensor in heads[0].values()] == [(2,), (2, 64)]
    alike = all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert alike == (method == "fedit")
    assert saved.record["classes"] == ["apple", "boat"]


def test_an_image_of_a_class_that_the_run_does_not_know_is_refused(tmp_path):
    data = (f"data.path={domain_net(tmp_path / 'net')}", "model.path=builtin-vit")
    result = run("vit-domainnet", tmp_path, *data, "partition={}", "model.dtype=float32")
    (tmp_path / "net" / "real" / "boat").rename(tmp_path / "net" / "real" / "cat")
    with pytest.raises(InputError, match="no class 'cat'; remove its images, known: apple, boat"):
        evaluate_run(result.out, "real", str(tmp_path / "net"))


def test_digits_run_export_and_load(tmp_path):
    pytest.importorskip("sklearn")
    chosen = ("data.clients=[plain, noisy]", "train.max_steps=3")
    result = run("digits", tmp_path, *chosen)
    for client in result.results["clients"].values():
        assert client["last"]["loss"] < client["base"]["loss"]
    model, processor = fedalt.load_client(result.out, "noisy")
    config = load_config(result.out / "config.yaml")
    records = load_clients(config.data, config.partition, config.seed)[1].read().test
    with torch.no_grad():
        found = model(pixel_values=pixels(records, processor)).logits.argmax(-1)
    right = [
        model.config.id2label[int(row)] == r.label for row, r in zip(found, records, strict=True)
    ]
    assert 100 * np.mean(right) == result.results["clients"]["noisy"]["last"]["accuracy"]
    export_client(result.out, "noisy", tmp_path / "exported")
    again, _ = load_export(tmp_path / "exported")
    with torch.no_grad():
        assert torch.equal(again(pixel_values=pixels(records, processor)).logits.argmax(-1), found)


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_the_last_rounds_scores_are_of_the_base_that_it_ends_with(method, tiny_config):
    """Where a method adds to the base, what the last round adds is scored with it."""
    train = replace(tiny_config.train, learning_rate=0.05, max_steps=8)
    result = fedalt.Federation(replace(tiny_config, method=method, train=train)).run()
    table = evaluate_run(result.out)
    for client, scores in result.results["clients"].items():
        assert f"{scores['last']['loss']:.3f}" in table.partition(client)[2].splitlines()[0]


def test_a_client_starts_from_a_peft_adapter(tiny_config, tmp_path):
    """Its first individual LoRA is the adapter's, which one of another client's export is here."""
    first = fedalt.Federation(tiny_config).run()
    export_client(first.out, "ann", tmp_path / "ann")
    start = {"bob": str(tmp_path / "ann" / "individual")}
    config = replace(
        tiny_config,
        out=str(tmp_path / "second"),
        rounds=1,
        lora=replace(tiny_config.lora, client_starts=start),
        save_total_limit=9,
    )
    fedalt.Federation(config).run()
    begun = load_checkpoint(tmp_path / "second" / "checkpoints" / "round-0000")
    wanted = states.select(load_latest(first.out).used("ann"), states.INDIVIDUAL)
    found = states.select(begun.used("bob"), states.INDIVIDUAL)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    fresh = states.select(begun.used("ann"), states.INDIVIDUAL)
    assert not any(fresh[name].any() for name in fresh if name.endswith(".b"))
