"""What a person sees of a run, and what is written down of it."""
import dataclasses
import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from support.errors import printable

from support.checks import matches_check
from support.settings import method


class Report:
    """Header, progress line, metrics.jsonl, printed pairs and the closing table; silent but on rank 0."""

    def __init__(self, settings, asked: dict, world, folder: Path, steps: int, done: int, rows, tokenizer, ends: list[int]):
        """asked: the settings as they were asked for, for settings.json. done: steps already taken, by the run that is
        resumed. rows: those that pairs are made of."""
        self.settings, self.world, self.folder, self.rows, self.tokenizer, self.ends = settings, world, folder, rows, tokenizer, ends
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=not world.is_main, dynamic_ncols=True,
                        mininterval=0.5 if sys.stderr.isatty() else 15)         # a log file wants fewer lines
        self.file = self.board = None
        if world.is_main and settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter       # not a requirement
            self.board = SummaryWriter(folder / "tensorboard", purge_step=done + 1)     # a resumed run writes these again
        if world.is_main:
            self.file = open(folder / "metrics.jsonl", "a", encoding="utf-8")
            write_json(folder / "settings.json", asked)

    def say(self, text: str = "") -> None:
        if self.world.is_main:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def step(self, record: dict, new: list, drawn: list, buffer, clock) -> None:
        """One flat line in metrics.jsonl, the progress line moved on, and now and then a pair shown. All processes together.

        record: what training knows of the step; statistics of the pairs that are new and of those drawn from the buffer
        (None where there is none), times and memory are added to it.
        """
        s = self.settings
        if s.generates:
            record |= self.world.means(pair_statistics(new, self.rows, self.tokenizer, self.ends, s.segment_len))
        if buffer is not None:
            record |= self.world.means(buffer_statistics(buffer, drawn, record["step"])) | {"buffer_size": self.world.sum([len(buffer)])[0]}
        record |= clock.laps | {"seconds": sum(clock.laps.values()), "peak_memory_mib": peak_memory_mib(self.world.device)}
        if self.world.is_main:
            self.file.write(json.dumps({name: value if math.isfinite(value) else None for name, value in record.items()}) + "\n")
            self.file.flush()
            for name, value in record.items() if self.board else ():
                self.board.add_scalar(name, value, record["step"])
            self.bar.set_postfix_str(f"loss {record['loss']:.4f}", refresh=False)
            self.bar.update()
        if s.generates and s.print_every and (record["step"] - 1) % s.print_every == 0:
            self.pair(next((pair for pair in new if pair.chosen != pair.rejected), new[0]))

    def pair(self, pair) -> None:
        """Print a pair with A, B, B' and C told apart."""
        a, b, b_new, c, cut = parts(pair, self.ends, self.settings.segment_len)
        x, a, b_text, b_new_text, c_text = (printable(self.tokenizer.decode(ids)) for ids in (pair.prompt[-120:], a, b, b_new, c))
        self.say(f"\nstep {pair.step}, row {pair.row}\n  x  {x}\n  A  {a}\n  B  {b_text}\n"
                 f"  B' {b_new_text}{'   (the same)' if b == b_new else ''}\n"
                 f"  C  {c_text}{'   (dropped: the response ended in B)' if cut and c else ''}")

    def evaluation(self, step: int, result: dict[str, float]) -> dict[str, float]:
        """Say a result on the way; returns it as it goes into the step's record."""
        self.say(f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in result.items()))
        return {f"eval_{name}": value for name, value in result.items()}

    def close(self) -> None:
        self.bar.close()
        for file in (self.file, self.board):
            if file:
                file.close()

    def summary(self, before: dict[str, float], after: dict[str, float]) -> None:
        """Held-out results before and after, as a table and as summary.json, and where everything is."""
        if self.world.is_main:
            write_json(self.folder / "summary.json", {"before": before, "after": after})
        if before:
            self.say(f"{'held out':<22}{'before':>10}{'after':>10}{'difference':>12}")
        for name in before:
            self.say(f"{name:<22}{before[name]:>10.4f}{after[name]:>10.4f}{after[name] - before[name]:>+12.4f}")
        self.say(f"\nsaved {self.folder}/final (an ordinary Hugging Face folder), metrics.jsonl, settings.json and summary.json beside it")


def parts(pair, ends: list[int], segment_len: int):
    """A, B, B' and C of a pair, and whether B' ended the response (so that y- has no C)."""
    stop = min(pair.start + segment_len, len(pair.chosen)) if segment_len else len(pair.chosen)
    c = pair.chosen[stop:]
    cut = ended_early(pair, ends, segment_len)
    b_new = pair.rejected[pair.start:] if cut or not c else pair.rejected[pair.start:len(pair.rejected) - len(c)]
    return pair.chosen[:pair.start], pair.chosen[pair.start:stop], b_new, c, cut


def ended_early(pair, ends: list[int], segment_len: int) -> bool:
    """Did B' produce an end token? Then y- is no longer than A and B' and closes with it."""
    room = pair.start + segment_len if segment_len else len(pair.rejected)
    return len(pair.rejected) <= room and pair.rejected[-1] in ends


def pair_statistics(pairs, rows, tokenizer, ends: list[int], segment_len: int) -> dict[str, tuple[float, int]]:
    """Of a batch of new pairs, (sum, count) each: identical (B' = B), ended (B' holds an end token), and worse: of the
    pairs that differ and carry a check, those whose rejected response fails it. rows: the rows they were made of."""
    different = [(pair, rows.numbered(pair.row)) for pair in pairs if pair.chosen != pair.rejected]
    checked = [(pair, row) for pair, row in different if row.check]
    texts = tokenizer.batch_decode([pair.rejected for pair, _ in checked], skip_special_tokens=True)
    worse = sum(not matches_check(row.check, text, row.chosen_text) for (_, row), text in zip(checked, texts))
    return {"identical": (len(pairs) - len(different), len(pairs)), "worse": (worse, len(checked)),
            "ended": (sum(ended_early(pair, ends, segment_len) for pair in pairs), len(pairs))}


def buffer_statistics(buffer, drawn, step: int) -> dict[str, tuple[float, int]]:
    """Of a batch just drawn, (sum, count) each: its age in steps and how often its pairs had been drawn before; and of
    all pairs evicted so far, how many were never drawn."""
    return {"buffer_age": (sum(step - pair.step for pair in drawn), len(drawn)),
            "buffer_use": (int(buffer.drawn_counts.sum()), len(drawn)),
            "never_used": (buffer.evicted_unused, buffer.evicted)}


class Clock:
    """Seconds of each part of a step: clock.lap("generate") takes the time since the last lap."""

    def __init__(self, device):
        self.device, self.laps = device, {}
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type != "cpu":           # kernels run behind the Python that queued them
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def lap(self, name: str) -> None:
        now = self._now()
        self.laps[f"seconds_{name}"] = self.laps.get(f"seconds_{name}", 0.0) + now - self.last
        self.last = now


def peak_memory_mib(device) -> float:
    """Most memory held so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def header(settings, world, model, rows, held, steps: int, folder: Path) -> str:
    """What goes into the run: model, data, machine, and every setting."""
    lengths = [len(row.prompt) + len(row.chosen) for row in rows.some]
    lines = [f"{method(settings)}: {steps} steps of {settings.batch_size} prompts",
             f"  model     {settings.model}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters",
             f"  data      {settings.data}: {len(rows)} rows of about {sum(lengths) / len(lengths):.0f} tokens; {len(held)} held out",
             f"  machine   {world.size} x {world.device.type}" + (f", {torch.get_num_threads()} threads each" if world.device.type == "cpu" else ""),
             f"  output    {folder}"]
    settings_text = "  ".join(f"{k}={v}" for k, v in dataclasses.asdict(settings).items() if v is not None)
    return "\n".join(lines) + "\n  settings  " + settings_text


def write_json(path: Path, content: dict) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file at once, so that it is the old one or the new one whatever happens meanwhile."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
