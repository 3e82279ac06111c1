"""Measures real steps and evaluations, for the test of what is foretold: a process of its own.

    python memory_driver.py 'JSON list of [config file, "train" or "evaluate", its settings]'

Prints a JSON list of bytes: the peak over the loaded base with its adapters. On a GPU that is what
its allocator counts, on a CPU the resident set, whose high-water mark is set back before each.
"""

import ctypes
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fedalt.config.settings import load_config
from fedalt.evaluation import Examined
from fedalt.memory.assumed import assume
from fedalt.methods.fedalt import get_method
from fedalt.run.stage import load_model
from fedalt.training.client import train_client


def main() -> None:
    torch.set_num_threads(1)
    peaks = []
    for path, group, settings in json.loads(sys.argv[1]):
        config = load_config(path)
        changed = replace(getattr(config, group), **settings)
        peaks.append(peak_of(replace(config, **{group: changed}), group))
        gc.collect()
    print(json.dumps(peaks))


def peak_of(config, group):
    model, task = load_model(config, ["LABEL_0", "LABEL_1"])
    assumed = assume(config, [], task.encode)

    def train(count):
        batch = [assumed.train_example] * count
        if hasattr(batch[0], "prompt"):  # a shorter one, so that there is padding
            batch[0] = replace(batch[0], prompt=batch[0].prompt[:-8])
        train_client(
            model,
            batch,
            replace(config.train, max_steps=2),
            task.loss,
            trains=get_method(config.method).trains,
            seed=0,
            count=task.count,
        )

    def evaluate(count):
        tested = Examined([assumed.test_example] * count, [assumed.test_record] * count)
        task.evaluate(model, [tested])

    work = {"train": train, "evaluate": evaluate}[group]
    work(2)  # libraries load and set themselves up
    gc.collect()
    count = getattr(config, group).batch_size
    if config.model.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work(count)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # else work could go on in pages that others left
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work(count)
    return resident("VmHWM") - before


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)[field].split()[0])


main()
