"""What the kernels are made of: functions of one tile, inlined where they are called.

Grammar: ``o_`` offsets, ``m_`` masks, ``b_`` loaded blocks; constexprs in capitals.  Matrices are
row-major with a row stride, and what lies outside of them reads as zero, through descriptors (TMA)
as through pointers.  Ranks of all adapters lie side by side: adapter e owns the columns from
EDGES[e] to EDGES[e + 1]; the rest, up to RANKS, is padding and holds zeros.

PRECISION is "ieee" or "tf32" for products of float32, and "upcast" in Triton's interpreter, whose
bfloat16 products are wrong.
"""

import triton
import triton.language as tl

# Columns of a block of gates: the most adapters there can be.
GATES = tl.constexpr(8)
# Columns of a block of logits: high parts of every mixer row, then low parts.
LOGITS = tl.constexpr(16)
# Columns that one call of the generator serves, see `fedalt_kernels.dropout`.
MASK_GROUP = tl.constexpr(32)


@triton.jit
def dot(left, right, acc, PRECISION: tl.constexpr):
    """acc + left · right, accumulated in float32."""
    if PRECISION == "upcast":
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def rounded(block, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """A float32 block to the nearest of another dtype."""
    if PRECISION == "upcast" and dtype == tl.bfloat16:  # the interpreter would cut it off
        bits = block.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        block = bits.to(tl.float32, bitcast=True)
    return block.to(dtype)


@triton.jit
def load_block(
    source,
    row,
    column,
    rows,
    columns,
    stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """[HEIGHT, WIDTH] at (row, column) of [rows, columns]; EVEN where no block crosses an edge."""
    if TMA:
        return source.load([row, column])
    else:
        o_row = row + tl.arange(0, HEIGHT)
        o_column = column + tl.arange(0, WIDTH)
        p_block = source + o_row[:, None].to(tl.int64) * stride + o_column[None, :]
        if EVEN:
            return tl.load(p_block)
        else:
            m_block = (o_row[:, None] < rows) & (o_column[None, :] < columns)
            return tl.load(p_block, mask=m_block, other=0)


@triton.jit
def store_block(
    target,
    block,
    row,
    column,
    rows,
    columns,
    stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The counterpart of `load_block`, in the target's dtype."""
    if TMA:
        target.store([row, column], rounded(block, target.dtype, PRECISION))
    else:
        o_row = row + tl.arange(0, HEIGHT)
        o_column = column + tl.arange(0, WIDTH)
        p_block = target + o_row[:, None].to(tl.int64) * stride + o_column[None, :]
        m_block = (o_row[:, None] < rows) & (o_column[None, :] < columns)
        tl.store(p_block, rounded(block, target.dtype.element_ty, PRECISION), mask=m_block)


@triton.jit
def tile_at(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile (m, n) of a linear index, in groups of rows that share columns in the L2 cache."""
    group = index // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    inside = index % (GROUP_M * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def load_factor(
    matrix,
    inner,
    outer,
    L: tl.constexpr,
    C: tl.constexpr,
    stride,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OUT_MAJOR: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BLOCK_L, BLOCK_C] at (inner, outer) of a right factor, [C, L] if OUT_MAJOR, else [L, C]."""
    EVEN: tl.constexpr = L % BLOCK_L == 0 and C % BLOCK_C == 0
    if OUT_MAJOR:
        return load_block(matrix, outer, inner, C, L, stride, BLOCK_C, BLOCK_L, EVEN, TMA).T
    else:
        return load_block(matrix, inner, outer, L, C, stride, BLOCK_L, BLOCK_C, EVEN, TMA)


@triton.jit
def add_bias(acc, bias, at, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """acc + bias [N], for BLOCK_N columns from `at` on."""
    o_n = at + tl.arange(0, BLOCK_N)
    return acc + tl.load(bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def contract(
    acc,
    left,
    weight,
    row,
    column,
    M,
    stride_left,
    stride_weight,
    L: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    OUT_MAJOR: tl.constexpr,
    EVEN_M: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + left [M, L] · weight for one tile; weight is [C, L] if OUT_MAJOR, else [L, C]."""
    for k in tl.range(0, L, BLOCK_K, num_stages=STAGES):
        b_left = load_block(
            left,
            row,
            k,
            M,
            L,
            stride_left,
            BLOCK_M,
            BLOCK_K,
            EVEN_M and L % BLOCK_K == 0,
            TMA,
        )
        b_weight = load_factor(
            weight, k, column, L, C, stride_weight, BLOCK_K, BLOCK_N, OUT_MAJOR, TMA
        )
        acc = dot(b_left, b_weight, acc, PRECISION)  # [m, k] [k, n]
    return acc


@triton.jit
def add_strip(
    acc,
    strip,
    side,
    row,
    column,
    M,
    C: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SIDE_OUT_MAJOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + strip [M, RANKS] · side; side is [C, RANKS] if SIDE_OUT_MAJOR, else [RANKS, C]."""
    STRIDE: tl.constexpr = RANKS if SIDE_OUT_MAJOR else C
    for r in tl.range(0, RANKS, BLOCK_R, num_stages=1):
        b_strip = load_block(strip, row, r, M, RANKS, RANKS, BLOCK_M, BLOCK_R, False, False)
        b_side = load_factor(
            side, r, column, RANKS, C, STRIDE, BLOCK_R, BLOCK_N, SIDE_OUT_MAJOR, False
        )
        acc = dot(b_strip, b_side, acc, PRECISION)  # [m, r] [r, n]
    return acc


@triton.jit
def column(block, index):
    """Column `index` of a block, as a vector."""
    mine = tl.arange(0, block.shape[1])[None, :] == index
    return tl.sum(tl.where(mine, block, 0.0), 1)


@triton.jit
def owned(o_rank, e, EDGES: tl.constexpr):
    """Which of these rank columns belong to adapter e."""
    return (o_rank >= EDGES[e]) & (o_rank < EDGES[e + 1])


@triton.jit
def spread_gates(gates, weights, o_rank, E: tl.constexpr, EDGES: tl.constexpr, GATED: tl.constexpr):
    """The gate of each rank column: [m, r] from gates [m, 8], or [1, r] from E fixed weights."""
    wide = tl.zeros((1, o_rank.shape[0]), tl.float32)
    for e in tl.static_range(E):
        gate = column(gates, e)[:, None] if GATED else weights[e]
        wide = tl.where(owned(o_rank, e, EDGES)[None, :], gate, wide)
    return wide


@triton.jit
def softmax_gates(parts, E: tl.constexpr):
    """Gates [m, 8] in float32 from the logits' high and low parts [m, 16]; zero from E on."""
    logits = tl.sum(tl.reshape(parts, (parts.shape[0], 2, GATES)), 1)
    logits = tl.where(tl.arange(0, GATES)[None, :] < E, logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def add_mixer(
    acc,
    dlogits,
    mixer,
    row,
    at,
    M,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """acc + dl G, E products of rank one in float32."""
    b_dlogits = load_block(dlogits, row, 0, M, GATES, GATES, BLOCK_M, GATES, False, False)
    o_k = at + tl.arange(0, BLOCK_N)
    for e in tl.range(0, E, num_stages=1):  # unrolled, eight rows at once would spill
        b_mixer = tl.load(mixer + e * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        acc += column(b_dlogits, e)[:, None] * b_mixer[None, :]  # [m] [n]
    return acc


@triton.jit
def split_parts(values, is_low, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """values rounded to dtype, or what that rounding lost, itself rounded to dtype."""
    high = rounded(values, dtype, PRECISION)
    low = rounded(values - high.to(tl.float32), dtype, PRECISION)
    return tl.where(is_low, low, high)


@triton.jit
def mixer_rows(
    mixer,
    k,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    E: tl.constexpr,
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[16, BLOCK_K] of the mixer [E, K] from column k: high parts of its rows, then low parts."""
    o_row = tl.arange(0, LOGITS)
    o_k = k + tl.arange(0, BLOCK_K)
    e = o_row % GATES
    m_block = (e[:, None] < E) & (o_k[None, :] < K)
    b_mixer = tl.load(mixer + e[:, None] * K + o_k[None, :], mask=m_block, other=0.0)
    return split_parts(b_mixer.to(tl.float32), (o_row >= GATES)[:, None], dtype, PRECISION)


@triton.jit
def down_pointers(downs, o_rank, K: tl.constexpr, E: tl.constexpr, EDGES: tl.constexpr):
    """Where each rank's row [K] begins, in E matrices A_e [r_e, K]."""
    p_row = downs[0] + o_rank * K
    for e in tl.static_range(1, E):
        p_row = tl.where(o_rank >= EDGES[e], downs[e] + (o_rank - EDGES[e]) * K, p_row)
    return p_row


@triton.jit
def up_pointers(ups, o_n, o_rank, E: tl.constexpr, EDGES: tl.constexpr):
    """Where element (n, rank) lies, in E matrices B_e [N, r_e]."""
    o_n = o_n.to(tl.int64)[:, None]
    o_rank = o_rank[None, :]
    p_block = ups[0] + o_n * (EDGES[1] - EDGES[0]) + o_rank
    for e in tl.static_range(1, E):
        mine = ups[e] + o_n * (EDGES[e + 1] - EDGES[e]) + (o_rank - EDGES[e])
        p_block = tl.where(o_rank >= EDGES[e], mine, p_block)
    return p_block


@triton.jit
def keep_block(
    seed, threshold, row, column, K: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """The dropout mask [HEIGHT, WIDTH] at (row, column), a multiple of 32: true where kept.

    Bit for bit `fedalt_kernels.dropout`: one Philox4x64-10 call makes 32 columns' bytes.
    """
    CALLS: tl.constexpr = (K + MASK_GROUP - 1) // MASK_GROUP
    o_row = (row + tl.arange(0, HEIGHT)).to(tl.int64)
    o_call = column // MASK_GROUP + tl.arange(0, WIDTH // MASK_GROUP)
    counter = (o_row[:, None] * CALLS + o_call[None, :]).to(tl.uint64)
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(seed, counter, zero, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [row, call, 2, 2]: 0 1, 2 3
    words = tl.reshape(words, (HEIGHT, WIDTH // 8))
    shifts = (8 * tl.arange(0, 8)).to(tl.uint64)
    octets = (words[:, :, None] >> shifts[None, None, :]) & 255
    return tl.reshape(octets, (HEIGHT, WIDTH)).to(tl.int32) >= threshold


@triton.jit
def kept_bits(words, row, column, M, K: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """`keep_block` from the words of `dropout.mask_words` [M, calls]."""
    CALLS: tl.constexpr = (K + MASK_GROUP - 1) // MASK_GROUP
    GROUPS: tl.constexpr = WIDTH // MASK_GROUP
    first = column // MASK_GROUP
    b_words = load_block(words, row, first, M, CALLS, CALLS, HEIGHT, GROUPS, False, False)
    bits = (b_words[:, :, None] >> tl.arange(0, MASK_GROUP)[None, None, :]) & 1
    return tl.reshape(bits, (HEIGHT, WIDTH)) != 0
