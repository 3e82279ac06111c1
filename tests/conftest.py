"""A base model and a federation so small that a whole run takes a second or two."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a network

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # where there is no GPU, kernels run in the interpreter

from fedalt.config.schema import Config
from fedalt.config.settings import config_from_dict
from fedalt_kernels import plans


@pytest.fixture(autouse=True)
def _fresh_plans() -> Iterator[None]:
    """A test may patch what plans are made by, and leaves none behind."""
    plans.forget()
    yield
    plans.forget()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers and 32 hidden units with random weights and a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.3,  # so that its greedy answers differ
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    """Three clients with 10, 6 and 4 train records: each answers with a letter of its own."""
    root = tmp_path / "data"
    for client, size in (("ann", 10), ("bob", 6), ("cyd", 4)):
        write_client(root / client, client[0], size)
    return root


def write_client(folder: Path, letter: str, size: int) -> None:
    """A client folder with ``size`` train and 3 test records."""
    folder.mkdir(parents=True)
    for name, count in (("train", size), ("test", 3)):
        rows = [{"instruction": f"say {i}", "output": letter * (1 + i % 3)} for i in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def tiny_config(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> Config:
    """Two rounds of three steps on the tiny base and data, with dropout."""
    return config_from_dict(
        {
            "rounds": 2,
            "threads": 1,
            "out": str(tmp_path / "run"),
            "model": {"path": str(tiny_base)},
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
            "data": {"path": str(tiny_data)},
            "train": {"batch_size": 4, "max_steps": 3},
            "evaluate": {"max_new_tokens": 4},
        }
    )


@pytest.fixture
def config_file(tiny_config: Config, tmp_path: Path) -> Path:
    """The same as a file."""
    path = tmp_path / "config.yaml"
    path.write_text(tiny_config.to_yaml())
    return path
