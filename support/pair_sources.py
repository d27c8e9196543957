"""Where pairs come from: what all sources share, and the sources of the baselines.

SAPO's own source is SegmentSource in train.py.
"""
import abc
from collections.abc import Callable

import numpy as np
import torch

from sapo import Pair
from support.optim import spin_round
from support.settings import Settings
from support.tokenize_rows import Examples, TokenizedExample

ORDER, REWRITE, ANSWER, DRAW = 1, 2, 3, 4   # random streams: no two uses share their numbers


class PairSource(abc.ABC):
    """This process's new pairs of each step. Subclasses say in `make` where pairs come from.

    pending: {step: pairs} that were made along with an earlier step's and not used yet. They are
    its state in a checkpoint, as plain tuples.
    """

    def __init__(self):
        self.pending: dict[int, list[Pair]] = {}

    @abc.abstractmethod
    def make(self, step: int) -> dict[int, list[Pair]]:
        """{step: its pairs}, for this step and for any later ones."""

    def pairs_of(self, step: int) -> list[Pair]:
        """The pairs of a step; steps are asked for one after the other, each once."""
        if step not in self.pending:
            self.pending |= self.make(step)
        return self.pending.pop(step)

    def state_dict(self) -> dict:
        return {step: [tuple(pair) for pair in pairs] for step, pairs in self.pending.items()}

    def load_state_dict(self, state: dict) -> None:
        self.pending = {step: [Pair(*fields) for fields in pairs] for step, pairs in state.items()}


def steps_at_once(s: Settings, world, ema) -> int:
    """How many steps' segments are generated in one go: those until the EMA model's refresh (two,
    with --ema_every 2), as far as --generate_batch has room.

    ema: None where the policy writes, which changes at every step.
    """
    if ema is None:
        return 1
    room = s.generate_batch // (s.batch_size // world.size * s.num_rejected)
    # Also beyond the last step, for a run that is extended later.
    return min(ema.steps_until_refresh(), max(1, room))


def minibatch(s: Settings, examples: Examples, step: int, world) -> list[TokenizedExample]:
    """Algorithm 1 line 6: this process's share of a step's mini-batch."""
    order = example_order(s, len(examples), range(step, step + 1))
    return [examples[i] for i in order[world.rank::world.size]]


def example_order(s: Settings, count: int, steps: range) -> list[int]:
    """Which of `count` examples these steps train on, in order; each epoch is a fresh permutation.

    Depends on the seed and the step alone, so that a resumed run and a run on more processes see
    the same batches.
    """
    places = range((steps.start - 1) * s.batch_size, (steps.stop - 1) * s.batch_size)
    epochs = {epoch: np.random.default_rng([ORDER, s.seed, epoch]).permutation(count)
              for epoch in {place // count for place in places}}
    return [int(epochs[place // count][place % count]) for place in places]


class ColumnSource(PairSource):
    """--rejected data: the rejected response is the row's own. --loss sft: there is none."""

    def __init__(self, s: Settings, world, loaded):
        super().__init__()
        self.s, self.world, self.examples = s, world, loaded.examples

    def make(self, step: int) -> dict[int, list[Pair]]:
        make = sft_pair if self.s.loss == "sft" else column_pair
        return {step: [make(example)._replace(step=step)
                       for example in minibatch(self.s, self.examples, step, self.world)]}


class SpinSource(PairSource):
    """SPIN: at the start of each round the policy is frozen and answers all prompts of the round.

    The frozen policy is the reference, too, and the optimizer starts afresh.
    """

    def __init__(self, s: Settings, world, loaded, rewriter: Callable, policy, reference,
                 optimizer):
        """rewriter(model, examples, rngs, num_rejected, generator): a list of pairs per example."""
        super().__init__()
        self.s, self.world, self.rewriter = s, world, rewriter
        self.examples, self.total_steps = loaded.examples, loaded.steps
        self.policy, self.reference, self.optimizer = policy, reference, optimizer

    def make(self, step: int) -> dict[int, list[Pair]]:
        """The pairs of a whole round."""
        s, steps = self.s, range(step, spin_round(self.s, step, self.total_steps)[1].stop)
        self.reference.load_state_dict(self.policy.state_dict())
        self.optimizer.state.clear()
        # One process answers a prompt, once, for all processes and all epochs of the round.
        used = sorted(set(example_order(s, len(self.examples), steps)))
        share = [self.examples[i] for i in used[self.world.rank::self.world.size]]
        rngs = [np.random.default_rng([ANSWER, s.seed, steps.start, e.example_id]) for e in share]
        generator = torch_generator(self.world, [ANSWER, s.seed, steps.start])
        pairs = self.rewriter(self.reference, share, rngs, s.num_rejected, generator)
        answers = {few[0].example_id: few for part in self.world.gather(pairs) for few in part}
        return {step: [pair._replace(step=step)
                       for example in minibatch(s, self.examples, step, self.world)
                       for pair in answers[example.example_id]]
                for step in steps}


def baseline_source(s: Settings, world, loaded, rewriter: Callable, policy, reference,
                    optimizer) -> PairSource:
    """The source of pairs of a method whose y- is not a rewritten segment."""
    if s.generates:
        return SpinSource(s, world, loaded, rewriter, policy, reference, optimizer)
    return ColumnSource(s, world, loaded)


def torch_generator(world, seed: list[int]) -> torch.Generator:
    """A generator seeded with these numbers and the rank: no random state has to be kept."""
    seed = int(np.random.default_rng([*seed, world.rank]).integers(2 ** 63))
    return torch.Generator(world.device).manual_seed(seed)


def column_pair(example: TokenizedExample) -> Pair:
    """The pair that a row brings: its rejected response, split where it leaves the chosen one."""
    chosen, rejected = example.chosen, example.rejected or example.chosen
    start = 0
    while start < min(len(chosen), len(rejected)) and chosen[start] == rejected[start]:
        start += 1
    return Pair(example.prompt, chosen, rejected, start, example_id=example.example_id)


def sft_pair(example: TokenizedExample) -> Pair:
    """The chosen response on both sides: the branches are empty, so it is scored once."""
    return Pair(example.prompt, example.chosen, example.chosen, len(example.chosen),
                example_id=example.example_id)
