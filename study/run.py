"""Run the study: every run of study/grid.py that study/results.jsonl does not hold yet.

    python study/run.py --list              what is done, what is left, and how long it will take
    python study/run.py                     everything, as many runs at a time as there are cores
    python study/run.py --only tail main    the tables "tail" and "main-...", with their tuning

Each run is a train.py in a process of its own, with one thread. A finished run adds one line to
study/results.jsonl (study/README.md says what a line holds). Ctrl-C ends the runs at work, whose
folders are removed; the next call starts those again and goes on. A run that fails leaves its
output in runs/study and the others go on; the exit status is then 1.
"""
import argparse
import contextlib
import datetime
import fcntl
import functools
import hashlib
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from study.grid import TABLES, Table  # noqa: E402
from study.plan import (  # noqa: E402
    Results,
    Run,
    Waiting,
    planned,
    read_results,
    settings_of,
    testbed_file,
)
from support.errors import UserError, printable  # noqa: E402
from support.files import flush, remove_tree  # noqa: E402
from support.settings import located  # noqa: E402

RESULTS = REPOSITORY / "study" / "results.jsonl"
FOLDER = REPOSITORY / "runs" / "study"
BINS = 12               # parts of a run over which rates are averaged
DIGITS = 6              # significant ones, of every number in results.jsonl
TRAIN = (sys.executable, str(REPOSITORY / "train.py"))


# --------------------------------------------------------------------------------- one run's record

def bins(steps: int) -> list[range]:
    """The steps of a run in BINS parts of about the same size; fewer parts than BINS where there
    are fewer steps.

        24 steps  ->  1 and 2, 3 and 4, ...
    """
    parts = min(BINS, steps)
    ends = [i * steps // parts for i in range(parts + 1)]
    return [range(first + 1, last + 1) for first, last in itertools.pairwise(ends)]


def rates(records: list[dict], margins: dict[int, tuple[float, int]]) -> list[dict]:
    """Over the run: of the new pairs, the share identical, and of the others the share worse.

    records: those of metrics.jsonl. margins: what start_margins gives; empty where no pairs were
    saved.
    Returns one dictionary per bin: "step", its last step, and what is known of it.
    """
    rows = []
    for part in bins(len(records)):
        row = {"step": part[-1]}
        known = [records[step - 1] for step in part
                 if records[step - 1].get("identical") is not None]
        if known:
            row["identical"] = sum(r["identical"] for r in known) / len(known)
        # A step's pairs that differ are the weight of its share of worse ones.
        worse = [(r["worse"], 1 - r["identical"]) for r in known if r.get("worse") is not None]
        if sum(weight for _, weight in worse):
            row["worse"] = (sum(value * weight for value, weight in worse)
                            / sum(weight for _, weight in worse))
        margin = sum(margins[step][0] for step in part if step in margins)
        pairs = sum(margins[step][1] for step in part if step in margins)
        if pairs:
            row |= {"start_margin": margin / pairs, "start_pairs": pairs}
        rows.append(row)
    return rows


def start_margins(pairs: Iterable[dict]) -> dict[int, tuple[float, int]]:
    """For each step, of the pairs made for it that differ: the sum of their margins under the model
    that training started from, log p(y+) - log p(y-) in nats, and how many they are.

    pairs: the lines of pairs.jsonl (--save_pairs).
    """
    sums = {}
    for pair in pairs:
        if not pair["identical"]:
            margin, count = sums.get(pair["step"], (0.0, 0))
            margin += pair["chosen_logps_at_start"] - pair["rejected_logps_at_start"]
            sums[pair["step"]] = (margin, count + 1)
    return sums


def read_lines(path: Path) -> Iterator[dict]:
    """The records of a .jsonl file; none where there is no file."""
    if path.exists():
        with open(path, encoding="utf-8") as file:
            yield from map(json.loads, file)


def evaluations(records: list[dict]) -> list[dict]:
    """The evaluations during the run, with the seconds of training until then."""
    rows, seconds = [], 0.0
    for record in records:
        seconds += record["seconds"]
        if "eval_nll" in record:
            rows.append({"step": record["step"], "seconds": seconds,
                         **{name.removeprefix("eval_"): value for name, value in record.items()
                            if name.startswith("eval_")}})
    return rows


def rounded(value):
    """Every float with DIGITS significant digits, so that lines stay readable."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def result_line(run: Run, tables: list[str], folder: Path, commit: str, wall_seconds: float,
                cpu_seconds: float) -> dict:
    """What results.jsonl says of a finished run, from the files in its folder."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    records = list(read_lines(folder / "metrics.jsonl"))
    margins = start_margins(read_lines(folder / "pairs.jsonl"))
    return rounded({
        "id": run.id, "name": run.name, "tables": tables, "testbed": run.testbed,
        "method": run.method, "flags": dict(run.flags), "seed": run.seed, "watch": dict(run.watch),
        "start": start_digest(run.testbed), "commit": commit, "versions": versions(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "before": summary["before"], "after": summary["after"], "steps": len(records),
        "seconds": summary["seconds"], "wall_seconds": wall_seconds, "cpu_seconds": cpu_seconds,
        "generated_tokens": summary["generated_tokens"],
        "scored_tokens": summary["scored_tokens"],
        "evaluations": evaluations(records), "rates": rates(records, margins)})


@functools.cache
def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": version("torch"),
            "transformers": version("transformers"), "cpu": cpu_name()}


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def code_commit() -> str:
    """The commit of the code that runs now; "-dirty" where the checkout has other code."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        # Results and pages change while the study runs, and change no run.
        changed = git("status", "--porcelain", "--", ".", ":!study/results.jsonl", ":!docs",
                      ":!*.md")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def start_digest(testbed: str) -> str:
    """8 hexadecimal digits of what a testbed's runs start from: the model's files, and its rows."""
    settings = settings_of((f"@{testbed_file(testbed)}",))
    digest = hashlib.sha256()
    model, data = located(settings.model), located(settings.data)
    for path in [*sorted(path for path in model.rglob("*") if path.is_file()), data]:
        if path.suffix != ".md":
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


# ----------------------------------------------------------------------------------- many processes

class Job:
    """A run at work, in a process of its own. folder, log: of the run, under runs/study."""

    def __init__(self, run: Run, tables: list[str], folder: Path, train: Sequence[str]):
        self.run, self.tables, self.train = run, tables, train
        self.folder, self.log = folder / run.id, folder / f"{run.id}.log"
        self.commit, self.process = code_commit(), None
        remove_tree(self.folder)
        self.log.write_bytes(b"")

    def start(self, inherited: int) -> None:
        """Start the process. inherited: a file descriptor that the process keeps open."""
        command = [*self.train, *self.run.words, "--threads", "1", "--print_every", "0",
                   "--out", str(self.folder)]
        with open(self.log, "ab") as log:
            self.began = time.monotonic()
            # A session of its own: Ctrl-C reaches this program alone, which then ends the runs.
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[inherited],
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})

    def ended(self) -> bool:
        """Has the process ended? Then its seconds are known."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            return False
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.wall_seconds = time.monotonic() - self.began
        self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return True

    def kill(self) -> None:
        """End the process and those it started, and remove what they wrote."""
        if self.process and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        remove_tree(self.folder)
        self.log.unlink(missing_ok=True)

    def last_words(self) -> str:
        """The last line of the output: where train.py fails, its sentence."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "no output")


class Study:
    """Runs what is left of the tables, `jobs` runs at a time.

    results: the file that lines are added to. folder: for the run folders and their output.
    keep: keep the folders of finished runs. say: prints a line. train: the command that a run's
    flags are added to.
    """

    def __init__(self, tables: dict[str, Table], results: Path = RESULTS, folder: Path = FOLDER,
                 jobs: int = 1, keep: bool = False, say: Callable[[str], None] = print,
                 train: Sequence[str] = TRAIN):
        self.tables, self.file, self.folder = tables, results, folder
        self.jobs, self.keep, self.say, self.train = jobs, keep, say, train
        self.at_work: list[Job] = []
        self.failed: set[str] = set()
        self.results = self.read()

    def read(self) -> Results:
        """The lines whose start model and rows are those of today."""
        lines = read_results(self.file)
        current = {}
        for testbed in {table.testbed for table in self.tables.values()}:
            with contextlib.suppress(OSError):          # --list, before the rows are made
                current[testbed] = start_digest(testbed)
        return Results([line for line in lines
                        if line["start"] == current.get(line["testbed"], line["start"])])

    def left(self) -> list[tuple[Run | Waiting, list[str]]]:
        """The runs that are not done, in order, each with the tables that need it."""
        found: dict[Run, list[str]] = {}
        waiting = []
        for table, run in planned(self.tables, self.results):
            if isinstance(run, Waiting):
                waiting.append((run, [table]))
            elif self.results.line_of(run) is None:
                tables = found.setdefault(run, [])
                if table not in tables:
                    tables.append(table)
        return [*found.items(), *waiting]

    def next_job(self) -> Job | None:
        """The first run that can start now."""
        busy = {job.run.id for job in self.at_work} | self.failed
        for run, tables in self.left():
            if isinstance(run, Run) and run.id not in busy:
                return Job(run, tables, self.folder, self.train)
        return None

    def go(self) -> int:
        """Run all there is; the exit status: 1 where a run failed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "a") as lock:
            try:
                # Runs inherit the lock: those of a killed study keep it until they have ended.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError("another study/run.py, or a run that it started, is at work "
                                "here") from None
            try:
                self.work(lock.fileno())
            finally:
                for job in self.at_work:
                    job.kill()
        waiting = len(self.left()) - len(self.failed)
        if self.failed:
            self.say(f"{len(self.failed)} runs failed, and {waiting} that wait for them were not "
                     f"started; see {self.folder / 'failed.log'}")
        return int(bool(self.failed))

    def work(self, lock: int) -> None:
        """Start runs and take in results until nothing is left that can run."""
        while True:
            while len(self.at_work) < self.jobs and (job := self.next_job()):
                self.at_work.append(job)
                job.start(lock)
            if not self.at_work:
                return
            while not (ended := [job for job in self.at_work if job.ended()]):
                time.sleep(0.05)
            for job in ended:
                self.at_work.remove(job)
                if job.process.returncode:
                    self.take_failure(job)
                else:
                    self.take_result(job)

    def take_result(self, job: Job) -> None:
        """Add the line of a finished run, and remove its folder."""
        line = result_line(job.run, job.tables, job.folder, job.commit, job.wall_seconds,
                           job.cpu_seconds)
        append_line(self.file, line)
        self.results = self.read()
        if not self.keep:
            remove_tree(job.folder)
            job.log.unlink()
        match = line["after"].get("exact_match")
        self.say(f"{job.run.name}: exact match {match:.4f}, {job.wall_seconds:.0f} s; "
                 f"{self.summary_of_left()}")

    def take_failure(self, job: Job) -> None:
        """Note down why a run failed. Its output stays, and the others go on."""
        self.failed.add(job.run.id)
        message = f"{job.run.name}: failed with status {job.process.returncode}: " \
                  f"{printable(job.last_words())} ({job.log})"
        with open(self.folder / "failed.log", "a", encoding="utf-8") as file:
            file.write(message + "\n")
        self.say(message)

    def seconds_of(self, run: Run | Waiting) -> float | None:
        """How long a run takes: the mean of its method's on its testbed, else of all lines."""
        lines = self.results.lines
        for same in (
                [x for x in lines if (x["testbed"], x["method"]) == (run.testbed, run.method)],
                [x for x in lines if x["method"] == run.method], lines):
            if same:
                return sum(x["wall_seconds"] for x in same) / len(same)
        return None

    def summary_of_left(self) -> str:
        """ "12 runs left, about 8 min": at most, since of runs that wait some may be the same."""
        left = [run for run, _ in self.left()]
        seconds = [self.seconds_of(run) for run in left]
        if None in seconds:
            return f"{len(left)} runs left"
        return f"{len(left)} runs left, about {duration(sum(seconds) / self.jobs)}"

    def show(self) -> None:
        """What is done and what is left of each table, and the time for what is left."""
        self.say(f"{'table':<18}{'done':>6}{'left':>6}   time on {self.jobs} cores")
        for name, table in self.tables.items():
            part = Study({name: table}, self.file, self.folder, self.jobs)
            runs = {run for _, run in planned(part.tables, self.results) if isinstance(run, Run)}
            left = part.left()
            seconds = [part.seconds_of(run) for run, _ in left]
            time_left = ("not known before a first run" if None in seconds
                         else duration(sum(seconds) / self.jobs))
            done = sum(self.results.line_of(run) is not None for run in runs)
            self.say(f"{name:<18}{done:>6}{len(left):>6}   {time_left}")
        self.say(f"in all: {self.summary_of_left()} (a run that two tables need is run once)")


def append_line(path: Path, line: dict) -> None:
    """Append to results.jsonl, in place of a torn last line, which a crash may have left. On return
    the line is on the disk."""
    with open(path, "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(line).encode() + b"\n")
        flush(file)


def duration(seconds: float) -> str:
    """ "45 s", "8 min", "2 h 5 min"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def selected(names: list[str] | None) -> dict[str, Table]:
    """Tables by name, or by the beginning of their names: "main" is all tables main-...

    Raises UserError for a name that no table has.
    """
    if not names:
        return TABLES
    for name in names:
        if not any(table == name or table.startswith(f"{name}-") for table in TABLES):
            raise UserError(f"--only {name}: there is no such table; there are "
                            f"{', '.join(TABLES)}")
    return {table: TABLES[table] for table in TABLES
            if any(table == name or table.startswith(f"{name}-") for name in names)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="TABLE", help="only these tables")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (none: the cores)")
    parser.add_argument("--list", action="store_true", help="say what is done and left, and stop")
    parser.add_argument("--keep", action="store_true", help="keep the folders of finished runs")
    given = parser.parse_args(argv)
    try:
        tables = selected(given.only)
        jobs = cores() if given.jobs is None else given.jobs
        if jobs < 1:
            raise UserError(f"--jobs must be at least 1, not {jobs}")
        if not given.list:
            from study.data import prepare
            prepare()
        study = Study(tables, jobs=jobs, keep=given.keep,
                      say=functools.partial(print, flush=True))
        if given.list:
            study.show()
            return 0
        for name in ("SIGTERM", "SIGHUP"):
            signal.signal(getattr(signal, name), signal.default_int_handler)
        return study.go()
    except UserError as error:
        print(f"run.py: {printable(str(error))}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("run.py: stopped; call it again to go on", file=sys.stderr)
        return 3


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
