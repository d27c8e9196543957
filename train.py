"""Train a language model with SAPO (Self-Augmented Preference Optimization, arXiv 2405.20830).

    torchrun train.py                                       the demo: a small model, on a CPU
    torchrun train.py --model DIR --data FILE.jsonl         your model, your prompts and responses
    torchrun --nproc_per_node 8 train.py @recipes/FILE.txt  eight processes, settings from a file
    python train.py --help                                  every setting

This file is Algorithm 1 of the paper, and the comments carry its line numbers:

     1, 2, 3  the policy; an empty replay buffer; the EMA model, a copy of the policy
     4        for each optimizer step:
     6            draw a mini-batch of prompts x and chosen responses y+
     7            for each of them:
     8                choose a segment B of y+ = A B C
     9                the EMA model writes B' after x and A                            [1]
    10                y- = A B' C                                                      [2]
    11                store (x, y+, y-) in the buffer
    14            draw a mini-batch of pairs from the buffer
    15            compute the loss of DPO (Eq. 1) or of ORPO (Eq. 3)
    16            update the policy
    17            EMA model <- decay * EMA model + (1 - decay) * policy                [3]

(Lines without content are left out.) This code departs from the printed algorithm in four places.
[1] The paper writes "A and B": B would give the model the text that it has to replace.
[2] Where B' holds an end token, the response ends there and C is dropped.
[3] The EMA model changes every --ema_every steps only, as Section 5.1 says. It is constant until
    then, so the pairs of these steps are made in one batch.
[4] With DPO the reference is renewed every --ref_every steps, as Section 5.3 says.
For choices that the paper leaves open see the README's table "Paper, authors' code, this code".

The baselines (ORPO, DPO, SFT, SPIN, on-policy) are settings of the same loop. First reading: to the
double line. Second reading, after it: lines 6 to 10 in larger batches. support/ has what is not the
method: loading, checkpoints, reports, several processes.
"""
import support.threads  # noqa: F401  (before torch: how its threads wait, docs/speed.md)

# isort: split
import sys

import numpy as np
import torch

from buffer import ReplayBuffer
from ema import EMA
from losses import dpo_loss, orpo_loss
from sapo import Example, Pair, make_pairs
from support import cli, pair_sources
from support.errors import UserError
from support.evaluate import Evaluation, new_tokens
from support.generating import GeneratingModels, batches_by_length
from support.loading import Loaded, load, make_reference
from support.metrics import LossMetrics
from support.models import checkpoint_layers
from support.optim import make_optimizer, optimizer_step, schedule
from support.parallel import World, batches
from support.run import Run
from support.settings import Settings
from support.signals import Stop


def train_policy(s: Settings, world: World, run: Run) -> None:
    """Set up, Algorithm 1, save.

    s: the settings. world: the processes, one unless torchrun starts more. run: the run's folder
    with its checkpoints and reports. s.loss is "orpo" or "dpo"; s.rejected says which method it is:

                          s.rejected   y- is written by                            buffer
        SAPO              "ema"        the EMA model                               s.buffer_size
        on-policy         "policy"     the policy                                  s.buffer_size
        SPIN              "spin"       the policy as it was when the round began   none (size 0)
        plain ORPO, DPO   "data"       the author of the data                      none

    SFT is s.loss "sft", which has neither y- nor a buffer. DPO's reference, by s.ref:

        "ema", "policy"     a copy of that model, renewed every s.ref_every steps (the paper: "ema")
        "fixed"             the model that training starts from
        None                in SPIN the model that writes y-; ORPO and SFT have no reference
    """
    loaded = load(s, world)         # .model, .examples, .steps (how many to take), .shortcuts

    # On one device prepare and wrap return what they are given, and sharded_copy None. On several
    # devices `world` wraps the scorer in DDP, or shards the models.
    policy = world.prepare(loaded.model)                                            # line 1
    buffer = ema = None
    if s.buffer_size:
        # DRAW: a number that keeps this use of the seed apart from others.
        buffer = ReplayBuffer(s.buffer_size // world.size,                          # line 2
                              seed=[pair_sources.DRAW, s.seed, world.rank])
    if s.needs_ema:         # s.rejected or s.ref is "ema"
        ema = EMA(policy, s.ema_decay, s.ema_every,                                 # line 3
                  model_copy=world.sharded_copy(loaded.model))
    # reference_scorer(pairs, ...) is pair_logps(reference, pairs, ...). Both are None with ORPO and
    # SFT; in SPIN-ORPO `reference` alone is there, because in SPIN that model writes y-.
    reference, reference_scorer = make_reference(s, world, loaded)
    if s.grad_checkpoint:
        checkpoint_layers(policy)       # computes activations again in backward, for less memory
    # scorer(pairs, ...) is pair_logps(policy, pairs, ...)
    scorer = world.wrap(world.scorer(policy, loaded.shortcuts, s.compile))
    optimizer = make_optimizer(s, policy)

    rewriter = Rewriter(s, world, loaded)       # make_pairs, in batches of like lengths
    # source.pairs_of(step): the new pairs of a step. (SPIN's starts its rounds, too: reference and
    # optimizer are renewed.)
    source = make_source(s, world, loaded, rewriter, policy, ema, reference, optimizer)
    evaluate = Evaluation(s, world, loaded, policy, rewriter)
    # Restores the newest checkpoint where there is one (run.step, weights, buffer and all else),
    # and evaluates the start.
    run.open(loaded, evaluate,
             replicated_state={"policy": policy, "optimizer": optimizer, "ema": ema,
                               "reference": reference},
             per_rank_state={"buffer": buffer, "pending": source})      # pairs made ahead

    # ----------------------------------------------------------------------------- Algorithm 1
    for step in range(run.step + 1, loaded.steps + 1):                              # line 4
        # Sampling stage. What pairs_of comes to in SAPO, one step at a time and on one device:
        #     minibatch = the next s.batch_size rows, shuffled anew in every epoch        # line 6
        #     make_pairs(ema.model, minibatch, s.segment_len, ...)                # lines 7 to 10
        new_pairs = source.pairs_of(step)                                           # lines 6 to 10
        kept = new_pairs
        if s.skip_identical:
            kept = [pair for pair in new_pairs if pair.chosen != pair.rejected]
        if buffer is None:
            batch = kept
        else:
            for pair in kept:
                buffer.add(pair)                                                    # line 11
            batch = buffer.sample(min(s.batch_size // world.size, len(buffer)))     # line 14
        run.lap("generate")

        # Training stage
        lr, beta = schedule(s, step, loaded.steps)      # beta: in SPIN one per round
        metrics, nonfinite_rows = backward(                                         # line 15
            s, world, scorer, reference_scorer, batch, beta)
        run.lap("score")
        # Clips the gradient, steps, and clears it. False: a loss or the gradient is not finite, or
        # no process had a pair to learn from.
        took_step = optimizer_step(s, world, policy, optimizer, lr, metrics)        # line 16
        if took_step and ema is not None:
            ema.update(policy)                                                      # line 17
        if s.ref in ("policy", "ema") and step % s.ref_every == 0:
            followed = ema.model if s.ref == "ema" else policy                      # [4]
            reference.load_state_dict(followed.state_dict())
        run.lap("update")
        # Logs, evaluates and saves; raises Stopped after a signal.
        run.after_step(step, metrics, took_step, nonfinite_rows, new_pairs, batch)
    run.close(policy)


# ------------------------------------------------------------------------------ line 15: the loss

def backward(s: Settings, world: World, scorer, reference_scorer, pairs: list[Pair],
             beta: float) -> tuple[dict[str, float], list[int]]:
    """Gradients of the mean loss over all processes' pairs, a micro-batch at a time.

    Returns the means of what is logged, and the rows whose loss is not finite.
    """
    metrics = LossMetrics(s)
    # On one device weight = 1 / len(pairs), so that the micro-batches add up to the mean.
    for micro_batch, weight in world.micro_batches(scorer, pairs, s.micro_batch):
        with world.precision():
            losses, policy_logps, rewards = compute_loss(
                s, scorer, reference_scorer, micro_batch, beta)
        (weight * losses.sum()).backward()
        if weight:          # 0: a call that only keeps this process in step with others
            metrics.add(micro_batch, losses, policy_logps, rewards)
    return world.means(metrics.sums), metrics.nonfinite_rows


def compute_loss(s: Settings, scorer, reference_scorer, pairs: list[Pair], beta: float):
    """Line 15: losses (pairs,), the policy's PairLogps, and the rewards of y+ and y-."""
    # DPO: sums, without A. ORPO: means per token.
    how = {"skip_shared": True} if s.loss == "dpo" else {"average": True}
    policy_logps = scorer(pairs, nll_on=s.nll_on, **how)
    chosen_logps, rejected_logps, chosen_nll = policy_logps
    if s.loss == "sft":
        return chosen_nll, policy_logps, None
    if s.loss == "orpo":
        losses, *rewards = orpo_loss(chosen_logps, rejected_logps, chosen_nll, s.lam)
    else:
        with torch.no_grad():
            reference_chosen, reference_rejected, _ = reference_scorer(pairs, **how)
        losses, *rewards = dpo_loss(chosen_logps, rejected_logps, reference_chosen,
                                    reference_rejected, beta, s.label_smoothing)
    return losses, policy_logps, rewards


# =================================================================================================
# The first reading ends here. What follows makes larger batches of lines 6 to 10:
#
#     pairs_of                (of PairSource, support/pair_sources.py) hands out pairs of a step,
#                             and calls `make` where there are none yet
#     SegmentSource.make      the mini-batches of all steps until the EMA model changes, as one list
#     Rewriter                cuts the list into batches of like lengths, and calls make_pairs
# =================================================================================================

def make_source(s: Settings, world: World, loaded: Loaded, rewriter: "Rewriter", policy,
                ema: EMA | None, reference, optimizer) -> pair_sources.PairSource:
    """Where the method gets its pairs from."""
    if s.generates and s.rejected == "ema":
        return SegmentSource(s, world, loaded, rewriter, ema.model, ema)
    if s.generates and s.rejected == "policy":
        return SegmentSource(s, world, loaded, rewriter, policy, ema=None)
    return pair_sources.baseline_source(s, world, loaded, rewriter, policy, reference, optimizer)


class Rewriter:
    """A model rewrites a segment of each of many chosen responses.

    tokens_written: the tokens of B' so far.
    """

    def __init__(self, s: Settings, world: World, loaded: Loaded):
        self.s, self.eos_ids, self.tokens_written = s, loaded.eos_ids, 0
        self.generating = GeneratingModels(loaded.model, world)

    def __call__(self, model, examples: list, rngs: list[np.random.Generator], num_rejected: int,
                 generator: torch.Generator) -> list[list[Pair]]:
        """num_rejected pairs per example, in the order of the examples.

        model: the one that writes. examples: rows of the data with prompt, chosen and example_id.
        rngs: one per example, to draw where its segment lies. generator: draws the tokens.
        """
        s = self.s
        by_place: dict[int, list[Pair]] = {}        # place in `examples` -> its pairs
        lengths = [len(e.prompt) + len(e.chosen) for e in examples]
        # full_model: all weights, where `model` is sharded. decode_step: a faster one, or None.
        with self.generating(model) as (full_model, decode_step):
            for places in batches_by_length(lengths, s.generate_batch // num_rejected):
                few = [examples[i] for i in places]
                pairs = make_pairs(                                                 # lines 7 to 10
                    full_model, [Example(e.prompt, e.chosen, e.example_id) for e in few],
                    s.segment_len, [rngs[i] for i in places], eos_token_id=self.eos_ids,
                    num_rejected=num_rejected, tail=s.tail, segment_eos=s.segment_eos,
                    max_new_tokens=new_tokens(s, few), temperature=s.temperature, top_k=s.top_k,
                    top_p=s.top_p, generator=generator, decode_step=decode_step)
                for i, rewrites in zip(places, batches(pairs, num_rejected), strict=True):
                    by_place[i] = rewrites
                self.tokens_written += sum(pair.rejected_stop - pair.start for pair in pairs)
        return [by_place[i] for i in range(len(examples))]


class SegmentSource(pair_sources.PairSource):
    """The pairs of SAPO, or of on-policy training.

    writer: the EMA model, or the policy.
    ema: tells when the writer changes; None where that is at every step.
    """

    def __init__(self, s: Settings, world: World, loaded: Loaded, rewriter: Rewriter, writer,
                 ema: EMA | None):
        super().__init__()
        self.s, self.world, self.examples = s, world, loaded.examples
        self.rewriter, self.writer, self.ema = rewriter, writer, ema

    def make(self, first_step: int) -> dict[int, list[Pair]]:
        """{step: its pairs}, for this step and for those whose pairs can be made along with it.

        The EMA model is constant until its next refresh, so the pairs of all steps until then are
        made at once, in larger batches. A mini-batch is this process's share of the next
        --batch_size rows; the rows are shuffled anew in every epoch.
        """
        s, world = self.s, self.world
        steps = range(first_step, first_step + pair_sources.steps_at_once(s, world, self.ema))
        work = [(step, example) for step in steps
                for example in pair_sources.minibatch(s, self.examples, step, world)]   # line 6
        # Where a segment lies depends on its step and row, not on the number of processes. Which
        # tokens are drawn does.
        rngs = [np.random.default_rng([pair_sources.REWRITE, s.seed, step, example.example_id])
                for step, example in work]
        generator = pair_sources.torch_generator(world, [pair_sources.REWRITE, s.seed, first_step])
        rewrites = self.rewriter(
            self.writer, [example for _, example in work], rngs, s.num_rejected, generator)
        by_step = {step: [] for step in steps}
        for (step, _), pairs in zip(work, rewrites, strict=True):
            by_step[step] += [pair._replace(step=step) for pair in pairs]
        return by_step


# -------------------------------------------------------------------------------------------- run

def train(s: Settings, stop: Stop | None = None) -> None:
    """One run. stop: tells when a signal asked for an end."""
    world = World(s.threads, s.shard, s.dtype)
    if s.batch_size % world.size or s.buffer_size % world.size:
        raise UserError(f"--batch_size {s.batch_size} and --buffer_size {s.buffer_size} must "
                        f"divide evenly among {world.size} processes")
    with Run(s, world, stop or Stop()) as run:
        if not run.finished:
            train_policy(s, world, run)


if __name__ == "__main__":
    sys.exit(cli.main(train, sys.argv[1:]))
