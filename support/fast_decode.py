"""A faster decode step for a CPU: the plain one, recorded once, so that no Python runs in it.

    decode_step = recorded_decode_step(model)       # None: use the plain step
    generate_segments(model, ..., decode_step=decode_step)

The numbers are those of sapo.plain_decode_step. torch.jit.trace is deprecated and not supported by
Python 3.14; where it is missing or refuses a model, generation uses the plain step.
"""
import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sapo import (
    KVCache,
    attention_masks,
    check_generation,
    eval_mode,
    plain_decode_step,
    prefill,
)


class DecodeStep(nn.Module):
    """One decode step as a function of tensors alone, which is what torch.jit.trace can record."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.decode_step = model, plain_decode_step(model)

    def forward(self, token: Tensor, position: Tensor, masks: dict[str, Tensor],
                keys: dict[int, Tensor], values: dict[int, Tensor]) -> Tensor:
        """As plain_decode_step, with the cache's tensors in the place of the cache."""
        cache = KVCache(0, 0)
        cache.keys, cache.values = keys, values
        return self.decode_step(token, position, masks, cache)


@torch.no_grad()
def recorded_decode_step(model: nn.Module) -> Callable | None:
    """The decode step of `model` as it is now, recorded; None where it can't be recorded.

    The recorded step stays valid while weights change in place, and for any number of slots and
    columns. It does not see other changes: new or disabled adapters, hooks, another dtype or
    device. A step in which Python decides something by a tensor's values is refused, because the
    branch would be frozen. The step is tried against the model without a cache before it is
    returned.
    """
    device = next(model.parameters()).device
    with eval_mode(model):
        try:
            prefixes = [[1, 2, 3, 4], [1, 2], [1, 2, 3]]
            cache = prefill(model, prefixes, max_new_tokens=4)
            position = torch.tensor([len(prefix) - 1 for prefix in prefixes], device=device)
            columns = torch.arange(4, device=device)[None]
            masks = attention_masks(model, (columns <= position[:, None])[:, None],
                                    position[:, None], columns)
            traced = trace(DecodeStep(model), (torch.ones_like(position), position, masks,
                                               cache.keys, cache.values))
        except Exception:               # whatever a model does that can't be recorded
            return None
    if traced is None:
        return None

    def decode_step(token: Tensor, position: Tensor, masks: dict[str, Tensor],
                    cache: KVCache) -> Tensor:
        return traced(token, position, masks, cache.keys, cache.values)

    try:
        check_generation(model, decode_step)
    except ValueError:
        return None
    return decode_step


def trace(module: nn.Module, inputs: tuple):
    """torch.jit.trace without its remarks; None where a branch depends on a tensor's values."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # What torch and transformers' attention ask in Python is about sizes, which are recorded.
        for sizes_only in (r"torch\.(?!jit)", r"transformers\.integrations\.sdpa_attention"):
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=sizes_only)
        # jit looks at every property of the model, and some of those log a remark.
        logging.disable(max(level, logging.WARNING))
        try:
            traced = torch.jit.trace(module, inputs, check_trace=False)
        finally:
            logging.disable(level)
    if any(issubclass(warning.category, torch.jit.TracerWarning) for warning in caught):
        return None
    return traced
