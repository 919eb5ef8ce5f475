"""The images that the model takes, checked while it is traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.errors import RequestError

WANTED = "floats [batch, height, width, 3] in [-1, 1]"


def check_images(images: Any) -> None:
    """Looks at shape and dtype while the model is traced, and at no value.

    Raises:
        RequestError: they are not floats [batch, height, width, 3]; the message says how to make them so.
    """
    if not isinstance(images, (jax.Array, np.ndarray)):
        raise RequestError(f"images are a {type(images).__name__}, not an array; give {WANTED}")
    shape = images.shape
    if len(shape) == 3 and 3 in (shape[0], shape[2]):
        remedy = "add a batch axis: images[None]"
    elif len(shape) == 4 and shape[1] == 3 != shape[3]:
        remedy = "move the channels to the end: images.transpose(0, 2, 3, 1)"
    elif len(shape) == 4 and shape[3] == 1:
        remedy = "repeat the grey channel: images.repeat(3, axis=-1)"
    elif len(shape) == 4 and shape[3] == 4:
        remedy = "leave out the fourth channel: images[..., :3]"
    elif len(shape) != 4 or shape[3] != 3 or not shape[1] * shape[2]:
        remedy = "bring them into that shape"
    elif not jnp.issubdtype(images.dtype, jnp.floating):
        remedy = "bring 0..255 into that range: (images.astype('float32') - 127.5) / 127.5"
    else:
        return
    raise RequestError(f"images are {images.dtype} {list(shape)}, and the model takes {WANTED}; {remedy}")
