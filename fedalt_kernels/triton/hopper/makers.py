"""What the makers of a strip leave for the tiles, of which each has half a row block in registers.

Forward: the gates, P, and S = g P.  Backward: dP = g T, S again where dB is wanted, and
dl = g ⊙ (dg − ⟨g, dg⟩) with dg_e = ⟨T_e, P_e⟩; makers that have only a slice of the ranks leave
their parts of dg in memory, and the last of a row block adds them up, in their order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .blocks import product_layout
from .gates import owned_gate, peak_logit, powers_of
from .ring import barrier, proxy_fence, publish


@gluon.jit
def make_strip(
    b_low,
    logits,
    p_gated,
    p_low,
    p_gates,
    flag,
    weights,
    row,
    part,
    M,
    dtype: gl.constexpr,
    S: gl.constexpr,
):
    """Half a row block's S, P and gates, of P and the logits; announces S at `flag`."""
    thin: gl.constexpr = product_layout(S.WIDTH, gl.num_warps())
    rows: gl.constexpr = gl.SliceLayout(1, thin)
    o_row = row + gl.arange(0, S.HALF_M, layout=rows)
    o_rank = part * S.WIDTH - S.SHIFT + gl.arange(0, S.WIDTH, layout=gl.SliceLayout(0, thin))
    gate = gl.zeros((S.HALF_M, S.WIDTH), gl.float32, layout=thin)
    if S.GATED:
        peak = peak_logit(logits, S.E)
        total = powers_of(logits, peak, 0, S.E)
        for e in gl.static_range(1, S.E):
            total += powers_of(logits, peak, e, S.E)
        for e in gl.static_range(S.E):
            mine = gl.convert_layout(powers_of(logits, peak, e, S.E) / total, rows)
            gate = owned_gate(gate, mine, o_rank, e, S.EDGES)
            if part == 0:
                gl.store(p_gates + o_row.to(gl.int64) * S.E + e, mine, mask=o_row < M)
    else:
        for e in gl.static_range(S.E):
            mine = gl.full([S.HALF_M], weights[e], gl.float32, rows)
            gate = owned_gate(gate, mine, o_rank, e, S.EDGES)
    inside = gl.expand_dims((o_rank >= 0) & (o_rank < S.RANKS), 0)
    m_low = gl.expand_dims(o_row < M, 1) & inside
    o_tall = gl.expand_dims(o_row.to(gl.int64), 1)
    p_strip = p_gated + o_tall * S.STRIDE + gl.expand_dims(o_rank, 0)
    gl.store(p_strip, (b_low * gate).to(dtype), mask=m_low)
    publish(flag)
    p_block = p_low + o_tall * S.RANKS + gl.expand_dims(o_rank, 0)
    gl.store(p_block, b_low.to(dtype), mask=m_low)


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
def _leave_part(products, o_rank, o_row, p_partial, slices, tile_n, M, S: gl.constexpr):
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
def _store_dlogits(products, o_rank, o_row, p_partial, p_gates, p_strip, M, S: gl.constexpr):
    """dl into the strip's first HEAD columns."""
    dtype: gl.constexpr = p_strip.dtype.element_ty
    lay: gl.constexpr = product_layout(16, gl.num_warps())
    rows: gl.constexpr = o_row.type.layout
    p_gate = p_gates + o_row.to(gl.int64) * S.E
    mean = gl.zeros([S.HALF_M], gl.float32, layout=rows)
    o_head = gl.expand_dims(gl.arange(0, S.HEAD, layout=gl.SliceLayout(0, lay)), 0)
    parts = gl.zeros((S.HALF_M, S.HEAD), gl.float32, layout=lay)
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


@gluon.jit
def make_dstrip(
    spread,
    p_strip,
    p_gated,
    p_partial,
    p_low,
    p_gates,
    weights,
    row,
    part,
    flag,
    slices,
    published,
    M,
    S: gl.constexpr,
):
    """Half a row block's dP, S where dB is wanted, and dl, of T `spread`; announces them at `flag`
    and `published`.  `slices` counts the makers that have left their part of dg."""
    thin: gl.constexpr = product_layout(S.WIDTH, gl.num_warps())
    rows: gl.constexpr = gl.SliceLayout(1, thin)
    dtype: gl.constexpr = p_strip.dtype.element_ty
    o_row = row + gl.arange(0, S.HALF_M, layout=rows)
    o_rank = part * S.WIDTH + gl.arange(0, S.WIDTH, layout=gl.SliceLayout(0, thin))
    o_tall = gl.expand_dims(o_row.to(gl.int64), 1)
    o_flat = gl.expand_dims(o_rank, 0)
    m_row = gl.expand_dims(o_row < M, 1)
    m_low = m_row & (o_flat < S.RANKS)
    b_low = gl.load(p_low + o_tall * S.RANKS + o_flat, mask=m_low, other=0.0).to(gl.float32)
    gate = gl.zeros((S.HALF_M, S.WIDTH), gl.float32, layout=thin)
    for e in gl.static_range(S.E):
        if S.GATED:
            mine = gl.load(p_gates + o_row.to(gl.int64) * S.E + e, mask=o_row < M, other=0.0)
        else:
            mine = gl.full([S.HALF_M], weights[e], gl.float32, rows)
        gate = owned_gate(gate, mine, o_rank, e, S.EDGES)
    p_block = p_strip + o_tall * S.STRIDE + S.HEAD + o_flat
    gl.store(p_block, (spread * gate).to(dtype), mask=m_low)
    if S.WIDTH_Y > 0:
        p_block = p_gated + o_tall * S.STRIDE_UP + (o_flat - S.UPS[0])
        m_up = m_row & (o_flat >= S.UPS[0]) & (o_flat < S.UPS[1])
        gl.store(p_block, (b_low * gate).to(dtype), mask=m_up)
    complete = True
    if S.GATED:
        products = spread * b_low
        if S.MAKERS > 1:
            complete = _leave_part(products, o_rank, o_row, p_partial, slices, part, M, S)
        if complete:
            _store_dlogits(products, o_rank, o_row, p_partial, p_gates, p_strip, M, S)
    if complete:
        publish(flag)
        gl.atomic_add(published, 1, sem="release", scope="gpu")
