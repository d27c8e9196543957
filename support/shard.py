"""Models larger than one GPU (--shard): FSDP2's fully_shard. Policy, EMA model and reference are cut up alike, every
tensor along its first dimension, so that averaging and optimizer work on each process's own part; whatever generates or
evaluates is gathered for as long as that takes.
"""
import contextlib
import copy
import types

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from sapo import pair_logps


def hull(model, device="meta", dtype=None):
    """A copy of a model with nothing in its tensors: the same shapes on `device`, parameters in `dtype` (none: their own)."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device=device, dtype=dtype), requires_grad=p.requires_grad) for p in model.parameters()}
    empty |= {id(b): torch.empty_like(b, device=device) for b in model.buffers()}
    return copy.deepcopy(model, empty)


def sharded_copy(model, device, dtype: str, frozen: bool = False):
    """A copy of a model, cut up among the processes. model: whole on rank 0, anything of the same shapes on the others.
    dtype: "bf16" gathers and computes in bf16, from fp32 shares and to fp32 gradients; autocast would keep what it casts. frozen: no
    backward pass will follow, for which what lies outside the layers would be kept gathered.

    The layers are gathered one at a time while the copy scores; what lies outside of them during all of its `score`,
    pair_logps as a method, because FSDP gathers around the calls of a module's own methods.
    """
    found, mesh = hull(model), init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if dtype == "bf16" else MixedPrecisionPolicy()
    for layer in found.modules():
        if isinstance(layer, GradientCheckpointingLayer):       # what transformers builds every decoder layer on
            fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(found, mesh=mesh, mp_policy=precision, reshard_after_forward=True if frozen else None)
    found.to_empty(device=device)
    with torch.no_grad():
        for mine, whole in zip(found.parameters(), model.parameters()):
            whole = whole.to(device) if dist.get_rank() == 0 else torch.empty(whole.shape, dtype=whole.dtype, device=device)
            mine.copy_(distribute_tensor(whole, mesh, mine.placements))     # sent from rank 0
        for mine, whole in zip(found.buffers(), model.buffers()):
            if dist.get_rank() == 0:
                mine.copy_(whole)
            dist.broadcast(mine, 0)
    found.score = types.MethodType(score, found)
    register_fsdp_forward_method(found, "score")
    return found


def score(model, pairs, **how):
    """pair_logps, its results no views of one tensor: FSDP hangs on to each of them for backward."""
    return tuple(values.clone() for values in pair_logps(model, pairs, **how))


class Whole:
    """A model as one plain module in every process, to generate and evaluate with.

    That is the model itself, unless it is cut up among processes or is to be read in bf16. Then it is a copy, whose memory
    is taken for as long as `with whole.of(model) as plain:` lasts.
    """

    def __init__(self, model, world):
        """model: any of the same shapes as those that will be read. In bf16 what is no weight (rotary frequencies) keeps its
        precision."""
        self.plain = None
        if world.sharded or world.dtype == "bf16":
            self.plain = hull(model, world.device, torch.bfloat16 if world.dtype == "bf16" else None).eval().requires_grad_(False)
            self._resize(0)
            self.plain._sapo_generates = False      # its weights never lie where they lay, which a recorded step relies on

    @contextlib.contextmanager
    def of(self, model):
        if self.plain is None:
            yield model
            return
        self._resize(1)
        try:
            with torch.no_grad():
                for mine, theirs in zip(self.plain.parameters(), model.parameters()):
                    mine.copy_(whole_tensor(theirs.to(mine.dtype)))
                for mine, theirs in zip(self.plain.buffers(), model.buffers()):
                    mine.copy_(theirs)
            yield self.plain
        finally:
            self._resize(0)

    def _resize(self, share: int) -> None:
        for p in self.plain.parameters():
            p.untyped_storage().resize_(share * p.numel() * p.element_size())


def whole_tensor(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state, keep: bool):
    """A state dict with its tensors whole, on the CPU: the same as without sharding. All processes together; keep: False
    where the result is not wanted."""
    if isinstance(state, dict):
        return {name: whole_state(value, keep) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole_state(value, keep) for value in state)
    if isinstance(state, DTensor):
        found = state.full_tensor()
        return found.cpu() if keep else None
    return state


def own_share(part, state: dict) -> dict:
    """What `part` (a model, its EMA or its optimizer) is to load of a whole state: each process cuts out its own share."""
    if isinstance(part, torch.optim.Optimizer):
        parameters = [p for group in part.param_groups for p in group["params"]]
        return state | {"state": {i: {name: cut(value, parameters[i]) for name, value in values.items()}
                                  for i, values in state["state"].items()}}
    if isinstance(part, nn.Module):
        return {name: cut(state[name], mine) for name, mine in part.state_dict().items()}
    return state | {"model": own_share(part.model, state["model"])}


def cut(value, like):
    """The share of a tensor that lies here when it is cut up as `like` is."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value
