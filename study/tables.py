"""The study's tables as Markdown, from study/results.jsonl.

    python study/tables.py                  every table
    python study/tables.py tail parts       these
    python study/tables.py --write          put them into docs/results.md and study/README.md

On a page, a table stands between the lines <!-- table: NAME --> and <!-- end -->; --write replaces
what is between them. What was not run yet is printed as "not run".

Numbers: mean +- standard deviation over seeds, and for differences to a control the mean over seeds
of the difference at the same seed +- its standard error.
"""
import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from study.grid import METHODS, TABLES, TESTBEDS, Row, Table  # noqa: E402
from study.plan import (  # noqa: E402
    Plan,
    Results,
    Run,
    at_edge,
    best,
    cpu_seconds,
    plan_row,
    planned,
    read_results,
    steps_of,
    training_cpu_seconds,
    tune_flags,
    tuning_runs,
)
from study.run import RESULTS  # noqa: E402
from support.errors import UserError, printable  # noqa: E402

PAGES = (REPOSITORY / "docs" / "results.md", REPOSITORY / "study" / "README.md")
NOT_RUN = "not run"
MATCHES = (0.5, 0.55, 0.58, 0.6, 0.61)      # exact match whose cost is asked for
# The tables whose runs save their pairs.
WITH_PAIRS = [name for name, table in TABLES.items() if table.watch.get("save_pairs")]


# --------------------------------------------------------------------------------------- statistics

def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def deviation(values: list[float]) -> float | None:
    """The standard deviation, with n - 1; None for fewer than two values."""
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))


def paired(values: dict[int, float],
           control: dict[int, float]) -> tuple[float, float | None] | None:
    """Mean difference to the control over the seeds that both have, and its standard error.

    The standard error is None for one seed. None where no seed is in both.

        {0: 3.0, 1: 5.0}, {0: 1.0, 1: 1.0}  ->  (3.0, 1.0): differences 2 and 4
    """
    gaps = [value - control[seed] for seed, value in values.items() if seed in control]
    if not gaps:
        return None
    spread = deviation(gaps)
    return mean(gaps), None if spread is None else spread / math.sqrt(len(gaps))


def with_spread(middle: float, spread: float | None, digits: int = 3, sign: str = "") -> str:
    """ "0.812 ± 0.004"."""
    text = f"{middle:{sign}.{digits}f}"
    return text if spread is None else f"{text} ± {spread:.{digits}f}"


# ---------------------------------------------------------------------------------------- one table

class Measured(NamedTuple):
    """A row's runs that are done. lines: seed -> line of results.jsonl."""
    row: Row
    plan: Plan
    lines: dict[int, dict]

    def after(self, name: str) -> dict[int, float]:
        """seed -> a held-out value after training."""
        return {seed: line["after"][name] for seed, line in self.lines.items()
                if line["after"].get(name) is not None}


def measured(table: Table, results: Results) -> dict[str, Measured]:
    """title of a row -> what was measured of it."""
    found = {}
    for row in table.rows:
        plan = plan_row(table, row, results)
        lines = {run.seed: line for run in plan.runs
                 if isinstance(run, Run) and (line := results.line_of(run))}
        found[row.title] = Measured(row, plan, lines)
    return found


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def value(name: str, number) -> str:
    """A setting as a reader writes it: "lr 3e-4", "steps 24"."""
    text = f"{number:g}" if isinstance(number, float) else str(number)
    if isinstance(number, float) and 0 < number < 0.01:
        text = re.sub(r"e-0?", "e-", f"{number:.0e}")
    return f"{name} {text}"


def settings(plan: Plan, row: Row, testbed: str) -> str:
    """The tuned settings of a row, and which of them are at an edge of what was tried."""
    if plan.tuned is None:
        return NOT_RUN
    tried = METHODS[plan.method].tried
    edges = at_edge(tried, {name: plan.tuned[name] for name in tried[0]})
    if row.tried:
        edges = at_edge(row.tried, {name: plan.tuned[name] for name in row.tried[0]
                                    if name != "steps"})
    shown = [value(name, number) + " (edge)" * (name in edges)
             for name, number in plan.tuned.items()]
    return ", ".join(shown)


def compared(name: str, results: Results) -> str:
    """The usual table: a line per row, with the difference to its control."""
    table = TABLES[name]
    rows = measured(table, results)
    start = next((line for each in rows.values() for line in each.lines.values()), None)
    lines = [start_line(start)]
    for title, each in rows.items():
        lines.append(compared_line(title, each, rows, table))
    seeds, held_out = len(table.seeds), table.evaluate["eval_rows"]
    caption = (f"*{table.testbed}, {seeds} seed{'s' * (seeds > 1)}, {held_out:,} held-out rows, "
               f"{steps_of(table.testbed)} steps where no other number is given*")
    return caption + "\n\n" + markdown(
        ["run", "exact match", "difference to its control", "NLL", "margin", "steps", "CPU s",
         "tokens generated", "tuned settings"], lines)


def start_line(line: dict | None) -> list[str]:
    """The first line of a table: the start model."""
    if line is None:
        return ["start", NOT_RUN, *[""] * 7]
    before = line["before"]
    return ["start", f"{before['exact_match']:.3f}", "", f"{before['nll']:.4f}",
            f"{before['data_margin']:.3f}", *[""] * 4]


def compared_line(title: str, each: Measured, rows: dict[str, Measured],
                  table: Table) -> list[str]:
    """The cells of a row."""
    tuned = settings(each.plan, each.row, table.testbed)
    if not each.lines:
        return [title, NOT_RUN, *[""] * 6, "" if tuned == NOT_RUN else tuned]
    match = each.after("exact_match")
    shown = with_spread(mean(list(match.values())), deviation(list(match.values())))
    if len(match) < len(table.seeds):
        shown += f" ({len(match)} of {len(table.seeds)} seeds)"
    control = each.row.control or table.control
    gap = None
    if control and control != title:
        gap = paired(match, rows[control].after("exact_match"))
    lines = list(each.lines.values())
    tokens = mean([line["generated_tokens"] for line in lines])
    return [title, shown, with_spread(*gap, sign="+") if gap else "",
            f"{mean(list(each.after('nll').values())):.4f}",
            f"{mean(list(each.after('data_margin').values())):.3f}",
            f"{mean([line['steps'] for line in lines]):.0f}",
            f"{mean([training_cpu_seconds(line) for line in lines]):.1f}",
            f"{tokens / 1000:.0f} k" if tokens else "0", tuned]


def tuning(testbed: str, results: Results) -> str:
    """What was tried for each method, and what came out on the testbed's tuning rows."""
    asked = [row.method for table in TABLES.values() if table.testbed == testbed
             for row in table.rows]
    lines = []
    for name, method in METHODS.items():
        runs = tuning_runs(testbed, name)
        found = [results.line_of(run) for run in runs]
        # A "{loss}" in a row stands for one of the two; the other one is never run.
        if not any(found) and name not in asked:
            continue
        chosen = best(results, runs)
        cells = [", ".join(value(*each) for each in tried.items()) + ": "
                 + (f"{line['after']['exact_match']:.3f}" if line else NOT_RUN)
                 for tried, line in zip(method.tried, found, strict=True)]
        edge = NOT_RUN
        if chosen:
            at = runs.index(chosen)
            cells[at] = f"**{cells[at]}**"
            edge = ", ".join(at_edge(method.tried, method.tried[at])) or "none"
        lines.append([name, "<br>".join(cells), edge])
    held_out = tune_flags(testbed)
    return (f"*{testbed}: exact match on the {held_out['eval_rows']:,} rows of "
            f"{held_out['eval_data']}, one seed*\n\n"
            + markdown(["method", "tried", "chosen value at an edge"], lines))


# ------------------------------------------------------------------------------ tables of their own

def worse_rates(results: Results) -> str:
    """By testbed and over the run: how many pairs are identical, how many of the others are worse,
    and by how much the start model tells y+ from y-."""
    lines = []
    for name in WITH_PAIRS:
        table = TABLES[name]
        for title, each in measured(table, results).items():
            if each.row.change.get("tail") == "drop":
                continue            # without C, y- nearly always fails, and has another margin
            runs = [line["rates"] for line in each.lines.values()]
            cells = [rate_over_run(runs, what, digits)
                     for what, digits in (("identical", 3), ("worse", 3), ("start_margin", 2))]
            lines.append([table.testbed, title, *(cells if runs else [NOT_RUN, "", ""])])
    return ("*First, middle and last quarter of each run. The start model's margin is log p(y+) - "
            "log p(y-) in nats, over the pairs that differ*\n\n" + markdown(
                ["testbed", "run", "identical", "worse, of those that differ",
                 "margin under the start model"], lines))


def rate_over_run(runs: list[list[dict]], name: str, digits: int) -> str:
    """The means over the first quarter of the bins, the middle, and the last quarter."""
    texts = []
    for part in range(3):
        rows = [row for bins in runs for row in beginning_middle_end(bins)[part] if name in row]
        texts.append(f"{mean([row[name] for row in rows]):.{digits}f}" if rows else "-")
    return ", ".join(texts)


def beginning_middle_end(rows: list) -> tuple[list, list, list]:
    """The first quarter, at least one, the last quarter, and what is between.

        12 rows  ->  3, 6 and 3
    """
    quarter = max(1, len(rows) // 4)
    return rows[:quarter], rows[quarter:-quarter], rows[-quarter:]


def curve(line: dict) -> list[tuple[int, float]]:
    """(step, exact match) over a run, with the start and the end."""
    return [(0, line["before"]["exact_match"]),
            *((each["step"], each["exact_match"]) for each in line["evaluations"]),
            (line["steps"], line["after"]["exact_match"])]


def epochs(results: Results) -> str:
    """Exact match over a run three times as long."""
    table = TABLES["epochs"]
    rows = measured(table, results)
    lines, marks = [], []
    for each in rows.values():
        curves = [dict(curve(line)) for line in each.lines.values()]
        if curves and not marks:
            marks = sorted(curves[0])[::2]
        lines.append([each.row.title, *([f"{mean([c[step] for c in curves]):.3f}" for step in marks]
                                        if curves else [NOT_RUN])])
    lines = [line + [""] * (len(marks) + 1 - len(line)) for line in lines]
    return (f"*{table.testbed}, {len(table.seeds)} seeds, {table.evaluate['eval_rows']:,} held-out "
            "rows: exact match after so many steps*\n\n"
            + markdown(["run", *(map(str, marks or ["exact match"]))], lines))


def generated_until(line: dict, step: int) -> float:
    """Tokens that were generated up to and with a step. SPIN generates at the start of a round,
    the other methods the same number of rows at every step."""
    rounds = line["flags"].get("iterations")
    if rounds:
        return line["generated_tokens"] * math.ceil(step * rounds / line["steps"]) / rounds
    return line["generated_tokens"] * step / line["steps"]


def cost_curve(line: dict) -> list[tuple[float, float, float]]:
    """(CPU seconds of training, generated tokens, exact match) at the start of a run, at each of
    its evaluations, and at its end."""
    share = line["cpu_seconds"] / line["wall_seconds"]
    seconds = [0.0, *(each["seconds"] * share for each in line["evaluations"]),
               training_cpu_seconds(line)]
    return [(at, generated_until(line, step), match)
            for at, (step, match) in zip(seconds, curve(line), strict=True)]


def cost_of_match(line: dict, match: float) -> tuple[float, float] | None:
    """CPU seconds of training and tokens generated until an evaluation first shows this exact
    match; None where none does."""
    return next(((seconds, tokens) for seconds, tokens, found in cost_curve(line)
                 if found >= match), None)


def cost(results: Results) -> str:
    """Seconds per step by part, and what a given exact match costs."""
    lines = []
    for each in measured(TABLES["cost"], results).values():
        runs = list(each.lines.values())
        if not runs:
            lines.append([each.row.title, NOT_RUN, *[""] * (2 + len(MATCHES))])
            continue
        cells = [f"{1000 * mean([cpu_seconds(line, part) / line['steps'] for line in runs]):.0f}"
                 for part in ("generate", "score", "update")]
        for match in MATCHES:
            costs = [cost_of_match(line, match) for line in runs]
            reached = [each for each in costs if each]
            seconds, tokens = ([mean([each[i] for each in reached]) for i in (0, 1)]
                               if reached else (0, 0))
            cells.append("-" if not reached else f"{seconds:.1f} s, {tokens / 1000:.0f} k"
                         + f" ({len(reached)} of {len(runs)})" * (len(reached) < len(runs)))
        lines.append([each.row.title, *cells])
    table = TABLES["cost"]
    return (f"*{table.testbed}, {len(table.seeds)} seeds. CPU seconds of training and tokens "
            f"generated until an evaluation on {table.evaluate['eval_rows']:,} held-out rows shows "
            "the exact match; in brackets, how many seeds reach it*\n\n" + markdown(
                ["run", "CPU ms per step: generate", "score", "update",
                 *(f"to {match:g}" for match in MATCHES)], lines))


def times(results: Results) -> str:
    """How long the runs of each table took, each run counted at the first table that needs it."""
    lines, counted, total = [], set(), 0.0
    for name, table in TABLES.items():
        runs = {run for _, run in planned({name: table}, results)}
        found = [results.line_of(run) if isinstance(run, Run) else None for run in runs]
        done = {id(line): line for line in found if line}
        seconds = sum(line["wall_seconds"] for at, line in done.items() if at not in counted)
        lines.append([name, str(len(set(done) - counted)),
                      f"{seconds / 120:.0f} min" if done else NOT_RUN,
                      "not all of it was run" if done and None in found else ""])
        counted |= set(done)
        total += seconds
    lines.append(["in all", str(len(counted)), f"{total / 7200:.1f} h", ""])
    return markdown(["table", "runs that no table above has", "on 2 cores", ""], lines)


# name on the page -> what prints it
PRINTED: dict[str, Callable[[Results], str]] = {
    **{name: (lambda results, name=name: compared(name, results)) for name in TABLES
       if not name.startswith("worse-") and name not in ("epochs", "cost")},
    "worse-rates": worse_rates, "epochs": epochs, "cost": cost, "times": times,
    **{f"tuning-{testbed}": (lambda results, testbed=testbed: tuning(testbed, results))
       for testbed in TESTBEDS}}


# ----------------------------------------------------------------------------------------- the page

def with_tables(page: str, results: Results) -> str:
    """The page with every table between its marks replaced. Raises UserError for unknown names."""
    def replaced(found: re.Match) -> str:
        name = found[1]
        if name not in PRINTED:
            raise UserError(f"there is no table {name}; there are {', '.join(PRINTED)}")
        return f"<!-- table: {name} -->\n{PRINTED[name](results)}\n<!-- end -->"
    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", replaced, page, flags=re.S)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tables.py", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="TABLE", help="only these tables")
    parser.add_argument("--write", action="store_true", help="put them into the pages")
    given = parser.parse_args(argv)
    results = Results(read_results(RESULTS))
    try:
        if given.write:
            for page in PAGES:
                text = with_tables(page.read_text(encoding="utf-8"), results)
                page.write_text(text, encoding="utf-8")
            return 0
        for name in given.names or PRINTED:
            if name not in PRINTED:
                raise UserError(f"there is no table {name}; there are {', '.join(PRINTED)}")
            print(f"{name}\n\n{PRINTED[name](results)}\n")
    except UserError as error:
        print(f"tables.py: {printable(str(error))}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
