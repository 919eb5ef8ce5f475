"""The learning rate, as PyTorch's side computes it."""

import math


def learning_rate(schedule: dict, step: int) -> float:
    """Returns the learning rate of update number `step`: it rises linearly from 0 during warm-up. In a staircase, it is
    then divided by 10 for each decay step below `step`; a cosine falls from there to 0 at the schedule's last step.
    With `restart_every`, all of this begins anew after each such number of updates."""
    if schedule.get("restart_every") is not None:
        step %= schedule["restart_every"]
    base, warmup = schedule["base_lr"], schedule["warmup_steps"]
    if step < warmup:
        return base * step / warmup
    if schedule.get("kind") == "cosine":  # as torch.optim.lr_scheduler.CosineAnnealingLR
        passed = min((step - warmup) / max(schedule["steps"] - warmup, 1), 1.0)
        return base * (1 + math.cos(math.pi * passed)) / 2
    return base / 10 ** sum(step > decay for decay in schedule["decay_steps"])
