"""The optimizer, and the learning rate and beta of each step."""
import bisect
import math

import torch
from torch import nn

from support.settings import Settings


def make_optimizer(s: Settings, policy: nn.Module) -> torch.optim.Optimizer:
    """AdamW or RMSprop, with weight decay on matrices only."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": s.weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    if s.optimizer == "rmsprop":        # foreach would hold another copy of the model for a moment
        return torch.optim.RMSprop(groups, lr=s.lr[0], foreach=False)
    return torch.optim.AdamW(groups, lr=s.lr[0], fused=True)


def spin_round(s: Settings, step: int, steps: int) -> tuple[int, range]:
    """The round of SPIN that a step belongs to: its number from 0, and its steps.

    A run of another method is one round.

        2 rounds, 10 steps  ->  step 5 is in (0, range(1, 6)), step 6 in (1, range(6, 11))
    """
    last_steps = [i * steps // s.iterations for i in range(s.iterations + 1)]
    number = bisect.bisect_left(last_steps, step) - 1
    return number, range(last_steps[number] + 1, last_steps[number + 1] + 1)


def schedule(s: Settings, step: int, steps: int) -> tuple[float, float]:
    """Learning rate and beta of an optimizer step, which counts from 1 in each round of SPIN."""
    number, round_steps = spin_round(s, step, steps)
    lr = learning_rate(s, step - round_steps.start + 1, len(round_steps), s.lr[number])
    return lr, s.beta[number]


def learning_rate(s: Settings, step: int, steps: int, peak: float) -> float:
    """Learning rate of optimizer step 1..steps."""
    warmup = s.warmup * steps if s.warmup < 1 else s.warmup
    # 1. Linear warm-up to the peak.
    if step <= warmup:
        return peak * step / warmup
    # 2. Then constant, or falling with the inverse square root.
    if s.schedule == "constant":
        return peak
    if s.schedule == "inverse_sqrt":
        return peak * math.sqrt(max(1, warmup) / step)
    # 3. Or falling towards 0, which comes one step after the last.
    done = (step - warmup) / max(1, steps - warmup + 1)
    return peak * ((1 + math.cos(math.pi * done)) / 2 if s.schedule == "cosine" else 1 - done)


def optimizer_step(s: Settings, world, policy: nn.Module, optimizer: torch.optim.Optimizer,
                   lr: float, metrics: dict[str, float]) -> bool:
    """Clip the gradients and take one step with them; adds lr and grad_norm to the metrics.

    All processes take the step, or none does: returns False where a loss or a gradient is not
    finite on any of them, or where no process had a pair to learn from.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    grad_norm = world.clip(policy, s.max_grad_norm or math.inf)
    metrics |= {"lr": lr, "grad_norm": grad_norm}
    finite = math.isfinite(metrics.get("loss", math.nan)) and math.isfinite(grad_norm)
    take = world.sum([finite])[0] == world.size
    if take:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return take
