"""Measures real training steps, for the test of what is foretold of them: a process of its own.

    python memory_driver.py 'JSON list of [config file, settings of train]'

Prints a JSON list of bytes: the peak over the loaded base with its adapters. On a GPU that is what
its allocator counts, on a CPU the resident set, whose high-water mark is set back before each.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fedalt.assumed import assume
from fedalt.client import train_client
from fedalt.methods import get_method
from fedalt.settings import load_config
from fedalt.stage import load_model


def main() -> None:
    torch.set_num_threads(1)
    peaks = []
    for path, changes in json.loads(sys.argv[1]):
        peaks.append(peak_of(path, changes))
        gc.collect()
    print(json.dumps(peaks))


def peak_of(path, changes):
    config = load_config(path)
    config = replace(config, train=replace(config.train, **changes))
    model, task = load_model(config, ["LABEL_0", "LABEL_1"])
    example = assume(config, [], task.encode).train_example
    batch = [example] * config.train.batch_size
    if hasattr(example, "prompt"):  # a shorter one, so that there is padding
        batch[0] = replace(example, prompt=example.prompt[:-8])

    def train(examples, steps):
        train_client(
            model,
            examples,
            replace(config.train, max_steps=steps),
            task.loss,
            trains=get_method(config.method).trains,
            seed=0,
            count=task.count,
        )

    train(batch[:2], 1)  # libraries load and set themselves up
    gc.collect()
    if config.model.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train(batch, 2)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    train(batch, 2)
    return resident("VmHWM") - before


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)[field].split()[0])


main()
