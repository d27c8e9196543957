"""Several processes: started by torchrun, one per device, each with its share of every batch.

DDP copies the models; with --shard, FSDP2 cuts them up (support/shard.py).
"""
import contextlib
import copy
import datetime
import gc
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sapo import Pair, PairScorer
from support.errors import UserError, printable
from support.shard import ShardedScorer, full_tensor, sharded_copy

FILLER = Pair([0], [0], [0], 0)         # scored with weight 0 by a process that has no pairs


class World:
    """The processes of a run. rank: this one's number; size: how many; device: to compute on."""

    def __init__(self, threads: int | None = None, shard: bool = False, dtype: str = "fp32"):
        """threads: CPU threads of each process. shard: cut models up instead of copying them.

        dtype: to compute in, "fp32" or "bf16"; weights are fp32 either way. Raises UserError where
        there are more processes than GPUs.
        """
        env = os.environ
        self.rank, self.size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        self.sharded, self.dtype = shard and self.size > 1, dtype
        local, local_size = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
        if torch.cuda.is_available():
            if local_size > torch.cuda.device_count():
                raise UserError(f"{local_size} processes on this machine, which has "
                                f"{torch.cuda.device_count()} GPUs; lower --nproc_per_node")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        else:
            use_mps = torch.backends.mps.is_available() and self.size == 1
            self.device = torch.device("mps" if use_mps else "cpu")
        # torchrun sets one thread per process, which leaves the other cores idle.
        torch.set_num_threads(threads or max(1, cores() // local_size))
        # In bf16 on a CPU, oneDNN keeps 1024 kernels, each with a weight's worth of scratch memory:
        # gigabytes, because lengths vary.
        env.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        if self.size > 1:
            # Others wait while rank 0 loads, hashes or saves a large model; torchrun ends them all
            # when one dies.
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo",
                                    timeout=datetime.timedelta(hours=2))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line on rank 0. A line break inside is printed as \\n: names may hold one."""
        if self.is_main:
            print(printable(text), flush=True)

    # -------------------------------------------------------------------------------------- models

    def prepare(self, model: nn.Module) -> nn.Module:
        """The policy, from the model that was loaded: that model itself, or its sharded copy."""
        return sharded_copy(model, self.device, self.dtype) if self.sharded else model

    def frozen_copy(self, model: nn.Module, in_place: bool = False) -> nn.Module:
        """A copy of the model that was loaded, without gradients.

        in_place: nobody else uses the model, so where models are not sharded it is frozen itself.
        """
        if self.sharded:
            return sharded_copy(model, self.device, self.dtype, frozen=True).requires_grad_(False)
        return (model if in_place else copy.deepcopy(model)).requires_grad_(False)

    def sharded_copy(self, model: nn.Module) -> nn.Module | None:
        """A sharded copy of the model that was loaded, without gradients; None where models are
        not sharded."""
        return self.frozen_copy(model) if self.sharded else None

    def gather_full(self, model: nn.Module, trained: nn.Module) -> nn.Module:
        """`trained`, the policy or the EMA model, whole on rank 0. All processes together.

        model: the model that was loaded. Where `trained` is sharded, its weights go in there.
        """
        if not self.sharded:
            return trained
        tensors = zip([*model.parameters(), *model.buffers()],
                      [*trained.parameters(), *trained.buffers()], strict=True)
        for full, shard in tensors:
            gathered = full_tensor(shard.detach())
            if self.is_main:
                full.data.copy_(gathered)
        return model

    def scorer(self, model: nn.Module, shortcuts, compiled: bool = False) -> nn.Module:
        """What scores pairs with a model, as one module."""
        kind = ShardedScorer if self.sharded else CompiledScorer if compiled else PairScorer
        return kind(model, shortcuts)

    def wrap(self, scorer: nn.Module) -> nn.Module:
        """The module to call in training: DDP where several processes hold a model each."""
        if self.size == 1 or self.sharded:
            return scorer
        config = scorer.model.config
        return DistributedDataParallel(
            scorer, device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,           # no second copy of the gradients
            # Those of a vision tower, which no text reaches.
            find_unused_parameters=config.get_text_config() is not config)

    # ---------------------------------------------------------------------------------- arithmetic

    def micro_batches(self, scorer, pairs: list[Pair],
                      size: int) -> Iterator[tuple[list[Pair], float]]:
        """This process's pairs, at most `size` at a time, and the weight of their losses.

        The weighted sum of all losses is the mean over the pairs of all processes, after DDP and
        FSDP have averaged over processes. Pairs of like lengths go together, for less padding.
        Weight 0 marks a micro-batch that is scored only because another process has more.
        """
        total = max(1, self.sum([len(pairs)])[0])
        pairs = sorted(pairs, key=lambda p: len(p.prompt) + max(len(p.chosen), len(p.rejected)))
        micro_batches = batches(pairs, size)
        rounds = max(1, len(micro_batches))
        if self.sharded:                # every process has to call a sharded model equally often
            rounds = max(self.gather(rounds))
        for i in range(rounds):
            # DDP adds up over the processes in the last backward pass only.
            more = i + 1 < rounds and isinstance(scorer, DistributedDataParallel)
            with scorer.no_sync() if more else contextlib.nullcontext():
                if i < len(micro_batches):
                    yield micro_batches[i], self.size / total
                else:
                    yield [FILLER], 0.0

    def clip(self, policy: nn.Module, max_norm: float) -> float:
        """Scale gradients down to max_norm; returns the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
        return float(full_tensor(norm))

    def precision(self):
        """A context to compute in. In bf16 the matrix products are, and weights stay in fp32.

        FSDP sees to that itself.
        """
        return torch.autocast(self.device.type, torch.bfloat16,
                              enabled=self.dtype == "bf16" and not self.sharded)

    # --------------------------------------------------------------------------------- collectives

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over the processes."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def means(self, sums: dict[str, tuple[float, int]]) -> dict[str, float]:
        """{name: (sum, count)} of each process -> the mean over all of them; none of nothing."""
        names = list(dict.fromkeys(name for part in self.gather(list(sums)) for name in part))
        flat = self.sum([x for name in names for x in sums.get(name, (0.0, 0))])
        return {name: total / count
                for name, total, count in zip(names, flat[::2], flat[1::2], strict=True) if count}

    def run_on_all(self, function) -> list:
        """What function() returns on each rank, in their order.

        An error on one rank is raised on every rank, so that no process waits for another.
        """
        result = error = None
        try:
            result = function()
        except Exception as raised:
            error = raised
        gathered = self.gather((result, error))
        for _, error in gathered:
            if error is not None:
                raise error
        return [result for result, _ in gathered]

    def run_on_each(self, function):
        """What function() returns here. An error on one rank is raised on every rank."""
        results = []
        self.run_on_all(lambda: results.append(function()))
        return results[0]

    def run_on_rank0(self, function):
        """What function() returns on rank 0, on every rank, errors included."""
        return self.run_on_all(lambda: function() if self.is_main else None)[0]

    def gather(self, thing) -> list:
        """What each process has, in the order of ranks."""
        if self.size == 1:
            return [thing]
        things = [None] * self.size
        dist.all_gather_object(things, thing)
        return things


class CompiledScorer(PairScorer):
    """PairScorer with torch.compile.

    Only the calls of this module are compiled: generation and evaluation would compile again for
    every shape.
    """

    def __init__(self, model: nn.Module, shortcuts=None):
        super().__init__(model, shortcuts)
        model.base_model.compile(dynamic=True)
        torch.compiler.set_stance("force_eager")

    def forward(self, pairs, **kwargs):
        with torch.compiler.set_stance("default"):
            return super().forward(pairs, **kwargs)


def batches(things: list, size: int) -> list[list]:
    """[1, 2, 3], 2  ->  [1, 2], [3]"""
    return [things[i:i + size] for i in range(0, len(things), size)]


def lost_process(error: BaseException) -> bool:
    """Does an error of torch.distributed say that another process is gone?"""
    words = ("gloo", "nccl", "connection", "peer", "socket")
    return dist.is_initialized() and any(word in str(error).lower() for word in words)


def out_of_memory(error: BaseException) -> bool:
    """Does an error say that memory ran out? Each device has its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in ("out of memory", "can't allocate memory"))


def leave() -> None:
    """End the process group before Python ends, when nothing of the run is referenced any more.

    A DDP wrapper keeps the group alive, and with it gloo's threads, which abort the process when
    one of them lets go of a tensor while the interpreter is being torn down.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def cores() -> int:
    """CPU cores this process may use (macOS does not tell, so there it is all of them)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
