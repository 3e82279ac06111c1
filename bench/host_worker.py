"""The calls of `host`, in a process of its own, over whichever tree of the package it finds.

    python -m bench.host_worker '{"kinds": ["layer"]}'

It writes a line of JSON when it is ready (what it measures, and what every call launches), after
every ``round`` (each call's times, µs) and after ``profile``, or an error's one line.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fedalt_kernels
from fedalt_kernels import MixedLoRALinear

from .device import brief, missing
from .peers import mixed_layer, one_peft_lora, two_peft_loras
from .worker import say

OURS, PLAIN, ONE, TWO = "MixedLoRALinear", "plain", "one PEFT LoRA", "two PEFT LoRAs"
KINDS = ("layer", "group", "decode", "cpu")
RANK, DROPOUTS = 8, (0.0, 0.05)
TRAINED = 4096, 4096  # rows and width of a call on a GPU
TINY = 80, 64  # and of one beside the stand-in: more rows than decode serves, hardly any work
BATCH, CUDA_BATCH = 20, 4  # calls; more would fill up a GPU's queue of launches
WARM_UP = 3
SAMPLE_S, SAMPLED_S, LEAST_SHARE = 0.00053, 1.0, 0.02
PROFILED = 100
PACKAGE = Path(fedalt_kernels.__file__).parent
# What PyTorch is called for without a launch; views are told by their schema.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


Stack = tuple[str, ...]


class Case(NamedTuple):
    """A kind of layers and a call of them."""

    kind: str
    dropout: float
    both: bool  # forward and backward

    @property
    def trains(self) -> bool:
        return self.kind != "decode"


def cases(kinds: Sequence[str]) -> Iterator[Case]:
    """Every case of these kinds."""
    for kind in kinds:
        if kind == "decode":
            yield Case(kind, 0.0, False)
        else:
            yield from (Case(kind, each, both) for both in (False, True) for each in DROPOUTS)


class Call:
    """A candidate's call: its layers read one x, and all are called."""

    def __init__(self, case: Case, layers: Sequence[nn.Module], source: Tensor) -> None:
        self.case, self.source = case, source
        self.layers = [layer.train(case.trains) for layer in layers]
        self.trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
        self.refresh()
        self.dys = [torch.ones_like(layer(self.x)).detach() for layer in layers]

    def refresh(self) -> None:
        """What comes before a call and is not timed: another x, which layers that share it want
        as well, and no gradients."""
        self.x = self.source.detach().requires_grad_(self.case.trains)
        for parameter in self.trained:
            parameter.grad = None

    def __call__(self) -> None:
        ys = [layer(self.x) for layer in self.layers]
        if self.case.both:
            torch.autograd.backward(ys, self.dys)

    def times_us(self, count: int) -> list[float]:
        """Of so many calls, the device left behind.

        Without a device it is this thread's own time, which others on the machine do not lengthen.
        """
        clock = time.thread_time
        if self.source.is_cuda:
            clock = time.perf_counter
            torch.cuda.synchronize()
        times = []
        with torch.set_grad_enabled(self.case.trains):
            for _ in range(count):
                self.refresh()
                start = clock()
                self()
                times.append(1e6 * (clock() - start))
        return times

    def watched(self, watch: AbstractContextManager[Any]) -> None:
        """Once, untimed, and all of it in this thread."""
        self.refresh()
        if self.source.is_cuda:
            torch.cuda.synchronize()
        with (
            torch.set_grad_enabled(self.case.trains),
            torch.autograd.set_multithreading_enabled(False),
            watch,
        ):
            self()


def calls_of(case: Case, device: torch.device) -> dict[str, Call]:
    """Every candidate's call; PEFT's are left out where it is not installed."""
    rows, width = TRAINED if device.type == "cuda" else TINY
    shape: tuple[int, ...] = (rows, width)
    outputs: tuple[int, ...] = (width,)
    dtype, impl = torch.bfloat16, "triton"
    if case.kind == "group":  # q, k and v, in Llama-3-8B's proportions
        outputs = width, width // 4, width // 4
    elif case.kind == "decode":
        shape = 1, width
    elif case.kind == "cpu":
        shape, outputs, dtype, impl = (1, 4, 16), (16,), torch.float32, "torch"
        device = torch.device("cpu")

    ours = []
    for n in outputs:
        layer = mixed_layer(n, shape[-1], RANK, case.dropout, dtype, device, bias=False)
        layer.impl = impl
        ours.append(layer)
    makes: dict[str, list[nn.Module]] = {OURS: [*ours], PLAIN: [layer.base for layer in ours]}
    if not missing("peft"):
        makes[ONE] = [one_peft_lora(layer) for layer in ours]
        makes[TWO] = [two_peft_loras(layer) for layer in ours]
    if case.kind == "group":
        MixedLoRALinear.share_input(ours)
    source = torch.ones(shape, dtype=dtype, device=device)
    return {name: Call(case, layers, source) for name, layers in makes.items()}


class Operators(TorchDispatchMode):
    """Counts what PyTorch is called for that is a launch on a GPU, or several."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


def operators(call: Call) -> Counter[str]:
    """PyTorch's operators of one call."""
    mode = Operators()
    call.watched(mode)
    return mode.counted


def cuda_launches(call: Call) -> Counter[str]:
    """The package's kernels that one call launches on a GPU."""
    from torch.profiler import ProfilerActivity, profile
    from triton.runtime.jit import JITFunction

    modules = [each for name, each in sys.modules.items() if name.startswith("fedalt_kernels")]
    values = [value for module in modules for value in vars(module).values()]
    ours = {value.fn.__name__ for value in values if isinstance(value, JITFunction)}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call.watched(nullcontext())
        torch.cuda.synchronize()
    return Counter(event.name for event in profiler.events() if event.name in ours)


def entries(call: Call) -> Counter[str]:
    """How often one call enters each of the package's files from another file, in first order."""
    entered: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        path, before = frame.f_code.co_filename, frame.f_back
        if event != "call" or not path.startswith(str(PACKAGE)):
            return
        if before is None or before.f_code.co_filename != path:
            entered[str(Path(path).relative_to(PACKAGE).with_suffix(""))] += 1

    sys.setprofile(note)
    try:
        call.watched(nullcontext())
    finally:
        sys.setprofile(None)
    return entered


def profiled(call: Call) -> list[str]:
    """A call's steps as a tree: µs, µs of the step's own, and whose they are; from samples.

    What is in C counts as its caller's own.
    """
    whole: Counter[Stack] = Counter()
    own: Counter[Stack] = Counter()

    def sample(_: int, frame: FrameType | None) -> None:
        stack: list[str] = []
        while frame is not None and frame.f_code is not Call.__call__.__code__:
            code = frame.f_code
            place = "/".join(Path(code.co_filename).parts[-2:])
            stack.insert(0, f"{code.co_qualname} ({place}:{code.co_firstlineno})")
            frame = frame.f_back
        if frame is not None:
            own[tuple(stack)] += 1
            whole.update(tuple(stack[:depth]) for depth in range(len(stack) + 1))

    previous = signal.signal(signal.SIGALRM, sample)
    signal.setitimer(signal.ITIMER_REAL, SAMPLE_S, SAMPLE_S)
    deadline = time.perf_counter() + SAMPLED_S
    while time.perf_counter() < deadline:
        call.watched(nullcontext())
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, previous)

    share_us = float(np.median(call.times_us(PROFILED))) / whole[()]
    lines = []

    def tell(stack: Stack) -> None:
        if whole[stack] >= LEAST_SHARE * whole[()]:
            name = stack[-1] if stack else "the call"
            times = f"{share_us * whole[stack]:7.1f} {share_us * own[stack]:6.1f}"
            lines.append(f"{times}  {'  ' * len(stack)}{name}")
            below = [each for each in whole if each and each[:-1] == stack]
            for each in sorted(below, key=lambda each: -whole[each]):
                tell(each)

    tell(())
    return lines


class Bench:
    """All the calls, and what is answered about them, in the order of `cases`."""

    def __init__(self, kinds: Sequence[str]) -> None:
        self.launches: Callable[[Call], Counter[str]] = cuda_launches
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch = CUDA_BATCH
        if device.type == "cpu":
            from . import standin

            launched, self.batch = standin.install(), BATCH

            def counted(call: Call) -> Counter[str]:
                launched.clear()
                call.watched(nullcontext())
                return launched.copy()

            self.launches = counted
        self.calls = [calls_of(case, device) for case in cases(kinds)]
        for call in self._all():
            call.times_us(WARM_UP)
        gc.collect()
        gc.freeze()  # what was loaded is no part of a call's rubbish

    def _all(self) -> Iterator[Call]:
        for calls in self.calls:
            yield from calls.values()

    def ready(self) -> dict[str, Any]:
        """What is measured, and what every call launches."""
        counted = [
            {
                name: {
                    "kernels": self.launches(call),
                    "operators": operators(call),
                    "files": entries(call),
                }
                for name, call in calls.items()
            }
            for calls in self.calls
        ]
        return {"package": str(PACKAGE), "counted": counted}

    def round(self) -> dict[str, Any]:
        """The times of every call, µs; candidates of a case in turn."""
        times = [
            {name: call.times_us(self.batch) for name, call in calls.items()}
            for calls in self.calls
        ]
        return {"times": times}

    def profile(self) -> dict[str, Any]:
        """Where our own calls' time goes."""
        return {"profiles": [profiled(calls[OURS]) for calls in self.calls]}


def main() -> None:
    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        bench = Bench(json.loads(sys.argv[1])["kinds"])
        say(bench.ready())
        for line in sys.stdin:
            say(bench.round() if line == "round\n" else bench.profile())
    except Exception as error:  # whatever it is, the parent tells
        last = traceback.extract_tb(error.__traceback__)[-1]
        say({"error": f"{brief(error)} ({last.filename}:{last.lineno})"})


if __name__ == "__main__":
    main()
