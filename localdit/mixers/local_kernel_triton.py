"""Local attention as kernels of a GPU: norm, turn and attention of tokens where they lie, forward and backward.

Nothing is gathered, padded or masked in memory. A program takes the queries of a tile of the grid in one head, and of
the keys the smallest rectangle that holds those of all its queries; who attends to whom is arithmetic on rows and
columns. It is the flash form of attention (arXiv 2205.14135), whose backward makes the weights anew.

A head of D channels is held in two parts, of MAIN and of TAIL channels, both powers of two, since one part would waste
nearly half of its registers on heads of 72.
"""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (what a kernel gives its functions, and what they return, is known to its compiler only)

import triton
import triton.language as tl

# what differs from grid to grid and from layer to layer, for which nothing is to be compiled anew
VARYING = ("pooled", "height", "width", "lead", "shift")

HIDDEN = tl.constexpr(-1e30)  # the score of a key that is not the query's; infinity less infinity would be no number


@triton.jit
def first_key(place, length, shift, SIZE: tl.constexpr, WINDOWS: tl.constexpr):
    """Where on an axis the SIZE keys of a query begin; a window may begin before the axis and end after it."""
    if WINDOWS:
        first = (place - shift + SIZE) // SIZE * SIZE - SIZE + shift
    else:
        first = tl.minimum(tl.maximum(place - SIZE // 2, 0), tl.maximum(length - SIZE, 0))
    return first


@triton.jit
def keys_of_tile(start, side, length, shift, SIZE: tl.constexpr, WINDOWS: tl.constexpr):
    """First key, and the place after the last, of the queries of a tile on an axis."""
    first = first_key(tl.maximum(start, 0), length, shift, SIZE, WINDOWS)
    last = first_key(tl.minimum(start + side, length) - 1, length, shift, SIZE, WINDOWS)
    return tl.maximum(first, 0), tl.minimum(last + SIZE, length)


@triton.jit
def queries_of_tile(start, side, length, shift, SIZE: tl.constexpr, WINDOWS: tl.constexpr):
    """First query, and the place after the last, that attend to any of the keys of a tile on an axis."""
    low, high = tl.maximum(start, 0), tl.minimum(start + side, length) - 1
    if WINDOWS:  # who attends is attended to
        first, stop = keys_of_tile(start, side, length, shift, SIZE, WINDOWS)
    else:  # queries near the ends of the axis look inwards
        first = tl.where(low < SIZE, 0, low - SIZE + 1 + SIZE // 2)
        stop = tl.where(high >= length - SIZE, length, high + SIZE // 2 + 1)
    return first, stop


@triton.jit
def sees(query_y, query_x, key_y, key_x, height, width, shift, SIZE: tl.constexpr, WINDOWS: tl.constexpr):
    """Whether each of some queries attends to each of some keys, [queries, keys]."""
    top = first_key(query_y, height, shift, SIZE, WINDOWS)[:, None]
    left = first_key(query_x, width, shift, SIZE, WINDOWS)[:, None]
    rows = (key_y[None, :] >= top) & (key_y[None, :] < top + SIZE)
    return rows & (key_x[None, :] >= left) & (key_x[None, :] < left + SIZE)


@triton.jit
def own_tile(height, width, side, lead, ROWS: tl.constexpr):
    """The corner of this program's tile, and of its tokens row, column and whether they are on the grid.

    Those that are not stand where the first of those that are does.
    """
    across, tile = (width + lead + side - 1) // side, tl.program_id(1)
    top, left = tile // across * side - lead, tile % across * side - lead
    row = tl.arange(0, ROWS)
    y, x = top + row // side, left + row % side
    there = (row < side * side) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return top, left, tl.where(there, y, tl.maximum(top, 0)), tl.where(there, x, tl.maximum(left, 0)), there


@triton.jit
def box_places(base, top, bottom, left, right, K: tl.constexpr):
    """Row and column of K tokens of a rectangle from `base` on, and whether they are in it; if not, of its first."""
    place, columns = base + tl.arange(0, K), right - left
    there = place < (bottom - top) * columns
    place = tl.where(there, place, 0)
    return top + place // columns, left + place % columns, there


@triton.jit
def load_part(states, token, there, stride, FIRST: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """C channels from FIRST on of some tokens' heads, in their own dtype; zero where a token or a channel is not."""
    channel = FIRST + tl.arange(0, C)
    places = token.to(tl.int64)[:, None] * stride + channel[None, :]
    return tl.load(states + places, mask=there[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def store_part(states, part, token, there, stride, FIRST: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Write C channels from FIRST on of some tokens' heads."""
    channel = FIRST + tl.arange(0, C)
    places = token.to(tl.int64)[:, None] * stride + channel[None, :]
    tl.store(states + places, part.to(states.dtype.element_ty), mask=there[:, None] & (channel < D)[None, :])


@triton.jit
def load_heads(states, token, there, stride, MAIN: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr):
    """The heads of some tokens, [rows, MAIN] and [rows, TAIL]."""
    main = load_part(states, token, there, stride, 0, MAIN, D)
    return main, load_part(states, token, there, stride, MAIN, TAIL, D)


@triton.jit
def store_heads(states, main, tail, token, there, stride, MAIN: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr):
    """Write the heads of some tokens."""
    store_part(states, main, token, there, stride, 0, MAIN, D)
    store_part(states, tail, token, there, stride, MAIN, TAIL, D)


@triton.jit
def turned(part, cosine, sine, sign, token, there, FIRST: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Channels [rows, C] of some tokens' heads with their pairs turned."""
    pair = FIRST // 2 + tl.arange(0, C // 2)
    places = token[:, None] * (D // 2) + pair[None, :]
    inside = there[:, None] & (pair < D // 2)[None, :]
    cos = tl.load(cosine + places, mask=inside, other=1.0)
    sin = tl.load(sine + places, mask=inside, other=0.0) * sign
    even, odd = tl.split(tl.reshape(part, (part.shape[0], C // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (part.shape[0], C))


@triton.jit
def load_weight(weight, FIRST: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """The norm's weights of C channels, [1, C]."""
    channel = FIRST + tl.arange(0, C)
    return tl.load(weight + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def norm_of(main, tail, eps, D: tl.constexpr):
    """What the norm multiplies each head by, [rows, 1]."""
    main, tail = main.to(tl.float32), tail.to(tl.float32)
    return tl.rsqrt((tl.sum(main * main, 1) + tl.sum(tail * tail, 1)) / D + eps)[:, None]


@triton.jit
def ready_part(
    part, norm, token, there, weight, cosine, sine,
    FIRST: tl.constexpr, C: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Channels [rows, C] normalised and turned in fp32, in their own dtype."""
    exact = part.to(tl.float32)
    if NORM:
        exact = exact * norm * load_weight(weight, FIRST, C, D)
    if TURN:
        exact = turned(exact, cosine, sine, 1.0, token, there, FIRST, C, D)
    return exact.to(part.dtype)


@triton.jit
def ready(
    states, token, there, stride, weight, cosine, sine, eps,
    MAIN: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Queries or keys of some tokens, ready to be compared, [rows, MAIN] and [rows, TAIL]."""
    main, tail = load_heads(states, token, there, stride, MAIN, TAIL, D)
    norm = norm_of(main, tail, eps, D) if NORM else 1.0
    main = ready_part(main, norm, token, there, weight, cosine, sine, 0, MAIN, D, NORM, TURN)
    return main, ready_part(tail, norm, token, there, weight, cosine, sine, MAIN, TAIL, D, NORM, TURN)


@triton.jit
def unready(
    of_main, of_tail, states, token, there, stride, weight, cosine, sine, eps, of_states, of_stride, of_weight,
    MAIN: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the states and, summed over the rows, of the norm's weight, from those of `ready`."""
    if TURN:
        of_main = turned(of_main, cosine, sine, -1.0, token, there, 0, MAIN, D)
        of_tail = turned(of_tail, cosine, sine, -1.0, token, there, MAIN, TAIL, D)
    if NORM:
        main, tail = load_heads(states, token, there, stride, MAIN, TAIL, D)
        norm = norm_of(main, tail, eps, D)
        main, tail = main.to(tl.float32) * norm, tail.to(tl.float32) * norm
        channel, channel_of_tail = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
        tl.store(of_weight + channel, tl.sum(of_main * main, 0), mask=channel < D)
        tl.store(of_weight + channel_of_tail, tl.sum(of_tail * tail, 0), mask=channel_of_tail < D)
        of_main, of_tail = of_main * load_weight(weight, 0, MAIN, D), of_tail * load_weight(weight, MAIN, TAIL, D)
        # a head gets no longer, whatever it is multiplied by
        longer = ((tl.sum(of_main * main, 1) + tl.sum(of_tail * tail, 1)) / D)[:, None]
        of_main, of_tail = (of_main - main * longer) * norm, (of_tail - tail * longer) * norm
    store_heads(of_states, of_main, of_tail, token, there, of_stride, MAIN, TAIL, D)


@triton.jit
def products(left_main, left_tail, right_main, right_tail):
    """Every head times every head, [left rows, right rows] in fp32."""
    of_main = tl.dot(left_main, tl.trans(right_main))
    return tl.dot(left_tail, tl.trans(right_tail), of_main)


@triton.jit
def add_weighed(weights, main, tail, sum_main, sum_tail):
    """Sums of heads, and to them other heads [others, ...] by weights [rows, others]."""
    weights = weights.to(main.dtype)
    sum_main = tl.dot(weights, main, sum_main)
    return sum_main, tl.dot(weights, tail, sum_tail)


@triton.jit
def look(
    query_main, query_tail, key_main, key_tail, value_main, value_tail, seen, scale, most, total, main, tail,
):  # fmt: skip
    """Go on by some keys: the greatest score so far, the sum of the weights, and that of the weighed values."""
    scores = products(query_main, query_tail, key_main, key_tail) * scale
    scores = tl.where(seen, scores, HIDDEN)
    more = tl.maximum(most, tl.max(scores, 1))
    weights = tl.where(seen, tl.exp(scores - more[:, None]), 0.0)
    shrink = tl.exp(most - more)
    main, tail = main * shrink[:, None], tail * shrink[:, None]
    main, tail = add_weighed(weights, value_main, value_tail, main, tail)
    return more, total * shrink + tl.sum(weights, 1), main, tail


@triton.jit
def score_gradient(
    query_main, query_tail, key_main, key_tail, value_main, value_tail, of_main, of_tail, seen, log, inner, scale,
):  # fmt: skip
    """Weights of some queries over some keys, and the gradient of their products, both [queries, keys] in fp32."""
    scores = products(query_main, query_tail, key_main, key_tail) * scale
    weights = tl.where(seen, tl.exp(scores - log[:, None]), 0.0)
    of_weights = products(of_main, of_tail, value_main, value_tail)
    return weights, weights * (of_weights - inner[:, None]) * scale


@triton.jit(do_not_specialize=VARYING)
def attend_kernel(
    query, key, value, context_key, context_value, query_weight, key_weight, cosine, sine, output, logarithm,
    batch_stride, token_stride, heads, pooled, height, width, side, lead, shift, scale, eps,
    SIZE: tl.constexpr, WINDOWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """The mixed values of a tile's queries, and the logarithm of what their weights were divided by."""
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    top, left, y, x, there = own_tile(height, width, side, lead, ROWS)
    token, tokens = y * width + x, height * width
    given, own = batch * batch_stride + head * D, (batch * tokens * heads + head) * D
    query_main, query_tail = ready(
        query + given, token, there, token_stride, query_weight, cosine, sine, eps, MAIN, TAIL, D, NORM, TURN
    )
    most, total = tl.full((ROWS,), HIDDEN, tl.float32), tl.zeros((ROWS,), tl.float32)
    main, tail = tl.zeros((ROWS, MAIN), tl.float32), tl.zeros((ROWS, TAIL), tl.float32)

    context = (batch * pooled * heads + head) * D
    for base in range(0, pooled, STEP):
        place = base + tl.arange(0, STEP)
        there_key = place < pooled
        key_main, key_tail = load_heads(context_key + context, place, there_key, heads * D, MAIN, TAIL, D)
        value_main, value_tail = load_heads(context_value + context, place, there_key, heads * D, MAIN, TAIL, D)
        most, total, main, tail = look(
            query_main, query_tail, key_main, key_tail, value_main, value_tail, there_key[None, :], scale,
            most, total, main, tail,
        )  # fmt: skip

    first_y, stop_y = keys_of_tile(top, side, height, shift, SIZE, WINDOWS)
    first_x, stop_x = keys_of_tile(left, side, width, shift, SIZE, WINDOWS)
    for base in range(0, (stop_y - first_y) * (stop_x - first_x), STEP):
        key_y, key_x, there_key = box_places(base, first_y, stop_y, first_x, stop_x, STEP)
        token_key = key_y * width + key_x
        key_main, key_tail = ready(
            key + given, token_key, there_key, token_stride, key_weight, cosine, sine, eps,
            MAIN, TAIL, D, NORM, TURN,
        )  # fmt: skip
        value_main, value_tail = load_heads(value + given, token_key, there_key, token_stride, MAIN, TAIL, D)
        seen = sees(y, x, key_y, key_x, height, width, shift, SIZE, WINDOWS) & there_key[None, :]
        most, total, main, tail = look(
            query_main, query_tail, key_main, key_tail, value_main, value_tail, seen, scale,
            most, total, main, tail,
        )  # fmt: skip

    main, tail = main / total[:, None], tail / total[:, None]
    store_heads(output + own, main, tail, token, there, heads * D, MAIN, TAIL, D)
    tl.store(logarithm + (batch * tokens + token) * heads + head, most + tl.log(total), mask=there)


@triton.jit(do_not_specialize=VARYING)
def query_gradient_kernel(
    query, key, value, context_key, context_value, query_weight, key_weight, cosine, sine, output, logarithm,
    gradient, of_query, of_query_weight, of_context_key, of_context_value, inner,
    batch_stride, token_stride, heads, pooled, height, width, side, lead, shift, scale, eps,
    SIZE: tl.constexpr, WINDOWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile's queries, and what the tile adds to those of the norm's weight and of the context."""
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    top, left, y, x, there = own_tile(height, width, side, lead, ROWS)
    token, tokens = y * width + x, height * width
    given, own = batch * batch_stride + head * D, (batch * tokens * heads + head) * D
    query_main, query_tail = ready(
        query + given, token, there, token_stride, query_weight, cosine, sine, eps, MAIN, TAIL, D, NORM, TURN
    )
    of_main, of_tail = load_heads(gradient + own, token, there, heads * D, MAIN, TAIL, D)
    main, tail = load_heads(output + own, token, there, heads * D, MAIN, TAIL, D)
    inner_product = tl.sum(of_main.to(tl.float32) * main.to(tl.float32), 1)
    inner_product += tl.sum(of_tail.to(tl.float32) * tail.to(tl.float32), 1)
    line = (batch * tokens + token) * heads + head
    tl.store(inner + line, inner_product, mask=there)
    log = tl.load(logarithm + line, mask=there, other=0.0)
    of_query_main, of_query_tail = tl.zeros((ROWS, MAIN), tl.float32), tl.zeros((ROWS, TAIL), tl.float32)

    program = (batch * tl.num_programs(1) + tl.program_id(1)) * heads + head
    context, part = (batch * pooled * heads + head) * D, program * pooled * D
    for base in range(0, pooled, STEP):
        place = base + tl.arange(0, STEP)
        there_key = place < pooled
        key_main, key_tail = load_heads(context_key + context, place, there_key, heads * D, MAIN, TAIL, D)
        value_main, value_tail = load_heads(context_value + context, place, there_key, heads * D, MAIN, TAIL, D)
        weights, of_scores = score_gradient(
            query_main, query_tail, key_main, key_tail, value_main, value_tail, of_main, of_tail,
            there[:, None] & there_key[None, :], log, inner_product, scale,
        )  # fmt: skip
        of_query_main, of_query_tail = add_weighed(of_scores, key_main, key_tail, of_query_main, of_query_tail)
        zero_main, zero_tail = tl.zeros((STEP, MAIN), tl.float32), tl.zeros((STEP, TAIL), tl.float32)
        sum_main, sum_tail = add_weighed(tl.trans(of_scores), query_main, query_tail, zero_main, zero_tail)
        store_heads(of_context_key + part, sum_main, sum_tail, place, there_key, D, MAIN, TAIL, D)
        sum_main, sum_tail = add_weighed(tl.trans(weights), of_main, of_tail, zero_main, zero_tail)
        store_heads(of_context_value + part, sum_main, sum_tail, place, there_key, D, MAIN, TAIL, D)

    first_y, stop_y = keys_of_tile(top, side, height, shift, SIZE, WINDOWS)
    first_x, stop_x = keys_of_tile(left, side, width, shift, SIZE, WINDOWS)
    for base in range(0, (stop_y - first_y) * (stop_x - first_x), STEP):
        key_y, key_x, there_key = box_places(base, first_y, stop_y, first_x, stop_x, STEP)
        token_key = key_y * width + key_x
        key_main, key_tail = ready(
            key + given, token_key, there_key, token_stride, key_weight, cosine, sine, eps,
            MAIN, TAIL, D, NORM, TURN,
        )  # fmt: skip
        value_main, value_tail = load_heads(value + given, token_key, there_key, token_stride, MAIN, TAIL, D)
        seen = sees(y, x, key_y, key_x, height, width, shift, SIZE, WINDOWS)
        _, of_scores = score_gradient(
            query_main, query_tail, key_main, key_tail, value_main, value_tail, of_main, of_tail,
            seen & there[:, None] & there_key[None, :], log, inner_product, scale,
        )  # fmt: skip
        of_query_main, of_query_tail = add_weighed(of_scores, key_main, key_tail, of_query_main, of_query_tail)

    unready(
        of_query_main, of_query_tail, query + given, token, there, token_stride, query_weight, cosine, sine, eps,
        of_query + own, heads * D, of_query_weight + program * D, MAIN, TAIL, D, NORM, TURN,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def key_gradient_kernel(
    query, key, value, query_weight, key_weight, cosine, sine, logarithm, gradient, inner,
    of_key, of_value, of_key_weight,
    batch_stride, token_stride, heads, height, width, side, lead, shift, scale, eps,
    SIZE: tl.constexpr, WINDOWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile's keys and values, and what the tile adds to that of the norm's weight."""
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    top, left, y, x, there = own_tile(height, width, side, lead, ROWS)
    token, tokens = y * width + x, height * width
    given, own = batch * batch_stride + head * D, (batch * tokens * heads + head) * D
    key_main, key_tail = ready(
        key + given, token, there, token_stride, key_weight, cosine, sine, eps, MAIN, TAIL, D, NORM, TURN
    )
    value_main, value_tail = load_heads(value + given, token, there, token_stride, MAIN, TAIL, D)
    of_key_main, of_key_tail = tl.zeros((ROWS, MAIN), tl.float32), tl.zeros((ROWS, TAIL), tl.float32)
    of_value_main, of_value_tail = tl.zeros((ROWS, MAIN), tl.float32), tl.zeros((ROWS, TAIL), tl.float32)

    first_y, stop_y = queries_of_tile(top, side, height, shift, SIZE, WINDOWS)
    first_x, stop_x = queries_of_tile(left, side, width, shift, SIZE, WINDOWS)
    for base in range(0, (stop_y - first_y) * (stop_x - first_x), STEP):
        query_y, query_x, there_query = box_places(base, first_y, stop_y, first_x, stop_x, STEP)
        token_query = query_y * width + query_x
        query_main, query_tail = ready(
            query + given, token_query, there_query, token_stride, query_weight, cosine, sine, eps,
            MAIN, TAIL, D, NORM, TURN,
        )  # fmt: skip
        of_main, of_tail = load_heads(gradient + own, token_query, there_query, heads * D, MAIN, TAIL, D)
        line = (batch * tokens + token_query) * heads + head
        log = tl.load(logarithm + line, mask=there_query, other=0.0)
        inner_product = tl.load(inner + line, mask=there_query, other=0.0)
        seen = sees(query_y, query_x, y, x, height, width, shift, SIZE, WINDOWS)
        weights, of_scores = score_gradient(
            query_main, query_tail, key_main, key_tail, value_main, value_tail, of_main, of_tail,
            seen & there_query[:, None] & there[None, :], log, inner_product, scale,
        )  # fmt: skip
        of_key_main, of_key_tail = add_weighed(tl.trans(of_scores), query_main, query_tail, of_key_main, of_key_tail)
        of_value_main, of_value_tail = add_weighed(tl.trans(weights), of_main, of_tail, of_value_main, of_value_tail)

    program = (batch * tl.num_programs(1) + tl.program_id(1)) * heads + head
    store_heads(of_value + own, of_value_main, of_value_tail, token, there, heads * D, MAIN, TAIL, D)
    unready(
        of_key_main, of_key_tail, key + given, token, there, token_stride, key_weight, cosine, sine, eps,
        of_key + own, heads * D, of_key_weight + program * D, MAIN, TAIL, D, NORM, TURN,
    )  # fmt: skip
