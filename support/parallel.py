"""Several processes: started by torchrun, one a device, each with its share of every batch (DDP, or FSDP2 with --shard)."""
import contextlib
import copy
import datetime
import gc
import os
import signal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support.errors import UserError
from support.shard import sharded_copy, whole_tensor


class World:
    """The processes of a run. rank: which one this is; size: how many; device: what this one computes on."""

    def __init__(self, threads: int | None = None, shard: bool = False, dtype: str = "fp32"):
        """threads: CPU threads of each process. shard: cut models up among the processes instead of copying them. dtype: to
        compute in, "fp32" or "bf16"; weights are fp32 either way."""
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.sharded, self.dtype = shard and self.size > 1, dtype
        local, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if torch.cuda.is_available():
            if local_size > torch.cuda.device_count():
                raise UserError(f"{local_size} processes on this machine, which has {torch.cuda.device_count()} GPUs; lower --nproc_per_node")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("mps" if torch.backends.mps.is_available() and self.size == 1 else "cpu")
        # torchrun sets one thread a process, which leaves the other cores idle.
        torch.set_num_threads(threads or max(1, cores() // local_size))
        # In bf16 on a CPU, oneDNN keeps 1024 kernels, each with a weight's worth of scratch: gigabytes, since lengths vary.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        if self.size > 1:       # others wait while rank 0 loads, hashes or saves a large model; torchrun sees to those that died
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.is_main:
            print(text, flush=True)

    def place(self, start):
        """The model to train, from the one that was loaded: that one itself, or its sharded copy."""
        return sharded_copy(start, self.device, self.dtype) if self.sharded else start

    def copy(self, start):
        """A frozen copy of the model that was loaded."""
        found = sharded_copy(start, self.device, self.dtype, frozen=True) if self.sharded else copy.deepcopy(start)
        return found.requires_grad_(False)

    def take_back(self, start, policy):
        """`start` with the weights of the trained model: whole, on rank 0. All processes together."""
        if self.sharded:
            for mine, theirs in zip([*start.parameters(), *start.buffers()], [*policy.parameters(), *policy.buffers()]):
                found = whole_tensor(theirs.detach())
                if self.is_main:
                    mine.data.copy_(found)
        return start

    def wrap(self, scorer):
        """The module whose forward is to be called in training: DDP where there are several processes (FSDP is in the model)."""
        if self.size == 1 or self.sharded:
            return scorer
        config = scorer.policy.config
        return DistributedDataParallel(scorer, device_ids=[self.device] if self.device.type == "cuda" else None,
                                       gradient_as_bucket_view=True,        # no second copy of the gradients
                                       find_unused_parameters=config.get_text_config() is not config)       # a vision tower's

    def accumulate(self, scorer, last: bool):
        """A context for one backward pass of several: DDP adds up over the processes in the last one only."""
        return contextlib.nullcontext() if last or self.size == 1 or self.sharded else scorer.no_sync()

    def most(self, number: int) -> int:
        """How often each process has to call a sharded model, where one calls it `number` times: they gather it together."""
        return max(self.gather(number)) if self.sharded else number

    def clip(self, policy, max_norm: float) -> float:
        """Scale gradients down to max_norm; returns the norm before."""
        return float(whole_tensor(torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)))

    def precision(self):
        """A context to compute in: in bf16 matrix products are, while weights stay what they are (FSDP sees to that itself)."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16" and not self.sharded)

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over the processes."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def means(self, tallies: dict[str, tuple[float, int]]) -> dict[str, float]:
        """(sum, count) of each process -> mean over all of them; left out where nothing was counted."""
        flat = self.sum([x for tally in tallies.values() for x in tally])
        return {name: total / count for name, total, count in zip(tallies, flat[::2], flat[1::2]) if count}

    def everywhere(self, function) -> list:
        """What function() gives on each rank, in their order; an error that it raises on one is raised on every rank, so
        that none waits for another."""
        result = error = None
        try:
            result = function()
        except Exception as raised:
            error = raised
        found = self.gather((result, error))
        for _, error in found:
            if error is not None:
                raise error
        return [result for result, _ in found]

    def alike(self, function):
        """What function() gives here; an error that it raises on one process is raised on every one."""
        found = []
        self.everywhere(lambda: found.append(function()))
        return found[0]

    def on_main(self, function):
        """What function() gives on rank 0, on every rank, errors included."""
        return self.everywhere(lambda: function() if self.is_main else None)[0]

    def gather(self, thing) -> list:
        """What each process has, in the order of ranks."""
        if self.size == 1:
            return [thing]
        things = [None] * self.size
        dist.all_gather_object(things, thing)
        return things


class Stop:
    """SIGTERM and Ctrl-C: the first is noted, so that the loop can finish its step and save; a second ends the process at once."""

    def __init__(self):
        self.asked = self.training = False
        self.before = {}

    def listen(self) -> None:
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame) -> None:
        for other in self.before:
            signal.signal(other, signal.SIG_DFL)
        self.asked = True
        if not self.training:           # no Exception: nothing on the way may take it for a bad row
            raise KeyboardInterrupt("stopped by a signal before training began: there was nothing to save")

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def lost_process(error: Exception) -> bool:
    """Does an error of torch.distributed say that another process is gone?"""
    return dist.is_initialized() and any(word in str(error).lower() for word in ("gloo", "nccl", "connection", "peer", "socket"))


def out_of_memory(error: BaseException) -> bool:
    """Does an error say that memory ran out? Each device has its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in ("out of memory", "can't allocate memory"))


def leave() -> None:
    """End the process group before Python ends; call it when nothing of the run is referenced any more.

    A DDP wrapper keeps the group alive, and with it gloo's threads, which abort the process when one of them lets go of
    a tensor while the interpreter is being torn down.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def cores() -> int:
    """CPU cores this process may use (macOS does not tell, so there it is all of them)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
