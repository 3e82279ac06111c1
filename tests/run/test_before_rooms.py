"""A run that was made when all of ``fedalt`` was one folder of modules is read, resumed and told.

``before_rooms/`` was made at 06f6fdc by ``fedalt run --data data -c rounds=2 -c threads=1 -c
train.max_steps=1 -c train.batch_size=2 -c lora.rank=1 -c 'lora.target_modules=[q_proj]' -c
evaluate.max_new_tokens=2 --out run``.
"""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedalt
from fedalt.report import read_results, write_report
from fedalt.serving import evaluate_run, export_client
from fedalt.store.checkpoint import load_latest
from tests.run.test_run import used

OLD = Path(__file__).with_name("before_rooms")


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The run's own copy, where its relative paths hold."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("run")


def test_its_clients_are_loaded_scored_and_exported(old):
    model, _ = fedalt.load_client(old, "ann")
    state = used(load_latest(old))["ann"]
    own = dict(model.named_parameters())
    for name, tensor in state.items():
        assert torch.equal(own[name], tensor), name
    stored = json.loads((old / "results.json").read_text("utf-8"))["clients"]["ann"]["last"]
    assert f"{stored['loss']:.3f}" in evaluate_run(old, "ann")
    assert export_client(old, "bob", "out").is_dir()


def losses(events: str) -> list[float]:
    """Of every client's training in the last round: they tell of the states that it began with."""
    told = [json.loads(line) for line in events.splitlines()]
    return [e["loss"] for e in told if e["event"] == "train" and e["round"] == 2]


def test_its_last_round_is_made_again(old):
    whole, events = load_latest(old), (old / "metrics.jsonl").read_text("utf-8")
    made = used(whole)
    shutil.rmtree(whole.path)
    config = replace(fedalt.load_config(old / "config.yaml"), out=str(old))
    fedalt.Federation(config).run(resume=True)
    # One step of AdamW moves an element by its gradient's sign, which is rounding's choice, hence
    # the processor's, where the gradient is nothing but rounding.
    step = 2 * config.train.learning_rate * (1 + 1e-3)
    for client, state in used(load_latest(old)).items():
        for name, tensor in state.items():
            assert (tensor - made[client][name]).abs().max() <= step, name
    again = (old / "metrics.jsonl").read_text("utf-8")
    told = [line.split(",")[:3] for line in again.splitlines() if '"answers"' not in line]
    assert told == [line.split(",")[:3] for line in events.splitlines()]
    assert losses(again) == pytest.approx(losses(events), rel=1e-4)


def test_its_report_is_told_again(old):
    stored = json.loads((old / "results.json").read_text("utf-8"))
    again = read_results(old)
    for client, scores in stored["clients"].items():
        assert again["clients"][client]["last"] == scores["last"]
    text, page = write_report(old, "a run of before")
    assert "By ROUGE-1, mixed " in text
    html = page.read_text("utf-8")
    assert "<dt>model</dt><dd>builtin, float32</dd>" in html
    for later in ("<dt>date</dt>", "<dt>versions</dt>", "95 % interval", "Questions and answers"):
        assert later not in html


def test_exports_name_where_loading_was_then():
    assert importlib.import_module("fedalt.export").load_export is fedalt.load_export
