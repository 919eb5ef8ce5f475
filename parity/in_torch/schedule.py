"""The learning rate, as PyTorch's side computes it."""


def learning_rate(schedule: dict, step: int) -> float:
    """Returns the learning rate of update number `step`: it rises linearly from 0 during warm-up, and is divided by 10
    for each decay step below `step`. With `restart_every`, this begins anew after each such number of updates."""
    if schedule.get("restart_every") is not None:
        step %= schedule["restart_every"]
    if step < schedule["warmup_steps"]:
        return schedule["base_lr"] * step / schedule["warmup_steps"]
    return schedule["base_lr"] / 10 ** sum(step > decay for decay in schedule["decay_steps"])
