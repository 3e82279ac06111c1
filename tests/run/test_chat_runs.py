"""Whole runs on chats: packed files, the base's template, and what is told before anything is."""

import gzip
import json
import warnings

import pytest
import torch

import fedalt
from fedalt.config.settings import config_from_dict
from fedalt.data import Chat, collate, encode
from fedalt.evaluation.evaluate import generate
from fedalt.model import load_base
from tests.families import write_family

ONE = Chat((("user", "say"), ("assistant", "xyz")))


def chat(*texts, system=""):
    roles = ("user", "assistant") * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def write_chats(folder, letter, zipped=False, **more):
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        rows = [
            {"messages": chat(f"say {i}", letter, "again", letter * 2, **more)} for i in range(4)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        name = f"{part}.jsonl.gz" if zipped else f"{part}.jsonl"
        (folder / name).write_bytes(gzip.compress(text) if zipped else text)


@pytest.fixture
def data(tmp_path):
    write_chats(tmp_path / "data" / "ann", "a", zipped=True)
    write_chats(tmp_path / "data" / "bob", "b")
    return tmp_path / "data"


def config_of(base, data, tmp_path, **more):
    return config_from_dict(
        {
            "rounds": 1,
            "threads": 1,
            "out": str(tmp_path / "run"),
            "model": {"path": str(base)},
            "lora": {"rank": 2},
            "data": {"path": str(data), **more},
            "train": {"batch_size": 2, "max_steps": 2},
            "evaluate": {"max_new_tokens": 4},
        }
    )


@pytest.mark.parametrize("family", ["chatml", "gemma", "zephyr"])
def test_a_run_on_chats(family, tiny_base, data, tmp_path, recwarn):
    base = write_family(family, tiny_base, tmp_path / "base")
    results = fedalt.Federation(config_of(base, data, tmp_path)).run().results
    assert all(client["trained_rounds"] for client in results["clients"].values())
    assert not [each for each in recwarn if each.category is fedalt.InputWarning]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    shown = [row["shown"] for row in map(json.loads, lines) if row["event"] == "answers"]
    assert [shown[0][0][key] for key in ("asked", "gold")] == ["again", "aa"]


def test_an_answer_ends_with_the_templates_own_end(tiny_base, tmp_path):
    """The tokenizer's end token is another one."""
    base = write_family("chatml", tiny_base, tmp_path / "base")
    config = config_of(base, tmp_path, tmp_path)
    model, tokenizer = load_base(config.model)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id != end
    (example,) = encode([ONE], tokenizer, config.data, tested=True)
    assert example.answer[-1] == end
    word = tokenizer("x", add_special_tokens=False)["input_ids"][0]

    lengths: list[int] = []

    def say(module, arguments, inputs, output):
        """A letter after the prompt, then the end, whatever the model finds."""
        lengths.append(inputs["input_ids"].shape[1])
        output.logits[..., end if lengths[1:] else word] = 1e9
        return output

    model.register_forward_hook(say, with_kwargs=True)
    assert generate(model, tokenizer, [example], config.evaluate) == ["x"]
    assert len(lengths) == 2


def test_a_template_that_refuses_ends_the_run_before_it_begins(tiny_base, tmp_path):
    write_chats(tmp_path / "data" / "ann", "a")
    write_chats(tmp_path / "data" / "bob", "b", system="Be brief.")
    base = write_family("gemma", tiny_base, tmp_path / "base")
    with pytest.raises(fedalt.InputError, match=r"refuses the chat 'Be brief\.': System role"):
        fedalt.Federation(config_of(base, tmp_path / "data", tmp_path)).run()
    assert not (tmp_path / "run").exists()


def test_an_instruct_base_off_its_template_is_told(tiny_base, tiny_data, tmp_path):
    base = write_family("chatml", tiny_base, tmp_path / "base")
    with pytest.warns(fedalt.InputWarning, match="has a chat template and is trained without it"):
        fedalt.Federation(config_of(base, tiny_data, tmp_path)).run()
    with warnings.catch_warnings():
        warnings.simplefilter("error", fedalt.InputWarning)
        fedalt.Federation(config_of(base, tiny_data, tmp_path / "b", prompt="chat")).run()


def test_chats_in_a_table_are_cut_into_clients(tiny_base, tmp_path):
    pytest.importorskip("datasets", reason="tables are read by it: pip install 'fedalt[data]'")
    rows = [{"messages": chat(f"say {i}", "ab"[i % 2]), "category": "ab"[i % 2]} for i in range(24)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "all.jsonl.gz").write_bytes(gzip.compress(text))
    base = write_family("chatml", tiny_base, tmp_path / "base")
    config = config_of(base, tmp_path / "all.jsonl.gz", tmp_path).to_dict()
    config["partition"] = {"by": "column", "column": "category"}
    results = fedalt.Federation(config_from_dict(config)).run().results
    assert set(results["clients"]) == {"a", "b"}


def test_plain_and_instruction_are_names_of_templates():
    plain = config_from_dict({"data": {"prompt": "plain"}}).data
    assert plain.prompt_with_input == "{instruction}\n\n{input}\n"
    usual = config_from_dict({"data": {"prompt": "instruction"}}).data
    assert usual == config_from_dict({}).data
    with pytest.raises(fedalt.InputError, match=r"prompt_with_input must be left out beside"):
        config_from_dict({"data": {"prompt": "plain", "prompt_with_input": "{instruction}{input}"}})
    with pytest.raises(
        fedalt.InputError, match=r"data\.prompt must be a name \(chat, instruction, plain\)"
    ):
        config_from_dict({"data": {"prompt": "chatty"}})


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b"{}" * 999)[:-9]], ids=["no gzip", "cut short"]
)
def test_a_broken_gzip_file_and_two_of_one_part_are_refused(content, data, tiny_base, tmp_path):
    config = config_of(tiny_base, data, tmp_path)
    (data / "ann" / "test.jsonl.gz").write_bytes(content)
    with pytest.raises(fedalt.InputError, match=r"test\.jsonl\.gz: no whole gzip file"):
        fedalt.Federation(config).run()
    (data / "ann" / "train.jsonl").write_text("{}")
    with pytest.raises(fedalt.InputError, match=r"train\.jsonl: there is a train\.jsonl\.gz too"):
        fedalt.Federation(config).run()
    assert not (tmp_path / "run").exists()


def test_what_counts_is_what_is_learned(tiny_base, tmp_path):
    """The labels of a batch are the assistant's tokens, and nothing else, in both rows."""
    base = write_family("chatml", tiny_base, tmp_path / "base")
    config = config_of(base, tmp_path, tmp_path)
    _, tokenizer = load_base(config.model)
    turns = tuple((row["role"], row["content"]) for row in chat("a", "bc", "d", "efg"))
    examples = encode([ONE, Chat(turns)], tokenizer, config.data)
    batch = collate(examples, tokenizer.pad_token_id, torch.device("cpu"))
    learned = [tokenizer.decode(row[row != -100]) for row in batch.labels]
    assert learned == ["xyz<|im_end|>", "bc<|im_end|>efg<|im_end|>"]
    kept = batch.labels.shape[1]
    same = (batch.labels == batch.input_ids[:, -kept:]) | (batch.labels == -100)
    assert same.all()
