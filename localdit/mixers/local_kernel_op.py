"""Local attention in one kernel, an operation of torch with its gradient: `torch.ops.localdit.local_attention`.

Imported where a mixer is asked for it, since it needs the package triton.
"""

from typing import Any, NamedTuple

import torch

from localdit.mixers.local_kernel_triton import attend_kernel, key_gradient_kernel, query_gradient_kernel

# B batch, N tokens of the grid, H heads, D head dim, G pooled tokens, T tiles of the grid

TILE = 8  # rows and columns of a tile, at most

# 64 tokens of a tile are set against 32 at a time by 8 warps: what fits the registers of sm_90 (by ptxas, heads of 72)
LAUNCH: dict[str, Any] = {"ROWS": TILE * TILE, "STEP": 32, "num_warps": 8, "num_stages": 2}
# from this capability on half of the registers do for the forward pass, and two programs run side by side
NEWER = (9, 0)


class Call(NamedTuple):
    """How the kernels are called.

    Attributes:
        programs: heads, tiles and pictures; the heads of a token lie side by side, and are read together.
        context: key and value of the pooled tokens, and how many there are.
        tables: weights of query's and key's norm, cosine and sine.
        strides: of a picture, of a token, and the number of heads.
        rule: who attends to whom, and how.
        constants: what the kernels are compiled for.
    """

    programs: tuple[int, int, int]
    context: tuple[torch.Tensor, torch.Tensor]
    pooled: int
    tables: tuple[torch.Tensor, ...]
    strides: tuple[int, int, int]
    rule: tuple[int | float, ...]
    constants: dict[str, Any]


def prepare(
    query: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    context_key: torch.Tensor | None,
    context_value: torch.Tensor | None,
    cosine: torch.Tensor | None,
    sine: torch.Tensor | None,
    height: int,
    width: int,
    size: int,
    shift: int,
    windows: bool,
    eps: float,
) -> Call:
    """The call for the arguments of `local_attention`. In place of a tensor that is not read stands the query."""
    batch, _, heads, head_dim = query.shape
    side, lead = tiling(size, shift, windows)
    tiles = ((height + lead + side - 1) // side) * ((width + lead + side - 1) // side)
    weights = (query, query) if query_weight is None or key_weight is None else (query_weight, key_weight)
    context, pooled = (query, query), 0
    if context_key is not None and context_value is not None:
        context, pooled = (context_key.contiguous(), context_value.contiguous()), context_key.shape[1]
    turn = (query, query) if cosine is None or sine is None else (cosine.contiguous(), sine.contiguous())
    main = max(16, 1 << (head_dim.bit_length() - 1))
    tail = max(16, 1 << max(0, head_dim - main - 1).bit_length())
    return Call(
        programs=(heads, tiles, batch),
        context=context,
        pooled=pooled,
        tables=(*weights, *turn),
        strides=(query.stride(0), query.stride(1), heads),
        rule=(height, width, side, lead, shift, head_dim**-0.5, eps),
        constants={
            "SIZE": size,
            "WINDOWS": windows,
            "MAIN": main,
            "TAIL": tail,
            "D": head_dim,
            "NORM": query_weight is not None,
            "TURN": cosine is not None,
        },
    )


def alike(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The states with the same strides and the heads of each token in one piece, as the projections make them."""
    whole = all(state.stride() == states[0].stride() for state in states)
    whole = whole and states[0].stride()[2:] == (states[0].shape[3], 1)
    return states if whole else tuple(state.contiguous() for state in states)


def few_registers(device: torch.device) -> dict[str, int]:
    """The option that lets two programs run side by side, where that does."""
    return {"maxnreg": 128} if device.type == "cuda" and torch.cuda.get_device_capability(device) >= NEWER else {}


def tiling(size: int, shift: int, windows: bool) -> tuple[int, int]:
    """Side of the tiles, and how far before the grid they begin: of whole windows, where windows are no larger."""
    if not windows:
        return TILE, 0
    side = TILE // size * size or TILE
    return side, -shift % min(size, side)


@torch.library.custom_op("localdit::local_attention", mutates_args=())
def local_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    context_key: torch.Tensor | None,
    context_value: torch.Tensor | None,
    cosine: torch.Tensor | None,
    sine: torch.Tensor | None,
    height: int,
    width: int,
    size: int,
    shift: int,
    windows: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise queries and keys, turn them by their place, and attend.

    Args:
        query, key, value: as projected, [B, N, H, D] with N = height * width, row-major.
        query_weight, key_weight: of the RMSNorm over each head, [D]; None for no norm.
        context_key, context_value: of tokens that every query attends to beside its own, [B, G, H, D].
        cosine, sine: of the turn of each token's pairs of channels, fp32 [N, 1, D / 2]; None for no turn.
        height, width: of the grid in tokens.
        size, shift: height and width of a window and where the first is cut, or of the square around each query.
        windows: windows, or squares around each query.
        eps: of the norms.

    Returns:
        The mixed values [B, N, H, D], and the logarithm of what the softmax divided by, fp32 [B, N, H].
    """
    settings = (cosine, sine, height, width, size, shift, windows, eps)
    query, key, value = alike(query, key, value)
    call = prepare(query, query_weight, key_weight, context_key, context_value, *settings)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    logarithm = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):  # Triton launches on the current device, whichever that is
        attend_kernel[call.programs](
            *(query, key, value, *call.context, *call.tables, output, logarithm),
            *(*call.strides, call.pooled, *call.rule),
            **call.constants,
            **LAUNCH,
            **few_registers(query.device),
        )
    return output, logarithm


@local_attention.register_fake
def _(query, *_):
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("localdit::local_attention_backward", mutates_args=())
def local_attention_backward(
    gradient: torch.Tensor,
    output: torch.Tensor,
    logarithm: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    context_key: torch.Tensor | None,
    context_value: torch.Tensor | None,
    cosine: torch.Tensor | None,
    sine: torch.Tensor | None,
    height: int,
    width: int,
    size: int,
    shift: int,
    windows: bool,
    eps: float,
) -> list[torch.Tensor]:
    """The gradients of query, key and value, of both weights, and of the context's key and value, if there are any.

    What tiles add to the last four they write in fp32, each for itself, so that the sum is the same every time.
    """
    settings = (cosine, sine, height, width, size, shift, windows, eps)
    query, key, value = alike(query, key, value)
    call = prepare(query, query_weight, key_weight, context_key, context_value, *settings)
    gradient, output, logarithm = gradient.contiguous(), output.contiguous(), logarithm.contiguous()
    of_query, of_key, of_value = (torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(3))
    of_weights, of_context = added(query, call), added(query, call, call.pooled)
    inner = torch.empty_like(logarithm)  # products of outputs and their gradients
    with torch.cuda.device_of(query):
        query_gradient_kernel[call.programs](
            *(query, key, value, *call.context, *call.tables, output, logarithm, gradient),
            *(of_query, of_weights[0], *of_context, inner),
            *(*call.strides, call.pooled, *call.rule),
            **call.constants,
            **LAUNCH,
        )
        key_gradient_kernel[call.programs](
            *(query, key, value, *call.tables, logarithm, gradient, inner, of_key, of_value, of_weights[1]),
            *(*call.strides, *call.rule),
            **call.constants,
            **LAUNCH,
        )
    of_weights = [part.sum((0, 1, 2)) for part in of_weights]
    return [of_query, of_key, of_value, *of_weights, *(part.sum(1).transpose(1, 2) for part in of_context)]


def added(query: torch.Tensor, call: Call, *rows: int) -> list[torch.Tensor]:
    """Room for what each tile adds to two tensors, [B, T, H, D], or [B, T, H, G, D] for `rows` G."""
    heads, tiles, batch = call.programs
    return [query.new_empty(batch, tiles, heads, *rows, query.shape[-1], dtype=torch.float32) for _ in range(2)]


@local_attention_backward.register_fake
def _(gradient, output, logarithm, query, *others):
    _, _, *weights, context_key, context_value = others[:6]
    exact = {"dtype": torch.float32}
    size = (len(query), query.shape[2], 0 if context_key is None else context_key.shape[1], query.shape[3])
    context = [query.new_empty(size, **exact).transpose(1, 2) for _ in (context_key, context_value)]
    of_weights = [query.new_empty(query.shape[3:], **exact) for _ in weights]
    return [*(query.new_empty(query.shape) for _ in range(3)), *of_weights, *context]


def keep(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[:9])
    ctx.settings = inputs[9:]
    ctx.mark_non_differentiable(output[1])


def gradients(ctx, gradient, _):
    output, logarithm, *given = ctx.saved_tensors
    found = local_attention_backward(gradient, output, logarithm, *given, *ctx.settings)
    # strict is not: the last two given are the turns, which have no gradient
    wanted = [None if own is None else one.to(own.dtype) for one, own in zip(found, given, strict=False)]
    return *wanted, None, None, *(None for _ in ctx.settings)


local_attention.register_autograd(gradients, setup_context=keep)
