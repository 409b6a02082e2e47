"""Turning of neighbouring values by the angles of their token's position."""

from quant.kernels.atomics import arguments_of
from quant.kernels.jit import Kernel, inner
from quant.kernels.plain import get, halves, put
from quant.kernels.tiles import floats, share
from quant.kernels.vector import BF16_CODE


@inner
def _turn(x, cos, sin, out):  # type: ignore[no-untyped-def]
    for pair in range(cos.size):
        even, odd = get(x, 2 * pair), get(x, 2 * pair + 1)
        put(out, 2 * pair, even * cos[pair] - odd * sin[pair])
        put(out, 2 * pair + 1, even * sin[pair] + odd * cos[pair])


@inner
def _turn_share(x, cos, sin, out, tokens, heads, width, token_stride, head_stride, out_stride, code, part, parts):  # type: ignore[no-untyped-def]
    first, end = share(tokens, part, parts)
    for token in range(first, end):
        angles = token * (width // 2) * 4
        cosines, sines = floats(cos + angles, (width // 2,)), floats(sin + angles, (width // 2,))
        for head in range(heads):
            source = x + token * token_stride + head * head_stride
            target = out + token * out_stride + head * width * (4 >> code)
            if code == BF16_CODE:
                _turn(halves(source, (width,)), cosines, sines, halves(target, (width,)))
            else:
                _turn(floats(source, (width,)), cosines, sines, floats(target, (width,)))


def _turn_pairs(arguments, part, parts, sync):  # type: ignore[no-untyped-def]
    """out [tokens, heads, width] = the pairs (2i, 2i + 1) of x, turned by the angle i of their token.

    Arguments: those of _turn_share. x, cos, sin, out: addresses; cos and sin: float32 [tokens, width / 2]. Strides of
    x, and of out from token to token, in bytes; code: of x and out.
    """
    x, cos, sin, out, tokens, heads, width, token_stride, head_stride, out_stride, code = arguments_of(arguments, 11)
    _turn_share(x, cos, sin, out, tokens, heads, width, token_stride, head_stride, out_stride, code, part, parts)
    return 0


turn_pairs = Kernel(_turn_pairs)
