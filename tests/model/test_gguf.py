"""A base in one .gguf file: the weights, tokens and answers of the folder that it was made of."""

import json
import subprocess
import sys

import pytest
import torch

from fedalt.cli import main
from fedalt.config.schema import ModelConfig
from fedalt.config.settings import config_from_dict
from fedalt.errors import InputError, InputWarning
from fedalt.memory.skeleton import load_skeleton
from fedalt.model import load_base

gguf = pytest.importorskip(
    "gguf", reason="reads and writes .gguf files: pip install 'fedalt[gguf]'"
)

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}
DIGITS = "a  12345 b"


def write_gguf(folder, path, pre):
    """The Llama of a folder, in float32, as llama.cpp lays it out."""
    model, tokenizer = load_base(ModelConfig(path=str(folder)))
    config, vocabulary = model.config, tokenizer.get_vocab()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens[tokens.index("Ā")] = "ĠĠ"  # in the place of the zero byte, so that there is a merge
    writer.add_token_list(tokens)
    writer.add_token_merges(["Ġ Ġ"])
    special = [token.startswith("<") and len(token) > 1 for token in tokens]
    writer.add_token_types([3 if each else 1 for each in special])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, tensor in model.state_dict().items():
        new = name
        for ours, theirs in NAMES.items():
            new = new.replace(ours, theirs)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for part, count in heads.items():
            if part in new:  # llama.cpp interleaves the halves that are rotated together
                rows = tensor.view(count, 2, -1, tensor.shape[1])
                tensor = rows.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(new, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tiny_base, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_base, path, "gpt-2")
    return path


def test_a_gguf_file_is_the_folder_that_it_was_made_of(file, tiny_base, recwarn):
    ours, tokenizer = load_base(ModelConfig(path=str(file)))
    theirs, usual = load_base(ModelConfig(path=str(tiny_base)))
    ids = torch.arange(5, 25).view(1, -1)
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert tokenizer(DIGITS)["input_ids"] == usual(DIGITS)["input_ids"]
    assert (tokenizer.eos_token_id, tokenizer.padding_side) == (2, "left")
    assert not [each for each in recwarn if each.category is InputWarning]


def test_it_is_saved_as_an_ordinary_dense_folder(file, tmp_path):
    model, tokenizer = load_base(ModelConfig(path=str(file)))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    again, _ = load_base(ModelConfig(path=str(tmp_path / "saved")))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("pre", "pieces", "told"),
    [
        ("gpt-2", ["a", "Ġ", "Ġ12345", "Ġb"], ""),
        ("smollm", ["a", "ĠĠ", "1", "2", "3", "4", "5", "Ġb"], "takes 'Ġ' for one word, that 'ĠĠ'"),
        ("llama-bpe", ["a", "Ġ", "Ġ", "123", "45", "Ġb"], ""),
        ("qwen2", ["a", "Ġ", "Ġ", "1", "2", "3", "4", "5", "Ġb"], ""),
        ("brand-new", ["a", "Ġ", "Ġ12345", "Ġb"], "'brand-new', which is not known"),
    ],
)
def test_text_is_split_as_the_file_says(tiny_base, tmp_path, pre, pieces, told, recwarn):
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_base, path, pre)
    _, tokenizer = load_base(ModelConfig(path=str(path)))
    lines = [str(each.message) for each in recwarn if each.category is InputWarning]
    assert len(lines) == bool(told)
    assert told in "".join(lines)
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(DIGITS)
    assert [piece for piece, _ in split] == pieces
    tokenizer.save_pretrained(tmp_path / "saved")
    kept = type(tokenizer).from_pretrained(tmp_path / "saved")
    assert kept(DIGITS)["input_ids"] == tokenizer(DIGITS)["input_ids"]
    assert max(tokenizer("<|endoftext|>")["input_ids"]) < 259


def test_a_run_and_its_memory_start_from_a_file(file, tiny_data, tmp_path):
    settings = {"model": {"path": str(file)}, "data": {"path": str(tiny_data)}}
    skeleton, _ = load_skeleton(config_from_dict(settings), ())
    assert skeleton.config.hidden_size == 32
    command = ["run", "-c", f"model.path={file}", "--data", str(tiny_data), "-c", "threads=1"]
    command += ["--out", str(tmp_path / "run"), "-c", "rounds=1", "-c", "train.max_steps=1"]
    assert main([*command, "-c", "evaluate.max_new_tokens=2"]) == 0


@pytest.mark.parametrize("content", [None, b"no model", b"GGUF\x03\0\0\0"])
def test_a_file_that_is_none_ends_in_one_line(content, tiny_data, tmp_path, capsys):
    path = tmp_path / "broken.gguf"
    if content is not None:
        path.write_bytes(content)
    command = ["run", "-c", f"model.path={path}", "--data", str(tiny_data)]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedalt: model.path: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_without_the_package_the_extra_is_named(file, monkeypatch):
    monkeypatch.setattr("fedalt.model.gguf.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"wants gguf: pip install 'fedalt\[gguf\]'"):
        load_base(ModelConfig(path=str(file)))


def test_the_script_says_what_it_fetches():
    script = ["scripts/fetch_smollm2.py", "--help"]
    done = subprocess.run([sys.executable, *script], capture_output=True, text=True, check=True)
    assert "Apache-2.0" in done.stdout
