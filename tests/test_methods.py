"""Whole runs of every method: what the loop does, in which order, and to which numbers."""
import copy
import dataclasses
import json
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    AXES,
    RUN_ELSEWHERE,
    check_close_runs,
    command,
    flag_value,
    parsed,
    quick_command,
    read_records,
    read_summary,
    run,
    same_state,
    two_processes,
    untimed,
    weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from buffer import ReplayBuffer
from ema import EMA
from sapo import Pair, make_pairs, pair_logps
from support import cli
from support.models import checkpoint_layers
from support.optim import learning_rate
from support.pair_sources import column_pair, minibatch, sft_pair
from support.parallel import World
from support.tokenize_rows import TokenizedExample
from test_sapo import random_ids, some_pairs, tiny


@pytest.mark.parametrize("flags", [
    pytest.param(flags, marks=pytest.mark.slow) if flags in RUN_ELSEWHERE else flags
    for flags in AXES])
def test_axes(flags, finished_run):
    """Every axis of the methods table runs from the command line, alone and combined: finite
    losses, one flat record per step, a summary before and after, and a folder that transformers
    loads."""
    out = finished_run(flags)
    records, summary = read_records(out), read_summary(out)
    assert [record["step"] for record in records] == list(range(1, 7))
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert set(summary["before"]) == set(summary["after"]) >= {"exact_match", "nll", "chosen_logps"}
    last = records[-1]
    assert last["seconds"] == pytest.approx(
        sum(last[f"seconds_{part}"] for part in ("generate", "score", "update")))
    generates = "--rejected data" not in flags and "--loss sft" not in flags
    assert ("identical" in records[0]) == generates
    model = AutoModelForCausalLM.from_pretrained(out / "final")
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert json.loads((out / "settings.json").read_text())["steps"] == 6


@pytest.mark.parametrize("flags", [
    "--loss orpo", "--rejected spin --iterations 2 --loss dpo", "--loss sft"])
def test_rejected_column_is_ignored(flags, tiny_run, finished_run, tmp_path):
    """SAPO, SPIN and SFT never look at the rejected column: with nonsense in its place, or without
    it, every metric and weight is the same, but for what is measured on the held-out rows' own
    pairs."""
    bare = [*tiny_run]
    for name in ("--data", "--eval_data"):
        with open(flag_value(tiny_run, name)) as file:
            rows = [json.loads(line) for line in file]
        for i, row in enumerate(rows):
            if i % 2:
                row["rejected"] = []
            else:
                del row["rejected"]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        bare += [name, str(file)]
    out = finished_run(flags)
    with_column = read_summary(out)
    _, without = run(bare, tmp_path / "bare", flags)
    assert untimed(out) == untimed(tmp_path / "bare")
    assert [without[when] for when in ("before", "after")] == [
        {name: value for name, value in with_column[when].items() if not name.startswith("data_")}
        for when in ("before", "after")]
    assert any(name.startswith("data_") for name in with_column["before"])
    assert same_state(dict(weights(out)), dict(weights(tmp_path / "bare")))
    start = AutoModelForCausalLM.from_pretrained(flag_value(tiny_run, "--model")).state_dict()
    assert not same_state(dict(weights(out)), dict(start))


def record_calls(monkeypatch, events: list, *places: tuple[object, str, object]) -> None:
    """Let functions note their calls in `events`, in order.

    places: (owner, name, note): note(*arguments) is what is appended when owner.name is called.
    """
    def noted(function, note):
        def call(*args, **kwargs):
            events.append(note(*args))
            return function(*args, **kwargs)
        return call

    for owner, name, note in places:
        monkeypatch.setattr(owner, name, noted(getattr(owner, name), note))


def test_algorithm_1_order(tiny_run, tmp_path, monkeypatch):
    """The loop is Algorithm 1: pairs are written by the EMA model (lines 7 to 10), stored (11),
    drawn (14), scored (15), the optimizer takes its step (16), the EMA model follows (17).

    The EMA model moves on every second optimizer step and only then. It is asked once for both
    steps. The buffer never holds more than its size.
    """
    events, emas = [], []
    record_calls(
        monkeypatch, events,
        (train, "make_pairs", lambda model, *rest: ("write", id(model))),
        (ReplayBuffer, "add", lambda buffer, item: ("store", len(buffer))),
        (ReplayBuffer, "sample", lambda buffer, k: ("draw", k)),
        (train, "compute_loss", lambda s, scorer, *rest: ("score", len(rest[1]))),
        (torch.optim.AdamW, "step", lambda optimizer: ("step", 0)),
        (EMA, "update", lambda ema, policy: ("ema", id(ema.model))))
    update = EMA.update
    monkeypatch.setattr(EMA, "update", lambda ema, policy: emas.append(update(ema, policy)))
    run(tiny_run, tmp_path)
    events = events[1:]                                     # the first wrote the held-out pairs
    one_step = ["store"] * 4 + ["draw", "score", "score", "step", "ema"]
    assert [name for name, _ in events] == (["write"] + one_step * 2) * 3
    assert len({what for name, what in events if name in ("write", "ema")}) == 1
    assert emas == [False, True] * 3
    assert max(size for name, size in events if name == "store") == 8
    assert {what for name, what in events if name == "draw"} == {4}


@pytest.mark.parametrize("ema_every, grouped", [
    (2, 3), (4, 2), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_grouping_changes_nothing(ema_every, grouped, tiny_run, tmp_path, monkeypatch):
    """Segments of all steps between two EMA refreshes are written in one batch, and each step
    stores what it would have stored alone: greedy, the buffer gets the same pairs at every step,
    and the weights end the same."""
    calls, stored = [], []
    record_calls(monkeypatch, calls,
                 (train, "make_pairs", lambda model, examples, *rest: len(examples)))
    record_calls(monkeypatch, stored, (ReplayBuffer, "add", lambda buffer, item: item))
    sizes, added = {}, {}
    for room in (4, 64):
        run(tiny_run, tmp_path / str(room),
            f"--temperature 0 --ema_every {ema_every} --generate_batch {room}")
        sizes[room], added[room] = calls[:], stored[:]
        calls.clear()
        stored.clear()
    assert sizes[4] == [4] * (12 // 4 + 6)                  # the 12 held-out rows, then 6 steps
    assert sizes[64] == [12] + [4 * ema_every] * grouped
    assert [pair.step for pair in added[4]] == sorted([*range(1, 7)] * 4)
    assert added[4] == added[64]
    assert any(pair.chosen != pair.rejected for pair in added[4])
    assert same_state(dict(weights(tmp_path / "4")), dict(weights(tmp_path / "64")))


def test_segments_do_not_depend_on_the_batch():
    """Where an example's segment lies depends on its own seed alone: not on the other examples,
    their order, or the batch size."""
    s = parsed("--model m --data d --segment_len 5 --temperature 0")
    model, rng = tiny(), np.random.default_rng(4)
    examples = [TokenizedExample(random_ids(rng, n), random_ids(rng, n + 9), None, n, None, "")
                for n in (9, 3, 14, 5, 7)]

    def pairs(examples, size):
        rewriter = train.Rewriter(dataclasses.replace(s, generate_batch=size), World(1),
                                  SimpleNamespace(model=model, eos_ids=[2]))
        rngs = [np.random.default_rng([example.example_id]) for example in examples]
        return rewriter(model, examples, rngs, 2, None)

    together, one_by_one = pairs(examples, 64), pairs(examples[::-1], 1)
    assert [[pair.example_id for pair in few] for few in together] == [
        [n, n] for n in (9, 3, 14, 5, 7)]
    assert together == one_by_one[::-1]
    assert len({pair.start for pair, _ in together}) > 2


def test_tails():
    """y- is A B' C (keep), A B' (drop), or A and all that the model writes after it (rewrite).

    B starts at the same place and, greedy, B' is the same. With rewrite, y- has max_new_tokens
    tokens where no end token comes, or as many as with drop where that is more.
    """
    example = [5, 9], random_ids(np.random.default_rng(1), 20)

    def pair(tail, limit=30):
        return make_pairs(tiny(), [example], 4, np.random.default_rng(3), eos_token_id=None,
                          max_new_tokens=limit, temperature=0, tail=tail)[0]

    keep, drop, rewrite, short = pair("keep"), pair("drop"), pair("rewrite"), pair("rewrite", 1)
    assert 0 < keep.start == drop.start == rewrite.start < keep.stop == drop.stop < 20
    assert keep.rejected[keep.rejected_stop:] == keep.chosen[keep.stop:]
    assert drop.rejected == keep.rejected[:keep.rejected_stop] == rewrite.rejected[:keep.stop]
    assert (rewrite.stop, len(rewrite.rejected), rewrite.rejected_stop) == (20, 30, 30)
    assert short.rejected == drop.rejected and short.stop == 20


# -------------------------------------------------------------------------------------- references

@pytest.mark.parametrize("flags, fresh", [
    ("--loss dpo --ref fixed", [1]), ("--loss dpo --ref policy", [1, 4]), ("--loss dpo", [1])])
def test_reference_refreshes(flags, fresh, finished_run):
    """Table 4's references: DPO's loss is log 2 exactly when the reference equals the policy, that
    is at the first step, and with --ref policy after each refresh (every 3 steps here). By default
    the reference is the EMA model's."""
    assert flags != "--loss dpo" or parsed(f"--model m --data d {flags}").ref == "ema"
    records = read_records(finished_run(flags))
    assert [r["step"] for r in records if abs(r["loss"] - math.log(2)) < 1e-6] == fresh


def test_ema_reference_follows_the_ema(tiny_run, tmp_path, monkeypatch):
    """--ref ema: after --ref_every steps the reference holds the EMA model's weights, not the
    policy's."""
    seen, emas, update = [], [], EMA.update

    def state(model):
        return copy.deepcopy(dict(model.state_dict()))

    record_calls(monkeypatch, seen, (
        train, "backward", lambda s, world, scorer, reference_scorer, *rest: (
            state(reference_scorer.model), state(scorer.model))))
    monkeypatch.setattr(EMA, "update", lambda ema, policy: (
        update(ema, policy), emas.append(state(ema.model))))
    run(tiny_run, tmp_path, "--loss dpo --ref ema")
    references = [reference for reference, _ in seen]
    assert same_state(references[0], references[2])
    assert not same_state(references[2], references[3])
    assert same_state(references[3], emas[2]) and not same_state(references[3], seen[3][1])
    assert same_state(references[3], references[5])


# -------------------------------------------------------------------------------------------- SPIN

def test_spin(tiny_run, tmp_path, monkeypatch):
    """SPIN: each round answers its prompts once, with the policy as it was at the round's start,
    and uses that policy as reference (the loss is log 2 at the first step). The optimizer starts
    afresh and takes the round's own lr and beta. Within a round an answer never changes."""
    made, learned, states = [], [], []
    record_calls(monkeypatch, made, (
        train, "make_pairs", lambda model, examples, *rest: [e.example_id for e in examples]))
    record_calls(monkeypatch, learned, (
        train, "backward", lambda s, world, scorer, reference_scorer, pairs, beta: (pairs, beta)))
    record_calls(monkeypatch, states, (
        train, "optimizer_step", lambda s, world, policy, optimizer, *rest: len(optimizer.state)))
    records, _ = run(tiny_run, tmp_path,
                     "--rejected spin --iterations 2 --loss dpo --lr 1e-3 5e-4 --beta 0.1 5",
                     "--steps 24 --schedule constant")
    rounds = [[pair for pairs, _ in half for pair in pairs]
              for half in (learned[:12], learned[12:])]
    used = [sorted({pair.example_id for pair in pairs}) for pairs in rounds]
    answered = [example_id for ids in made[1:] for example_id in ids]   # made[0]: held-out rows
    assert sorted(answered) == sorted(used[0] + used[1]) and used[0] == [*range(40)]
    assert [r["step"] for r in records if abs(r["loss"] - math.log(2)) < 1e-6] == [1, 13]
    assert [r["lr"] for r in records] == [1e-3] * 12 + [5e-4] * 12
    assert [beta for _, beta in learned] == [0.1] * 12 + [5.0] * 12
    assert [step for step, size in enumerate(states, 1) if not size] == [1, 13]
    for pairs in rounds:
        answers = {}
        for pair in pairs:
            assert answers.setdefault(pair.example_id, pair.rejected) == pair.rejected


def test_spin_answers_no_more_than_it_trains_on(tiny_run, tmp_path, monkeypatch):
    """Where the steps of a round come to fewer examples than there are, only those are answered,
    each once."""
    answered, learned = [], []
    record_calls(monkeypatch, answered, (
        train.Rewriter, "__call__", lambda rewriter, model, examples, *rest: [
            e.example_id for e in examples]))
    record_calls(monkeypatch, learned, (
        train, "backward", lambda s, world, scorer, reference, pairs, beta: {
            pair.example_id for pair in pairs}))
    run(tiny_run, tmp_path, "--rejected spin --iterations 2 --loss dpo --steps 5")
    answered = answered[1:]                                 # the first call is the evaluation's
    assert [len(ids) for ids in answered] == [2 * 4, 3 * 4]
    assert [set(ids) for ids in answered] == [set.union(*learned[:2]), set.union(*learned[2:])]


def test_spin_rounds_without_steps(tiny_run, tmp_path):
    """Without --steps each round of SPIN takes --epochs of the data, also where a batch holds more
    than all rows."""
    at = tiny_run.index("--steps")
    records, _ = run([*tiny_run[:at], *tiny_run[at + 2:]], tmp_path,
                     "--rejected spin --iterations 3 --epochs 1 --batch_size 64",
                     "--lr 1e-3 2e-3 3e-3 --schedule constant")
    assert [r["lr"] for r in records] == [1e-3, 2e-3, 3e-3]


# --------------------------------------------------------------------------- order, schedule, pairs

def test_epochs_are_permutations():
    """Each epoch sees every row once, in another order. Processes share a batch without overlap.
    The seed decides."""
    s, rows = parsed("--model m --data d --batch_size 6 --seed 1"), list(range(30))
    ranks = [SimpleNamespace(rank=rank, size=2) for rank in (0, 1)]
    steps = [[minibatch(s, rows, step, world) for world in ranks] for step in range(1, 11)]
    epochs = [[row for shares in steps[first:first + 5] for share in shares for row in share]
              for first in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == rows and epochs[0] != epochs[1]
    other_seed = dataclasses.replace(s, seed=2)
    assert minibatch(other_seed, rows, 1, ranks[0]) != steps[0][0]


def test_learning_rate():
    """Linear warm-up to the peak, then each schedule's own course; warm-up in steps or a share."""
    def course(**changes):
        s = dataclasses.replace(parsed("--model m --data d"), **changes)
        return [learning_rate(s, step, 10, 1.0) for step in range(1, 11)]

    assert course(schedule="constant", warmup=4) == [0.25, 0.5, 0.75] + [1.0] * 7
    assert course(schedule="linear", warmup=0.2) == pytest.approx(
        [0.5, 1] + [1 - i / 9 for i in range(1, 9)])
    assert course(schedule="inverse_sqrt", warmup=4)[-1] == pytest.approx(math.sqrt(4 / 10))
    assert course(schedule="cosine", warmup=0)[4] == pytest.approx(
        (1 + math.cos(math.pi * 5 / 11)) / 2)


def test_column_pair():
    """A row's own rejected response becomes a pair that starts where it leaves the chosen one. A
    row without one, and SFT's, has both sides equal and nothing behind the start."""
    row = TokenizedExample([1], [5, 6, 7, 2], [5, 6, 8, 2], 3, None, "")
    assert column_pair(row) == Pair([1], [5, 6, 7, 2], [5, 6, 8, 2], 2, example_id=3)
    equal = Pair([1], [5, 6, 7, 2], [5, 6, 7, 2], 4, example_id=3)
    assert column_pair(dataclasses.replace(row, rejected=None)) == sft_pair(row) == equal


# ---------------------------------------------------------------- precision, memory and compilation

def test_bf16(tiny_run, tmp_path, monkeypatch):
    """--dtype bf16: losses close to fp32's and not equal to them. Pairs are written by a bf16 copy
    that is the EMA model rounded, and everything that is kept is fp32."""
    fp32, bf16 = (run(tiny_run, tmp_path / dtype, f"--rejected data --dtype {dtype}")[0]
                  for dtype in ("fp32", "bf16"))
    assert fp32[0]["loss"] == pytest.approx(bf16[0]["loss"], rel=0.02)
    assert fp32[0]["loss"] != bf16[0]["loss"]
    writers, emas, update = [], [], EMA.update

    def copied(model):
        return [p.clone() for p in model.parameters()]

    record_calls(monkeypatch, writers, (train, "make_pairs", lambda model, *rest: copied(model)))
    monkeypatch.setattr(EMA, "update", lambda ema, policy: (
        update(ema, policy), emas.append(copied(ema.model))))
    run(tiny_run, tmp_path / "sapo", "--dtype bf16 --loss dpo")
    assert len(writers) == 4            # the first for the held-out pairs
    for writer, ema in zip(writers[2:], (emas[1], emas[3]), strict=True):   # it moves at 2 and 4
        assert all(a.dtype == torch.bfloat16 and b.dtype == torch.float32
                   and torch.equal(a, b.bfloat16()) for a, b in zip(writer, ema, strict=True))
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "sapo").values())


def test_grad_checkpoint_changes_nothing(tiny_run, finished_run, tmp_path):
    """--grad_checkpoint: the same weights, from layers that run twice; without dropout, even where
    a layer has its own (OPT)."""
    run(tiny_run, tmp_path, "--loss dpo --grad_checkpoint")
    one, other = weights(finished_run("--loss dpo")), weights(tmp_path)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    for kind, layers in (("llama", lambda m: m.model.layers),
                         ("opt", lambda m: m.model.decoder.layers)):
        model, calls = tiny(kind, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5,
                            attention_dropout=0.5), []
        expected = torch.stack(pair_logps(model, some_pairs()))
        checkpoint_layers(model)
        layers(model)[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found = torch.stack(pair_logps(model, some_pairs()))
        assert torch.allclose(expected, found, atol=1e-6)
        forward_calls = len(calls)
        found.sum().backward()
        assert len(calls) == 2 * forward_calls > 0


@pytest.mark.slow
def test_compile_changes_nothing(tiny_run, tmp_path):
    """--compile: the same losses, in a run that generates and evaluates too."""
    records = []
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        done = command(*tiny_run, "--buffer_size", "8", "--temperature", "0", "--out",
                       str(tmp_path / name), *flags)
        assert done.returncode == 0, done.stderr
        records.append([record["loss"] for record in untimed(tmp_path / name)])
    assert records[0] == pytest.approx(records[1], rel=1e-4)


# ------------------------------------------------------- identical pairs, and what generates badly

def make_identical(monkeypatch, steps: tuple, ranks: tuple = (0, 1)) -> None:
    """Let B' equal B, at these steps, in all pairs that belong to these of two processes."""
    sample = train.SegmentSource.make

    def make(source, step):
        pairs = sample(source, step)
        for step in set(pairs) & set(steps):
            shares = [minibatch(source.s, source.examples, step,
                                SimpleNamespace(rank=rank, size=2)) for rank in ranks]
            ids = {example.example_id for share in shares for example in share}
            pairs[step] = [pair._replace(rejected=pair.chosen) if pair.example_id in ids else pair
                           for pair in pairs[step]]
        return pairs

    monkeypatch.setattr(train.SegmentSource, "make", make)


@pytest.mark.parametrize("loss", ["orpo", pytest.param("dpo", marks=pytest.mark.slow)])
def test_skip_identical_on_one_of_two_processes(loss, tiny_run, tmp_path, monkeypatch):
    """--skip_identical where all pairs of one process are identical: that process contributes
    nothing. Two processes take the steps that one process takes."""
    make_identical(monkeypatch, steps=(1, 4), ranks=(1,))
    flags = f"--skip_identical --temperature 0 --buffer_size 0 --steps 4 --loss {loss}"
    run(tiny_run, tmp_path / "one", flags)
    assert two_processes(lambda: run(tiny_run, tmp_path / "two", flags)) == [0, 0]
    assert [record["identical"] for record in untimed(tmp_path / "two")] == [0.5, 0, 0, 0.5]
    check_close_runs(tmp_path / "one", tmp_path / "two")


def test_skipped_pairs_are_not_stored(tiny_run, tmp_path, monkeypatch):
    """--skip_identical stores no identical pair, also where a process has no other one."""
    make_identical(monkeypatch, steps=(1,), ranks=(1,))
    flags = "--skip_identical --temperature 0 --buffer_size 12 --steps 3"
    assert two_processes(lambda: run(tiny_run, tmp_path, flags)) == [0, 0]
    assert [record["buffer_size"] for record in untimed(tmp_path)] == [2, 6, 10]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_without_pairs(processes, tiny_run, tmp_path, monkeypatch, capfd):
    """--skip_identical where every pair of every process is identical: no step is taken, neither
    the weights nor the EMA model move, the run says so and goes on."""
    make_identical(monkeypatch, steps=(1, 2, 3))
    flags = "--skip_identical --temperature 0 --buffer_size 0 --optimizer rmsprop --ema_every 1"
    moved, update = tmp_path / "moved", EMA.update
    monkeypatch.setattr(EMA, "update", lambda ema, policy: (
        update(ema, policy), moved.open("a").write("x")))
    if processes == 1:
        run(tiny_run, tmp_path / "out", flags)
    else:
        assert two_processes(lambda: run(tiny_run, tmp_path / "out", flags)) == [0, 0]
    records = untimed(tmp_path / "out")
    assert [record["skipped"] for record in records] == [1, 2, 3, 3, 3, 3]
    assert [("loss" in record, record["grad_norm"] > 0) for record in records] == [
        (False, False)] * 3 + [(True, True)] * 3
    assert len(moved.read_text()) == 3 * processes
    said = capfd.readouterr().out
    assert said.count("every pair is identical; there is nothing to learn from") == 3


@pytest.mark.parametrize("flags", [
    "--rejected policy --eval_rows 2", "--rejected ema --eval_rows 2 --batch_size 2"])
def test_one_row_first_and_more_later(flags, tiny_run, tmp_path):
    """Where a process generates for one held-out row first and for larger batches later, the
    recorded decode step holds for both, in two processes and in one."""
    assert two_processes(lambda: run(tiny_run, tmp_path / "two", flags)) == [0, 0]
    run(tiny_run, tmp_path / "one", flags.replace("--eval_rows 2", "--eval_rows 1"))
    run(tiny_run, tmp_path / "alone", "--batch_size 1 --micro_batch 1 --num_rejected 2")
    for name in ("two", "one", "alone"):
        assert all(math.isfinite(record["loss"]) for record in untimed(tmp_path / name))


def test_very_low_temperatures(tiny_run, tmp_path):
    """--temperature 1e-40 is greedy in effect: the same pairs, so the same run as --temperature
    0."""
    for temperature in ("0", "1e-40"):
        run(tiny_run, tmp_path / temperature, f"--temperature {temperature} --steps 3")
    assert untimed(tmp_path / "0") == untimed(tmp_path / "1e-40")


def test_a_model_that_diverged_ends_the_run(tiny_run, tmp_path, capfd):
    """A model that generates with logits that are not finite: one sentence that says what to do,
    on a line of its own, exit status 4, no traceback."""
    status, _, said = quick_command(
        *tiny_run, "--rejected", "policy", "--buffer_size", "8", "--lr", "1e30", "--out",
        str(tmp_path / "out"), capfd=capfd)
    assert status == 4 and "Traceback" not in said
    sentence, = [line for line in said.splitlines() if line.startswith("train.py: ")]
    assert "logits" in sentence and "not finite; lower --lr" in sentence


def test_one_diverged_process_speaks_for_itself(tiny_run, tmp_path, capfd):
    """Logits that are not finite on the second of two processes alone: that process says so, and
    does not wait for the other."""
    def diverge():
        if os.environ["RANK"] == "1":
            write = train.make_pairs

            def make_pairs(model, examples, *rest, **options):
                if len(examples) < 6:       # not for the held-out rows
                    raise FloatingPointError("the logits of the model that generates are not "
                                             "finite")
                return write(model, examples, *rest, **options)

            train.make_pairs = make_pairs
        sys.exit(cli.main(train.train, [*tiny_run, "--rejected", "policy", "--buffer_size", "8",
                                        "--out", str(tmp_path / "out")]))

    assert two_processes(diverge)[1] == 4
    assert "not finite; lower --lr" in capfd.readouterr().err
