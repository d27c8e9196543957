"""From the rows of study/grid.py to runs: which flags they have, which are done, what is left.

A run is what is learned: its resolved settings. How its flags were written, or which table asked
for it, makes no difference, so a run that several tables need is run once.
"""
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from study.grid import (  # noqa: E402
    METHODS,
    TUNE,
    TUNE_DATA,
    TUNING_SEED,
    WATCHING,
    Row,
    Share,
    Table,
)
from support.settings import Settings, parse  # noqa: E402

# Settings that change nothing of what is learned and measured, apart from those of WATCHING.
NOT_PART_OF_A_RUN = {
    "out", "overwrite", "resume", "template_date", "threads", "print_every", "tensorboard",
    "save_every", "save_ema", "save_every_epoch", "keep", "max_bad_steps", "trust_remote_code",
    *WATCHING}


class Run(NamedTuple):
    """One run of train.py. flags, watch: (name, value) pairs; watch has flags of WATCHING only."""
    testbed: str
    method: str
    flags: tuple[tuple, ...]
    seed: int
    watch: tuple[tuple, ...] = ()

    @property
    def words(self) -> list[str]:
        """The command line, as far as it decides the run: @FILE, flags, seed."""
        return [f"@{testbed_file(self.testbed)}", *words_of(dict(self.flags)),
                *words_of({"seed": self.seed}), *words_of(dict(self.watch))]

    @property
    def id(self) -> str:
        """12 hexadecimal digits; the same for two runs that learn and measure the same."""
        return run_id(tuple(self._replace(watch=()).words))

    @property
    def name(self) -> str:
        """As a person reads it: "habits sapo-dpo lr=0.0001 beta=0.5 seed=3"."""
        own = dict(with_shares(METHODS[self.method].flags, self.testbed))
        shown = {name: value for name, value in self.flags
                 if own.get(name) != value and name not in TUNE}
        is_tuning = dict(self.flags).get("eval_data") == tune_flags(self.testbed)["eval_data"]
        return " ".join([self.testbed, self.method, *(["tune"] if is_tuning else []),
                         *(f"{name}={value}" for name, value in shown.items()),
                         f"seed={self.seed}"])

    def answered_by(self, line: dict) -> bool:
        """Is the line of results.jsonl that of this run, and does it hold what is watched?"""
        return line["id"] == self.id and all(line["watch"].get(name) == value
                                             for name, value in self.watch)


class Waiting(NamedTuple):
    """A run whose flags are not known yet: it waits for tuning runs."""
    testbed: str
    method: str


def testbed_file(testbed: str) -> Path:
    """The flag file of a testbed, relative to the repository. An absolute path stays as it is."""
    return Path("study") / f"{testbed}.txt"


def words_of(flags: dict) -> list[str]:
    """{"lr": 0.001, "skip_identical": True} -> ["--lr", "0.001", "--skip_identical"]."""
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


@functools.cache
def settings_of(words: tuple[str, ...]) -> Settings:
    """The resolved settings of a command line. Raises UserError where train.py would."""
    first, *others = words
    return parse([f"@{REPOSITORY / first[1:]}", *others])


@functools.cache
def run_id(words: tuple[str, ...]) -> str:
    """The digest of the settings that are not train.py's defaults."""
    settings = settings_of(words)
    decisive = {field.name: getattr(settings, field.name)
                for field in dataclasses.fields(Settings)
                if field.name not in NOT_PART_OF_A_RUN
                and getattr(settings, field.name) != field.default}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def tune_flags(testbed: str) -> dict:
    """The held-out rows that the settings of a testbed's methods are chosen on."""
    return TUNE | {"eval_data": TUNE_DATA.get(testbed, TUNE["eval_data"])}


def steps_of(testbed: str) -> int:
    """Optimizer steps of a run on a testbed."""
    return settings_of((f"@{testbed_file(testbed)}",)).steps


def with_shares(flags: dict, testbed: str) -> tuple[tuple, ...]:
    """The flags as pairs, with every Share turned into steps (at least 1)."""
    return tuple((name, max(1, round(value.of_steps * steps_of(testbed)))
                  if isinstance(value, Share) else value) for name, value in flags.items())


# ----------------------------------------------------------------------------------------- results

class Results:
    """The lines of results.jsonl that count: of each testbed, those of its newest start model."""

    def __init__(self, lines: list[dict]):
        newest = {line["testbed"]: line["start"] for line in lines}
        self.lines = [line for line in lines if line["start"] == newest[line["testbed"]]]
        self.by_id: dict[str, list[dict]] = {}
        for line in self.lines:
            self.by_id.setdefault(line["id"], []).append(line)

    def line_of(self, run: Run) -> dict | None:
        """The line of a run, or None where the run is not done. Of several, the first."""
        for line in self.by_id.get(run.id, []):
            if run.answered_by(line):
                return line
        return None


def read_results(path: Path) -> list[dict]:
    """The lines of results.jsonl; none where there is no file. A torn last line is left out."""
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def best(results: Results, candidates: list[Run]) -> Run | None:
    """The candidate with the highest exact match, at equal match with the lower nll.

    None where a candidate is not done. Candidates are tuning runs: their lines are measured on the
    rows of tune_flags().
    """
    lines = [results.line_of(run) for run in candidates]
    if None in lines:
        return None
    scores = [(line["after"]["exact_match"], -line["after"]["nll"]) for line in lines]
    return candidates[scores.index(max(scores))]


def at_edge(tried: Sequence[dict], chosen: dict) -> list[str]:
    """Names of the settings whose chosen value is the smallest or largest of those tried.

    Only where at least three were tried: of two values, each is an edge.
    """
    names = [name for name in chosen if len({each[name] for each in tried}) > 2]
    return [name for name in names
            if chosen[name] in (min(each[name] for each in tried),
                                max(each[name] for each in tried))]


def cpu_seconds(line: dict, part: str) -> float:
    """CPU seconds of a part of the run: "generate", "score", "update", "evaluate" or "other".

    Its wall-clock seconds, times the share of the wall-clock time in which the process had a core.
    So waiting for a core does not count; what a busy machine slows down besides does.
    """
    return line["seconds"][part] * line["cpu_seconds"] / line["wall_seconds"]


def training_cpu_seconds(line: dict) -> float:
    """CPU seconds of the training parts: generating, scoring, updating."""
    return sum(cpu_seconds(line, part) for part in ("generate", "score", "update"))


# --------------------------------------------------------------------------------------------- rows

def tuning_runs(testbed: str, method: str) -> list[Run]:
    """The runs that the settings of a method are chosen from, in the order of Method.tried."""
    return [Run(testbed, method,
                with_shares(METHODS[method].flags | tried | tune_flags(testbed), testbed),
                TUNING_SEED)
            for tried in METHODS[method].tried]


def better_loss(results: Results, testbed: str) -> tuple[str | None, list[Run]]:
    """The loss ("dpo" or "orpo") with which tuned SAPO does better, and the runs that decide."""
    runs = {loss: tuning_runs(testbed, f"sapo-{loss}") for loss in ("dpo", "orpo")}
    every = [run for each in runs.values() for run in each]
    chosen = best(results, every)
    return chosen and chosen.method.removeprefix("sapo-"), every


class Plan(NamedTuple):
    """What a row needs: tuning runs, and its own, which are Waiting while the tuning is not done.

    method: its name with the loss filled in, or None. tuned: the settings chosen, or None.
    """
    tuning: list[Run]
    runs: list[Run | Waiting]
    method: str | None = None
    tuned: dict | None = None


def plan_row(table: Table, row: Row, results: Results) -> Plan:
    """The runs of a row. Its flags are what the header of study/grid.py says."""
    tuning: list[Run] = []
    testbed, method = table.testbed, row.method
    one = Waiting(testbed, method.replace("{loss}", "dpo"))
    waiting = [one] * (len(table.seeds) + len(row.tried))
    if "{loss}" in method:
        loss, decisive = better_loss(results, testbed)
        tuning += decisive
        if loss is None:
            return Plan(tuning, waiting)
        method = method.replace("{loss}", loss)
    candidates = tuning_runs(testbed, method)
    tuning += [run for run in candidates if run not in tuning]
    chosen = best(results, candidates)
    if chosen is None:
        return Plan(tuning, waiting)
    tuned = METHODS[method].tried[candidates.index(chosen)]
    flags = METHODS[method].flags | tuned
    if row.tried:
        again = [Run(testbed, method,
                     with_shares(flags | row.change | tried | tune_flags(testbed), testbed),
                     TUNING_SEED) for tried in row.tried]
        tuning += again
        waiting = [one] * len(table.seeds)
        chosen = best(results, again)
        if chosen is None:
            return Plan(tuning, waiting)
        tuned = tuned | dict(with_shares(row.tried[again.index(chosen)], testbed))
        flags = flags | tuned
    if row.cost_of:
        needed, steps = same_cost_steps(results, testbed, method, row.cost_of)
        tuning += [run for run in needed if run not in tuning]
        if steps is None:
            return Plan(tuning, waiting)
        flags = flags | {"steps": steps}
    flags = with_shares(flags | row.change | table.evaluate, testbed)
    watch = with_shares(table.watch, testbed)
    return Plan(tuning, [Run(testbed, method, flags, seed, watch) for seed in table.seeds], method,
                tuned)


def same_cost_steps(results: Results, testbed: str, method: str,
                    other: str) -> tuple[list[Run], int | None]:
    """How many steps of `method` take the CPU seconds that a run of `other` takes.

    By the cheapest tuning run of each: other programs on the machine make a run cost more, never
    less. A run that waited for a core most of the time counts only where there is no other: the
    share in which it had one changed too much within the run for training_cpu_seconds. Returns the
    tuning runs of both, too; None for the steps while they are not done.
    """
    ours, theirs = tuning_runs(testbed, method), tuning_runs(testbed, other)
    lines = {run: results.line_of(run) for run in [*ours, *theirs]}
    if None in lines.values():
        return [*ours, *theirs], None

    def cost(runs: list[Run]) -> float:
        done = [lines[run] for run in runs]
        steady = [line for line in done if line["cpu_seconds"] >= line["wall_seconds"] / 2]
        return min(map(training_cpu_seconds, steady or done))

    our_cost, their_cost = cost(ours), cost(theirs)
    return [*ours, *theirs], max(1, round(steps_of(testbed) * their_cost / our_cost))


def planned(tables: dict[str, Table], results: Results) -> Iterator[tuple[str, Run | Waiting]]:
    """(table, run) in the order in which they are run: a row's tuning, then the row's runs.

    A run that several tables need comes with each of them.
    """
    for name, table in tables.items():
        for row in table.rows:
            plan = plan_row(table, row, results)
            for run in [*plan.tuning, *plan.runs]:
                yield name, run
