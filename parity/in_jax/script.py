"""One operation in JAX against its float64 answer. This file needs only jax and numpy and stands alone: a copy of it is
`jax_side.py` in a reproducer's folder, beside `operation.json`, `inputs.npz` and `jax_program.bin`.

It prints two differences from float64: that of the program that the model really ran, and that of the same operation
written in JAX's public functions.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

DTYPES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def dtypes(question):
    """Returns the dtypes of products, and of parameters and results."""
    precision = question["precision"]
    return jnp.dtype(DTYPES[precision]), jnp.dtype("float64" if precision == "fp64" else "float32")


def operations(question):
    """Returns {kind: function of the operands} in public functions alone, for the question's precision and numbers."""
    narrow, wide = dtypes(question)
    exact = lax.Precision.HIGHEST if question["precision"] in ("fp32", "fp64") else lax.Precision.DEFAULT

    def convolution(input, kernel):  # noqa: A002 (the operand's name)
        pad = (kernel.shape[0] - 1) // 2
        return lax.conv_general_dilated(
            input.astype(narrow),
            kernel.astype(narrow),
            (question["stride"],) * 2,
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=exact,
        )

    def standardization(kernel):
        centred = kernel - kernel.mean((0, 1, 2), keepdims=True)
        return centred / jnp.sqrt((centred * centred).mean((0, 1, 2), keepdims=True) + question["standardize_eps"])

    def norm_and_relu(input, gamma, beta):  # noqa: A002
        x = input.astype(narrow).astype(wide)
        groups = x.reshape(*x.shape[:3], 32, -1)
        centred = groups - groups.mean((1, 2, 4), keepdims=True)
        deviation = jnp.sqrt((centred * centred).mean((1, 2, 4), keepdims=True) + question["norm_eps"])
        return jnp.maximum((centred / deviation).reshape(x.shape) * gamma + beta, 0).astype(narrow)

    def head(input, kernel, bias):  # noqa: A002
        return jnp.dot(input, kernel[0, 0], precision=exact) + bias

    def pool(input):  # noqa: A002
        padded = jnp.pad(input.astype(narrow), ((0, 0), (1, 1), (1, 1), (0, 0)))
        return lax.reduce_window(padded, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")

    return {
        "convolution": convolution,
        "standardization": standardization,
        "norm and ReLU": norm_and_relu,
        "head": head,
        "pool": pool,
    }


def update(question, parameter, buffer, gradient):
    """Returns a parameter and its momentum after one update by SGD."""
    schedule, step = question["schedule"], question["step"]
    if step < schedule["warmup_steps"]:
        rate = schedule["base_lr"] * step / schedule["warmup_steps"]
    else:
        rate = schedule["base_lr"] / 10 ** sum(step > decay for decay in schedule["decay_steps"])
    held = question["momentum"] * buffer + gradient
    return {"value": parameter - rate * held, "momentum": held}


def plain(question, arrays):
    """Returns {`value`, `by NAME` of each operand: array} of the operation, in public functions alone.

    Args:
        question: the content of operation.json.
        arrays: {name of an operand: array}, and `gradient`, the gradient by the result.
    """
    _, wide = dtypes(question)
    operands = {name: jnp.asarray(arrays[name], wide) for name in question["operands"]}
    gradient = jnp.asarray(arrays["gradient"], wide)
    if question["kind"] == "update":
        return update(question, **operands, gradient=gradient)
    operation = operations(question)[question["kind"]]

    def compute(operands, gradient):
        value, backward = jax.vjp(lambda operands: operation(**operands).astype(wide), operands)
        return {"value": value} | {f"by {name}": array for name, array in backward(gradient)[0].items()}

    return jax.jit(compute)(operands, gradient)


def difference(answer, result):
    """Returns the largest difference, relative to the answer's root mean square."""
    scale = np.sqrt(np.mean(np.square(answer))) or 1.0
    return float(np.abs(answer - np.asarray(result, np.float64)).max() / scale)


def main():
    folder = Path(__file__).parent
    question = json.loads((folder / "operation.json").read_text())
    if question["precision"] == "fp64":
        jax.config.update("jax_enable_x64", True)
    arrays = np.load(folder / "inputs.npz")
    program = jax.export.deserialize(bytearray((folder / "jax_program.bin").read_bytes()))
    _, wide = dtypes(question)
    given = [arrays[name].astype(wide) for name in (*question["operands"], "gradient")]
    # compiled as the model was
    ran = jax.jit(program.call, **question["jax ran with"])(*given)[question["results"].index(question["what"])]
    answer = arrays["float64"]
    print(f"{question['operation']}, {question['what']}, JAX {jax.__version__} on {jax.devices()[0].device_kind}")
    print(f"the program that the model ran differs from float64 by {difference(answer, ran):.3e}")
    print(
        f"the same in public functions differs by {difference(answer, plain(question, arrays)[question['what']]):.3e}"
    )


if __name__ == "__main__":
    main()
