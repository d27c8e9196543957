"""The life of a run around the algorithm: find its checkpoint, open its folder, log and save after
each step, close it.
"""
from sapo import Pair
from support.checkpoint import (
    find_checkpoint,
    newest_checkpoint,
    newest_good_checkpoint,
    read_checkpoint,
    remove_checkpoint,
    step_of,
    write_checkpoint,
)
from support.epochs import ends_epoch, epochs_ended, remove_later_epochs
from support.errors import RunFailed, Stopped
from support.evaluate import Evaluation
from support.fingerprint import (
    compare_fingerprints,
    fingerprint_examples,
    fingerprint_model,
)
from support.models import model_card, save_model
from support.report import Clock, Report, header
from support.run_folder import (
    changed_settings,
    lock_run,
    new_run_folder,
    rewind_run,
    run_finished,
)
from support.saved_pairs import SavedPairs
from support.settings import Settings, as_saved, located, run_folder
from support.totals import Totals


class Run:
    """A run's folder, checkpoints, report and end. All processes call its methods together.

    A context manager, because the folder is locked until the run ends, whatever ends it.

    step: optimizer steps done when training begins. steps: the step at which the run ends.
    """

    def __init__(self, s: Settings, world, stop):
        """stop: tells of signals."""
        self.settings, self.world, self.stop = s, world, stop
        # Each process read its own clock, and templates must tell all of them the same time.
        s.template_date = world.run_on_rank0(lambda: s.template_date)
        self.saved_settings = as_saved(s)       # as asked for, before a model's limits lower them
        self.step, self.steps = 0, 0
        self.folder = self.checkpoint = self.lock = None
        self.finished, self.changed = False, {}
        self.clock = Clock(world.device)
        self.report = self.saved_pairs = None

    def __enter__(self):
        try:
            if self.settings.resume:
                self._find_checkpoint()
        except BaseException:
            self.__exit__()
            raise
        if self.finished:
            self.world.say(f"{self.folder} had finished: there is nothing left to do")
        return self

    def __exit__(self, *exception) -> None:
        """Let go of the folder, also where an error is kept and with it everything of the run."""
        self._close_files()
        if self.lock:
            self.lock.release()

    def _close_files(self) -> None:
        for writer in (self.report, self.saved_pairs):
            if writer:
                writer.close()

    def _find_checkpoint(self) -> None:
        """Lock the folder that --resume names, and look at what is in there."""
        s, world = self.settings, self.world
        self.folder = run_folder(s.resume)
        world.run_on_rank0(self._lock_folder)
        self.finished = world.run_on_rank0(lambda: run_finished(s))
        self.checkpoint = world.run_on_rank0(lambda: find_checkpoint(s.resume))
        self.changed = changed_settings(s)

    def _lock_folder(self) -> None:
        """Hold the folder's lock on rank 0: a second run in it would prune this run's files."""
        self.lock = lock_run(self.folder)
        if self.lock.warning:
            self.world.say(self.lock.warning)

    def open(self, loaded, evaluate: Evaluation, replicated_state: dict,
             per_rank_state: dict) -> None:
        """Restore the checkpoint, make the folder, print the header, evaluate the start.

        loaded: what loading.load gave. replicated_state, per_rank_state: name -> what a checkpoint
        holds, the same in every process and each process's own. The order of examples, segments
        and sampling need no state: their seeds come from the step.
        """
        s, world = self.settings, self.world
        model, examples, steps = loaded.model, loaded.examples, loaded.steps
        self.model, self.examples, self.steps, self.evaluate = model, examples, steps, evaluate
        self.tokenizer, self.eos_ids = loaded.tokenizer, loaded.eos_ids
        self.replicated_state, self.per_rank_state = replicated_state, per_rank_state
        # Before the checkpoint: the model that was loaded is the one that training started from.
        start_model = world.frozen_copy(model) if s.save_pairs else None
        fingerprints = {"data": examples.fingerprint(),
                        "eval_data": fingerprint_examples(loaded.eval_examples),
                        "model": world.run_on_rank0(lambda: fingerprint_model(located(s.model))),
                        "ref_model": world.run_on_rank0(lambda: s.ref_model and fingerprint_model(
                            located(s.ref_model), "--ref_model"))}
        self.progress = {"fingerprints": fingerprints, "before": None, "skipped": 0,
                         "bad_steps_in_a_row": 0}
        if self.checkpoint:
            # Compared first: the states may not fit what changed, and that says less.
            self.step, self.progress = read_checkpoint(
                self.checkpoint, world, replicated_state, per_rank_state,
                check=lambda progress: compare_fingerprints(progress["fingerprints"], fingerprints))
        self.totals = Totals(self.clock, self.progress.get("totals"))
        self.tokens_before = evaluate.rewriter.tokens_written     # of the held-out pairs
        if s.resume:
            world.say(world.run_on_rank0(
                lambda: rewind_run(s, self.step, steps, self.changed)))
            world.run_on_rank0(lambda: remove_later_epochs(
                self.folder, epochs_ended(s, len(examples), self.step, steps)))
        else:
            self.folder = world.run_on_rank0(lambda: new_run_folder(s))
            world.run_on_rank0(self._lock_folder)
        self.report = Report(s, self.saved_settings, world, self.folder, steps, self.step, examples,
                             self.tokenizer, self.eos_ids)
        if s.save_pairs:
            self.saved_pairs = SavedPairs(
                s, world, self.folder, examples, self.tokenizer,
                world.scorer(start_model, evaluate.shortcuts), self.report.say)
        self.report.say(*header(s, world, model, examples, loaded.eval_examples, steps,
                                self.folder))
        self.progress["before"] = self.progress["before"] or self._evaluate()
        self.stop.training = True
        self.clock.restart()

    def _evaluate(self) -> dict[str, float]:
        """The policy's results on the held-out rows."""
        self.clock.restart()
        result = self.evaluate(self.replicated_state["policy"])
        self.clock.lap("evaluate")
        return result

    def lap(self, name: str) -> None:
        """The part of a step that ends here."""
        self.clock.lap(name)

    def after_step(self, step: int, metrics: dict[str, float], took_step: bool,
                   nonfinite_rows: list[int], new_pairs: list[Pair], batch: list[Pair]) -> None:
        """Log the step; evaluate, save or stop where it is time to.

        took_step: False where no process took the optimizer step. nonfinite_rows: rows of this
        process's pairs whose loss was not finite. Raises Stopped where a signal asked for an end,
        and RunFailed after --max_bad_steps steps in a row without a finite loss and gradient.
        """
        s, world, progress = self.settings, self.world, self.progress
        seconds = self.clock.restart()
        bad = not took_step and "loss" in metrics
        progress["bad_steps_in_a_row"] = progress["bad_steps_in_a_row"] + 1 if bad else 0
        progress["skipped"] += not took_step
        if bad:
            self.report.say(f"step {step}: loss or gradient is not finite; no process takes the "
                            f"step; {self._nonfinite_report(nonfinite_rows, batch)}")
        elif not took_step:
            self.report.say(f"step {step}: every pair is identical; there is nothing to learn from")
        record = {"step": step, "epoch": step * s.batch_size / len(self.examples), **metrics,
                  "skipped": progress["skipped"]}
        if s.eval_every and step % s.eval_every == 0 and step < self.steps:
            record |= self.report.evaluation(step, self._evaluate())
        statistics = self.report.step(record, new_pairs, batch, self.per_rank_state["buffer"],
                                      seconds)
        self._count(statistics, batch)
        if self.saved_pairs:
            self.saved_pairs.write(new_pairs)

        if progress["bad_steps_in_a_row"] >= s.max_bad_steps:
            good = world.run_on_rank0(lambda: newest_good_checkpoint(self.folder))
            raise RunFailed(
                f"stopped after {s.max_bad_steps} steps in a row without a finite loss and "
                "gradient; lower --lr, or look at the rows named above"
                + (f"; the last checkpoint from before them: --resume {good}" if good else ""))
        if s.save_every_epoch and ends_epoch(s, len(self.examples), step, self.steps):
            # Before the checkpoint: a run that goes on from there does not come by here again.
            number = epochs_ended(s, len(self.examples), step, self.steps)
            self._save_model(self.replicated_state["policy"], f"epochs/{number}", step)
        ending = world.sum([self.stop.asked])[0] > 0
        if ending:
            self.stop.heard_elsewhere()
        if ending or (s.save_every and step % s.save_every == 0):
            self._save(step)
        if ending:
            raise Stopped(f"stopped by a signal after step {step}, and saved; go on with "
                          f"--resume {self.folder}")
        self.clock.restart()

    def _count(self, statistics: dict[str, tuple[float, int]], batch: list[Pair]) -> None:
        """Add a step to the run's totals. A pair's x and A count as scored once."""
        identical, pairs = statistics.get("identical", (0, 0))
        worse, checked = statistics.get("worse", (0, 0))
        written = self.evaluate.rewriter.tokens_written
        self.totals.add(self.world, {
            "generated_tokens": written - self.tokens_before,
            "scored_tokens": sum(len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
                                 - pair.start for pair in batch),
            "pairs": pairs, "identical": identical, "checked": checked, "worse": worse})
        self.tokens_before = written

    def _save_model(self, model, name: str, step: int) -> None:
        """Save the policy or the EMA model as RUN/NAME, a Hugging Face folder."""
        full = self.world.gather_full(self.model, model)
        card = model_card(self.settings, step, is_ema=model is not self.replicated_state["policy"])
        self.world.run_on_rank0(lambda: save_model(full, self.tokenizer, self.eos_ids,
                                                   self.folder / name, card))

    def _save(self, step: int) -> None:
        self.progress["totals"] = self.totals.state()
        write_checkpoint(self.folder, step, self.world, self.replicated_state,
                         self.per_rank_state, self.progress, self.settings.keep)

    def _nonfinite_report(self, rows: list[int], batch: list[Pair]) -> str:
        """Which rows a step without a finite loss or gradient came from."""
        named = sorted({row for part in self.world.gather(rows) for row in part})
        if named:
            return f"rows {named} have such a loss"
        used = [pair.example_id for pair in batch]
        return f"its rows: {sorted({row for part in self.world.gather(used) for row in part})}"

    def close(self, policy) -> None:
        """Save the policy as a Hugging Face folder, evaluate it, print the summary.

        With --save_ema, save the EMA model, too.

        A checkpoint comes first, so that a full disk or a kill in here loses nothing. It goes when
        all is done, unless --save_every asked for it.
        """
        s, world, ema = self.settings, self.world, self.replicated_state["ema"]
        self._close_files()
        if world.run_on_rank0(self._last_step_is_not_saved):
            self._save_last()
        if s.save_ema and ema is not None:
            self._save_model(ema.model, "final-ema", self.steps)
        self._save_model(policy, "final", self.steps)
        after = self._evaluate()
        self.report.summary(self.progress["before"], after, self.totals.summary(self.steps))
        world.run_on_rank0(self._remove_closing_checkpoint)

    def _last_step_is_not_saved(self) -> bool:
        last = newest_checkpoint(self.folder)
        return last is None or step_of(last) < self.steps

    def _save_last(self) -> None:
        """The checkpoint before closing. A disk without room for it may have room for final/."""
        try:
            self._save(self.steps)
        except RunFailed as error:
            self.report.say(f"{error}; going on without it")

    def _remove_closing_checkpoint(self) -> None:
        """Without --save_every nobody asked for a checkpoint of a finished run."""
        last = newest_checkpoint(self.folder)
        if last and step_of(last) == self.steps and not self.settings.save_every:
            remove_checkpoint(last)
