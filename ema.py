"""The EMA model of SAPO: a slowly moving copy of the policy that writes the rejected segments. Needs torch alone.

    ema = EMA(policy, decay=0.5, update_every=2)
    ...
    optimizer.step()
    ema.update(policy)          # once per optimizer step; the copy moves on every second call
    generate(ema.model, ...)
"""
import copy as copying

import torch
from torch import nn


class EMA:
    """Exponential moving average of a model's weights (paper, Eq. 6 and Algorithm 1 lines 3 and 17).

    model: the policy. decay: alpha of Eq. 6; 0 copies the policy, 1 never moves.
    update_every: optimizer steps between two refreshes (the paper: 2).
    copy: a copy made elsewhere, for models that can't be deep-copied (sharded ones); it must have the same parameters.
    Raises ValueError for a decay outside [0, 1] or an update_every below 1.

    .model is the averaged model: in eval mode (no dropout), no parameter requires a gradient.

        decay 0.5, update_every 1, theta_ema 0, theta 1  ->  theta_ema 0.5, then 0.75, then 0.875
    """

    def __init__(self, model: nn.Module, decay: float = 0.5, update_every: int = 2, copy: nn.Module | None = None):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie between 0 and 1, not {decay}")
        if update_every < 1:
            raise ValueError(f"update_every must be at least 1, not {update_every}")
        self.decay, self.update_every, self.steps = decay, update_every, 0
        self.model = (copying.deepcopy(model) if copy is None else copy).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> bool:
        """Count one optimizer step of `model`; on every update_every-th, refresh and return True.

        theta_ema <- decay * theta_ema + (1 - decay) * theta (Eq. 6); buffers, which are not trained, are copied.
        """
        self.steps += 1
        if self.steps % self.update_every:
            return False
        # One fused call for all tensors: a Python loop over hundreds of them costs more than the arithmetic.
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - self.decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers()):
            mine.copy_(theirs)
        return True

    def state_dict(self) -> dict:
        """The averaged weights and the number of steps counted; decay and interval are settings, not state."""
        return {"model": self.model.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict gave. Raises RuntimeError (torch's) when the weights do not fit the model."""
        self.model.load_state_dict(state["model"])
        self.steps = state["steps"]
