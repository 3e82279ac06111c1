"""What is kept of a client's answers: five questions, evenly spread, cut to a length."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fedalt
from fedalt.config import DataConfig, EvaluateConfig, ModelConfig
from fedalt.data import ImageExample, ImageRecord, Record, encode
from fedalt.evaluation import evaluate
from fedalt.evaluation.answers import LENGTH, Answers
from fedalt.evaluation.evaluate import evaluate_images, evaluate_text
from fedalt.model import load_base
from tests.evaluation.test_evaluate import RECORDS, Table, first_pixels


def kept(given, scores=()):
    answers = Answers(5)
    answers.take(given, scores)
    return answers


@pytest.mark.parametrize(
    ("records", "places"),
    [(1, [0]), (3, [0, 1, 2]), (5, [0, 1, 2, 3, 4]), (12, [0, 2, 4, 7, 9])],
)
def test_five_questions_are_spread_over_the_records(records, places):
    asked = [Record(f"ask {i}", f"gold {i}") for i in range(records)]
    event = kept([f"given {i}" for i in range(records)], [100 / 3] * records).event(asked)
    assert event["test"] == records
    assert event["scores"] == [33.33] * records
    assert event["shown"] == [
        {"asked": f"ask {i}", "gold": f"gold {i}", "given": f"given {i}"} for i in places
    ]


def test_long_texts_are_cut_and_inputs_belong_to_the_question():
    (shown,) = kept(["x" * 1000]).event([Record("ask", "y" * LENGTH, input="about this")])["shown"]
    assert shown["asked"] == "ask\nabout this"
    assert shown["gold"] == "y" * LENGTH
    assert shown["given"] == "x" * (LENGTH - 1) + "…"


def test_images_are_named_by_file_and_class():
    array = np.zeros((2, 2), dtype=np.uint8)
    records = [ImageRecord(Path("a/b.png"), "cat", "sketch"), ImageRecord(array, "dog")]
    event = kept(["dog", "dog"]).event(records)
    assert "scores" not in event
    assert event["shown"] == [
        {"asked": "sketch b.png", "gold": "cat", "given": "dog"},
        {"asked": "image 2", "gold": "dog", "given": "dog"},
    ]


def test_an_evaluation_hands_over_every_answer_and_its_score(tiny_base, monkeypatch):
    """In the records' order, though the longest prompts go first."""
    model, tokenizer = load_base(ModelConfig(path=str(tiny_base)))
    examples = encode(RECORDS, tokenizer, DataConfig())
    said = {e.prompt: r.output for e, r in zip(examples, RECORDS, strict=True)}
    said[examples[2].prompt] = f"{RECORDS[2].output} zzz"
    monkeypatch.setattr(evaluate, "generate", lambda *a: [said[e.prompt] for e in a[2]])
    answers = Answers(5)
    config = EvaluateConfig(batch_size=2)
    scores = evaluate_text(model, tokenizer, examples, RECORDS, config, kept=answers)
    assert answers.given == [said[e.prompt] for e in examples]
    assert scores["rouge1"] == pytest.approx(sum(answers.scores) / len(RECORDS), abs=0.01)
    assert [score == 100 for score in answers.scores] == [i != 2 for i in range(len(RECORDS))]
    assert scores == evaluate_text(model, tokenizer, examples, RECORDS, config)


def test_an_evaluation_of_images_tells_every_class_found():
    model = Table([[0.5, 0.25, 0.25], [0.375, 0.5, 0.125], [0.75, 0.125, 0.125]])
    images = [ImageExample(row, label) for row, label in ((0, 0), (1, 1), (2, 2))]
    found: list[int] = []
    evaluate_images(model, first_pixels, images, 2, found=found)
    assert found == [0, 1, 0]


def test_a_run_may_keep_none_of_its_questions(tiny_config):
    config = replace(tiny_config, evaluate=replace(tiny_config.evaluate, answers=0), rounds=1)
    fedalt.Federation(config).run()
    lines = (Path(config.out) / "metrics.jsonl").read_text("utf-8").splitlines()
    kept = [event for event in map(json.loads, lines) if event["event"] == "answers"]
    assert kept
    assert all(event["shown"] == [] for event in kept)
