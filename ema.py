"""The EMA model of SAPO: a slowly moving copy of the policy, which writes the rejected segments.

    ema = EMA(policy, decay=0.5, update_every=2)
    ...
    optimizer.step()
    ema.update(policy)          # once per optimizer step; the copy moves at every second call
    generate_segments(ema.model, ...)

The average is taken in the weights' own dtype. Keep them in fp32: in bf16 the step, (1 - decay)
times the difference, is rounded away when the decay is high, and the EMA model stalls.

Needs torch >= 2.9. MIT licence; from the reference code for SAPO (arXiv 2405.20830).
"""
import copy
import functools
import types

import torch
from torch import nn


class EMA:
    """Exponential moving average of a model's weights (Algorithm 1 lines 3 and 17).

        theta_ema <- decay * theta_ema + (1 - decay) * theta        (Eq. 6)

    model: the policy. decay: alpha of Eq. 6; 0 follows the policy, 1 never moves.
    update_every: optimizer steps between two refreshes (2 in the paper).
    .model is the averaged model: in eval mode (no dropout), no parameter requires a gradient.

        decay 0.5, update_every 1, theta_ema 0, theta 1  ->  theta_ema 0.5, then 0.75, then 0.875

    trainable_only: parameters with requires_grad=False, and buffers, are shared with the policy,
    not copied (for adapters on a frozen or quantised base). Merge adapters into a deep copy of the
    policy only: merging writes into the base, which the EMA model shares.
    model_copy: a copy of `model` made elsewhere, for models that can't be deep-copied (sharded
    ones); nothing is shared then.

    Raises ValueError for a decay outside [0, 1], an update_every below 1, a wrapper (DDP, FSDP),
    and a model whose forward was replaced by a function (TRL does that): the copy would still run
    the policy.
    """

    def __init__(self, model: nn.Module, decay: float = 0.5, update_every: int = 2,
                 trainable_only: bool = False, model_copy: nn.Module | None = None):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie between 0 and 1, not {decay}")
        if update_every < 1:
            raise ValueError(f"update_every must be at least 1, not {update_every}")
        if hasattr(model, "module"):
            raise ValueError(f"EMA takes the model inside {type(model).__name__}, not the wrapper")
        refuse_replaced_forward(model)
        self.decay, self.update_every, self.steps = decay, update_every, 0
        if model_copy is None:
            shared = []
            if trainable_only:
                shared = [p for p in model.parameters() if not p.requires_grad] + [*model.buffers()]
            # deepcopy takes what is in its memo instead of copying it.
            model_copy = copy.deepcopy(model, memo={id(tensor): tensor for tensor in shared})
        self.averaged = [name for name, p in model.named_parameters()
                         if p.requires_grad or not trainable_only]
        # Parameters that are shared require no gradient already: nothing of the policy changes.
        self.model = model_copy.eval().requires_grad_(False)
        self.trainable_only = trainable_only

    @torch.no_grad()
    def update(self, model: nn.Module) -> bool:
        """Count one optimizer step of `model`; at every update_every-th, refresh and return True.

        Parameters move by Eq. 6; buffers are copied.
        """
        self.steps += 1
        if self.steps % self.update_every:
            return False
        ours, theirs = dict(self.model.named_parameters()), dict(model.named_parameters())
        if self.averaged:       # ours += (1 - decay) * (theirs - ours), one call for all tensors
            torch._foreach_lerp_([ours[name] for name in self.averaged],
                                 [theirs[name] for name in self.averaged], 1 - self.decay)
        for our_buffer, their_buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            if our_buffer is not their_buffer:      # they are one and the same where shared
                our_buffer.copy_(their_buffer)
        return True

    def steps_until_refresh(self) -> int:
        """Optimizer steps until `update` refreshes the EMA model, which is constant until then."""
        return self.update_every - self.steps % self.update_every

    def state_dict(self) -> dict:
        """The averaged weights and the number of steps counted, but not decay and update_every."""
        weights = self.model.state_dict()
        if self.trainable_only:
            weights = {name: weights[name] for name in self.averaged}
        return {"model": weights, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict gave. Raises RuntimeError when the weights do not fit."""
        if self.trainable_only and set(state["model"]) != set(self.averaged):
            raise RuntimeError("the state does not hold the weights that this EMA model averages")
        self.model.load_state_dict(state["model"], strict=not self.trainable_only)
        self.steps = state["steps"]


def refuse_replaced_forward(model: nn.Module) -> None:
    """Raise ValueError where a copy of the model would still run the model."""
    for name, module in model.named_modules():
        if copy_would_share(vars(module).get("forward")):
            raise ValueError(f"the forward of {name or 'the model'} was replaced by a function,"
                             " which a copy would share; make the EMA model before that")


def copy_would_share(forward) -> bool:
    """Would a deep copy of a module that has this `forward` of its own still run the module?

        None: no forward of its own         no, the copy runs that of its class
        a bound method, or a partial of it  no, deepcopy copies the module it is bound to as well
        a function                          yes, it goes on calling the model that it was made for
        a partial of a function             if that has a closure; accelerate's gets the module as
                                            an argument instead, which deepcopy copies
    """
    if isinstance(forward, functools.partial):
        return isinstance(forward.func, types.FunctionType) and bool(forward.func.__closure__)
    return isinstance(forward, types.FunctionType)
