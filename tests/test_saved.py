"""What a run leaves behind on request: its new pairs, the EMA model, a model per epoch; and what
summary.json says that it sums to."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    StopAfter,
    check_same_run,
    flag_value,
    parsed,
    read_records,
    results,
    run,
    same_state,
    two_processes,
    weights,
)
from test_report import names_in_table
from test_resume import resume, stopped_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import support.report
import train
from ema import EMA
from sapo import pair_logps
from support.epochs import ends_epoch, epochs_ended, remove_later_epochs
from support.errors import Stopped
from support.settings import parse
from support.totals import Totals

ALL = "--save_pairs --save_ema --save_every_epoch"
SPIN = "--rejected spin --iterations 2 --loss dpo"


def read_pairs(out: Path) -> list[dict]:
    with (out / "pairs.jsonl").open() as file:
        return [json.loads(line) for line in file]


def model_weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


# ------------------------------------------------------------------------------------------- pairs

@pytest.mark.parametrize("flags", [
    "--loss dpo --ref fixed --num_rejected 2", "--tail drop --segment_eos forbid",
    "--tail rewrite", SPIN])
def test_saved_pairs_are_the_new_pairs(flags, tiny_run, tmp_path, monkeypatch):
    """A line of pairs.jsonl holds a new pair of its step: A B C and A B' (C) are its responses to
    the token, the text is theirs, and the log-probabilities are those of the start model."""
    made, after_step = [], train.Run.after_step

    def noted(self, step, metrics, took_step, nonfinite_rows, new_pairs, batch):
        made.extend(new_pairs)
        after_step(self, step, metrics, took_step, nonfinite_rows, new_pairs, batch)

    monkeypatch.setattr(train.Run, "after_step", noted)
    run(tiny_run, tmp_path, f"--save_pairs {flags}")
    saved = read_pairs(tmp_path)
    folder = flag_value(tiny_run, "--model")
    start, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(
        folder)
    for line, pair in zip(saved, made, strict=True):
        ids = line["ids"]
        assert (line["step"], line["row"], line["start"]) == (pair.step, pair.example_id,
                                                              len(ids["A"]))
        assert ids["x"] == pair.prompt and ids["A"] + ids["B"] + ids["C"] == pair.chosen
        assert ids["A"] + ids["B'"] + (ids["C"] if line["keeps_C"] else []) == pair.rejected
        assert line["identical"] == (pair.chosen == pair.rejected)
        assert line["text"] == {name: tokenizer.decode(part) for name, part in ids.items()}
    with torch.no_grad():
        logps = pair_logps(start, made)
    for name in ("chosen_logps", "rejected_logps"):
        assert [line[f"{name}_at_start"] for line in saved] == pytest.approx(
            getattr(logps, name).tolist(), rel=1e-4)
    assert names_in_table((Path(train.__file__).parent / "docs" / "metrics.md").read_text(),
                          "New pairs") - {"x", "A", "B", "C"} == set(saved[0])


def test_worse_as_in_the_metrics(tiny_run, tmp_path):
    """The share of worse lines among those that differ is what metrics.jsonl has, step by step, and
    summary.json over the run; so is the share of identical ones."""
    _, summary = run(tiny_run, tmp_path, "--save_pairs --temperature 0 --batch_size 8",
                     "--buffer_size 8 --segment_len 1")
    saved = read_pairs(tmp_path)

    def rates(lines):
        differ = [line["worse"] for line in lines if not line["identical"]]
        return (1 - len(differ) / len(lines), sum(differ) / len(differ) if differ else None)

    for record in read_records(tmp_path):
        expected = rates([line for line in saved if line["step"] == record["step"]])
        assert (record["identical"], record.get("worse")) == pytest.approx(expected)
    assert (summary["identical"], summary["worse"]) == pytest.approx(rates(saved))


@pytest.mark.parametrize("flags", ["", "--loss dpo --ref ema", SPIN])
def test_saving_changes_nothing(flags, tiny_run, tmp_path):
    """A run that saves pairs, the EMA model and every epoch has the same metrics, weights and
    results as one that does not."""
    saving, sizes = ALL, "--batch_size 16 --buffer_size 16"
    if flags == SPIN:
        saving, sizes = ALL.replace("--save_ema", ""), "--batch_size 16"
    _, plain = run(tiny_run, tmp_path / "plain", f"{sizes} {flags}")
    _, saved = run(tiny_run, tmp_path / "saved", f"{sizes} {flags} {saving}")
    assert results(plain) == results(saved)
    assert same_state(dict(weights(tmp_path / "plain")), dict(weights(tmp_path / "saved")))
    assert not {"pairs.jsonl", "final-ema", "epochs"} & {
        path.name for path in (tmp_path / "plain").iterdir()}
    assert (tmp_path / "saved" / "epochs").exists()


def test_pairs_that_a_full_disk_refused(tiny_run, tmp_path, monkeypatch, capsys):
    """A disk that refuses lines of pairs.jsonl for a step costs neither the run nor the lines."""
    run(tiny_run, tmp_path / "whole", "--save_pairs")
    append, refused = support.report.append_whole, []

    def unreliable(path, content):
        if path.name == "pairs.jsonl" and len(refused) < 2:
            refused.append(path)
            raise OSError(28, "No space left on device")
        append(path, content)

    monkeypatch.setattr(support.report, "append_whole", unreliable)
    run(tiny_run, tmp_path / "out", "--save_pairs")
    assert capsys.readouterr().out.count("pairs.jsonl: could not be written (No space left") == 1
    assert len(refused) == 2 and read_pairs(tmp_path / "out") == read_pairs(tmp_path / "whole")


# ---------------------------------------------------------------------------- the EMA model, epochs

def test_save_ema(tiny_run, tmp_path, monkeypatch):
    """final-ema/ holds the EMA model, final/ the policy: both ordinary Hugging Face folders."""
    emas, update = [], EMA.update
    monkeypatch.setattr(EMA, "update", lambda ema, policy: (
        emas.append(ema.model), update(ema, policy))[1])
    run(tiny_run, tmp_path, "--save_ema --loss dpo")
    saved = model_weights(tmp_path / "final-ema")
    assert same_state(saved, dict(emas[0].state_dict()))
    assert not same_state(saved, dict(weights(tmp_path)))
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("final", "final-ema")]
    assert names[0] == names[1]
    assert "moving average of the model." in (tmp_path / "final-ema" / "README.md").read_text()
    assert "moving average of the model." not in (tmp_path / "final" / "README.md").read_text()


def ends(flags: str, rows: int, steps: int) -> list[int]:
    s = parsed(f"--model m --data d --batch_size 4 {flags}")
    return [step for step in range(1, steps + 1) if ends_epoch(s, rows, step, steps)]


def test_where_epochs_end():
    """At the first step that completes a pass over the rows. In SPIN passes count from the start of
    the round, and its last step ends one, too; a step of several passes ends one."""
    assert ends("", 10, 10) == [3, 5, 8, 10] and ends("", 8, 5) == [2, 4]
    assert ends("", 3, 2) == [1, 2]
    assert ends("--rejected spin --iterations 2", 10, 12) == [3, 5, 6, 9, 11, 12]
    assert ends("--rejected spin --iterations 2", 12, 12) == [3, 6, 9, 12]
    s = parsed("--model m --data d --batch_size 4 --rejected spin --iterations 2")
    assert [epochs_ended(s, 10, step, 12) for step in (2, 3, 6, 8, 12)] == [0, 1, 3, 3, 6]


def test_save_every_epoch(tiny_run, tmp_path):
    """epochs/N is the policy as it was after the N-th pass: what a run of so many steps ends with.

    40 rows in batches of 16: an epoch ends with the steps 3 and 5.
    """
    flags = "--batch_size 16 --buffer_size 16 --schedule constant"
    run(tiny_run, tmp_path / "out", f"{flags} --save_every_epoch")
    assert sorted(path.name for path in (tmp_path / "out" / "epochs").iterdir()) == ["1", "2"]
    for number, steps in ((1, 3), (2, 5)):
        run(tiny_run, tmp_path / str(steps), f"{flags} --steps {steps}")
        folder = tmp_path / "out" / "epochs" / str(number)
        assert same_state(model_weights(folder), dict(weights(tmp_path / str(steps))))
        assert f"{steps} optimizer steps" in (folder / "README.md").read_text()


def test_later_epochs_are_removed(tmp_path):
    """A run that is taken back loses the epochs that it will come to again, and what was half
    written; folders with other names stay."""
    for name in ("1", "2", "3", "10", "2.partial", "mine", "3-mine"):
        (tmp_path / "epochs" / name).mkdir(parents=True)
    remove_later_epochs(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "epochs").iterdir()) == [
        "1", "2", "3-mine", "mine"]
    remove_later_epochs(tmp_path / "nothing", 0)


# ----------------------------------------------------------------------------- resuming, processes

def saved_folders(out: Path) -> dict[str, dict]:
    """Weights of final-ema/ and of every epoch."""
    folders = [*(out / "epochs").iterdir(), *out.glob("final-ema")]
    return {folder.name: model_weights(folder) for folder in folders}


def check_saved_the_same(one: Path, other: Path) -> None:
    assert read_pairs(one) == read_pairs(other)
    assert same_state(saved_folders(one), saved_folders(other))
    a, b = (json.loads((out / "summary.json").read_text()) for out in (one, other))
    assert results(a) == results(b)


@pytest.mark.parametrize("stop", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_resume_is_exact_with_everything_saved(stop, tiny_run, tmp_path):
    """A run that was stopped and resumed leaves the same pairs, EMA model, epochs and sums as one
    that never stopped, also where pairs and epochs beyond its checkpoint had been written."""
    flags = [*tiny_run, *f"{ALL} --batch_size 16 --buffer_size 16 --save_every 3 --keep 9".split()]
    train.train(parse([*flags, "--out", str(tmp_path / "whole")]))
    out = tmp_path / "stopped"
    stopped_run(flags, out, stop)
    resume(out)
    resume(out / "checkpoints" / "step-000003")         # back, over all that was written since
    check_same_run(tmp_path / "whole", out)
    check_saved_the_same(tmp_path / "whole", out)


def test_two_processes_save_all_pairs(tiny_run, tmp_path):
    """With two processes, pairs.jsonl has the pairs of both, once each; a resumed run's file is the
    same, and so are its sums."""
    flags = [*tiny_run, *f"{ALL} --batch_size 16 --buffer_size 16 --save_every 3 --keep 9".split()]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert two_processes(lambda: train.train(parse([*flags, "--out", str(whole)]))) == [0, 0]

    def stopped():
        with pytest.raises(Stopped):
            train.train(parse([*flags, "--out", str(out)]), StopAfter(1))

    assert two_processes(stopped) == [0, 0]
    assert two_processes(lambda: resume(out)) == [0, 0]
    check_saved_the_same(whole, out)
    saved = read_pairs(whole)
    assert [line["step"] for line in saved] == [step for step in range(1, 7) for _ in range(16)]
    assert len({line["row"] for line in saved[:32]}) == 32      # of 40 rows, within the first epoch


def test_shard_saves_the_same(tiny_run, tmp_path):
    """--shard on two processes: the same epochs and EMA model as without, up to rounding, and the
    same pairs with their log-probabilities under the start model."""
    sizes = "--batch_size 16 --buffer_size 16 --temperature 0 --steps 3"
    flags = [*tiny_run, *f"{ALL} {sizes}".split()]
    for name in ("ddp", "shard"):
        more = ["--shard"] if name == "shard" else []
        assert two_processes(lambda more=more, name=name: train.train(
            parse([*flags, *more, "--out", str(tmp_path / name)]))) == [0, 0]
    one, other = (saved_folders(tmp_path / name) for name in ("ddp", "shard"))
    assert one.keys() == other.keys() == {"1", "final-ema"}
    for name in one:
        gaps = torch.cat([(one[name][key] - other[name][key]).abs().flatten() for key in one[name]])
        assert gaps.mean() < 1e-5
    for a, b in zip(*(read_pairs(tmp_path / name) for name in ("ddp", "shard")), strict=True):
        assert (a["row"], a["ids"]["A"]) == (b["row"], b["ids"]["A"])
        assert a["chosen_logps_at_start"] == pytest.approx(b["chosen_logps_at_start"], rel=1e-4)


# ----------------------------------------------------------------------------------------- the sums

def test_totals_by_hand():
    """Seconds by part add up to the whole, with those of earlier processes; counts add up, rates
    are over the pairs of the run, and over none there is no rate."""
    world = SimpleNamespace(sum=lambda values: [2 * value for value in values])
    clock = SimpleNamespace(totals={"generate": 3.0, "score": 2.0}, elapsed=lambda: 10.0)
    totals = Totals(clock)
    assert totals.summary(1)["identical"] is None and totals.summary(1)["worse"] is None
    totals.add(world, {"generated_tokens": 5, "scored_tokens": 9, "pairs": 4, "identical": 1,
                       "checked": 3, "worse": 2})
    later = Totals(SimpleNamespace(totals={"score": 1.0}, elapsed=lambda: 1.5), totals.state())
    later.add(world, {"pairs": 4})
    assert later.summary(7) == {
        "steps": 7, "seconds": {"generate": 3.0, "score": 3.0, "update": 0.0, "evaluate": 0.0,
                                "other": 5.5, "total": 11.5},
        "generated_tokens": 10, "scored_tokens": 18, "identical": 2 / 16, "worse": 4 / 6}


@pytest.mark.parametrize("flags", ["", SPIN, "--loss sft", "--rejected data"])
def test_the_sums_of_a_run(flags, tiny_run, tmp_path, monkeypatch):
    """Tokens are those of the pairs that were made and used, counted here pair by pair; SPIN's
    answers count once per round. The seconds of a part are the sum over the steps."""
    made, used, rewrite, backward = [], [], train.Rewriter.__call__, train.backward

    def noted(*arguments):
        pairs = rewrite(*arguments)
        made.append([pair for few in pairs for pair in few])
        return pairs

    monkeypatch.setattr(train.Rewriter, "__call__", noted)
    monkeypatch.setattr(train, "backward", lambda s, world, scorer, reference, pairs, beta: (
        used.extend(pairs), backward(s, world, scorer, reference, pairs, beta))[1])
    records, summary = run(tiny_run, tmp_path, f"{flags} --eval_every 2 --save_every 2")
    written = [pair for pairs in made[1:] for pair in pairs]        # made[0]: the held-out pairs
    assert summary["generated_tokens"] == sum(pair.rejected_stop - pair.start for pair in written)
    assert summary["scored_tokens"] == sum(
        len(pair.prompt) + len(pair.chosen) + len(pair.rejected[pair.start:]) for pair in used)
    assert summary["steps"] == 6 and (summary["generated_tokens"] > 0) == (flags in ("", SPIN))
    seconds = summary["seconds"]
    for part in ("generate", "score", "update"):
        assert seconds[part] == pytest.approx(sum(record[f"seconds_{part}"] for record in records))
    parts = [value for name, value in seconds.items() if name != "total"]
    assert min(parts) > 0 and seconds["total"] == pytest.approx(sum(parts))
