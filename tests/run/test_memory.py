"""Memory: no growth over many rounds, and a peak that does not depend on the number of clients.

Each measured run is a process of its own, so that nothing else counts. On the tiny base a rank of
1024 makes a client's state, 1 MiB, large beside all else that a round makes. The bounds are a tenth
of what it would take to keep one state a round, or one a client.
"""

import gc
import os
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedalt
from fedalt.methods.method import Round
from fedalt.store.checkpoint import Draft, load_latest
from fedalt.store.journal import Progress
from tests.conftest import write_client
from tests.methods.method_cases import HEAD, A, B
from tests.run.test_run import quick

TENTH = 0.1


@pytest.fixture
def small(tiny_config, tmp_path):
    """One step a round, one token an answer; states of some size."""

    def make(rounds, clients):
        for number in range(clients):
            letter = "abcd"[number % 4]
            write_client(tmp_path / f"{clients}" / f"client{number:03d}", letter, 1)
        config = quick(tiny_config, rounds=rounds, out=tmp_path / f"run-{clients}")
        return replace(
            config,
            data=replace(config.data, path=str(tmp_path / f"{clients}")),
            lora=replace(config.lora, rank=1024, alpha=1024.0),
            train=replace(config.train, max_steps=1),
        )

    return make


DRIVER = """
import gc, resource, sys
from pathlib import Path

import fedalt
from fedalt.store.journal import Progress

sampled = {}
end_round = Progress.end_round


def end(self, number):
    end_round(self, number)
    if number in marks:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sampled[number] = pages * resource.getpagesize()


marks = [int(word) for word in sys.argv[2:]]
Progress.end_round = end
fedalt.Federation(fedalt.load_config(sys.argv[1])).run()
sampled["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(*[f"{mark}={size}" for mark, size in sampled.items()])
"""


def measured(config, tmp_path, *marks):
    """In bytes: resident after the rounds named in ``marks``, and the ``peak``."""
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(path), *map(str, marks)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    return {k: int(v) for k, v in (pair.split("=") for pair in done.stdout.split())}


def state_bytes(config):
    saved = load_latest(Path(config.out))
    state = saved.used(saved.record["clients"][0]).read()
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def test_memory_does_not_grow_over_two_hundred_rounds(small, tmp_path):
    """By round 20 all that is made once is there; what is left behind later is so 180 times."""
    config = small(rounds=200, clients=2)
    size = measured(config, tmp_path, 20, 200)
    print(f"growth {(size['200'] - size['20']) / 2**20:.2f} MiB")
    assert size["200"] - size["20"] < TENTH * 180 * state_bytes(config)


def test_reading_states_leaves_nothing_behind(tmp_path):
    """Not even the few bytes a tensor that ``safe_open`` does: 6000 tensors of 40 bytes or more.

    It frees about a hundred objects late, 6 KB however many files it opens.
    """
    draft = Draft(tmp_path, 0)
    state = draft.put("clients", "ann", {f"t{i}": torch.ones(i, 2) for i in range(10)})
    for read in (state.read, lambda: dict(state), lambda: dict(draft.state("clients", "ann"))):
        read()
        gc.collect()
        tracemalloc.start()
        for _ in range(600):
            read()
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < TENTH * 6000 * 40


class Watched(Mapping):
    """A stored update; ``held`` gets how many tensors, of any client's, are in memory at a read."""

    def __init__(self, alive, held):
        self.alive, self.held = alive, held

    def __getitem__(self, name):
        assert name == HEAD
        tensor = torch.ones(3)
        self.alive.add(tensor)
        self.held.append(len(self.alive))
        return tensor

    def __iter__(self):
        return iter((f"q.{A}", f"q.{B}", HEAD))

    def __len__(self):
        return 3


def test_a_mean_of_some_parts_reads_them_alone_and_a_client_at_a_time():
    """The next is read before the one before it is let go of."""
    alive, held = weakref.WeakSet(), []
    clients = {f"client{i}": Watched(alive, held) for i in range(9)}
    round = Round(1, clients, dict.fromkeys(clients, 2), alpha=4.0, rank=2)
    assert round.mean("head")[HEAD].tolist() == [1, 1, 1]
    assert max(held) <= 2


@pytest.mark.parametrize("aggregate", ["mean", "clipped"])
def test_peak_memory_does_not_depend_on_the_number_of_clients(aggregate, small, tmp_path):
    """Eight fill the shelf of encoded examples; a hundred would need room for 92 states more."""
    peaks = {}
    for clients in (8, 100):
        config = small(rounds=1, clients=clients)
        federation = replace(config.federation, aggregate=aggregate)
        config = replace(config, federation=federation)
        peaks[clients] = measured(config, tmp_path)["peak"]
    print(f"peaks {peaks[8] / 2**20:.1f} and {peaks[100] / 2**20:.1f} MiB")
    assert peaks[100] - peaks[8] < TENTH * 92 * state_bytes(config)


def test_no_other_client_is_alive_while_one_trains(small, monkeypatch):
    """Of A's and B's shape there are at every step the model's own, their gradients and moments,
    and what the trained client's round started from, however many clients there are: the others'
    adapters and moments are on disk, whatever device the model is on."""
    alive = []

    def count(self):
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        alive[-1].append(sum(1024 in tensor.shape for tensor in tensors))

    monkeypatch.setattr(Progress, "step", count)
    for clients in (2, 4):
        alive.append([])
        config = small(rounds=1, clients=clients)
        fedalt.Federation(replace(config, method="fedalt-kept-optimizer")).run()
    few, many = alive
    assert (len(few), len(many)) == (2, 4)
    assert max(few) == max(many) > 0
