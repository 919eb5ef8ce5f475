"""The learning rate, as PyTorch's side computes it."""


def learning_rate(schedule: dict, step: int) -> float:
    """Returns the learning rate of update number `step`: it rises linearly from 0 during warm-up, and is divided by 10
    for each decay step below `step`."""
    if step < schedule["warmup_steps"]:
        return schedule["base_lr"] * step / schedule["warmup_steps"]
    return schedule["base_lr"] / 10 ** sum(step > decay for decay in schedule["decay_steps"])
