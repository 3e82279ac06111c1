"""Whether a model keeps texts apart that share a row."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from fedalt.errors import InputError

LONG, OTHER, SHORT = (3, 5, 7, 4, 6, 8, 9), (4, 4, 3, 3, 9, 5, 6), (6, 5, 4, 8)
"""Token ids of texts; nothing depends on which these are."""


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Refuses, with ``InputError``, a model in which texts of one row see each other.

    A text's logits must be the same bits whatever text of the same length stands before it, and
    what they are where it stands alone, but for rounding.
    """
    after_long, after_other = _after(model, LONG), _after(model, OTHER)
    alone = _logits(model, [SHORT])
    slack = torch.finfo(alone.dtype).eps ** 0.5 * alone.abs().max()
    apart = torch.equal(after_long, after_other) and (after_long - alone).abs().max() <= slack
    if not apart:
        raise InputError(
            f"train.packing: in {type(model).__name__} records that share a row see each other; "
            "set it to false"
        )


def _after(model: nn.Module, before: tuple[int, ...]) -> Tensor:
    """The short text's logits behind another one."""
    return _logits(model, [before, SHORT])[:, len(before) :]


def _logits(model: nn.Module, texts: list[tuple[int, ...]]) -> Tensor:
    """Of texts in one row [1, L, vocabulary]; without positions where the model takes none."""
    device = next(model.parameters()).device
    ids = torch.tensor([[token for text in texts for token in text]], device=device)
    inputs = {"input_ids": ids, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        starts = torch.cat([torch.arange(len(text), device=device) for text in texts])
        inputs["position_ids"] = starts.unsqueeze(0)
    return model(**inputs).logits
