"""A base in one ``.gguf`` file: what ``from_pretrained`` wants to hear, and how its text is split.

The file names its pre-tokenizer, by which text falls apart before any merge; transformers takes
GPT-2's for names that it does not know. Where the named one is known here, it takes its place.
"""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedalt.errors import InputError, InputWarning, first_line, not_installed

SUFFIX = ".gguf"
PROBE = "I'm  12345 x1  7.5\n\n 6 WE'LL\n  go"
"""A text that the known pre-tokenizers split differently."""
AS_GPT2 = ("gpt-2", "mpt", "olmo", "jais", "phi-2")
DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Pre-tokenizers, as llama.cpp calls them, that split as GPT-2's does; those of the second kind
take every digit for a word before."""


def is_gguf(path: str) -> bool:
    return path.lower().endswith(SUFFIX)


def gguf_options(path: str) -> dict[str, str]:
    """What ``from_pretrained`` of the file's folder wants besides; of any other path, nothing.

    Raises:
        InputError: no such file, or the package `gguf` is missing.
    """
    if not is_gguf(path):
        return {}
    if not Path(path).is_file():
        raise InputError(f"model.path: {path}: no such file; name a .gguf file, or its folder")
    if find_spec("gguf") is None:
        raise not_installed("model.path: a .gguf file", "gguf", "gguf")
    return {"gguf_file": Path(path).name}


def forget_quantization(model: Any) -> None:
    """A model read from a ``.gguf`` file is dense, and saved as such."""
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)


def mend_tokenizer(tokenizer: Any, path: str) -> None:
    """Have text of byte-level BPE split as the file says, into tokens of the file alone.

    transformers adds an ``<|endoftext|>`` where the file has none, which no embedding is for.
    SentencePiece names no pre-tokenizer. An ``InputWarning`` tells of splits that transformers
    would make otherwise, and of a name that neither it nor this package knows.
    """
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    kind, name, count = _named_in(path)
    if kind != "gpt2":
        return
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    beyond = [token["content"] for token in whole["added_tokens"] if token["id"] >= count]
    if beyond:
        whole["added_tokens"] = [token for token in whole["added_tokens"] if token["id"] < count]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(whole))
        for role, token in tokenizer.special_tokens_map.items():
            if token in beyond:
                setattr(tokenizer, role, None)
    raw, gpt2 = tokenizer.backend_tokenizer, ByteLevel(add_prefix_space=False)
    found = _pieces(raw.pre_tokenizer)
    if name in AS_GPT2 or found != _pieces(gpt2):
        return
    told = f"model.path: {path} names the pre-tokenizer {name!r}"
    if name in DIGITS_FIRST:
        raw.pre_tokenizer = Sequence([Digits(individual_digits=True), gpt2])
        right = _pieces(raw.pre_tokenizer)
        place = next(i for i, (a, b) in enumerate(zip(found, right, strict=False)) if a != b)
        told += (
            f"; transformers takes {found[place]!r} for one word, that {right[place]!r}: put right"
        )
    else:
        told += ", which is not known; its text is split as GPT-2's, perhaps not as in its training"
    warnings.warn(told, InputWarning, stacklevel=2)


def _named_in(path: str) -> tuple[str, str, int]:
    """The kind of the file's tokenizer, its pre-tokenizer's name, and how many tokens it has."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
    except (ValueError, OSError, IndexError) as error:
        raise InputError(f"model.path: cannot read {path!r}: {first_line(error)}") from None
    keys = ("tokenizer.ggml.model", "tokenizer.ggml.pre")
    kind, name = (str(fields[key].contents()) if key in fields else "" for key in keys)
    tokens = fields.get("tokenizer.ggml.tokens")
    return kind, name, len(tokens.data) if tokens else 0


def _pieces(pre_tokenizer: Any) -> list[str]:
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(PROBE)] if pre_tokenizer else []
