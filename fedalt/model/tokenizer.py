"""The base's tokenizer: its end, its padding, and an embedding for each of its tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from fedalt.errors import InputError, first_line
from fedalt.model.gguf import gguf_options, is_gguf, mend_tokenizer


def load_tokenizer(path: str, name: str) -> Any:
    """The tokenizer of a base, padding on the left; with the end token where it has no padding.

    Args:
        path: what ``from_pretrained`` takes; ``name``: what messages call it.

    Raises:
        InputError: there is none, it cannot be read, or it has no end token.
    """
    from transformers import AutoTokenizer

    options = gguf_options(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **options)
    except Exception as error:  # whatever a tokenizer's reader may raise
        raise InputError(f"model.path: cannot load {name!r}: {first_line(error)}") from None
    if is_gguf(name):
        mend_tokenizer(tokenizer, name)
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"model.path: the tokenizer of {name!r} has no end token, which every answer ends "
            "with; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fit_tokenizer(tokenizer: Any, model: nn.Module, name: str) -> None:
    """Refuse, with ``InputError``, a tokenizer of more tokens than the model has embeddings for.

    Of padding, which the model does not look at, the end token takes the place.
    """
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= rows]
    pad, ends = tokenizer.pad_token, (tokenizer.bos_token, tokenizer.eos_token)
    if pad in beyond and pad not in ends:
        beyond.remove(pad)
        tokenizer.pad_token = tokenizer.eos_token
    if beyond:
        raise InputError(
            f"model.path: the tokenizer of {name!r} has tokens such as {beyond[0]!r} beyond the "
            f"model's {rows} embeddings; take the tokenizer that the model was trained with, or "
            "save the model after resize_token_embeddings"
        )
