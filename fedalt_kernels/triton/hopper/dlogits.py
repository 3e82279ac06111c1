"""dl of a row block in a maker's registers, and who writes it.

dl = g ⊙ (dg − ⟨g, dg⟩), dg_e = ⟨T_e, P_e⟩.  Makers that have only a slice of the ranks leave their
parts of dg in memory; the last of a row block adds them up, in their order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .blocks import product_layout
from .ring import barrier, proxy_fence


@gluon.jit
def _owned_sum(products, o_rank, e: gl.constexpr, EDGES: gl.constexpr):
    """dg_e [m] of products T P [m, r]."""
    owned = gl.expand_dims((o_rank >= EDGES[e]) & (o_rank < EDGES[e + 1]), 0)
    return gl.sum(gl.where(owned, products, 0.0), 1)


@gluon.jit
def _whole_sum(p_partial, o_row, M, e, S: gl.constexpr):
    """dg_e [m] of all makers' parts [m, makers, E]."""
    p_mine = p_partial + o_row.to(gl.int64) * (S.MAKERS * S.E) + e
    total = gl.load(p_mine, mask=o_row < M, other=0.0)
    for maker in gl.static_range(1, S.MAKERS):
        total += gl.load(p_mine + maker * S.E, mask=o_row < M, other=0.0)
    return total


@gluon.jit
def leave_part(products, o_rank, o_row, p_partial, slices, tile_n, M, S: gl.constexpr):
    """Leaves a maker's part of dg; returns whether all of its row block's are there."""
    p_mine = p_partial + (o_row.to(gl.int64) * S.MAKERS + tile_n) * S.E
    for e in gl.static_range(S.E):
        gl.store(p_mine + e, _owned_sum(products, o_rank, e, S.EDGES), mask=o_row < M)
    barrier()
    proxy_fence()
    return gl.atomic_add(slices, 1, sem="acq_rel", scope="gpu") == S.MAKERS - 1


@gluon.jit
def _with_dlogit(parts, o_head, gate, dgate, mean, e, E: gl.constexpr, dtype: gl.constexpr):
    """`parts` with dl_e in its columns: high, low and high part, see `gates`."""
    lay: gl.constexpr = gl.SliceLayout(1, parts.type.layout)
    dlogit = gl.expand_dims(gl.convert_layout(gate * (dgate - mean), lay), 1)
    high = dlogit.to(dtype).to(gl.float32)
    parts = gl.where((o_head == e) | (o_head == 2 * E + e), high, parts)
    return gl.where(o_head == E + e, dlogit - high, parts)


@gluon.jit
def store_dlogits(products, o_rank, o_row, p_partial, p_gates, p_strip, M, S: gl.constexpr):
    """dl into the strip's first HEAD columns."""
    dtype: gl.constexpr = p_strip.dtype.element_ty
    lay: gl.constexpr = product_layout(16, gl.num_warps())
    rows: gl.constexpr = o_row.type.layout
    p_gate = p_gates + o_row.to(gl.int64) * S.E
    mean = gl.zeros([S.BLOCK_M], gl.float32, layout=rows)
    o_head = gl.expand_dims(gl.arange(0, S.HEAD, layout=gl.SliceLayout(0, lay)), 0)
    parts = gl.zeros((S.BLOCK_M, S.HEAD), gl.float32, layout=lay)
    if S.MAKERS == 1:
        for e in gl.static_range(S.E):
            gate = gl.load(p_gate + e, mask=o_row < M, other=0.0)
            mean += gate * _owned_sum(products, o_rank, e, S.EDGES)
        for e in gl.static_range(S.E):
            gate = gl.load(p_gate + e, mask=o_row < M, other=0.0)
            dgate = _owned_sum(products, o_rank, e, S.EDGES)
            parts = _with_dlogit(parts, o_head, gate, dgate, mean, e, S.E, dtype)
    else:
        for e in range(S.E):
            gate = gl.load(p_gate + e, mask=o_row < M, other=0.0)
            mean += gate * _whole_sum(p_partial, o_row, M, e, S)
        for e in range(S.E):
            gate = gl.load(p_gate + e, mask=o_row < M, other=0.0)
            dgate = _whole_sum(p_partial, o_row, M, e, S)
            parts = _with_dlogit(parts, o_head, gate, dgate, mean, e, S.E, dtype)
    o_out = gl.expand_dims(gl.convert_layout(o_row, gl.SliceLayout(1, lay)), 1)
    gl.store(p_strip + o_out.to(gl.int64) * S.STRIDE + o_head, parts.to(dtype), mask=o_out < M)
