"""A model as one plain module that can generate, whatever form it is trained in."""
import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from support.fast_decode import recorded_decode_step
from support.parallel import batches
from support.shard import empty_like_model, full_tensor


class GeneratingModels:
    """with generating(model) as (full_model, decode_step): generate_segments(full_model, ...)

    full_model is the model itself, unless that is cut up among processes or computes in bf16. Then
    full_model is a copy, whose memory is taken for as long as the context lasts. decode_step is the
    recorded step on a CPU, else None (the plain one).
    """

    def __init__(self, model: nn.Module, world):
        """model: any with the shapes of the models to come. Rotary frequencies stay in fp32."""
        self.copy = None
        self.can_record = world.device.type == "cpu"        # there Python is what is slow
        self.decode_steps: dict[int, tuple[nn.Module, Callable | None]] = {}
        if world.sharded or world.dtype == "bf16":
            dtype = torch.bfloat16 if world.dtype == "bf16" else None
            self.copy = empty_like_model(model, world.device, dtype).eval().requires_grad_(False)
            self._resize(0)

    @contextlib.contextmanager
    def __call__(self, model: nn.Module) -> Iterator[tuple[nn.Module, Callable | None]]:
        """Raises FloatingPointError where the logits of the model that generates are not finite.

        That may happen on one process alone.
        """
        try:
            if self.copy is None:
                yield model, self._decode_step(model)
                return
            self._resize(1)
            with torch.no_grad():
                for ours, theirs in zip(self.copy.parameters(), model.parameters(), strict=True):
                    ours.copy_(full_tensor(theirs.to(ours.dtype)))
                for ours, theirs in zip(self.copy.buffers(), model.buffers(), strict=True):
                    ours.copy_(theirs)
            yield self.copy, None
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; lower --lr, and go on from a checkpoint before it "
                                     "with --resume") from None
        finally:
            if self.copy is not None:
                self._resize(0)

    def _decode_step(self, model: nn.Module) -> Callable | None:
        """The model's recorded step; its weights change in place, and nothing else of it does."""
        if not self.can_record:
            return None
        if id(model) not in self.decode_steps:      # the model is kept, so its id stays its own
            self.decode_steps[id(model)] = model, recorded_decode_step(model)
        return self.decode_steps[id(model)][1]

    def _resize(self, share: int) -> None:
        for p in self.copy.parameters():
            p.untyped_storage().resize_(share * p.numel() * p.element_size())


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of `lengths`, those of like lengths together, at most `size` at a time.

        lengths [9, 2, 8], size 2  ->  [1, 2], [0]
    """
    return batches(sorted(range(len(lengths)), key=lambda place: lengths[place]), max(1, size))
