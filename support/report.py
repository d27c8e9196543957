"""What a person sees of a run, and what is written down of it."""
import dataclasses
import json
import math
import resource
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from sapo import Pair
from support.checks import matches_check
from support.errors import error_text, printable
from support.files import write_json
from support.settings import run_label


class Report:
    """Progress line, metrics.jsonl, printed pairs and the closing table; silent but on rank 0."""

    def __init__(self, settings, saved_settings: dict, world, folder: Path, steps: int, done: int,
                 examples, tokenizer, eos_ids: list[int]):
        """saved_settings: what goes into settings.json. done: steps that a resumed run has taken.

        examples: those that pairs are made of.
        """
        self.settings, self.world, self.folder = settings, world, folder
        self.examples, self.tokenizer, self.eos_ids = examples, tokenizer, eos_ids
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=not world.is_main,
                        dynamic_ncols=True,                     # a log file wants fewer lines
                        mininterval=0.5 if sys.stderr.isatty() else 15)
        self.board, self.file = None, RecordFile(folder / "metrics.jsonl", self.say)
        if world.is_main and settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # not a requirement
            # A resumed run writes the steps from here on again.
            self.board = SummaryWriter(folder / "tensorboard", purge_step=done + 1)
        world.run_on_rank0(lambda: write_json(folder / "settings.json", saved_settings))

    def say(self, *lines: str) -> None:
        """Print on rank 0. A line break inside a line is printed as \\n: names may hold one."""
        if self.world.is_main:
            self.bar.write("\n".join(map(printable, lines)), file=sys.stdout)
            sys.stdout.flush()

    def step(self, record: dict, new_pairs: list[Pair], batch: list[Pair], buffer,
             seconds: dict[str, float]) -> dict[str, tuple[float, int]]:
        """One flat record in metrics.jsonl, the progress line, and now and then a pair.

        All processes together. record: what training knows of the step. Added here are statistics
        of the new pairs and of the batch drawn from the buffer (None where there is none), times
        and memory. Returns the statistics of this process's new pairs, where a model writes them.
        """
        s, statistics = self.settings, {}
        if s.generates:
            statistics = pair_statistics(
                new_pairs, self.examples, self.tokenizer, self.eos_ids)
            record |= self.world.means(statistics)
        if buffer is not None:
            record |= self.world.means(buffer_statistics(buffer, batch, record["step"]))
            record["buffer_size"] = self.world.sum([len(buffer)])[0]
        record |= seconds | {"seconds": sum(seconds.values()),
                             "peak_memory_mib": peak_memory_mib(self.world.device)}
        if self.world.is_main:
            self._write(record)
            self.bar.set_postfix_str(f"loss {record.get('loss', math.nan):.4f}", refresh=False)
            self.bar.update()
        if s.generates and s.print_every and (record["step"] - 1) % s.print_every == 0:
            self.pair(next((p for p in new_pairs if p.chosen != p.rejected), new_pairs[0]))
        return statistics

    def _write(self, record: dict) -> None:
        self.file.write([record])
        for name, value in record.items() if self.board else ():
            self.board.add_scalar(name, value, record["step"])

    def pair(self, pair: Pair) -> None:
        """Print a pair with A, B, B' and C told apart."""
        text = self.tokenizer.decode
        b = pair.chosen[pair.start:pair.stop]
        rewritten = pair.rejected[pair.start:pair.rejected_stop]
        c = pair.chosen[len(pair.chosen) if pair.stop is None else pair.stop:]
        dropped = bool(c) and pair.rejected_stop == len(pair.rejected)
        ended = rewritten[-1:] in [[i] for i in self.eos_ids]
        why = ": the response ended in B'" if ended else ""
        self.say("", f"step {pair.step}, row {pair.example_id}",
                 f"  x  {text(pair.prompt[-120:])}", f"  A  {text(pair.chosen[:pair.start])}",
                 f"  B  {text(b)}", f"  B' {text(rewritten)}{'   (the same)' * (b == rewritten)}",
                 f"  C  {text(c)}{f'   (dropped{why})' * dropped}")

    def evaluation(self, step: int, result: dict[str, float]) -> dict[str, float]:
        """Say a result on the way; returns it as it goes into the step's record."""
        values = "  ".join(f"{name} {value:.4f}" for name, value in result.items())
        self.say(f"step {step}: {values}")
        return {f"eval_{name}": value for name, value in result.items()}

    def close(self) -> None:
        """No more steps will come: records that still wait get a last try. May be called twice."""
        self.file.close()
        self.bar.close()
        if self.board:
            self.board.close()
        self.board = None

    def summary(self, before: dict[str, float], after: dict[str, float], totals: dict) -> None:
        """Held-out results before and after, as a table and as summary.json.

        totals: what the run sums to, for summary.json.
        """
        self.world.run_on_rank0(lambda: write_json(
            self.folder / "summary.json", {"before": before, "after": after} | totals))
        if before:
            self.say(f"{'held out':<22}{'before':>10}{'after':>10}{'difference':>12}")
        for name in before:
            if name in after:
                self.say(f"{name:<22}{before[name]:>10.4f}{after[name]:>10.4f}"
                         f"{after[name] - before[name]:>+12.4f}")
        self.say("", f"saved {self.folder}/final (an ordinary Hugging Face folder), metrics.jsonl, "
                 "settings.json and summary.json beside it")


def pair_statistics(pairs: list[Pair], examples, tokenizer,
                    eos_ids: list[int]) -> dict[str, tuple[float, int]]:
    """Of new pairs, (sum, count) each: identical, ended and worse.

    identical: B' = B. ended: B' holds an end token. worse: of the pairs that differ and carry a
    check, those whose rejected response fails the check. examples: those the pairs were made of.
    """
    different = [pair for pair in pairs if pair.chosen != pair.rejected]
    failed = [fails for fails in fails_check(different, examples, tokenizer) if fails is not None]
    ended = sum(pair.rejected[pair.start:pair.rejected_stop][-1:] in [[i] for i in eos_ids]
                for pair in pairs)
    return {"identical": (len(pairs) - len(different), len(pairs)),
            "worse": (sum(failed), len(failed)), "ended": (ended, len(pairs))}


def fails_check(pairs: list[Pair], examples, tokenizer) -> list[bool | None]:
    """Of each pair: does its rejected response fail the check of its row? None: the row has none.

    examples: those the pairs were made of.
    """
    fails = []
    for pair in pairs:
        example = examples.by_id(pair.example_id)
        if example.check:
            text = tokenizer.decode(pair.rejected, skip_special_tokens=True)
            fails.append(not matches_check(example.check, text, example.chosen_text))
        else:
            fails.append(None)
    return fails


def buffer_statistics(buffer, batch: list[Pair], step: int) -> dict[str, tuple[float, int]]:
    """Of a batch just drawn, (sum, count) each: age in steps, and draws before.

    And of all pairs evicted so far, how many were never drawn.
    """
    return {"buffer_age": (sum(step - pair.step for pair in batch), len(batch)),
            "buffer_use": (sum(buffer.drawn_counts), len(batch)),
            "never_used": (buffer.evicted_unused, buffer.evicted)}


class Clock:
    """Seconds of each part of a step: clock.lap("generate") takes the time since the last lap.

    totals: seconds of each part so far, of all steps.
    """

    def __init__(self, device):
        self.device, self.laps, self.totals = device, {}, {}
        self.began = self.last = self._now()

    def _now(self) -> float:
        if self.device.type != "cpu":           # kernels run behind the Python that queued them
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def lap(self, name: str) -> None:
        now = self._now()
        for sums, key in ((self.laps, f"seconds_{name}"), (self.totals, name)):
            sums[key] = sums.get(key, 0.0) + now - self.last
        self.last = now

    def elapsed(self) -> float:
        """Seconds since the clock was made."""
        return self._now() - self.began

    def restart(self) -> dict[str, float]:
        """The laps so far; the next step begins."""
        laps, self.laps = self.laps, {}
        self.last = self._now()
        return laps


def peak_memory_mib(device) -> float:
    """Most memory held so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def header(settings, world, model, examples, eval_examples: list, steps: int,
           folder: Path) -> list[str]:
    """What goes into the run, in lines: model, data, machine, and every setting."""
    lengths = [len(example.prompt) + len(example.chosen) for example in examples.length_sample]
    parameters = sum(p.numel() for p in model.parameters())
    threads = f", {torch.get_num_threads()} threads each" if world.device.type == "cpu" else ""
    values = "  ".join(f"{name}={value}" for name, value in dataclasses.asdict(settings).items()
                       if value is not None)
    return [
        f"{run_label(settings)}: {steps} steps of {settings.batch_size} prompts",
        f"  model     {settings.model}: {type(model).__name__}, "
        f"{parameters / 1e6:.2f} M parameters",
        f"  data      {settings.data}: {len(examples)} rows of about "
        f"{sum(lengths) / len(lengths):.0f} tokens; {len(eval_examples)} held out",
        f"  machine   {world.size} x {world.device.type}{threads}",
        f"  output    {folder}",
        f"  settings  {values}"]


class RecordFile:
    """A file of JSON records, one per line, that grows by whole lines."""

    def __init__(self, path: Path, say):
        """say: prints a line."""
        self.path, self.say, self.unwritten = path, say, []

    def write(self, records: list[dict]) -> None:
        """Append records; those that a full disk refused go first at the next step.

        JSON knows no NaN: a number of a record that is not finite becomes null.
        """
        waited = bool(self.unwritten)
        for record in records:
            finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                      for name, value in record.items()}
            self.unwritten.append(json.dumps(finite) + "\n")
        error = self._write_waiting()
        if error and not waited:
            self.say(f"{self.path}: could not be written ({error}); trying again at the next step")

    def close(self) -> None:
        """No more records will come: those that still wait get a last try. May be called twice."""
        error = self._write_waiting() if self.unwritten else None
        if error:
            self.say(f"{self.path}: {len(self.unwritten)} records could not be written ({error}) "
                     "and are lost")
        self.unwritten = []

    def _write_waiting(self) -> str | None:
        """Append the records that are not in the file yet. Returns why that failed, or None."""
        try:
            append_whole(self.path, "".join(self.unwritten).encode())
        except OSError as error:
            return error_text(error)
        self.unwritten = []
        return None


def append_whole(path: Path, content: bytes) -> None:
    """Append to a file, all or nothing. Raises OSError where the disk refuses."""
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(content) != len(content):
                raise OSError(28, "No space left on device")
        except OSError:
            file.truncate(size)
            raise
