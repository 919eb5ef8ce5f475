"""One operation in PyTorch against its float64 answer. This file needs only torch and numpy and stands alone: a copy of
it is `torch_side.py` in a reproducer's folder, beside `operation.json`, `inputs.npz` and `torch_program.pt2`.

It prints two differences from float64: that of the program that the model really ran, and that of the same operation
written in PyTorch's public functions.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def dtypes(question):
    """Returns the dtypes of products, and of parameters and results."""
    precision = question["precision"]
    return DTYPES[precision], torch.float64 if precision == "fp64" else torch.float32


def operations(question):
    """Returns {kind: function of the operands} in public functions alone, for the question's precision and numbers."""
    narrow, wide = dtypes(question)

    def convolution(input, kernel):  # noqa: A002 (the operand's name)
        x, weight = input.permute(0, 3, 1, 2).to(narrow), kernel.permute(3, 2, 0, 1).to(narrow)
        padding = (kernel.shape[0] - 1) // 2
        return F.conv2d(x, weight, stride=question["stride"], padding=padding).permute(0, 2, 3, 1)

    def standardization(kernel):
        variance, mean = torch.var_mean(kernel, dim=(0, 1, 2), keepdim=True, correction=0)
        return (kernel - mean) / torch.sqrt(variance + question["standardize_eps"])

    def norm_and_relu(input, gamma, beta):  # noqa: A002
        x = input.permute(0, 3, 1, 2).to(narrow).to(wide)
        return F.relu(F.group_norm(x, 32, gamma, beta, question["norm_eps"])).permute(0, 2, 3, 1)

    def head(input, kernel, bias):  # noqa: A002
        return F.linear(input.to(narrow), kernel[0, 0].T.to(narrow), bias.to(narrow))

    def pool(input):  # noqa: A002
        padded = F.pad(input.permute(0, 3, 1, 2).to(narrow), (1, 1, 1, 1))
        return F.max_pool2d(padded, 3, 2).permute(0, 2, 3, 1)

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
        arrays: {name of an operand: array, NHWC or HWIO}, and `gradient`, the gradient by the result.
    """
    _, wide = dtypes(question)
    operands = {name: torch.from_numpy(arrays[name]).to(wide) for name in question["operands"]}
    gradient = torch.from_numpy(arrays["gradient"]).to(wide)
    if question["kind"] == "update":
        return {name: array.numpy() for name, array in update(question, **operands, gradient=gradient).items()}
    operands = {name: tensor.requires_grad_() for name, tensor in operands.items()}
    value = operations(question)[question["kind"]](**operands).to(wide)
    by = torch.autograd.grad(value, list(operands.values()), gradient)
    named = {"value": value} | {f"by {name}": array for name, array in zip(operands, by, strict=True)}
    return {name: array.detach().numpy() for name, array in named.items()}


def difference(answer, result):
    """Returns the largest difference, relative to the answer's root mean square."""
    scale = np.sqrt(np.mean(np.square(answer))) or 1.0
    return float(np.abs(answer - np.asarray(result, np.float64)).max() / scale)


def main():
    folder = Path(__file__).parent
    question = json.loads((folder / "operation.json").read_text())
    arrays = np.load(folder / "inputs.npz")
    device = question["torch ran with"]["device"]
    program = torch.export.load(folder / "torch_program.pt2").module()
    _, wide = dtypes(question)
    given = [torch.from_numpy(arrays[name]).to(device, wide) for name in (*question["operands"], "gradient")]
    ran = program(*given)[question["results"].index(question["what"])]
    answer = arrays["float64"]
    print(f"{question['operation']}, {question['what']}, PyTorch {torch.__version__} on {device}")
    print(f"the program that the model ran differs from float64 by {difference(answer, ran.numpy(force=True)):.3e}")
    print(
        f"the same in public functions differs by {difference(answer, plain(question, arrays)[question['what']]):.3e}"
    )


if __name__ == "__main__":
    main()
