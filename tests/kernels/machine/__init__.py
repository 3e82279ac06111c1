"""A machine for tests: the Gluon kernels' own source on the CPU, in any order a GPU may take.

Triton's interpreter does not run Gluon.  Here each partition of each program is a thread, of which
one runs at a time; every operation that others can see hands over to whom a seed picks.  Copies
(TMA) land at some later moment, and products (wgmma) read shared memory at some moment between
their issue and their wait.  So a slot that is released too early or read before it is ready, a flag
that comes before what it announces, bytes that no barrier was promised, fences and barriers that
are missing, a wait that never ends and counters left dirty show under some seed, as a `Fault` or as
wrong numbers in outputs that began as NaN.
"""

from .launching import launched, load
from .scheduler import Fault

__all__ = ["Fault", "launched", "load"]
