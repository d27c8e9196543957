"""The study: which runs it has, how they are run and recorded, and what the tables make of them."""
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import REPOSITORY, run

from study import grid, plan, tables
from study.grid import METHODS, TABLES, Method, Row, Table
from study.plan import Results, Run, Waiting, best, planned, read_results, tuning_runs
from study.run import Study, bins, evaluations, rates, result_line, rounded, start_margins
from support.errors import UserError

SETTINGS = ({"lr": 1e-4}, {"lr": 1e-3})


def line_of(run: Run, match: float, nll: float = 1.0, **more) -> dict:
    """A line of results.jsonl as a run would leave it, with a made-up result."""
    values = {"exact_match": match, "nll": nll, "data_margin": 0.5}
    return {"id": run.id, "name": run.name, "tables": [], "testbed": run.testbed,
            "method": run.method, "flags": dict(run.flags), "seed": run.seed,
            "watch": dict(run.watch), "start": "s", "before": values | {"exact_match": 0.25},
            "after": values, "steps": 96, "wall_seconds": 40.0, "cpu_seconds": 20.0,
            "seconds": {"generate": 10.0, "score": 8.0, "update": 2.0, "evaluate": 10.0,
                        "other": 10.0},
            "generated_tokens": 96_000, "scored_tokens": 300_000, "evaluations": [], "rates": []
            } | more


def all_done(tables_: dict[str, Table], score=lambda run: 0.5) -> Results:
    """Results in which every run of these tables is done, the tuning runs first."""
    lines, waits = [], True
    while waits:      # what is tuned decides what is run
        results = Results(lines)
        runs = {run for _, run in planned(tables_, results)}
        waits = any(isinstance(run, Waiting) for run in runs)
        new = [run for run in sorted(runs, key=str)
               if isinstance(run, Run) and results.line_of(run) is None]
        assert new or not waits
        lines += [line_of(run, score(run)) for run in new]
    return Results(lines)


@pytest.fixture
def testbed(tiny_run, tmp_path) -> str:
    """A testbed: the flag file of a tiny run, by its absolute path without .txt."""
    (tmp_path / "tiny.txt").write_text(" ".join([*tiny_run, "--buffer_size 8 --steps 4"]))
    return str(tmp_path / "tiny")


@pytest.fixture
def few(testbed, monkeypatch, tiny_run) -> dict[str, Table]:
    """A table of two methods with two settings each and one seed, on the tiny testbed."""
    held_out = {"eval_data": tiny_run[tiny_run.index("--eval_data") + 1]}
    monkeypatch.setattr(plan, "METHODS", {
        "sft": Method("SFT", METHODS["sft"].flags, list(SETTINGS)),
        "sapo-orpo": Method("SAPO-ORPO", METHODS["sapo-orpo"].flags, list(SETTINGS))})
    monkeypatch.setattr(plan, "TUNE", held_out | {"eval_rows": 6})
    return {"few": Table("?", testbed, [Row("SFT", "sft"), Row("SAPO-ORPO", "sapo-orpo")],
                         range(1), control="SFT", evaluate=held_out | {"eval_rows": 12})}


# ----------------------------------------------------------------------------------------- the grid

def test_the_whole_grid_can_be_run():
    """With every tuning run done, every row of every table has its runs, one per seed, and train.py
    takes the flags of each."""
    results = all_done(TABLES)
    for table in TABLES.values():
        for row in table.rows:
            found = plan.plan_row(table, row, results)
            assert [each.seed for each in found.runs] == list(table.seeds), row.title
            for each in [*found.tuning, *found.runs]:
                settings = plan.settings_of(tuple(each.words))      # raises where train.py would
                assert settings.seed == each.seed


def test_every_method_has_the_same_tuning():
    """Six different settings for each method; in the table of few rows, six more for each."""
    assert all(len({str(tried) for tried in method.tried}) == 6 for method in METHODS.values())
    assert {len(row.tried) for row in TABLES["few-rows"].rows} == {6}


def test_controls_are_rows_of_their_table():
    """Every control is the title of a row, and no two rows of a table have one title."""
    for table in TABLES.values():
        titles = [row.title for row in table.rows]
        assert len(set(titles)) == len(titles)
        assert {row.control or table.control for row in table.rows} <= {None, *titles}


def test_tuning_never_sees_the_reported_rows():
    """Tuning runs are evaluated on tune.jsonl (where the wording is free: free-tune.jsonl) with a
    seed of their own, all others on report.jsonl (free-report.jsonl) with other seeds."""
    results = all_done(TABLES)
    for table in TABLES.values():
        for row in table.rows:
            found = plan.plan_row(table, row, results)
            free = "free-" if table.testbed in ("free-wording", "no-habit") else ""
            for runs, name in ((found.tuning, "tune"), (found.runs, "report")):
                assert {plan.settings_of(tuple(each.words)).eval_data for each in runs} == {
                    f"study/data/{free}{name}.jsonl"}
            assert {each.seed for each in found.tuning} == {grid.TUNING_SEED}
            assert grid.TUNING_SEED not in table.seeds


def test_rows_get_the_settings_that_did_best():
    """A row's runs have the best tuned settings of its method, and {loss} is the better loss."""
    def score(run: Run) -> float:
        flags = dict(run.flags)
        wanted = {"orpo": ("lr", 3e-5), "dpo": ("beta", 0.5)}.get(flags["loss"], ("lr", 5e-3))
        return 0.5 + 0.1 * (flags[wanted[0]] == wanted[1]) + 0.1 * (flags["loss"] == "orpo")
    table = TABLES["tail"]
    row = table.rows[1]
    found = plan.plan_row(table, row, all_done({"tail": table}, score))
    flags = dict(found.runs[0].flags)
    assert found.method == "sapo-orpo"
    assert (flags["loss"], flags["lr"], flags["tail"]) == ("orpo", 3e-5, "drop")


def test_a_runs_name_says_what_its_method_does_not():
    """The name has the tuned settings and what the row changes, and leaves out what every run of
    the method has; tuning runs say so."""
    found = plan.plan_row(TABLES["reference"], TABLES["reference"].rows[1],
                          all_done({"reference": TABLES["reference"]}))
    assert found.runs[0].name == "habits sapo-dpo ref_every=6 lr=1e-05 beta=0.5 seed=0"
    assert found.tuning[0].name == "habits sapo-dpo tune lr=1e-05 beta=0.5 seed=100"
    assert tuning_runs("free-wording", "sft")[0].name == "free-wording sft tune lr=3e-06 seed=100"


# ------------------------------------------------------------------------------- identity, skipping

def test_a_run_is_what_it_learns(testbed):
    """The order of the flags, a default spelled out, the method's name and what is watched change
    nothing; a learning rate, a seed and the rows it is evaluated on do."""
    one = Run(testbed, "sft", (("loss", "sft"), ("buffer_size", 0), ("lr", 1e-3)), 1)
    same = [one._replace(flags=one.flags[::-1]), one._replace(method="dpo"),
            one._replace(flags=(*one.flags, ("lam", 0.05))),
            one._replace(watch=(("eval_every", 2),))]
    other = [one._replace(seed=2), one._replace(flags=(*one.flags, ("lr", 2e-3))),
             one._replace(flags=(*one.flags, ("eval_rows", 3)))]
    assert {each.id for each in same} == {one.id}
    assert len({one.id, *(each.id for each in other)}) == 4


def test_finished_runs_are_skipped(few, tmp_path):
    """What results.jsonl holds is not run again; what is watched and was not recorded is."""
    study = Study(few, tmp_path / "results.jsonl", tmp_path / "runs")
    first = study.left()[0][0]
    study.results = Results([line_of(first, 0.5)])
    assert first not in [each for each, _ in study.left()]
    watched = first._replace(watch=(("eval_every", 2),))
    assert study.results.line_of(watched) is None
    assert Results([line_of(watched, 0.5)]).line_of(first)


def test_lines_of_another_start_model_do_not_count(testbed):
    """Of a testbed, only lines of the newest start model are used."""
    one = Run(testbed, "sft", (("loss", "sft"), ("buffer_size", 0)), 0)
    other = one._replace(seed=1)
    results = Results([line_of(one, 0.5, start="old"), line_of(other, 0.5, start="new")])
    assert results.line_of(one) is None and results.line_of(other)


# ------------------------------------------------------------------------ choosing by made-up lines

def test_best_is_the_highest_match_then_the_lowest_nll(few, testbed):
    """best() goes by exact match on the tuning rows, then by nll, and waits for all candidates."""
    candidates = tuning_runs(testbed, "sft")
    lines = [line_of(candidates[0], 0.5, nll=1.0), line_of(candidates[1], 0.5, nll=0.9)]
    assert best(Results(lines), candidates) == candidates[1]
    lines[0]["after"]["exact_match"] = 0.51
    assert best(Results(lines), candidates) == candidates[0]
    assert best(Results(lines[:1]), candidates) is None


def test_an_edge_is_named():
    """The smallest and the largest of three values are edges; of two values none is."""
    tried = [{"lr": lr, "beta": beta} for lr in (1, 2, 3) for beta in (0.1, 0.5)]
    assert plan.at_edge(tried, {"lr": 3, "beta": 0.5}) == ["lr"]
    assert plan.at_edge(tried, {"lr": 2, "beta": 0.5}) == []


def test_the_same_cost_is_taken_from_cpu_seconds(few, testbed):
    """SAPO's 4 steps take 20 s of training in a process that had a core half of the time: 10 CPU
    seconds. SFT's take 4. So SFT gets 10 steps. The cheapest run of each method counts, but not one
    that had no core most of the time."""
    ours, theirs = tuning_runs(testbed, "sft"), tuning_runs(testbed, "sapo-orpo")
    sft = {"seconds": {"generate": 0.0, "score": 3.0, "update": 1.0}, "wall_seconds": 10.0,
           "cpu_seconds": 10.0}
    lines = [*(line_of(each, 0.5, **sft) for each in ours),
             *(line_of(each, 0.5) for each in theirs)]
    lines[0]["cpu_seconds"] = lines[-1]["cpu_seconds"] = 40.0
    results = Results(lines)
    assert plan.same_cost_steps(results, testbed, "sft", "sapo-orpo")[1] == 10
    lines[-1]["cpu_seconds"] = 4.0
    assert plan.same_cost_steps(Results(lines), testbed, "sft", "sapo-orpo")[1] == 10


# ------------------------------------------------------------------------------- numbers of a table

def test_paired_difference_by_hand():
    """Differences 2, 4 and 6 at the same seeds: mean 4, standard deviation 2, standard error
    2 / sqrt 3. A seed that one side lacks does not count."""
    gap, error = tables.paired({0: 3.0, 1: 5.0, 2: 7.0, 3: 9.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert (gap, error) == (4.0, pytest.approx(2 / math.sqrt(3)))
    assert tables.paired({0: 3.0}, {0: 1.0}) == (2.0, None)
    assert tables.paired({0: 3.0}, {1: 1.0}) is None


def test_bins_and_rates_by_hand():
    """24 steps are 12 bins of two. A bin's share of worse pairs weighs each step by how many of
    its pairs differ: 1.0 of 4 and 0.5 of 2 are 5 of 6."""
    assert bins(24)[0] == range(1, 3) and bins(24)[-1] == range(23, 25)
    assert [len(part) for part in bins(5)] == [1] * 5
    records = [{"identical": 0.0, "worse": 1.0}, {"identical": 0.5, "worse": 0.5}] * 12
    margins = {1: (6.0, 3), 2: (2.0, 1)}
    found = rates(records, margins)
    assert len(found) == 12
    assert found[0] == {"step": 2, "identical": 0.25, "worse": pytest.approx(5 / 6),
                        "start_margin": 2.0, "start_pairs": 4}
    assert found[1] == {"step": 4, "identical": 0.25, "worse": pytest.approx(5 / 6)}
    assert rates([{"identical": 1.0, "worse": None}], {}) == [{"step": 1, "identical": 1.0}]
    assert rates([{"loss": 1.0}], {}) == [{"step": 1}]          # SFT has no pairs


def test_start_margins_leave_identical_pairs_out():
    """Margins of -1 - -3 = 2 and -2 - -3 = 1 at step 1; an identical pair is no pair that
    differs."""
    pairs = [{"step": 1, "identical": False, "chosen_logps_at_start": -1.0,
              "rejected_logps_at_start": -3.0},
             {"step": 1, "identical": False, "chosen_logps_at_start": -2.0,
              "rejected_logps_at_start": -3.0},
             {"step": 2, "identical": True, "chosen_logps_at_start": -1.0,
              "rejected_logps_at_start": -1.0}]
    assert start_margins(pairs) == {1: (3.0, 2)}


def test_evaluations_know_the_seconds_until_then():
    """The seconds of an evaluation are those of all steps up to it."""
    records = [{"step": 1, "seconds": 2.0}, {"step": 2, "seconds": 3.0, "eval_nll": 1.5,
                                              "eval_exact_match": 0.25}]
    assert evaluations(records) == [{"step": 2, "seconds": 5.0, "nll": 1.5, "exact_match": 0.25}]


def test_cost_of_a_match():
    """The first evaluation that shows the match counts, in CPU seconds: half of the wall-clock
    seconds here. SPIN has generated a whole round's tokens when the round begins."""
    one = line_of(Run("habits", "sft", (("loss", "sft"), ("buffer_size", 0)), 0), 0.9)
    one["evaluations"] = [{"step": 24, "seconds": 4.0, "exact_match": 0.5},
                          {"step": 48, "seconds": 8.0, "exact_match": 0.7}]
    assert tables.cost_of_match(one, 0.6) == (4.0, 48_000)
    assert tables.cost_of_match(one, 0.8) == (10.0, 96_000)
    assert tables.cost_of_match(one, 0.95) is None
    one["flags"]["iterations"] = 3
    assert tables.generated_until(one, 1) == 32_000
    assert tables.generated_until(one, 33) == 64_000


# --------------------------------------------------------------------------------------- the tables

def test_tables_say_what_was_not_run():
    """Every table prints from no results at all, and says that nothing was run."""
    assert all(tables.NOT_RUN in printed(Results([])) for printed in tables.PRINTED.values())


def test_every_table_prints_when_all_is_run():
    """With made-up results of every run, no table lacks a value."""
    results = all_done(TABLES)
    for line in results.lines:
        line["evaluations"] = [{"step": line["steps"] // 2, "seconds": 10.0, "exact_match": 0.4,
                                "nll": 1.0}]
        line["rates"] = [{"step": i, "identical": 0.5, "worse": 0.9, "start_margin": 1.0}
                         for i in range(12)]
    for name, printed in tables.PRINTED.items():
        assert tables.NOT_RUN not in printed(results), name


def test_a_table_by_hand(monkeypatch):
    """Two methods at two seeds: mean, standard deviation, paired difference, standard error; a
    missing seed is said."""
    table = Table("?", "habits", [Row("SFT", "sft"), Row("DPO", "dpo")], range(2), control="SFT")
    monkeypatch.setitem(tables.TABLES, "hand", table)
    after = {("sft", 0): 0.5, ("sft", 1): 0.6, ("dpo", 0): 0.7, ("dpo", 1): 0.9}
    results = all_done({"hand": table}, lambda each: after.get((each.method, each.seed), 0.5))
    text = tables.compared("hand", results)
    assert "| SFT | 0.550 ± 0.071 |  |" in text
    assert "| DPO | 0.800 ± 0.141 | +0.250 ± 0.050 |" in text
    few = Results([line for line in results.lines if (line["method"], line["seed"]) != ("dpo", 1)])
    assert "| DPO | 0.700 (1 of 2 seeds) | +0.200 |" in tables.compared("hand", few)


def test_the_pages_tables_are_the_output():
    """Every table stands on a page, as study/tables.py prints it from study/results.jsonl."""
    pages = [page.read_text(encoding="utf-8") for page in tables.PAGES]
    results = Results(read_results(REPOSITORY / "study" / "results.jsonl"))
    for page in pages:
        assert tables.with_tables(page, results) == page, "run: python study/tables.py --write"
    assert all(f"<!-- table: {name} -->" in "".join(pages) for name in tables.PRINTED)


def test_an_unknown_table_is_refused(capsys):
    """One sentence that names the tables there are, and status 2."""
    assert tables.main(["nonsense"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tables.py: there is no table nonsense; there are main-habits")
    assert error.count("\n") == 1


def test_figures_are_drawn(tmp_path, monkeypatch):
    """Every figure is drawn from made-up results, and twice the same."""
    pytest.importorskip("matplotlib")
    from study import plot
    results = all_done(TABLES)
    for line in results.lines:
        line["evaluations"] = [{"step": line["steps"] // 2, "seconds": 10.0, "exact_match": 0.4}]
        line["rates"] = [{"step": 8 * i + 8, "identical": 0.5, "worse": 0.9, "start_margin": 1.0}
                         for i in range(12)]
    monkeypatch.setattr(plot, "read_results", lambda path: results.lines)
    for folder in ("one", "two"):
        monkeypatch.setattr(plot, "FIGURES", tmp_path / folder)
        plot.main()
    for name in plot.DRAWN:
        one, two = ((tmp_path / folder / f"{name}.svg").read_bytes() for folder in ("one", "two"))
        assert one == two and len(one) > 5000


# --------------------------------------------------------------------------------------- the runner

# Stands for train.py: writes what a run leaves, or fails where the learning rate is FAILS.
STAND_IN = """
    import json, os, pathlib, sys, time
    flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
    with open(os.environ["STARTED"], "a") as file:
        print(flags["--lr"], flags["--seed"], file=file)
    if flags["--lr"] == os.environ.get("FAILS"):
        sys.exit("train.py: a sentence about what went wrong")
    time.sleep(float(os.environ.get("SLEEPS", 0)))
    out = pathlib.Path(flags["--out"])
    out.mkdir(parents=True)
    held_out = {"exact_match": 0.5, "nll": 1.0, "data_margin": 0.1}
    (out / "summary.json").write_text(json.dumps({
        "before": held_out, "after": held_out, "seconds": {"generate": 1.0, "score": 1.0,
        "update": 1.0, "evaluate": 1.0, "other": 1.0, "total": 5.0}, "generated_tokens": 10,
        "scored_tokens": 20, "steps": 1, "identical": None, "worse": None}))
    (out / "metrics.jsonl").write_text('{"step": 1, "seconds": 1.0}\\n')
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> list[str]:
    (tmp_path / "stand_in.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    return [sys.executable, str(tmp_path / "stand_in.py")]


def started(tmp_path) -> list[str]:
    return (tmp_path / "started").read_text().splitlines()


def test_a_study_runs_tuning_then_rows_and_nothing_twice(few, tmp_path, stand_in):
    """4 tuning runs and 2 runs of rows, a line each; no folder stays; a second call runs nothing,
    and a torn last line is run again."""
    file, said = tmp_path / "results.jsonl", []
    study = Study(few, file, tmp_path / "runs", jobs=2, say=said.append, train=stand_in)
    assert study.go() == 0
    lines = read_results(file)
    assert len(lines) == len({line["id"] for line in lines}) == len(started(tmp_path)) == 6
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["lock"]
    assert said[-1].endswith("0 runs left, about 0 s")
    Study(few, file, tmp_path / "runs", say=said.append, train=stand_in).go()
    assert len(started(tmp_path)) == 6
    file.write_bytes(file.read_bytes()[:-10])
    Study(few, file, tmp_path / "runs", say=said.append, train=stand_in).go()
    assert len(started(tmp_path)) == 7 and len(read_results(file)) == 6


def test_a_crash_keeps_the_rest_going(few, tmp_path, stand_in, monkeypatch):
    """Both tuning runs at one learning rate fail: the others are recorded, what waits for them is
    not run, the sentence is in failed.log and the status is 1."""
    monkeypatch.setenv("FAILS", "0.001")
    file, said = tmp_path / "results.jsonl", []
    study = Study(few, file, tmp_path / "runs", say=said.append, train=stand_in)
    assert study.go() == 1
    assert {line["flags"]["lr"] for line in read_results(file)} == {1e-4}
    log = (tmp_path / "runs" / "failed.log").read_text()
    assert log.count("train.py: a sentence about what went wrong") == 2
    assert said[-1].startswith("2 runs failed, and 2 that wait for them were not started")
    monkeypatch.delenv("FAILS")
    assert Study(few, file, tmp_path / "runs", say=said.append, train=stand_in).go() == 0
    assert len(read_results(file)) == 6


def test_ctrl_c_ends_the_runs_and_leaves_nothing(few, tmp_path, stand_in, monkeypatch):
    """An interrupt ends the processes at work and removes their folders; no line is written, and
    the lock is free again."""
    monkeypatch.setenv("SLEEPS", "60")
    file = tmp_path / "results.jsonl"
    study = Study(few, file, tmp_path / "runs", jobs=2, train=stand_in)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            study.go()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert len(started(tmp_path)) == 2 and not file.exists()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["lock"]
    for job in study.at_work:
        with pytest.raises(ProcessLookupError):
            os.kill(job.process.pid, 0)
    monkeypatch.delenv("SLEEPS")
    assert Study(few, file, tmp_path / "runs", say=str, train=stand_in).go() == 0


def test_two_studies_do_not_run_at_once(few, tmp_path, stand_in, monkeypatch):
    """A second study, and one while a run of a killed study goes on, is refused in a sentence."""
    monkeypatch.setenv("SLEEPS", "2")
    (tmp_path / "runs").mkdir()
    first = Study(few, tmp_path / "results.jsonl", tmp_path / "runs", train=stand_in)
    job = first.next_job()
    with open(tmp_path / "runs" / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job.start(lock.fileno())
    second = Study(few, tmp_path / "results.jsonl", tmp_path / "runs", train=stand_in)
    with pytest.raises(UserError, match="at work here"):
        second.go()
    job.kill()
    time.sleep(0.05)
    monkeypatch.delenv("SLEEPS")
    second.say = str
    assert second.go() == 0


def test_a_line_says_everything(tiny_run, testbed, tmp_path):
    """A run of SAPO leaves a line with commit, versions, results, seconds, tokens, evaluations and
    rates, none of them empty, which is one line of JSON."""
    one = Run(testbed, "sapo-orpo", (("loss", "orpo"), ("lr", 1e-3)), 3,
              (("eval_every", 2), ("save_pairs", True)))
    _, summary = run([f"@{testbed}.txt"], tmp_path / "out", *one.words[1:])
    line = result_line(one, ["few"], tmp_path / "out", "abc", 10.0, 5.0)
    assert json.loads(json.dumps(line)) == line
    assert line["before"] == rounded(summary["before"]) != line["after"]
    assert line["seed"] == 3 and line["tables"] == ["few"] and line["commit"] == "abc"
    assert set(line["versions"]) == {"python", "torch", "transformers", "cpu"}
    assert all(line["seconds"][part] > 0 for part in ("generate", "score", "update", "evaluate"))
    assert line["generated_tokens"] > 0 and line["scored_tokens"] > line["generated_tokens"]
    assert [each["step"] for each in line["evaluations"]] == [2] and line["steps"] == 4
    assert len(line["rates"]) == 4
    assert all(0 <= each["identical"] <= 1 and each["start_pairs"] for each in line["rates"])


@pytest.mark.slow
def test_the_study_runs_train_py(few, tmp_path):
    """The real runner with the real train.py: six tiny runs, each with what the tables need."""
    study = Study(few, tmp_path / "results.jsonl", tmp_path / "runs", jobs=2, say=str)
    assert study.go() == 0
    lines = read_results(tmp_path / "results.jsonl")
    assert len(lines) == 6
    assert all(line["wall_seconds"] > line["seconds"]["total"] > 0 and line["cpu_seconds"] > 1
               and 0 <= line["after"]["exact_match"] <= 1 for line in lines)


def test_the_command_lists_and_refuses():
    """--list works without results of a table; a wrong name or number gives a sentence and
    status 2."""
    def command(*words: str):
        return subprocess.run([sys.executable, "study/run.py", *words], cwd=REPOSITORY,
                              capture_output=True, text=True, timeout=60)
    done = command("--list", "--only", "tail")
    assert done.returncode == 0 and done.stdout.splitlines()[1].startswith("tail")
    for words, sentence in ((["--only", "nonsense"], "run.py: --only nonsense: there is no such"),
                            (["--jobs", "0"], "run.py: --jobs must be at least 1, not 0")):
        done = command(*words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith(sentence)
