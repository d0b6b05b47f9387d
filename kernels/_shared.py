"""Device functions that more than one family uses."""

import triton
import triton.language as tl

INTERPRETING: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total):
    """total + a @ b in float32 (total may be None); the interpreter would multiply the bit patterns of bfloat16."""
    if INTERPRETING:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 x in another dtype, to the nearest; the interpreter would cut bfloat16 off."""
    if INTERPRETING and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def tanh(x):
    """tanh in float32. 1 - exp cancels near 0, where an odd polynomial is exact to rounding."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    s = a * a
    tail = s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835))))
    y = tl.where(a < 0.25, a + a * tail, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -y, y)
