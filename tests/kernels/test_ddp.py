"""The layer under DistributedDataParallel: two processes train as one does on the whole batch."""

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from fedalt_kernels import MixedLoRALinear

from .budget import assert_within_budget

RANKS, STEPS, RECORDS, TOKENS = 2, 3, 6, 5
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no processes")


def network(seed: int) -> nn.Module:
    """Two adapted layers whose adapters both say something."""
    torch.manual_seed(seed)
    first = MixedLoRALinear(nn.Linear(24, 32), rank=4, dropout=0.0)
    second = MixedLoRALinear(nn.Linear(32, 8), rank=4, dropout=0.0)
    for layer in (first, second):
        for name, parameter in layer.named_parameters():
            if name.endswith((".a", ".b")):
                nn.init.normal_(parameter, std=0.3)
    return nn.Sequential(first, nn.GELU(), second)


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(7)
    shape = RECORDS, TOKENS
    return torch.randn(*shape, 24, generator=draw), torch.randn(*shape, 8, generator=draw)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> dict[str, Tensor]:
    """The trained parameters' gradients in the first step, after ``steps`` steps."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    first: dict[str, Tensor] = {}
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        first = first or {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
        optimizer.step()
    return {name.removeprefix("module."): gradient for name, gradient in first.items()}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS)
    model = network(seed=rank)  # the second process begins elsewhere, and is given the first's
    x, y = (part[rank::RANKS] for part in batch())
    gradients = train(DistributedDataParallel(model), x, y, STEPS)
    torch.save((gradients, model.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one_on_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=RANKS)
    (gradients, ended), (gradients_2, ended_2) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)
    )
    x, y = batch()
    whole = network(seed=0)
    began = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    eager = train(whole, x, y, STEPS)
    truth = train(network(seed=0).double(), x.double(), y.double(), 1)
    assert len(gradients) == 6  # of each layer A and B of the individual LoRA, and the mixer
    assert_within_budget(gradients, eager, truth, RECORDS * TOKENS)
    for name, tensor in ended.items():
        assert torch.equal(tensor, ended_2[name]), name
        assert torch.equal(tensor, began[name]) == (name not in gradients), name
    assert all(torch.equal(gradients[name], gradients_2[name]) for name in gradients)
