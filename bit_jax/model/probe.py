"""What a product really multiplies with, read off its result: flags say what was asked for, this what was done.

The left operand's columns hold 1 + 2^-9, 1 + 2^-12 and 1 + 2^-30 in turn, the right one is the identity, so that every
result is one product. bfloat16 (8 bits) keeps none of the three, TF32 and float16 (11 bits) the first, float32
(24 bits) two.
"""

import numpy as np

# A multiple of 3, large enough for the kernels that models use, and of 64, as their channels are. Of 129 channels, no
# multiple of four, a convolution on an H100 was in float32 where TF32 was allowed.
SIZE = 192
OFFSETS = 2.0 ** -np.array([9, 12, 30])


def operands() -> tuple[np.ndarray, np.ndarray]:
    """float64 [SIZE, SIZE], twice; to be cast to what the model multiplies."""
    return np.tile(1 + OFFSETS, (SIZE, SIZE // 3)), np.eye(SIZE)


def multiplied_in(product: np.ndarray) -> str:
    """float64, float32, tf32 (float16, where that is the product's type) or bfloat16 (or anything as narrow).

    Args:
        product: of the operands, [..., SIZE], the right operand's columns last.
    """
    kept = sum(bool((product[..., kind::3] != 1).all()) for kind in range(3))
    return ("bfloat16", "float16" if product.dtype == np.float16 else "tf32", "float32", "float64")[kept]
