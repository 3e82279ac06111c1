"""Counters by which the programs of one launch order themselves."""

from threading import Lock

import torch
from torch import Tensor
from triton.runtime import driver

ARENA_LENGTH = 2**18
STREAM_LENGTH = 2**12

_lock = Lock()
_arenas: dict[torch.device, Tensor] = {}
_used: dict[torch.device, int] = {}
_by_stream: dict[tuple[torch.device, int], Tensor] = {}


def prepare(device: torch.device) -> None:
    """Makes the device's arena of zeros, out of which all its counters are cut.

    Done before torch.compile runs anything, since memory of a CUDA graph's pool must not be kept.
    """
    if device not in _arenas and not torch.cuda.is_current_stream_capturing():
        _arenas[device] = torch.zeros(ARENA_LENGTH, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)


def counters(device: torch.device, length: int) -> Tensor:
    """Zeroed int32 [length or more]; the kernel that is given them leaves them zeroed.

    Launches on one stream follow one another, so they share.  A captured launch gets its own:
    graphs may be replayed on any stream, side by side, and need no node that zeroes.
    """
    if device.type == "cpu":
        return torch.zeros(length, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        return _cut(device, length)
    prepare(device)
    key = device, driver.active.get_current_stream(device.index)
    held = _by_stream.get(key)
    if held is None or held.numel() < length:
        held = _by_stream[key] = _cut(device, max(length, STREAM_LENGTH))
    return held


def _cut(device: torch.device, length: int) -> Tensor:
    """A part of the arena that nobody else is given; zeros of its own where the arena is spent."""
    with _lock:
        start = _used.get(device, 0)
        if device in _arenas and start + length <= ARENA_LENGTH:
            _used[device] = start + length
            return _arenas[device][start : start + length]
    return torch.zeros(length, dtype=torch.int32, device=device)
