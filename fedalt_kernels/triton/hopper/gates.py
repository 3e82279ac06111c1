"""The mixer in a maker's registers: logits, softmax, and whose gate a rank column has.

The mixer has HEAD rows of `side`, 16 or, for more than five adapters, 32: high parts of its E rows,
high parts again, low parts, zeros.  A product of x with them has the logits in columns e (high) and
2 E + e (low).  In the backward dl's high, low and high part multiply the three: all of the mixer's
product but the least of its four parts is made, in the dtype of x.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def column_of(block, index, other):
    """The sum of two columns of a block, as a vector."""
    lay: gl.constexpr = gl.SliceLayout(0, block.type.layout)
    o_column = gl.expand_dims(gl.arange(0, block.shape[1], layout=lay), 0)
    return gl.sum(gl.where((o_column == index) | (o_column == other), block, 0.0), 1)


@gluon.jit
def peak_logit(logits, E: gl.constexpr):
    """The largest logit of each row."""
    peak = column_of(logits, 0, 2 * E)
    for e in gl.static_range(1, E):
        peak = gl.maximum(peak, column_of(logits, e, 2 * E + e))
    return peak


@gluon.jit
def powers_of(logits, peak, e, E: gl.constexpr):
    """exp(l_e - peak) of each row."""
    return gl.exp(column_of(logits, e, 2 * E + e) - peak)


@gluon.jit
def owned_gate(gate, mine, o_rank, e: gl.constexpr, EDGES: gl.constexpr):
    """`gate` [m, r] with adapter e's gates [m] in the rank columns that it owns."""
    owned = gl.expand_dims((o_rank >= EDGES[e]) & (o_rank < EDGES[e + 1]), 0)
    return gl.where(owned, gl.expand_dims(mine, 1), gate)
