"""The layer against its peers: x [2048, 1024], W [1024, 1024], two adapters of rank 8.

Individual LoRA and mixer are trained, Rest-of-World is frozen.  Every peer is first checked
against float64, then all are timed forward and backward in interleaved rounds, because what counts
are ratios and the machine is noisy.  pytest-benchmark runs and times the rounds; the peers' own
times are in its ``extra_info`` and under ``bench/results/cpu``.

    python -m pytest bench/test_layer.py
"""

from typing import Any

import pytest
import torch

from fedalt_kernels import MixedLoRALinear

from .measure import Interleaved, saved_bytes, training_step
from .peers import all_peers, expected, mixed_layer

M, N, K, RANK = 2048, 1024, 1024, 8
ROUNDS, WARM_UP = 20, 2
PLAIN, UNFUSED = "plain frozen linear", "unfused"
# Largest error over the largest value; a float32 product is good to about 1e-6.
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def check(layer: MixedLoRALinear, peers: dict[str, Any], x: torch.Tensor) -> None:
    """Every peer, with its dropout off, returns what it should."""
    for name, peer in peers.items():
        truth = expected(layer, name, x)
        with torch.no_grad():
            got = peer.eval()(x)
        peer.train()
        error = (got.double() - truth).abs().max() / truth.abs().max()
        assert error < LARGEST_ERROR[x.dtype], name


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_training_step(
    dtype: torch.dtype, dropout: float, benchmark: Any, layer_results: list[dict[str, Any]]
) -> None:
    torch.manual_seed(0)
    layer = mixed_layer(N, K, RANK, dropout, dtype)
    x = torch.randn(M, K).to(dtype).requires_grad_()
    dy = torch.randn(M, N).to(dtype)
    peers = all_peers(layer)
    check(layer, peers, x)
    timing = Interleaved({name: training_step(peer, x, dy) for name, peer in peers.items()})
    timing.warm_up(WARM_UP)
    benchmark.pedantic(timing.round, rounds=ROUNDS)
    held = {name: saved_bytes(peer, x) for name, peer in peers.items()}
    for name in peers:
        p20, median, p80 = timing.percentiles_ms(name)
        layer_results.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "dropout": str(dropout),
                "layer": name,
                "p20 ms": p20,
                "median ms": median,
                "p80 ms": p80,
                "time / plain": timing.ratio(name, PLAIN),
                "time / unfused": timing.ratio(name, UNFUSED),
                "saved beside x, KiB": held[name] // 1024,
                "saved, % of unfused": 100 * held[name] / held[UNFUSED],
            }
        )
    benchmark.extra_info["layers"] = layer_results[-len(peers) :]
