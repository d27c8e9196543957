"""What a person sees of a run, and what is written down of it."""
import importlib.util
import json
import re
import resource
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    REPOSITORY,
    flag_value,
    forked,
    parsed,
    quick_command,
    read_records,
    results,
    run,
    status_of,
    untimed,
)

import support.report
import train
from buffer import ReplayBuffer
from sapo import Pair, PairScorer
from support.errors import UserError
from support.metrics import LossMetrics
from support.parallel import World
from support.report import Report, append_whole, buffer_statistics, pair_statistics
from support.settings import parse
from test_sapo import tiny


class Letters:
    """A tokenizer for which id i is the character of that code point; 2 is the end token."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids)).replace("\x02", "" if skip_special_tokens else "<end>")


def letters(text: str) -> list[int]:
    return [*map(ord, text)]


def pair_of(a: str, b: str, rewritten: str, c: str, example_id: int = 0, step: int = 1) -> Pair:
    """A pair in which "rewritten" stands for B in a + b + c. An end token is written as \x02."""
    ended = rewritten.endswith("\x02")
    return Pair(letters("x"), letters(a + b + c), letters(a + rewritten + c * (not ended)), len(a),
                len(a + b), len(a + rewritten), example_id, step)


# -------------------------------------------------------------------------------------- statistics

def test_statistics_of_new_pairs():
    """identical, ended and worse, counted by hand. Worse counts pairs that differ and have a check;
    it asks the check of the pair's own row."""
    examples = {0: SimpleNamespace(check="[0-9]+", chosen_text="12 34"),
                1: SimpleNamespace(check="[0-9]+", chosen_text="7"),
                2: SimpleNamespace(check=None, chosen_text="7")}
    pairs = [pair_of("12 ", "34", "34", "\x02"),                    # identical
             pair_of("12 ", "34", "35", "\x02"),                    # worse
             pair_of("12", " 34", ", 34", "\x02"),                  # differs, and passes
             pair_of("", "7", "", "\x02", example_id=1),            # worse: nothing is there
             pair_of("", "7", "8", "\x02", example_id=2),           # has no check
             pair_of("", "a7", "7\x02", "\x02", example_id=1),      # ended, and passes
             pair_of("1", "2 34\x02", "2 34\x02", "")]              # identical, and ended
    found = pair_statistics(pairs, SimpleNamespace(by_id=examples.get), Letters(), [2, 3])
    assert found == {"identical": (2, 7), "worse": (2, 4), "ended": (2, 7)}


def test_statistics_of_the_buffer():
    """Age and use are those of the batch just drawn; never_used is over all evicted pairs."""
    buffer = ReplayBuffer(2)
    for step in (1, 2):
        buffer.add(pair_of("a", "b", "c", "d", step=step))
    buffer.sample(2)
    buffer.add(pair_of("a", "b", "c", "d", step=3))                 # evicts a pair that was drawn
    batch = buffer.sample(2)
    assert buffer_statistics(buffer, batch, step=4) == {
        "buffer_age": (1 + 2, 2), "buffer_use": (1, 2), "never_used": (0, 1)}
    buffer.add(batch[0])
    buffer.add(batch[0])
    buffer.add(batch[0])                                            # evicts one that was not drawn
    assert buffer_statistics(buffer, batch, step=4)["never_used"] == (1, 4)


def test_dpo_leaves_pairs_without_a_scored_token_out_of_nll():
    """DPO scores B C. Where the rejected response only goes on after the chosen one, B C is empty:
    such a pair counts for the loss, and not as a likelihood of 0 in nll."""
    model = tiny()
    scorer = PairScorer(model)
    empty, other = Pair([5], [6, 7], [6, 7, 8], 2), Pair([5], [6, 7, 9], [6, 8, 9], 1)
    s = parsed("--model m --data d --rejected data --loss dpo")
    with torch.no_grad():
        metrics = LossMetrics(s)
        metrics.add([empty, other], *train.compute_loss(s, scorer, scorer, [empty, other], 0.1))
        expected = scorer([other], skip_shared=True).chosen_nll
    total, count = metrics.sums["nll"]
    assert count == 1 and total == pytest.approx(float(expected)) and expected > 0
    assert metrics.sums["loss"][1] == 2


# ---------------------------------------------------------------------------------- printed pairs

@pytest.fixture
def report(tmp_path):
    s = parsed("--model m --data d --batch_size 2 --buffer_size 2")
    found = Report(s, {}, World(1), tmp_path, 10, 0, None, Letters(), [2])
    yield found
    found.close()


def said(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line]


def test_printed_pairs_are_told_apart(report, capsys):
    """A, B, B' and C of a pair are printed apart, and whether B' is B or C was dropped."""
    report.pair(pair_of("ab", "cd", "XYZ", "ef\x02", example_id=7, step=3))
    assert said(capsys) == ["step 3, row 7", "  x  x", "  A  ab", "  B  cd", "  B' XYZ",
                            "  C  ef<end>"]
    report.pair(pair_of("", "cd", "cd", "ef\x02"))
    assert said(capsys)[2:] == ["  A  ", "  B  cd", "  B' cd   (the same)", "  C  ef<end>"]
    report.pair(pair_of("ab", "cd", "X\x02", "ef\x02"))
    assert said(capsys)[4:] == ["  B' X<end>",
                                "  C  ef<end>   (dropped: the response ended in B')"]
    report.pair(pair_of("ab", "cd", "XY", "ef\x02")._replace(rejected=letters("abXY")))
    assert said(capsys)[4:] == ["  B' XY", "  C  ef<end>   (dropped)"]
    report.pair(pair_of("ab", "cd\x02", "XY", ""))
    assert said(capsys)[4:] == ["  B' XY", "  C  "]


def test_printed_text_is_harmless(report, capsys):
    """No control character of generated text reaches the terminal, and no line break either: a
    text can't pretend to be another line of the output."""
    report.pair(pair_of("\x1b[31ma", "b\nstep 9: loss 0", "\x9b2J\u202ec", "\r\x07\x02"))
    lines = said(capsys)
    assert lines[2:] == [r"  A  \x1b[31ma", r"  B  b\nstep 9: loss 0", r"  B' \x9b2J\u202ec",
                         r"  C  \r\x07<end>"]


@pytest.mark.parametrize("skip", [True, False])
def test_names_are_harmless(skip, tiny_run, tmp_path, capfd):
    """Names of files, folders and columns that hold escape sequences or line breaks are printed
    with these spelled out, in the run's output and in the sentence about a bad row."""
    evil = "\x1b[2J\ntrain.py: pwned"
    data = tmp_path / f"rows{evil}.jsonl"
    with open(flag_value(tiny_run, "--data")) as file:
        rows = [json.loads(line) for line in file]
    rows[1]["check"] = f"({evil}"
    rows[2] = {f"column{evil}": "a"}
    rows[3]["messages"] = rows[3].pop("prompt") if isinstance(rows[3]["prompt"], list) else [
        {"role": f"role{evil}", "content": "a"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = quick_command(
        *tiny_run, "--data", str(data), "--out", str(tmp_path / f"out{evil}"), "--steps", "1",
        "--buffer_size", "8", *["--skip_bad_rows"] * skip, capfd=capfd)
    assert status == (0 if skip else 2), err
    assert "\x1b" not in out + err
    assert r"\x1b[2J\ntrain.py: pwned" in (out if skip else err)
    assert not re.search(r"^train\.py: pwned", out + err, re.MULTILINE)


# ------------------------------------------------------------------------------------ written down

def names_in_table(page: str, heading: str) -> set[str]:
    """The names in the first column of the table below a heading."""
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    return set(re.findall(r"`(\w+)`", "".join(rows)))


def test_every_metric_is_explained(tiny_run, tmp_path):
    """docs/metrics.md explains every name in metrics.jsonl and summary.json, and no other."""
    page = (REPOSITORY / "docs" / "metrics.md").read_text()
    records, summary = run(tiny_run, tmp_path, "--steps 12 --eval_every 2")
    logged = set().union(*records)
    held_out = names_in_table(page, "Held-out results")
    assert names_in_table(page, "One record per step") == {
        name for name in logged if not name.startswith("eval_")}
    assert held_out == set(summary["before"]) == set(summary["after"])
    assert {f"eval_{name}" for name in held_out} == logged - names_in_table(
        page, "One record per step")
    assert [r["step"] for r in records if "eval_nll" in r] == [2, 4, 6, 8, 10]
    assert names_in_table(page, "The whole run") == set(summary) - {"before", "after"}


def test_the_summary_is_what_is_printed(tiny_run, tmp_path, capsys):
    """The closing table has the numbers of summary.json, and their differences."""
    _, summary = run(tiny_run, tmp_path, "--steps 1")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, before in summary["before"].items():
        after = summary["after"][name]
        assert [name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"] in lines


def test_values_that_are_not_finite_are_null(report):
    """metrics.jsonl stays JSON, which knows no NaN."""
    report._write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    text = (report.folder / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert record == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}


@pytest.mark.parametrize("failing, lost", [((2, 3), 0), ((6,), 0), ((5, 6, 7), 2)])
def test_a_line_that_fails_does_not_lose_the_run(failing, lost, tiny_run, finished_run, tmp_path,
                                                 monkeypatch, capsys):
    """Where metrics.jsonl can't be written, the run says so once and goes on. The records come
    with a later step, or after the last one. Those that never could be written are said to be
    lost."""
    whole, calls = finished_run(), []

    def append(path, content):
        calls.append(path)
        if len(calls) in failing:
            raise OSError(28, "No space left on device")
        append_whole(path, content)

    monkeypatch.setattr(support.report, "append_whole", append)
    capsys.readouterr()
    run(tiny_run, tmp_path / "out")
    assert untimed(tmp_path / "out") == untimed(whole)[:6 - lost]
    out = capsys.readouterr().out
    assert out.count("could not be written (No space left on device); trying again") == 1
    assert ("2 records could not be written" in out) == bool(lost)
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()


def test_appending_is_all_or_nothing(tmp_path):
    """Where the disk takes only a part of what is appended, that part goes again."""
    path = tmp_path / "file"
    append_whole(path, b"first line\n")

    def append_beyond_the_limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (15, 15))
        with pytest.raises(OSError):
            append_whole(path, b"second line\n")

    assert status_of(forked(append_beyond_the_limit)) == 0
    assert path.read_bytes() == b"first line\n"
    append_whole(path, b"second line\n")
    assert path.read_bytes() == b"first line\nsecond line\n"


def test_tensorboard(tiny_run, tmp_path, monkeypatch):
    """--tensorboard writes every value of metrics.jsonl. Without the package it is refused with a
    sentence before anything else happens."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: (
        None if name == "tensorboard" else find(name)))
    with pytest.raises(UserError, match="pip install tensorboard"):
        parse([*tiny_run, "--tensorboard"])
    written = []
    board = SimpleNamespace(add_scalar=lambda *record: written.append(record),
                            close=lambda: written.append("closed"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: (
        True if name == "tensorboard" else find(name)))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(
        SummaryWriter=lambda folder, purge_step: board))
    records, _ = run(tiny_run, tmp_path, "--tensorboard --steps 2")
    assert written == [(name, value, record["step"]) for record in records
                       for name, value in record.items()] + ["closed"]


# -------------------------------------------------------------------------------------- evaluation

def without_rejected(tiny_run, tmp_path) -> list[str]:
    """The flags of tiny_run, with data that has no rejected column."""
    flags = [*tiny_run]
    for name in ("--data", "--eval_data"):
        with open(flag_value(tiny_run, name)) as file:
            rows = [json.loads(line) for line in file]
        bare = tmp_path / f"{name}.jsonl"
        bare.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "rejected"}) + "\n"
                                for row in rows))
        flags += [name, str(bare)]
    return flags


def test_sft_keeps_its_evaluation_without_the_column(tiny_run, tmp_path):
    """--loss sft --rejected data on rows without a rejected response: likelihoods, exact match and
    preference are measured all the same, as with plain --loss sft."""
    flags = without_rejected(tiny_run, tmp_path)
    _, summary = run(flags, tmp_path / "data", "--loss sft --rejected data --steps 2")
    _, plain = run(flags, tmp_path / "plain", "--loss sft --steps 2")
    assert set(summary["before"]) == {
        "exact_match", "nll", "preference_accuracy", "preference_margin", "chosen_logps"}
    assert results(summary) == results(plain)


def test_held_out_pairs_of_the_data_are_measured(tiny_run, tmp_path):
    """Held-out rows with a rejected response are measured by it, whatever writes the training's
    pairs, by the mean per token: so the same figures come out for every method."""
    found = [run(tiny_run, tmp_path / str(i), flags)[1]["before"] for i, flags in enumerate(
        ("--steps 1", "--steps 1 --loss dpo", "--steps 1 --loss sft",
         "--steps 1 --rejected data"))]
    for name in ("data_accuracy", "data_margin"):
        assert len({result[name] for result in found}) == 1
    assert found[3]["preference_margin"] == pytest.approx(found[3]["data_margin"])


def test_no_evaluation_where_no_row_is_held_out(tiny_run, tmp_path):
    """--eval_rows 0: all rows are trained on, nothing is evaluated, and the run ends well."""
    at = tiny_run.index("--eval_data")
    flags = [*tiny_run[:at], *tiny_run[at + 2:]]
    records, summary = run(flags, tmp_path, "--eval_rows 0 --eval_every 2 --steps 3")
    assert summary["before"] == summary["after"] == {} and len(records) == 3
    assert read_records(tmp_path)[0]["epoch"] == 4 / 40
