"""Train a language model with SAPO (Self-Augmented Preference Optimization, arXiv 2405.20830).

    torchrun train.py                                               the demo: a small model on embedded data, CPU, minutes
    torchrun train.py --model DIR --data FILE.jsonl                 your model, your prompts and chosen responses
    torchrun --nproc_per_node 8 train.py @recipes/FILE.txt          eight processes, settings from a file
    python train.py --help                                          every setting

This file is Algorithm 1 of the paper and the set-up it needs; the line numbers in `train` are the algorithm's. It
departs from it in two places: line 9 gives the EMA model x and A (giving it B too would show it what it is to rewrite),
and line 17 happens every --ema_every optimizer steps, as the paper's Section 5.1 says. What the paper leaves open is in
the README's last table. The baselines (ORPO, DPO, SFT, SPIN, on-policy) are settings of the same loop.
"""
import bisect
import contextlib
import functools
import math
import os
import sys

import numpy as np
import torch
from torch import nn

from buffer import ReplayBuffer
from ema import EMA
from losses import dpo_loss, orpo_loss
from sapo import Pair, check_generation, pair_logps, probe
from support.checkpoint import changed, finished, newest, new_run_folder, read_checkpoint, take_up, to_go_on_from, write_checkpoint
from support.evaluate import Evaluation, batches, column_pair, write_pairs
from support.models import checkpoint_layers, end_token_ids, load_model, model_card, save_model
from support.parallel import Stop, World, leave, lost_process, out_of_memory
from support.plan import plan
from support.report import Clock, Report, header
from support.tokenize_rows import Tokenize, load_data
from support.shard import Whole
from support.errors import RowFailed, RunFailed, Stopped, UserError
from support.settings import Settings, as_saved, parse, run_folder

ORDER, REWRITE, ANSWER, DRAW = 1, 2, 3, 4       # random streams, so that no two uses of one seed share their numbers


class Scorer(nn.Module):
    """Scores pairs with the policy. A module of its own, because DDP synchronises gradients only of what it wraps."""

    def __init__(self, policy: nn.Module, compiled: bool = False):
        super().__init__()
        self.policy, self.compiled = policy, compiled
        self.score = getattr(policy, "score", functools.partial(pair_logps, policy))        # a sharded model brings its own
        if compiled:        # for this module's calls alone: what generates or evaluates would compile again and again
            policy.base_model.compile(dynamic=True)
            torch.compiler.set_stance("force_eager")

    def forward(self, pairs: list[Pair], **how):
        with torch.compiler.set_stance("default") if self.compiled else contextlib.nullcontext():
            return self.score(pairs, **how)


def pair_losses(s: Settings, logps, reference_logps, beta: float):
    """Losses and rewards of scored pairs, (B,) each. logps: what pair_logps gave for the policy (and the reference)."""
    chosen_logps, rejected_logps, chosen_nll = logps
    if s.loss == "sft":
        return chosen_nll, chosen_logps.detach(), chosen_logps.detach()
    if s.loss == "orpo":
        return orpo_loss(chosen_logps, rejected_logps, chosen_nll, s.lam)
    return dpo_loss(chosen_logps, rejected_logps, *reference_logps[:2], beta, s.label_smoothing)


def learn(s: Settings, world: World, scorer, reference, pairs: list[Pair], beta: float) -> tuple[dict, list[int]]:
    """Algorithm 1 line 15: gradients of the mean loss over all processes' pairs.

    Returns the means of what was seen, and the rows of this process's pairs whose loss is not finite.
    """
    how = {"average": s.loss != "dpo", "skip_shared": s.loss == "dpo", "nll_on": s.nll_on}
    total, = world.sum([len(pairs)])
    tallies, suspects = {}, []                                          # tallies: name -> (sum, count)
    micro = batches(sorted(pairs, key=pair_length), s.micro_batch)      # alike lengths together: less padding
    rounds = world.most(len(micro))
    for i in range(rounds):
        chunk, counts = micro[min(i, len(micro) - 1)], i < len(micro)
        with world.accumulate(scorer, last=i + 1 == rounds):
            with world.precision():
                logps = scorer(chunk, **how)
                with torch.no_grad():
                    reference_logps = reference(chunk, **how) if reference is not None else None
            losses, chosen_rewards, rejected_rewards = pair_losses(s, logps, reference_logps, beta)
            # DDP and FSDP average over processes; the mean is over pairs.
            (losses.sum() * counts * world.size / total).backward()
        if not counts:          # called only because another process has more to score
            continue
        suspects += [pair.row for pair, loss in zip(chunk, losses.tolist()) if not math.isfinite(loss)]
        seen = {"loss": losses, "nll": logps[2], "chosen_logps": logps[0]}
        if s.loss != "sft":
            margin = chosen_rewards - rejected_rewards
            differ = [pair.chosen != pair.rejected for pair in chunk]   # of an identical pair the margin's sign is noise
            seen |= {"rejected_logps": logps[1], "chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards,
                     "margin": margin, "reward_accuracy": (margin > 0).float()[differ]}
        for name, values in seen.items():
            before = tallies.get(name, (0.0, 0))
            tallies[name] = (before[0] + float(values.detach().sum()), before[1] + len(values))
    return world.means(tallies), suspects


def pair_length(pair: Pair) -> int:
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def learning_rate(s: Settings, step: int, steps: int, peak: float) -> float:
    """Learning rate of optimizer step 1..steps: linear warm-up to the peak, then the schedule."""
    warmup = s.warmup * steps if s.warmup < 1 else s.warmup
    if step <= warmup:
        return peak * step / warmup
    if s.schedule == "constant":
        return peak
    if s.schedule == "inverse_sqrt":
        return peak * math.sqrt(max(1, warmup) / step)
    done = (step - warmup) / max(1, steps - warmup + 1)
    return peak * ((1 + math.cos(math.pi * done)) / 2 if s.schedule == "cosine" else 1 - done)


def make_optimizer(s: Settings, policy: nn.Module):
    """AdamW or RMSprop; weight decay on matrices only."""
    matrices = [p for p in policy.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in policy.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if s.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=s.lr[0], foreach=False)       # all at once, it would hold another copy of the model
    return torch.optim.AdamW(groups, lr=s.lr[0], fused=True)


def rows_of_step(s: Settings, rows: list, step: int, world: World) -> list:
    """Algorithm 1 line 6: this process's share of the step's mini-batch."""
    return [rows[i] for i in order_of_rows(s, len(rows), range(step, step + 1))[world.rank::world.size]]


def order_of_rows(s: Settings, count: int, steps: range) -> list[int]:
    """Which of `count` rows these steps train on, in order; each epoch is a fresh permutation of the data.

    Depends on the seed and the step alone, so a resumed run and one on more processes see the same batches.
    """
    places = range((steps.start - 1) * s.batch_size, (steps.stop - 1) * s.batch_size)
    epochs = {epoch: np.random.default_rng([ORDER, s.seed, epoch]).permutation(count) for epoch in {place // count for place in places}}
    return [int(epochs[place // count][place % count]) for place in places]


class Writer:
    """Algorithm 1 lines 6 to 10: makes the pairs of a step, as --rejected says.

    ema, policy: `model` rewrites segments as training goes on. iteration (SPIN): it does so once for all rows of an
    iteration, at its start. data: the rejected response is the row's own. With --loss sft there is none.
    """

    def __init__(self, s: Settings, world: World, model, whole: Whole, ema: EMA | None, ends: list[int], rows: list):
        self.s, self.world, self.model, self.whole, self.ema, self.ends, self.rows = s, world, model, whole, ema, ends, rows
        self.answers = {}       # SPIN: row number -> its pairs
        self.ready = {}         # step -> its pairs, written ahead

    def start_iteration(self, number: int, steps: range) -> None:
        """SPIN: answer each prompt that these steps come to, with the model as it is now; each process a share, for all."""
        used = sorted(set(order_of_rows(self.s, len(self.rows), steps)))
        mine = [self.rows[i] for i in used[self.world.rank::self.world.size]]
        pairs = self._generate(mine, [[ANSWER, self.s.seed, number, row.number] for row in mine])
        self.answers = {}
        for pair in (pair for part in self.world.gather(pairs) for pair in part):
            self.answers.setdefault(pair.row, []).append(pair)

    def __call__(self, step: int) -> list[Pair]:
        if self.s.generates and self.s.rejected != "iteration":
            if step not in self.ready:
                self._write_ahead(step)
            return self.ready.pop(step)
        rows = rows_of_step(self.s, self.rows, step, self.world)
        if self.s.loss == "sft":
            return [Pair(row.prompt, row.chosen, row.chosen, len(row.chosen), row.number, step) for row in rows]
        if self.s.rejected == "data":
            return [column_pair(row)._replace(step=step) for row in rows]
        return [pair._replace(step=step) for row in rows for pair in self.answers[row.number]]

    def state_dict(self) -> dict:
        """What was written and not yet used; pairs as plain tuples."""
        return {name: {key: [tuple(pair) for pair in pairs] for key, pairs in held.items()}
                for name, held in (("answers", self.answers), ("ready", self.ready))}

    def load_state_dict(self, state: dict) -> None:
        self.answers, self.ready = ({key: [Pair(*fields) for fields in pairs] for key, pairs in state[name].items()}
                                    for name in ("answers", "ready"))

    def _write_ahead(self, step: int) -> None:
        """Write the pairs of this step and, in one batch with them, of the next ones up to the EMA model's next refresh:
        it would write them no differently then. As many steps as --generate_batch has room for."""
        same = self.ema.update_every - self.ema.steps % self.ema.update_every if self.s.rejected == "ema" else 1
        room = self.s.generate_batch // (self.s.batch_size // self.world.size * self.s.num_rejected)
        last = step + min(same, max(1, room)) - 1       # also beyond the last step, for a run that is extended later
        work = [(row, n) for n in range(step, last + 1) for row in rows_of_step(self.s, self.rows, n, self.world)]
        pairs = self._generate([row for row, _ in work], [[REWRITE, self.s.seed, n, row.number] for row, n in work])
        for (_, n), few in zip(work, batches(pairs, self.s.num_rejected)):
            self.ready.setdefault(n, []).extend(pair._replace(step=n) for pair in few)

    def _generate(self, rows: list, seeds: list[list[int]]) -> list[Pair]:
        # Seeds come from the settings, the step and the row, so that no random state has to be kept.
        generator = torch.Generator(self.world.device).manual_seed(seed_of([*seeds[0], self.world.rank]) if seeds else 0)
        with self.whole.of(self.model) as model:
            return write_pairs(self.s, model, rows, self.ends, seeds, generator, self.s.num_rejected)


def seed_of(numbers: list[int]) -> int:
    """One seed for torch from several numbers."""
    return int(np.random.default_rng(numbers).integers(2 ** 63))


def train(s: Settings, stop: Stop | None = None) -> None:
    """One run: set up, evaluate, Algorithm 1, evaluate, save. stop: tells when a signal asked for an end."""
    stop, asked = stop or Stop(), as_saved(s)
    world = World(s.threads, s.shard, s.dtype)
    if s.batch_size % world.size or s.buffer_size % world.size:
        raise UserError(f"--batch_size {s.batch_size} and --buffer_size {s.buffer_size} must divide evenly among {world.size} processes")
    checkpoint = world.on_main(lambda: to_go_on_from(s.resume)) if s.resume else None
    if s.resume and world.on_main(lambda: finished(s)):
        return world.say(f"{run_folder(s.resume)} had finished: there is nothing left to do")
    other = changed(s) if s.resume else {}
    start, tokenizer = world.alike(lambda: load_model(s, world))
    tokenize = Tokenize(tokenizer, s.max_prompt_len, s.max_len, use_rejected=s.rejected == "data" and s.loss != "sft",
                        known_ids=start.get_input_embeddings().num_embeddings)
    rows, held = world.alike(lambda: load_data(s, tokenize, world.say))
    ends = world.on_main(lambda: end_token_ids(start, tokenizer, tokenize.turn_end))
    per_iteration = math.ceil(s.epochs * len(rows) / s.batch_size)
    steps = s.steps or per_iteration * s.iterations
    bounds = [i * steps // s.iterations for i in range(s.iterations + 1)]               # last step of each iteration (SPIN)

    # Before any copy of the policy is made: the copies inherit what is found.
    try:
        start._sapo_exact, start._sapo_generates = world.on_main(lambda: (probe(start), check_generation(start)))
    except ValueError as error:
        raise UserError(f"--model {s.model}: {error}") from None
    # Algorithm 1 line 1: the policy. Lines 2 and 3: the buffer and the EMA model. DPO needs a reference besides.
    policy, whole = world.place(start), Whole(start, world)
    buffer = ReplayBuffer(s.buffer_size // world.size, seed=[DRAW, s.seed, world.rank]) if s.buffer_size else None
    needs_ema = s.generates and s.rejected == "ema" or s.ref == "ema"
    ema = EMA(policy, s.ema_decay, s.ema_every, copy=world.copy(start)) if needs_ema else None
    frozen = world.copy(start) if s.ref or s.rejected == "iteration" else None
    reference = Scorer(frozen) if s.loss == "dpo" else None
    author = {"ema": ema and ema.model, "policy": policy, "iteration": frozen, "data": None}[s.rejected]
    write = Writer(s, world, author, whole, ema, ends, rows)
    if s.grad_checkpoint:
        checkpoint_layers(policy)
    scorer = world.wrap(Scorer(policy, s.compile))          # after the copies, which are neither compiled nor checkpointed
    optimizer = make_optimizer(s, policy)
    evaluate = Evaluation(s, world, tokenizer, ends, held, policy, whole)

    # What a checkpoint holds. Order of rows, segments and sampling need no state: their seeds come from the step.
    shared = {"policy": policy, "optimizer": optimizer, "ema": ema, "frozen": frozen}   # the same in every process
    own = {"buffer": buffer, "writer": write}
    tally = {"data": rows.fingerprint(), "before": None, "skipped": 0, "bad_in_a_row": 0}
    done = 0
    if checkpoint:
        done, found = read_checkpoint(checkpoint, world, shared, own)
        if found["data"] != tally["data"]:
            raise UserError(f"--resume {s.resume}: {s.data} is not what it was when that run began; start a new one")
        tally = found
    folder = run_folder(s.resume) if s.resume else world.on_main(lambda: new_run_folder(s))
    if s.resume:
        world.say(world.on_main(lambda: take_up(s, done, steps, other)))
    report = Report(s, asked, world, folder, steps, done, rows, tokenizer, ends)
    report.say(header(s, world, start, rows, held, steps, folder))
    tally["before"] = tally["before"] or evaluate(policy)

    stop.training = True
    for step in range(done + 1, steps + 1):                                             # line 4
        clock = Clock(world.device)
        iteration = bisect.bisect_left(bounds, step) - 1
        first, last = bounds[iteration] + 1, bounds[iteration + 1]
        if s.rejected == "iteration" and step == first:
            frozen.load_state_dict(policy.state_dict())
            write.start_iteration(iteration, range(first, last + 1))
            optimizer = shared["optimizer"] = make_optimizer(s, policy)

        # Sampling stage
        new = write(step)                                                               # lines 6 to 10
        pairs = [pair for pair in new if pair.chosen != pair.rejected] if s.skip_identical else new
        if not pairs and not buffer:
            pairs = new[:1]         # nothing at all to learn from: an identical pair does no harm
        if buffer is not None:
            for pair in pairs:
                buffer.add(pair)                                                        # line 11
            pairs = buffer.sample(min(s.batch_size // world.size, len(buffer)))         # line 14
        clock.lap("generate")

        # Training stage
        optimizer.zero_grad(set_to_none=True)
        means, suspects = learn(s, world, scorer, reference, pairs, s.beta[iteration])  # line 15
        clock.lap("score")
        lr = learning_rate(s, step - first + 1, last - first + 1, s.lr[iteration])
        for group in optimizer.param_groups:
            group["lr"] = lr
        grad_norm = world.clip(policy, s.max_grad_norm or math.inf)
        finite, = world.sum([math.isfinite(means["loss"]) and math.isfinite(grad_norm)])
        if finite == world.size:        # all processes take the step, or none
            optimizer.step()                                                            # line 16
            if ema:
                ema.update(policy)                                                      # line 17
            tally["bad_in_a_row"] = 0
        else:
            tally["skipped"], tally["bad_in_a_row"] = tally["skipped"] + 1, tally["bad_in_a_row"] + 1
            report.say(f"step {step}: loss or gradient is not finite; no process takes the step; {blame(world, suspects, pairs)}")
        if s.ref in ("policy", "ema") and step % s.ref_every == 0:                      # Table 4
            frozen.load_state_dict((ema.model if s.ref == "ema" else policy).state_dict())
        clock.lap("update")

        record = {"step": step, "epoch": step * s.batch_size / len(rows), **means, "lr": lr, "grad_norm": grad_norm, "skipped": tally["skipped"]}
        if s.eval_every and step % s.eval_every == 0 and step < steps:
            record |= report.evaluation(step, evaluate(policy))
        report.step(record, new, pairs, buffer, clock)

        if tally["bad_in_a_row"] >= s.max_bad_steps:
            report.close()
            raise RunFailed(f"stopped after {s.max_bad_steps} steps in a row without a finite loss and gradient; lower --lr, or look at "
                            "the rows named above" + (f"; the last checkpoint is as it was: --resume {folder}" if newest(folder) else ""))
        ending = world.sum([stop.asked])[0]
        if ending or s.save_every and step % s.save_every == 0:
            write_checkpoint(folder, step, world, shared, own, tally, s.keep)
        if ending:
            report.close()
            raise Stopped(f"stopped by a signal after step {step}, and saved; go on with --resume {folder}")

    report.close()
    trained = world.take_back(start, policy)
    world.on_main(lambda: save_model(trained, tokenizer, ends, folder / "final", model_card(s, steps)))
    report.summary(tally["before"], evaluate(policy))


def blame(world: World, suspects: list[int], pairs: list[Pair]) -> str:
    """Which rows a step without a finite loss or gradient came from: those with such a loss, else all of the step."""
    named = sorted({row for part in world.gather(suspects) for row in part})
    return f"rows {named} have such a loss" if named else f"its rows: {sorted({pair.row for part in world.gather(pairs) for pair in part})}"


def main() -> None:
    status, stop = 0, Stop()
    try:
        stop.listen()
        settings = parse(sys.argv[1:])
        if not settings.dry_run:
            train(settings, stop)
        elif on_main():
            print(plan(settings, int(os.environ.get("WORLD_SIZE", 1))))
    except RowFailed as error:
        say_error(error, error.status, on_all=True)
        os._exit(error.status)              # the others did not meet it and wait; torchrun ends them
    except UserError as error:
        status = say_error(error, error.status)
    except KeyboardInterrupt as error:
        status = say_error(error, Stopped.status)
    except OSError as error:
        status = say_error(f"{error.filename or 'the output folder'}: {error.strerror or error}", RunFailed.status)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            say_error("out of memory; lower --micro_batch (scoring) or --generate_batch (generating), pass --grad_checkpoint or --dtype bf16, "
                      "with several GPUs --shard; --dry_run tells beforehand what is needed", RunFailed.status, on_all=True)
        elif lost_process(error):
            say_error("another process of this run is gone; go on from the last checkpoint with --resume", RunFailed.status, on_all=True)
        else:
            raise
        sys.stdout.flush()
        os._exit(RunFailed.status)          # leaving in good order would wait for the others
    finally:
        stop.restore()
    leave()
    sys.exit(status)


def on_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def say_error(error, status: int, on_all: bool = False) -> int:
    """Print what went wrong, on one process or on all; returns the exit status."""
    if on_all or on_main():
        print(f"train.py: {error}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    main()
