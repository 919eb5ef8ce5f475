"""Finds out the precision in which a device really multiplies, which may differ from the precision asked for.

The columns of the left operand hold 1 + 2^-9, 1 + 2^-12 and 1 + 2^-30 in turn; the right operand is the identity, so
every element of the result is one product. bfloat16 (8 bits) keeps none of the three small terms, TF32 and float16
(11 bits) keep the first, float32 (24 bits) keeps two, float64 all.
"""

import numpy as np

# A multiple of 3, and of 64 as models' channels are, and large enough for the library kernels that models use. With 129
# channels, which is no multiple of 4, an H100 computed a convolution in float32 although TF32 was allowed.
SIZE = 192
OFFSETS = 2.0 ** -np.array([9, 12, 30])


def operands() -> tuple[np.ndarray, np.ndarray]:
    """Returns the two operands, float64 [SIZE, SIZE]; cast them to the type that the model multiplies."""
    return np.tile(1 + OFFSETS, (SIZE, SIZE // 3)), np.eye(SIZE)


def multiplied_in(product: np.ndarray) -> str:
    """Returns the precision of a product: float64, float32, tf32 (float16 if that is the product's type) or bfloat16
    (or anything as narrow).

    Args:
        product: product of the operands, [..., SIZE], with the right operand's columns last.
    """
    kept = sum(bool((product[..., kind::3] != 1).all()) for kind in range(3))
    return ("bfloat16", "float16" if product.dtype == np.float16 else "tf32", "float32", "float64")[kept]
