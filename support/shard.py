"""Models larger than one GPU (--shard), with FSDP2's fully_shard.

Policy, EMA model and reference are cut up alike, every tensor along its first dimension, so that
the average and the optimizer work on each process's own part. A model that generates or evaluates
is gathered for as long as that takes (support/generating.py).
"""
import copy
import types

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from sapo import PairScorer, pair_logps


def empty_like_model(model: nn.Module, device="meta", dtype=None) -> nn.Module:
    """A copy of a model without content: the same shapes on `device`, parameters in `dtype`."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device=device, dtype=dtype),
                                 requires_grad=p.requires_grad) for p in model.parameters()}
    empty |= {id(b): torch.empty_like(b, device=device) for b in model.buffers()}
    return copy.deepcopy(model, empty)


def sharded_copy(model: nn.Module, device, dtype: str, frozen: bool = False) -> nn.Module:
    """A copy of a model, cut up among the processes.

    model: whole on rank 0, anything of the same shapes on the others. dtype: "bf16" gathers and
    computes in bf16, from fp32 shares and to fp32 gradients; autocast would keep what it casts.
    frozen: no backward pass will follow, for which what lies outside the layers would be kept
    gathered. The layers are gathered one at a time while the copy scores.
    """
    sharded, mesh = empty_like_model(model), init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy()
    if dtype == "bf16":
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in sharded.modules():
        if isinstance(layer, GradientCheckpointingLayer):   # what transformers builds its layers on
            fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(sharded, mesh=mesh, mp_policy=precision,
                reshard_after_forward=True if frozen else None)
    sharded.to_empty(device=device)
    is_main = dist.get_rank() == 0
    with torch.no_grad():
        for shard, full in zip(sharded.parameters(), model.parameters(), strict=True):
            full = full.to(device) if is_main else torch.empty(
                full.shape, dtype=full.dtype, device=device)
            shard.copy_(distribute_tensor(full, mesh, shard.placements))        # sent from rank 0
        for buffer, full in zip(sharded.buffers(), model.buffers(), strict=True):
            if is_main:
                buffer.copy_(full)
            dist.broadcast(buffer, 0)
    return sharded


class ShardedScorer(PairScorer):
    """PairScorer for a sharded copy.

    FSDP gathers what lies outside the layers around calls of the model's own methods, so pair_logps
    becomes one of the copy.
    """

    def __init__(self, model: nn.Module, shortcuts=None):
        super().__init__(model, shortcuts)
        model.pair_logps = types.MethodType(pair_logps, model)
        register_fsdp_forward_method(model, "pair_logps")

    def forward(self, pairs, **kwargs):
        return self.model.pair_logps(pairs, shortcuts=self.shortcuts, **kwargs)


def full_tensor(tensor):
    """The whole of a tensor that is cut up; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(state, keep: bool):
    """A state dict with whole tensors, on the CPU: the same as without sharding.

    All processes together. keep: False where the result is not wanted.
    """
    if isinstance(state, dict):
        return {name: full_state(value, keep) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(full_state(value, keep) for value in state)
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.cpu() if keep else None
    return state


def local_state(part, state: dict) -> dict:
    """This process's share of a whole state, for `part`: a model, its EMA or its optimizer."""
    if isinstance(part, torch.optim.Optimizer):
        parameters = [p for group in part.param_groups for p in group["params"]]
        return state | {"state": {
            i: {name: local_shard(value, parameters[i]) for name, value in values.items()}
            for i, values in state["state"].items()}}
    if isinstance(part, nn.Module):
        return {name: local_shard(state[name], tensor)
                for name, tensor in part.state_dict().items()}
    return state | {"model": local_state(part.model, state["model"])}


def local_shard(value, like):
    """The share of a tensor that lies here when the tensor is cut up as `like` is."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements,
                                 src_data_rank=None)
    return value
