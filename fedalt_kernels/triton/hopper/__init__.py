"""Hopper's own kernels, in Gluon: what sm_90 can do and Triton's dialect for all GPUs cannot say.

`forward` and `backward` are one persistent launch each, made of `ring`, `blocks`, `gates`,
`makers` and `sums`; `shapes` has their sizes, `planning` their plans, `record` where they serve.
"""

from .planning import (
    backward_shape,
    forward_shape,
    mixing,
    mixing_backward,
    serves_backward,
    serves_forward,
    unserved,
)

__all__ = [
    "backward_shape",
    "forward_shape",
    "mixing",
    "mixing_backward",
    "serves_backward",
    "serves_forward",
    "unserved",
]
