"""Where PyTorch's operations ask nobody for their derivative."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def undifferentiated() -> AbstractContextManager[Any]:
    """For what has a derivative of its own: each operation in it is a sixth cheaper."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch._C._AutoDispatchBelowADInplaceOrView()
