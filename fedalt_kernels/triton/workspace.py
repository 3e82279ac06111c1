"""Counters by which the programs of one launch order themselves."""

import torch
from torch import Tensor

ARENA_LENGTH = 2**18

_arenas: dict[torch.device, Tensor] = {}
_used: dict[torch.device, int] = {}
_by_stream: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, length: int) -> Tensor:
    """Zeroed int32 [length]; the kernel that is given them leaves them zeroed.

    Launches on one stream follow one another, so they share.  A captured launch gets its own, out
    of an arena zeroed beforehand: graphs may be replayed on any stream, side by side, and need no
    node that zeroes.
    """
    if device.type == "cpu":
        return torch.zeros(length, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        start = _used.get(device, 0)
        if device not in _arenas or start + length > ARENA_LENGTH:
            return torch.zeros(length, dtype=torch.int32, device=device)
        _used[device] = start + length
        return _arenas[device][start : start + length]
    if device not in _arenas:
        _arenas[device] = torch.zeros(ARENA_LENGTH, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()
    key = device, torch.cuda.current_stream(device).cuda_stream
    held = _by_stream.get(key)
    if held is None or held.numel() < length:
        held = _by_stream[key] = torch.zeros(length, dtype=torch.int32, device=device)
    return held
