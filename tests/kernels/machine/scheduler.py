"""Threads of which one runs at a time, picked by a seed, and what happens later."""

import random
import threading
from collections.abc import Callable
from typing import Any

MOST_POLLS = 3000  # of all spinning tasks together, while nothing else happens
LAZINESS = 0.03, 0.3, 0.7  # probability that something under way ends before a task goes on


class Fault(AssertionError):
    """What a kernel does wrong."""


class Task:
    """A partition of a program."""

    def __init__(self, scheduler: "Scheduler", name: str, program: int, body: Callable[[], None]):
        self.scheduler, self.name, self.program = scheduler, name, program
        self.done, self.reason, self.until = False, "", lambda: True
        self.products: list[Any] = []  # issued and not yet known to have ended
        self.copies: list[Any] = []  # out of shared memory, in their order
        self.unordered = False  # has written since its last barrier
        self.unfenced: list[tuple[Any, Any]] = []  # written, and not yet seen by copies
        self.must_fence = False  # has been told of others' writes since its last fence
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._run, args=(body,), daemon=True).start()

    def _run(self, body: Callable[[], None]) -> None:
        self._turn.acquire()
        _here.task = self
        try:
            body()
        except BaseException as error:
            self.scheduler.error = error
        self.done = True
        self._back.release()

    def step(self) -> None:
        self._turn.release()
        self._back.acquire()

    def pause(self, until: Callable[[], bool] = lambda: True, reason: str = "") -> None:
        """Hands over; goes on at some moment when `until` holds."""
        self.until, self.reason = until, reason
        self._back.release()
        self._turn.acquire()


class Scheduler:
    def __init__(self, seed: int, programs: int) -> None:
        self.random, self.programs = random.Random(seed), programs
        self.laziness = self.random.choice(LAZINESS)
        self.tasks: list[Task] = []
        self.later: list[Callable[[], None]] = []
        self.polls = 0
        self.error: BaseException | None = None

    def spawn(self, name: str, program: int, body: Callable[[], None]) -> Task:
        self.tasks.append(Task(self, name, program, body))
        return self.tasks[-1]

    def run(self) -> None:
        while left := [task for task in self.tasks if not task.done]:
            ready = [task for task in left if task.until()]
            if (not ready and not self.later) or self.polls > MOST_POLLS:
                waits = "; ".join(f"{task.name} for {task.reason or 'a flag'}" for task in left)
                raise Fault(f"deadlock: {waits}")
            if self.later and (not ready or self.random.random() < self.laziness):
                self.later.pop(self.random.randrange(len(self.later)))()
                self.polls = 0
                continue
            self.random.choice(ready).step()
            if self.error:
                raise self.error


class _Here(threading.local):
    task: Task


_here = _Here()


def here() -> Task:
    """The task that runs."""
    return _here.task


def pause(until: Callable[[], bool] = lambda: True, reason: str = "") -> None:
    task = here()
    task.scheduler.polls = 0
    task.pause(until, reason)
