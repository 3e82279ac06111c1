"""Clients from folders and from the package, records as tokens."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fedalt.config import load_config
from fedalt.config.schema import DataConfig, PartitionConfig
from fedalt.data import ImageRecord, Record, load_clients
from fedalt.data.tokens import IGNORED, Example, collate, encode, render_prompt
from fedalt.errors import InputError
from tests.conftest import write_client


def clients_of(root, partition=None, **settings):
    """The clients, each of them read once, as a run does before it writes anything."""
    cut = PartitionConfig(**(partition or {}))
    clients = load_clients(DataConfig(path=str(root), **settings), cut, seed=0)
    for client in clients:
        client.read().fingerprint()
    return clients


def test_a_folder_a_client_in_the_order_of_names(tiny_data):
    clients = clients_of(tiny_data)
    assert [client.id for client in clients] == ["ann", "bob", "cyd"]
    assert [len(client.read().train) for client in clients] == [10, 6, 4]
    assert clients[0].read().train[1] == Record(instruction="say 1", output="aa")


def test_records_are_read_anew_each_time(tiny_data):
    bob = clients_of(tiny_data)[1]
    assert len(bob.read().train) == 6
    write_client(tiny_data / "new", "n", 9)
    os.replace(tiny_data / "new" / "train.jsonl", tiny_data / "bob" / "train.jsonl")
    assert len(bob.read().train) == 9
    (tiny_data / "bob" / "train.jsonl").unlink()
    with pytest.raises(InputError, match=r"bob/train.jsonl: missing"):
        bob.read()


def test_the_sample_has_eight_clients():
    clients = clients_of("sample")
    assert len(clients) == 8
    assert {record.category for record in clients[3].read().test} == {clients[3].id}


def test_data_with_clients_of_its_own_is_not_cut(tiny_data):
    for path in (tiny_data, "sample"):
        with pytest.raises(InputError, match="has its clients already and is not cut"):
            clients_of(path, {"by": "equal"})
        with pytest.raises(InputError, match=r"data.columns: .* has no columns but fields"):
            clients_of(path, columns={"output": "answer"})


def test_clients_can_be_chosen_in_an_order(tiny_data):
    assert [c.id for c in clients_of(tiny_data, clients=("cyd", "ann"))] == ["cyd", "ann"]


def test_fingerprints_follow_the_records(tiny_data):
    before = [client.read().fingerprint() for client in clients_of(tiny_data)]
    path = tiny_data / "bob" / "test.jsonl"
    path.write_text(path.read_text().replace("say 0", "say 9"))
    after = [client.read().fingerprint() for client in clients_of(tiny_data)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_bom_blank_lines_and_extra_fields_are_fine(tiny_data):
    row = {"instruction": "a", "input": "b", "output": "c", "task": "t", "category": "k"}
    content = b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n\n"
    (tiny_data / "ann" / "train.jsonl").write_bytes(content)
    assert clients_of(tiny_data)[0].read().train == (Record("a", "c", "b", "k"),)


def test_a_record_may_have_options(tiny_data):
    row = {"instruction": "a", "output": "c ", "options": ["b", "c"]}
    (tiny_data / "ann" / "train.jsonl").write_text(json.dumps(row))
    assert clients_of(tiny_data)[0].read().train == (Record("a", "c", options=("b", "c")),)


GOOD = b'{"instruction": "a", "output": "b"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"train.jsonl: empty"),
        (b"\n \n", r"train.jsonl: empty"),
        (GOOD + b'{"instruction": "a"', r"train.jsonl:2: broken JSON: .* at column \d+"),
        (GOOD + b'{"instruction": "a"}\n', r"train.jsonl:2: field 'output' is missing"),
        (b'{"output": "a"}\n', r"train.jsonl:1: field 'instruction' is missing"),
        (b'{"instruction": "a", "output": 3}\n', r"train.jsonl:1: field 'output' must be text"),
        (b'{"instruction": "a", "output": " "}\n', r"train.jsonl:1: field 'output' is empty"),
        (
            b'{"instruction": "a", "output": "b", "options": ["b"]}',
            r"train.jsonl:1: field 'options' must be a list of two texts or more",
        ),
        (
            b'{"instruction": "a", "output": "b", "options": ["c", "d"]}',
            r"train.jsonl:1: the output 'b' is not among field 'options'",
        ),
        (
            GOOD + rb'{"instruction": "a\ud800", "output": "b"}',
            r"train.jsonl:2: field 'instruction' holds '\\ud800' at character 2, half of a ",
        ),
        (rb'{"instruction": "a", "output": "\udfff"}', r"train.jsonl:1: field 'output' holds "),
        (
            rb'{"instruction": "a", "output": "b", "input": "\ud83d"}',
            r"train.jsonl:1: field 'input' holds ",
        ),
        (
            rb'{"instruction": "a", "output": "b", "category": "\udc80"}',
            r"train.jsonl:1: field 'category' holds ",
        ),
        (
            rb'{"instruction": "a", "output": "b", "options": ["b", "\ud800"]}',
            r"train.jsonl:1: field 'options' holds ",
        ),
        (b"[1]\n", r"train.jsonl:1: wants a JSON object, got list"),
        (GOOD + "é".encode("latin-1"), r"train.jsonl:2: not UTF-8 \(byte 0xe9 at column 1\)"),
        (GOOD.decode().encode("utf-16"), r"train.jsonl:1: this is UTF-16"),
    ],
)
def test_a_bad_file_is_named_with_line_and_field(tiny_data, content, message):
    (tiny_data / "ann" / "train.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        clients_of(tiny_data)


def test_a_pair_of_surrogates_is_one_character(tiny_data):
    row = rb'{"instruction": "\ud83d\ude00", "output": "b"}'
    (tiny_data / "ann" / "train.jsonl").write_bytes(row)
    assert clients_of(tiny_data)[0].read().train == (Record("\N{GRINNING FACE}", "b"),)


@pytest.mark.parametrize("key", ["prompt", "prompt_with_input"])
def test_a_prompt_that_cannot_be_encoded_is_named(key):
    with pytest.raises(InputError, match=rf"data.{key} holds '\\ud800' at character 1, half"):
        load_config(overrides=(rf'data.{key}="\ud800{{instruction}} {{input}}"',))


def test_missing_folders_and_files_are_named(tiny_data, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        clients_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: no folder with a train\.jsonl"):
        clients_of(tmp_path / "empty")
    (tiny_data / "bob" / "test.jsonl").unlink()
    with pytest.raises(InputError, match=r"bob/test.jsonl: missing"):
        clients_of(tiny_data)


def test_a_client_twice_is_refused(tiny_data):
    with pytest.raises(InputError, match="names the client 'ann' twice"):
        clients_of(tiny_data, clients=("ann", "bob", "ann"))
    with pytest.raises(InputError, match="no client 'zoe'; known: ann, bob, cyd"):
        clients_of(tiny_data, clients=("zoe",))
    os.symlink(tiny_data / "bob", tiny_data / "dan")
    with pytest.raises(InputError, match=r"dan: the same client as .*bob"):
        clients_of(tiny_data)


def test_names_that_differ_in_case_alone_are_one_client(tiny_data):
    write_client(tiny_data / "Ann", "x", 2)
    with pytest.raises(InputError, match="the same client as"):
        clients_of(tiny_data)


@pytest.fixture
def images(tmp_path):
    """Two clients of two classes, four train images and two test images each."""
    for client in ("ida", "jon"):
        for part, count in (("train", 2), ("test", 1)):
            for name in ("cat", "dog"):
                folder = tmp_path / "images" / client / part / name
                folder.mkdir(parents=True)
                save_images(folder, count)
    return tmp_path / "images"


def save_images(folder, count):
    for number in range(count):
        array = np.full((4, 4, 3), 10 * number, np.uint8)
        Image.fromarray(array).save(folder / f"{number}.png")


def test_image_clients_are_folders_of_classes(images):
    clients = clients_of(images, kind="image")
    assert [client.id for client in clients] == ["ida", "jon"]
    train = clients[0].read().train
    assert [record.label for record in train] == ["cat", "cat", "dog", "dog"]
    assert train[0].image == images / "ida" / "train" / "cat" / "0.png"
    (images / "jon" / "test").rename(images / "jon" / "tests")
    with pytest.raises(InputError, match=r"jon/test: missing"):
        clients_of(images, kind="image")
    with pytest.raises(InputError, match="has its clients already"):
        clients_of(images, {"by": "column", "column": "label"}, kind="image")


@pytest.fixture
def domains(tmp_path):
    """Three domains of two classes, of which one is called train, with ten images in each."""
    for domain in ("real", "clip", "art"):
        for name in ("cat", "train"):
            folder = tmp_path / "domains" / domain / name
            folder.mkdir(parents=True)
            save_images(folder, 10)
    return tmp_path / "domains"


def test_domains_are_clients(domains):
    clients = clients_of(domains, kind="image")
    assert [client.id for client in clients] == ["art", "clip", "real"]
    parts = clients[2].read()
    assert (len(parts.train), len(parts.test)) == (16, 4)
    assert all(isinstance(record, ImageRecord) for record in parts.train)
    assert {(record.category, record.label) for record in parts.train} == {
        ("real", "cat"),
        ("real", "train"),
    }


def test_domains_are_dealt_to_equally_many_clients(domains):
    cut = {"by": "column", "column": "domain", "clients": 6}
    clients = clients_of(domains, cut, kind="image")
    assert [client.id for client in clients][:3] == ["art-00", "art-01", "clip-00"]
    files = [r.image for c in clients for part in vars(c.read()).values() for r in part]
    assert len(files) == len(set(files)) == 60
    with pytest.raises(InputError, match=r"3 domains in .* cannot be dealt equally to 8 clients"):
        clients_of(domains, {**cut, "clients": 8}, kind="image")
    few = clients_of(domains, {**cut, "clients": 2}, kind="image")
    assert [client.id for client in few] == ["art", "clip", "real"]


def test_digits_are_clients_of_images():
    pytest.importorskip("sklearn")
    clients = clients_of("digits", kind="image")
    assert len(clients) == 8
    assert len(clients[0].read().train) == 64
    with pytest.raises(InputError, match=r"data.kind: digits is image, got 'text'"):
        clients_of("digits")
    with pytest.raises(InputError, match=r"data.kind: sample is text, got 'image'"):
        clients_of("sample", kind="image")


def test_prompts_follow_the_template_and_never_expand_the_data():
    config = DataConfig()
    assert render_prompt(Record("add", "2"), config) == "### Instruction:\nadd\n\n### Response:\n"
    assert render_prompt(Record("x {input}", "2", "y {instruction}"), config) == (
        "### Instruction:\nx {input}\n\n### Input:\ny {instruction}\n\n### Response:\n"
    )


@pytest.fixture
def tokenizer(tiny_base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


def test_encoding_marks_both_ends_and_keeps_the_end_of_a_long_prompt(tokenizer):
    (example,) = encode([Record("abc", "xyz")], tokenizer, DataConfig())
    assert example.prompt[0] == tokenizer.bos_token_id
    assert example.answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.answer[:-1]) == "xyz"
    assert not example.cut
    (short,) = encode([Record("abc" * 40, "xyz" * 40)], tokenizer, DataConfig(max_length=32))
    assert len(short.prompt) + len(short.answer) == 32
    assert short.cut
    size = len(example.prompt) + len(example.answer)
    for length, cut in ((size, False), (size - 1, True)):
        assert (
            encode([Record("abc", "xyz")], tokenizer, DataConfig(max_length=length))[0].cut is cut
        )
    assert tokenizer.decode(short.answer[:-1]) == ("xyz" * 40)[:15]
    assert tokenizer.decode(short.prompt[1:]) == "\n### Response:\n"
    (whole,) = encode([Record("hi", "y" * 300)], tokenizer, DataConfig())
    assert tokenizer.decode(whole.answer[:-1]) == "y" * 300


def test_batches_are_padded_left_with_labels_on_answers():
    rows = [Example((1, 5, 6), (7, 2)), Example((1,), (8, 9, 2))]
    batch = collate(rows, pad_id=0, device=torch.device("cpu"))
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 2], [0, 1, 8, 9, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7, 2], [IGNORED, 8, 9, 2]]
