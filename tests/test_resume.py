"""Runs that stop and are resumed: equal to runs that never stopped, and careful about what they
go on from."""
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import (
    AXES,
    DATA,
    StopAfter,
    check_same_run,
    checkpoint_names,
    flag_value,
    forked,
    own_buffer,
    quick_command,
    read_records,
    read_summary,
    results,
    run,
    same_state,
    status_of,
    two_processes,
    untimed,
    weights,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import support.report
import train
from support.errors import Stopped, UserError
from support.run_folder import lock_run, new_run_folder
from support.settings import parse
from test_sapo import tiny

RESUMED = [*AXES, "--generate_batch 4", "--ema_every 4 --num_rejected 2",
           "--ema_every 3 --loss dpo --ref ema", "--dtype bf16 --grad_checkpoint"]


def stopped_run(flags: list[str], out: Path, step: int) -> None:
    """A run that a signal stops after a step."""
    with pytest.raises(Stopped):
        train.train(parse([*flags, "--out", str(out)]), StopAfter(step))


def resume(out: Path, *more: str) -> None:
    """Go on with a run."""
    train.train(parse(["--resume", str(out), *more]))


# ------------------------------------------------------------------------------------------- exact

def check_resume(flags: str, tiny_run: list[str], tmp_path: Path) -> None:
    """A run stopped after 3 of 6 steps and resumed equals one that never stopped."""
    flags = [*tiny_run, "--save_every", "6", *own_buffer(flags), *flags.split()]
    train.train(parse([*flags, "--out", str(tmp_path / "whole")]))
    stopped_run(flags, tmp_path / "stopped", 3)
    assert [record["step"] for record in read_records(tmp_path / "stopped")] == [1, 2, 3]
    resume(tmp_path / "stopped")
    check_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("flags", [
    "--loss dpo --ref ema", "--rejected spin --iterations 2 --loss dpo", "--loss sft"])
def test_resume_is_exact(flags, tiny_run, tmp_path):
    """A run of 6 steps stopped after 3 and resumed equals one that never stopped, bit for bit:
    metrics, weights, optimizer, EMA, reference, buffer with its counts and random state. Segments
    of step 4 were generated before the stop."""
    check_resume(flags, tiny_run, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("flags", RESUMED)
def test_resume_is_exact_for_every_method(flags, tiny_run, tmp_path):
    """The same for every method of the axes table."""
    check_resume(flags, tiny_run, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("flags", RESUMED)
def test_resume_is_exact_on_two_processes(flags, tiny_run, tmp_path):
    """The same with two processes, each with a buffer of its own."""
    flags = [*tiny_run, "--save_every", "6", *own_buffer(flags), *flags.split()]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    def training(arguments: list[str], *stop: StopAfter) -> list[int]:
        return two_processes(lambda: train.train(parse(arguments), *stop))

    assert training([*flags, "--out", str(whole)]) == [0, 0]
    assert training([*flags, "--out", str(stopped)], StopAfter(3)) == [3, 3]
    assert training(["--resume", str(stopped)]) == [0, 0]
    check_same_run(whole, stopped, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("short", [1, 2, 3, 5])
def test_an_extended_run_equals_a_long_one(short, tiny_run, tmp_path):
    """A finished run extended to 6 steps equals one of 6, although the step where the extension
    begins shares its segments' batch with the step before it."""
    flags = [*tiny_run, "--buffer_size", "8", "--schedule", "constant", "--save_every", "1"]
    run(flags, tmp_path / "short", "--steps", str(short), "--buffer_size", "8")
    run(flags, tmp_path / "long", "--buffer_size", "8")
    resume(tmp_path / "short", "--steps", "6")
    check_same_run(tmp_path / "short", tmp_path / "long")


# ------------------------------------------------------------------------------- says and refuses

def test_resume_says_and_refuses(tiny_run, tmp_path, capsys):
    """A folder with a run is refused; --resume refuses flags that would make it another run, and
    another number of processes; it says what else differs; a finished run has nothing to do."""
    out, flags = tmp_path / "out", [*tiny_run, "--buffer_size", "8"]
    stopped_run(flags, out, 2)
    with pytest.raises(UserError, match="holds a run already"):
        run(tiny_run, out)
    for more, words in ((["--seed", "1"], "--seed 1 .was 0"),
                        (["--batch_size", "2"], "--batch_size 2"),
                        (["--model", str(DATA / "model")], "--model"),
                        (["--data", str(DATA / "heldout.jsonl")], "--data"),
                        (["--loss", "dpo"], "--loss dpo"), (["--out", "other"], "own folder")):
        with pytest.raises(UserError, match=words):
            parse(["--resume", str(out), *more])
    for nowhere in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match="no run there"):
            parse(["--resume", str(nowhere)])

    assert two_processes(lambda: resume(out)) == [2, 2]
    assert untimed(out)[-1]["step"] == 2 and checkpoint_names(out) == ["step-000002"]

    capsys.readouterr()
    train.train(parse([*flags, "--resume", str(out), "--out", str(out), "--lr", "5e-4"]))
    said = capsys.readouterr().out
    assert "going on after step 2" in said and "--lr [0.0005] (was [0.001])" in said
    assert len(untimed(out)) == 6
    resume(out)
    assert "had finished" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_starts_over(tiny_run, tmp_path, capsys):
    """A run killed before its first checkpoint is taken up from the start, and says so; a record
    that the kill cut short goes. A folder that is replaced with --overwrite keeps other files."""
    out, flags = tmp_path / "out", [*tiny_run, "--buffer_size", "8"]
    stopped_run(flags, out, 2)
    (out / "notes.txt").write_text("mine")
    run(flags, out, "--overwrite", "--steps", "1")
    assert len(untimed(out)) == 1 and not (out / "checkpoints").exists()
    assert (out / "notes.txt").read_text() == "mine"
    before = untimed(out)
    (out / "summary.json").unlink()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    capsys.readouterr()
    resume(out)
    assert "starting over" in capsys.readouterr().out
    assert untimed(out) == before


def test_runs_that_are_extended_or_taken_back(tiny_run, tmp_path, capsys):
    """A finished run is extended from its last checkpoint, and is not finished meanwhile. Going
    back to an older checkpoint drops what came after, and says so. A run can't be shortened, and a
    copy that somebody made of a checkpoint is neither used nor in the way."""
    out, flags = tmp_path / "out", [*tiny_run, "--buffer_size", "8", "--schedule", "constant"]
    train.train(parse([*flags, "--out", str(out), "--save_every", "2"]))
    with pytest.raises(Stopped):
        train.train(parse(["--resume", str(out), "--steps", "9"]), StopAfter(2))
    assert [record["step"] for record in untimed(out)] == list(range(1, 9))
    assert not (out / "summary.json").exists()
    with pytest.raises(UserError, match="3 steps are fewer than the 8"):
        resume(out, "--steps", "3")

    older = out / "checkpoints" / "step-000006"
    copied = shutil.copytree(older, older.with_name("step-000006-mine"))
    with pytest.raises(UserError, match="not a checkpoint"):
        resume(copied)
    capsys.readouterr()
    resume(older, "--save_every", "3")
    assert "going on after step 6, without the later step-000008" in capsys.readouterr().out
    assert checkpoint_names(out) == ["step-000006", "step-000009"] and copied.exists()
    run(flags, tmp_path / "whole", "--buffer_size", "8", "--steps", "9")
    assert untimed(out) == untimed(tmp_path / "whole")


def test_what_is_not_extended(tiny_run, tmp_path):
    """A finished run without a checkpoint can't be extended and stays as it is. A run of SPIN can't
    be made longer: the starts of its rounds would move. --overwrite never removes its input."""
    whole = tmp_path / "whole"
    run(tiny_run, whole, "--steps", "2")
    before = untimed(whole)
    with pytest.raises(UserError, match="kept no checkpoint"):
        resume(whole, "--steps", "20")
    assert untimed(whole) == before and (whole / "final").exists()
    for inside in (["--model", str(whole / "final")], ["--data", str(whole / "metrics.jsonl")]):
        with pytest.raises(UserError, match="holds the model or the data"):
            new_run_folder(parse([*tiny_run, *inside, "--out", str(whole), "--overwrite"]))
    spin = ["--rejected", "spin", "--iterations", "2", "--loss", "dpo"]
    stopped_run([*tiny_run, *spin], tmp_path / "spin", 1)
    with pytest.raises(UserError, match="--steps 8"):
        parse(["--resume", str(tmp_path / "spin"), "--steps", "8"])


def test_resume_from_another_folder(tiny_run, tmp_path, monkeypatch, capsys):
    """A run that was started with relative paths, and a --max_len that its model lowers, is
    resumed from any folder and reports no change. --trust_remote_code is not inherited."""
    out, flags = tmp_path / "out", [*tiny_run, "--buffer_size", "8", "--max_len", "400"]
    monkeypatch.chdir(Path(flag_value(tiny_run, "--model")).parent)
    flags[flags.index("--model") + 1] = "model"
    stopped_run([*flags, "--trust_remote_code"], out, 1)
    monkeypatch.chdir(tmp_path)
    assert parse(["--resume", "out"]).trust_remote_code is False
    capsys.readouterr()
    resume(Path("out"))
    said = capsys.readouterr().out
    assert "going on after step 1" in said and "max_len" not in said.split("SAPO-ORPO:")[0]


def test_resume_with_a_path_beside_train_py(tiny_run, tmp_path, monkeypatch):
    """--model data/model names the folder beside train.py from anywhere (recipes do that). Such a
    run is resumed, and its model folder does not count as changed."""
    monkeypatch.chdir(tmp_path)
    flags = [*tiny_run, "--model", "data/model", "--random_init", "--rejected", "data"]
    flags += ["--loss", "sft", "--steps", "2", "--eval_data", str(DATA / "heldout.jsonl")]
    flags[flags.index("--eval_data") + 1] = flag_value(tiny_run, "--eval_data")
    monkeypatch.setattr(train, "Evaluation", lambda *arguments: lambda model: {})
    stopped_run(flags, tmp_path / "out", 1)
    resume(tmp_path / "out")
    assert len(untimed(tmp_path / "out")) == 2


# ------------------------------------------------------------------------------------ what changed

@pytest.fixture
def own_inputs(tiny_run, tmp_path) -> list[str]:
    """The flags of tiny_run with a model and data of its own, which a test may change."""
    flags = [*tiny_run, "--buffer_size", "8"]
    for name in ("--model", "--data", "--eval_data"):
        source = Path(flag_value(tiny_run, name))
        copied = tmp_path / source.name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copied)
        flags[flags.index(name) + 1] = str(copied)
    return flags


def reverse_rows(flags: list[str], name: str) -> None:
    path = Path(flag_value(flags, name))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[::-1]))


def change_a_weight(flags: list[str]) -> None:
    path = Path(flag_value(flags, "--model")) / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def change_the_shape(flags: list[str]) -> None:
    folder = Path(flag_value(flags, "--model"))
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    tiny(vocab_size=len(AutoTokenizer.from_pretrained(folder)), pad_token_id=end, eos_token_id=end,
         bos_token_id=None, intermediate_size=48).save_pretrained(folder)


@pytest.mark.parametrize("change, words", [
    (lambda flags: reverse_rows(flags, "--data"), "training rows .--data. changed"),
    (lambda flags: reverse_rows(flags, "--eval_data"), "held-out rows .--eval_data. changed"),
    (change_a_weight, "model folder .--model. changed"),
    (change_the_shape, "model folder .--model. changed")])
def test_what_changed_is_refused(change, words, own_inputs, tmp_path, monkeypatch):
    """Training rows, held-out rows or a model folder that changed since the run began: a resumed
    run names what changed before it trains, and leaves the run's folder as it was."""
    out = tmp_path / "out"
    stopped_run(own_inputs, out, 1)
    change(own_inputs)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(train, "backward", lambda *arguments: pytest.fail("it trained"))
    with pytest.raises(UserError, match=words):
        resume(out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_a_template_that_reads_the_clock(own_inputs, tmp_path):
    """A chat template that prints the date is told when the run began, in a resumed run too: the
    two runs render the same text, and the resumed one ends like one that never stopped. Of several
    processes, all are told rank 0's time."""
    template = Path(flag_value(own_inputs, "--model")) / "chat_template.jinja"
    template.write_text("{{ strftime_now('%H:%M:%S %d %b %Y') }}\n" + template.read_text())
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = [*own_inputs, "--save_every", "6", "--template_date", "2024-05-31T12:34:56"]
    train.train(parse([*flags, "--out", str(whole)]))
    stopped_run(flags, out, 2)
    resume(out)
    check_same_run(whole, out)
    assert parse(["--resume", str(out)]).template_date == "2024-05-31T12:34:56"
    with pytest.raises(UserError, match="template_date"):
        parse(["--resume", str(out), "--template_date", "2025-01-01"])

    # Without the flag, the date is that of the run's start. One that resumes later keeps it.
    stopped_run(own_inputs, tmp_path / "dated", 1)
    saved = json.loads((tmp_path / "dated" / "settings.json").read_text())["template_date"]
    assert saved and parse(["--resume", str(tmp_path / "dated")]).template_date == saved

    def two_clocks():
        given = parse([*own_inputs, "--steps", "1", "--out", str(tmp_path / "two")])
        given.template_date = f"2024-05-31T12:34:5{os.environ['RANK']}"
        train.train(given)
        assert given.template_date.endswith("50")

    assert two_processes(two_clocks) == [0, 0]


# --------------------------------------------------------------------------------- locks, closings

def test_two_processes_resume_one_run(tiny_run, tmp_path, capfd):
    """While a process runs a run, a second one that resumes or overwrites it, or that starts in its
    folder, gets one sentence and status 2. The run's files stay as they were."""
    out = tmp_path / "out"
    stopped_run([*tiny_run, "--buffer_size", "8"], out, 1)
    files = {path: path.read_bytes() for path in out.rglob("step-*/*")}
    with lock_run(out):
        for flags in (["--resume", str(out)], [*tiny_run, "--out", str(out), "--overwrite"],
                      ["--resume", str(out / "checkpoints" / "step-000001")]):
            status, _, said = quick_command(*flags, capfd=capfd)
            assert status == 2 and "another process runs this run" in said, said
            assert f"process {os.getpid()}" in said and "Traceback" not in said
    assert {path: path.read_bytes() for path in out.rglob("step-*/*")} == files
    assert quick_command("--resume", str(out), capfd=capfd)[0] == 0


def test_a_run_lets_go_of_its_folder(tiny_run, tmp_path):
    """However a run ends, its folder is free afterwards, in the same process too: a notebook can
    resume what it has just stopped, while the error of the stop is still at hand."""
    out = tmp_path / "out"
    with pytest.raises(Stopped) as stop:
        train.train(parse([*tiny_run, "--buffer_size", "8", "--out", str(out)]), StopAfter(2))
    lock_run(out).release()
    assert stop.value.status == 3
    for refused in ([str(out), "--steps", "1"], [str(out / "checkpoints" / "step-000001")]):
        with pytest.raises(UserError) as error:
            train.train(parse(["--resume", *refused]))
        lock_run(out).release()
        assert error.value.status == 2
    resume(out)
    lock_run(out).release()
    resume(out)                 # finished: nothing to do
    lock_run(out).release()


@pytest.mark.parametrize("steps, save_every, kept", [
    (6, 0, []), (6, 3, ["step-000003", "step-000006"]), (5, 2, ["step-000004", "step-000005"])])
def test_checkpoints_of_a_finished_run(steps, save_every, kept, tiny_run, tmp_path):
    """A finished run keeps no checkpoint without --save_every. With that flag the last one is of
    the last step, and --keep of them are there."""
    run(tiny_run, tmp_path, "--steps", str(steps), "--save_every", str(save_every))
    assert checkpoint_names(tmp_path) == kept
    assert (tmp_path / "checkpoints").exists() == bool(kept)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("moment", ["before final", "before summary"])
def test_killed_while_closing(moment, tiny_run, finished_run, tmp_path, monkeypatch):
    """A run killed between its last step and its summary, with no --save_every: it is resumed to
    the same end without training again."""
    flags, out = [*tiny_run, "--buffer_size", "8"], tmp_path / "out"

    def kill(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    def killed():
        if moment == "before final":
            train.Run.close.__globals__["save_model"] = kill
        else:
            support.report.Report.summary = kill
        train.train(parse([*flags, "--out", str(out)]))

    assert status_of(forked(killed)) == -signal.SIGKILL
    assert checkpoint_names(out) == ["step-000006"] and not (out / "summary.json").exists()
    assert (out / "final").exists() == (moment == "before summary")
    records = (out / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(train, "backward", lambda *arguments: pytest.fail("it trained again"))
        resume(out)
    assert (out / "metrics.jsonl").read_bytes() == records and not (out / "checkpoints").exists()
    whole = finished_run()
    assert results(read_summary(out)) == results(read_summary(whole))
    assert same_state(dict(weights(out)), dict(weights(whole)))
    assert torch.isfinite(next(iter(weights(out).values()))).all()
