"""Train a language model with SAPO (Self-Augmented Preference Optimization, arXiv 2405.20830).

    torchrun train.py                                       the demo: a small model, on a CPU
    torchrun train.py --model DIR --data FILE.jsonl         your model, your prompts and responses
    torchrun --nproc_per_node 8 train.py @recipes/FILE.txt  eight processes, settings from a file
    python train.py --help                                  every setting

This file is Algorithm 1 of the paper and the set-up it needs; line numbers in comments are the
algorithm's. The code departs from the algorithm in three places:
- in line 9 the EMA model sees x and A only: B would give it the text that it has to replace;
- where B' holds an end token, the response ends there and C is dropped (Eq. 5 keeps C);
- line 17 happens every --ema_every optimizer steps, as the paper's Section 5.1 says. The EMA model
  is constant until then, so the pairs of all steps until then are made in one batch.
For choices that the paper does not specify, see the README's table "Paper, authors' code, this
code". The baselines (ORPO, DPO, SFT, SPIN, on-policy) are settings of the same loop. support/ has
the rest: data, checkpoints, reports, several processes.
"""
import support.threads  # noqa: F401  (before torch: how its threads wait, docs/speed.md)

# isort: split
import functools
import math
import sys

import numpy as np
import torch

from buffer import ReplayBuffer
from ema import EMA
from losses import dpo_loss, orpo_loss
from sapo import Example, Pair, check_generation, find_shortcuts, make_pairs
from support import cli
from support.errors import UserError
from support.evaluate import Evaluation, new_tokens
from support.generating import GeneratingModels
from support.models import checkpoint_layers, end_token_ids, load_model, load_reference
from support.optim import make_optimizer, optimizer_step, schedule
from support.pair_sources import (
    DRAW,
    REWRITE,
    ColumnSource,
    PendingPairs,
    SpinSource,
    minibatch,
    steps_to_sample,
    torch_generator,
)
from support.parallel import World, batches
from support.plan import micro_batch_for
from support.run import Run
from support.settings import Settings
from support.signals import Stop
from support.tokenize_rows import RowTokenizer, load_data


def rewrite(s: Settings, generating: GeneratingModels, eos_ids: list[int], model, examples: list,
            rngs: list[np.random.Generator], num_rejected: int,
            generator: torch.Generator) -> list[list[Pair]]:
    """Algorithm 1 lines 7 to 10: `model` rewrites a segment of each chosen response.

    rngs: one per example, to draw where its segment lies. Returns num_rejected pairs per example.
    """
    by_length = sorted(range(len(examples)),
                       key=lambda i: len(examples[i].prompt) + len(examples[i].chosen))
    pairs = {}
    with generating(model) as (full_model, decode_step):
        for batch in batches(by_length, max(1, s.generate_batch // num_rejected)):
            new_pairs = make_pairs(
                full_model,
                [Example(examples[i].prompt, examples[i].chosen, examples[i].example_id)
                 for i in batch],
                s.segment_len, [rngs[i] for i in batch], eos_token_id=eos_ids,
                num_rejected=num_rejected,
                max_new_tokens=new_tokens(s, [examples[i] for i in batch]),
                segment_eos=s.segment_eos, tail=s.tail, temperature=s.temperature, top_k=s.top_k,
                top_p=s.top_p, generator=generator, decode_step=decode_step)
            pairs |= zip(batch, batches(new_pairs, num_rejected), strict=True)
    return [pairs[i] for i in range(len(examples))]


def sample_pairs(s: Settings, world: World, rewrite_with, model, examples, steps: range) -> dict:
    """Algorithm 1 lines 6 to 10 for several steps at once: {step: its pairs}.

    model: the EMA model, or with --rejected policy the policy. rewrite_with: `rewrite` with its
    first three arguments.
    """
    work = [(step, example) for step in steps
            for example in minibatch(s, examples, step, world)]                     # line 6
    rngs = [np.random.default_rng([REWRITE, s.seed, step, example.example_id])
            for step, example in work]
    rewrites = rewrite_with(model, [example for _, example in work], rngs, s.num_rejected,
                            torch_generator(world, [REWRITE, s.seed, steps.start])) # lines 7 to 10
    pairs = {step: [] for step in steps}
    for (step, _), new_pairs in zip(work, rewrites, strict=True):
        pairs[step] += [pair._replace(step=step) for pair in new_pairs]
    return pairs


def compute_loss(s: Settings, scorer, reference_scorer, pairs: list[Pair], beta: float):
    """Algorithm 1 line 15: the losses of a micro-batch and what is logged of it, (B,) each."""
    # DPO: sums, without A. ORPO and SFT: means per token.
    how = {"average": s.loss != "dpo", "skip_shared": s.loss == "dpo", "nll_on": s.nll_on}
    policy = scorer(pairs, **how)
    metrics = {"nll": policy.chosen_nll, "chosen_logps": policy.chosen_logps}
    if s.loss == "sft":
        return policy.chosen_nll, metrics | {"loss": policy.chosen_nll}
    if s.loss == "orpo":
        losses, chosen_rewards, rejected_rewards = orpo_loss(
            policy.chosen_logps, policy.rejected_logps, policy.chosen_nll, s.lam)
    else:
        with torch.no_grad():
            reference = reference_scorer(pairs, **how)
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            policy.chosen_logps, policy.rejected_logps, reference.chosen_logps,
            reference.rejected_logps, beta, s.label_smoothing)
        # Without A, nothing is scored of a chosen response that is a prefix of the rejected one.
        scored = [pair.start < len(pair.chosen) or s.nll_on == "prompt" for pair in pairs]
        metrics["nll"] = policy.chosen_nll[scored]
    margin = chosen_rewards - rejected_rewards
    # The margin of an identical pair is 0 up to rounding: its sign would be noise.
    differ = [pair.chosen != pair.rejected for pair in pairs]
    return losses, metrics | {
        "loss": losses, "rejected_logps": policy.rejected_logps, "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards, "margin": margin,
        "reward_accuracy": (margin > 0).float()[differ]}


def backward(s: Settings, world: World, scorer, reference_scorer, pairs: list[Pair],
             beta: float) -> tuple[dict[str, float], list[int]]:
    """Gradients of the mean loss over all processes' pairs, a micro-batch at a time.

    Returns the means of what is logged, and the rows whose loss is not finite.
    """
    sums: dict[str, tuple[float, int]] = {}
    nonfinite_rows = []
    for micro_batch, weight in world.micro_batches(scorer, pairs, s.micro_batch):
        with world.precision():
            losses, metrics = compute_loss(s, scorer, reference_scorer, micro_batch, beta)
        (weight * losses.sum()).backward()
        if not weight:                  # scored for another process's sake
            continue
        for name, values in metrics.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = total + float(values.detach().sum()), count + len(values)
        nonfinite_rows += [pair.example_id
                           for pair, loss in zip(micro_batch, losses.tolist(), strict=True)
                           if not math.isfinite(loss)]
    return world.means(sums), nonfinite_rows


def train(s: Settings, stop: Stop | None = None) -> None:
    """One run. stop: tells when a signal asked for an end."""
    world = World(s.threads, s.shard, s.dtype)
    if s.batch_size % world.size or s.buffer_size % world.size:
        raise UserError(f"--batch_size {s.batch_size} and --buffer_size {s.buffer_size} must "
                        f"divide evenly among {world.size} processes")
    with Run(s, world, stop or Stop()) as run:
        if not run.finished:
            train_policy(s, world, run)


def train_policy(s: Settings, world: World, run: Run) -> None:
    """Set up, Algorithm 1, save."""
    model, tokenizer = world.run_on_each(lambda: load_model(s, world))
    reference = (world.run_on_each(lambda: load_reference(s, world, model, tokenizer))
                 if s.ref_model else model)
    row_tokenizer = RowTokenizer.from_settings(s, tokenizer, model)
    examples, eval_examples = world.run_on_each(lambda: load_data(s, row_tokenizer, world.say))
    eos_ids = world.run_on_rank0(lambda: end_token_ids(model, tokenizer, row_tokenizer.turn_end))
    steps = s.steps or math.ceil(s.epochs * len(examples) / s.batch_size) * s.iterations
    try:
        shortcuts = reference_shortcuts = world.run_on_rank0(lambda: find_shortcuts(model))
        world.run_on_rank0(lambda: check_generation(model))
    except ValueError as error:
        raise UserError(f"--model {s.model}: {error}") from None
    if s.ref_model:
        reference_shortcuts = world.run_on_rank0(lambda: find_shortcuts(reference))
    s.micro_batch = micro_batch_for(s, model.get_input_embeddings().num_embeddings,
                                    shortcuts.split_head and reference_shortcuts.split_head)

    policy = world.prepare(model)       # the model itself, or a sharded copy         line 1
    buffer = (ReplayBuffer(s.buffer_size // world.size, seed=[DRAW, s.seed, world.rank])
              if s.buffer_size else None)                                           # line 2
    needs_ema = (s.generates and s.rejected == "ema") or s.ref == "ema"
    ema = (EMA(policy, s.ema_decay, s.ema_every, copy=world.frozen_copy(model))
           if needs_ema else None)                                                  # line 3
    spin = s.generates and s.rejected == "spin"
    # DPO's reference: fixed (the start or --ref_model), or refreshed from the policy or the EMA
    # model (--ref). In SPIN it is the policy at the start of the round, which also writes the
    # rejected responses.
    frozen = (world.frozen_copy(reference, in_place=bool(s.ref_model))
              if s.ref or spin else None)
    reference_scorer = world.scorer(frozen, reference_shortcuts) if s.loss == "dpo" else None
    if s.grad_checkpoint:
        checkpoint_layers(policy)
    scorer = world.wrap(world.scorer(policy, shortcuts, s.compile))
    optimizer = make_optimizer(s, policy)

    generating = GeneratingModels(model, world)
    rewrite_with = functools.partial(rewrite, s, generating, eos_ids)
    # new_pairs_of: a range of steps -> {step: this process's pairs}
    if s.generates and not spin:
        new_pairs_of = functools.partial(sample_pairs, s, world, rewrite_with,
                                         ema.model if s.rejected == "ema" else policy, examples)
    elif s.generates:
        new_pairs_of = SpinSource(s, world, examples, policy, frozen, optimizer, rewrite_with)
    else:
        new_pairs_of = ColumnSource(s, world, examples)
    pending = PendingPairs()                    # step -> pairs that were made and not yet used
    evaluate = Evaluation(s, world, tokenizer, eos_ids, eval_examples, policy, generating,
                          shortcuts, rewrite_with)
    run.open(steps, evaluate, model, tokenizer, eos_ids, examples, eval_examples,
             {"policy": policy, "optimizer": optimizer, "ema": ema, "frozen": frozen},
             {"buffer": buffer, "pending": pending})

    for step in range(run.step + 1, steps + 1):                                     # line 4
        # Sampling stage
        if step not in pending:         # mostly of several steps, see above
            pending |= new_pairs_of(steps_to_sample(s, world, ema, step, steps))    # lines 6 to 10
        new_pairs = pending.pop(step)
        kept_pairs = [pair for pair in new_pairs
                      if not (s.skip_identical and pair.chosen == pair.rejected)]
        if buffer is None:
            batch = kept_pairs
        else:
            for pair in kept_pairs:
                buffer.add(pair)                                                    # line 11
            batch = buffer.sample(min(s.batch_size // world.size, len(buffer)))     # line 14
        run.lap("generate")

        # Training stage
        lr, beta = schedule(s, step, steps)
        metrics, nonfinite_rows = backward(                                         # line 15
            s, world, scorer, reference_scorer, batch, beta)
        run.lap("score")
        took_step = optimizer_step(s, world, policy, optimizer, lr, metrics)        # line 16
        if took_step and ema is not None:
            ema.update(policy)                                                      # line 17
        if s.ref in ("policy", "ema") and step % s.ref_every == 0:      # DPO's reference, Table 4
            frozen.load_state_dict((ema.model if s.ref == "ema" else policy).state_dict())
        run.lap("update")
        run.after_step(step, metrics, took_step, nonfinite_rows, new_pairs, batch)
    run.close(policy)


if __name__ == "__main__":
    sys.exit(cli.main(train, sys.argv[1:]))
