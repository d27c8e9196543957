"""Runs that something goes wrong with: damaged files, a full disk, numbers that are not finite,
kills, signals."""
import copy
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    REPOSITORY,
    TORCHRUN,
    StopAfter,
    check_same_run,
    checkpoint_names,
    forked,
    quick_command,
    read_records,
    run,
    same_state,
    status_of,
    two_processes,
    untimed,
    weights,
)

import support.models
import support.report
import train
from ema import EMA
from support import cli
from support.checkpoint import all_checkpoints, newest_checkpoint, step_of
from support.errors import RunFailed, Stopped
from support.settings import parse

MANIFEST, SETTINGS = "manifest.json", "settings.json"


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory) -> Path:
    """A run of 6 steps that nothing disturbed, with a checkpoint of its last step."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(tiny_run, out, "--save_every", "3")
    return out


@pytest.fixture(scope="module")
def stopped(tiny_run, tmp_path_factory) -> Path:
    """The same run, stopped after step 4. Its checkpoints are of the steps 3 and 4."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    flags = [*tiny_run, "--buffer_size", "8", "--save_every", "3"]
    with pytest.raises(Stopped):
        train.train(parse([*flags, "--out", str(out)]), StopAfter(4))
    return out


@pytest.fixture
def out(stopped, tmp_path) -> Path:
    """A copy of the stopped run, for a test to break."""
    return shutil.copytree(stopped, tmp_path / "out")


# ------------------------------------------------------------------------------------------ damage

@pytest.mark.parametrize("name, harm", [
    ("shared.pt", lambda content: content[:999] + bytes([content[999] ^ 4]) + content[1000:]),
    (MANIFEST, lambda content: content[:len(content) // 2]),
    pytest.param("rank0.pt", lambda content: content[:len(content) // 2], marks=pytest.mark.slow),
    pytest.param("shared.pt", lambda content: None, marks=pytest.mark.slow)])
def test_damaged_checkpoints_are_noticed(name, harm, out, whole, capfd):
    """A file with a flipped bit, cut short, missing, or a broken manifest: one sentence names the
    file and the checkpoint before. Going on from that one ends like a run that was not damaged."""
    older, newest = all_checkpoints(out)
    content = harm((newest / name).read_bytes())
    (newest / name).unlink()
    if content is not None:
        (newest / name).write_bytes(content)
    shutil.copytree(older, out / "checkpoints" / "step-000009.partial")     # never finished
    status, _, said = quick_command("--resume", str(out), capfd=capfd)
    assert status == 2 and "Traceback" not in said
    assert f"{name} is damaged" in said and f"--resume {older}" in said
    assert quick_command("--resume", str(older), capfd=capfd)[0] == 0
    check_same_run(out, whole)


def check_refused(out: Path, file: Path, change, words: str, capfd) -> None:
    """With the content of a JSON file changed, or (change None) a link to /dev/zero in its place,
    `python train.py --resume` ends with status 2 and one sentence that has these words."""
    content = json.loads(file.read_text())
    file.unlink()
    if change:
        file.write_text(json.dumps(change(content)))
    else:
        file.symlink_to("/dev/zero")
    status, _, said = quick_command("--resume", str(out), capfd=capfd)
    assert status == 2 and words in said and "\x1b" not in said, said
    assert "train.py: " in said and len(said.strip().splitlines()) == 1, said


@pytest.mark.parametrize("change, words", [
    (lambda content: {**content, "files": {**content["files"], "../x.pt": {}}}, "its files"),
    (lambda content: {**content, "processes": "1"}, "its processes is not a count"),
    (lambda content: {name: content[name] for name in ("step", "files")}, "its keys"),
    (lambda content: [content], "no JSON object"), (None, "symbolic link")])
def test_a_manifest_of_another_shape(change, words, out, capfd):
    """A manifest.json with other keys, types or file names, or a link in its place: one sentence
    and status 2 from `python train.py --resume`."""
    check_refused(out, out / "checkpoints" / "step-000004" / MANIFEST, change, words, capfd)


@pytest.mark.parametrize("change, words", [
    (lambda content: {**content, "batch_size": "many"}, '"many" for batch_size'),
    (lambda content: {**content, "lr": [None]}, "for lr"),
    (lambda content: {**content, "batch_size": -4}, "--batch_size"),
    (lambda content: {**content, "loss": "\u001b[2J"}, "for loss"),
    (lambda content: {"a": 1}, "which every run saves"), (lambda content: 3, "no JSON object"),
    (None, "symbolic link")])
def test_settings_of_another_shape(change, words, out, capfd):
    """A settings.json with other types, without keys, or a link in its place: one sentence and
    status 2 from `python train.py --resume`, and no escape sequence reaches the terminal."""
    check_refused(out, out / SETTINGS, change, words, capfd)


def test_overwrite_on_folders_that_are_no_runs(tiny_run, out, tmp_path, capfd):
    """--overwrite on a folder with checkpoints/ and final/ of another program, or with a link where
    a run has a folder: one sentence, status 2, and not a byte is changed."""
    others = tmp_path / "others"
    (others / "checkpoints" / "step-000001").mkdir(parents=True)
    (others / "final").mkdir()
    (others / "final" / "model.safetensors").write_text("mine")
    (others / SETTINGS).write_text('{"model": "x", "lr": 1}')
    (out / "final").symlink_to(others / "final")
    for folder, words in ((others, "no settings.json that says"), (out, "symbolic link")):
        before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")
                  if path.name != "lock"}
        status, _, said = quick_command(*tiny_run, "--out", str(folder), "--overwrite", capfd=capfd)
        assert status == 2 and words in said and "Traceback" not in said, said
        assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")
                if path.name != "lock"} == before


# --------------------------------------------------------------------------------------- full disk

def limited(size: int, *arguments: str) -> int:
    """The status of a run on a disk where no file can be larger than `size` bytes."""
    def program():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        sys.exit(cli.main(train.train, list(arguments)))

    return status_of(forked(program))


def test_a_full_disk_costs_no_checkpoint(out, whole, capfd):
    """The disk is full when a checkpoint is written: a sentence, status 4, the checkpoints before
    it untouched, nothing half written left; once there is room, the run resumes to the same end."""
    before = {file: file.read_bytes() for file in out.rglob("step-*/*")}
    capfd.readouterr()
    assert limited(100_000, "--resume", str(out), "--save_every", "1") == 4
    said = capfd.readouterr().err
    assert "could not write the checkpoint" in said and "from step-000004" in said, said
    assert "Traceback" not in said and not list(out.rglob("*.partial"))
    assert {file: file.read_bytes() for file in out.rglob("step-*/*")} == before
    train.train(parse(["--resume", str(out), "--save_every", "3"]))
    check_same_run(out, whole)


def test_a_full_disk_at_the_end_costs_no_training(tiny_run, whole, tmp_path, monkeypatch, capfd):
    """The disk is full when final/ is written, in a run without --save_every: a sentence, status 4,
    and the checkpoint of the last step, from which the run is finished without training."""
    out = tmp_path / "out"

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    def program():
        support.models.flush_tree = full
        sys.exit(cli.main(train.train, [*tiny_run, "--buffer_size", "8", "--out", str(out)]))

    assert status_of(forked(program)) == 4
    said = capfd.readouterr().err
    assert "could not save the model (No space left on device)" in said and "Traceback" not in said
    assert not (out / "final").exists() and not list(out.glob("*.partial"))
    assert checkpoint_names(out) == ["step-000006"]
    monkeypatch.setattr(train, "backward", lambda *arguments: pytest.fail("it trained again"))
    train.train(parse(["--resume", str(out)]))
    assert untimed(out) == untimed(whole) and not (out / "checkpoints").exists()
    assert same_state(dict(weights(out)), dict(weights(whole)))


def test_no_room_for_the_closing_checkpoint(tiny_run, whole, tmp_path, monkeypatch, capsys):
    """Where there is no room for the checkpoint before final/, the run says so and saves the model
    all the same."""
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("support.checkpoint.write_state", full)
    run(tiny_run, tmp_path / "out")
    assert "No space left on device); make room" in capsys.readouterr().out
    assert same_state(dict(weights(tmp_path / "out")), dict(weights(whole)))


def test_a_summary_that_can_not_be_written(tiny_run, whole, tmp_path, capfd):
    """The disk is full when rank 0 of two processes writes summary.json: both end with status 4 and
    for that reason, one sentence says so, and the resumed run finishes."""
    out, write = tmp_path / "out", support.report.write_json

    def full(path, content):
        if path.name == "summary.json":
            raise OSError(errno.ENOSPC, "No space left on device", path.name)
        write(path, content)

    def program():
        support.report.write_json = full
        sys.exit(cli.main(train.train, [*tiny_run, "--buffer_size", "8", "--out", str(out)]))

    assert two_processes(program) == [4, 4]
    said = capfd.readouterr().err
    assert "train.py: summary.json: No space left on device" in said and "Traceback" not in said
    assert "another process" not in said
    assert checkpoint_names(out) == ["step-000006"]
    assert two_processes(lambda: train.train(parse(["--resume", str(out)]))) == [0, 0]
    assert (out / "summary.json").exists() and not (out / "checkpoints").exists()


# -------------------------------------------------------------------------------------- not finite

def nan_at(monkeypatch, *steps: int, in_gradient: bool = False) -> None:
    """Make the loss of one pair (or its gradient alone) NaN at these steps of 2 micro-batches."""
    calls, compute_loss = [], train.compute_loss

    def spoiled(*arguments):
        losses, *others = compute_loss(*arguments)
        calls.append(None)
        if (len(calls) + 1) // 2 not in steps or len(calls) % 2 == 0:
            return losses, *others
        spoil = torch.zeros_like(losses)
        spoil[0] = torch.nan
        if in_gradient:
            losses.register_hook(lambda gradient: gradient + spoil)
            return losses, *others
        return losses + spoil, *others

    monkeypatch.setattr(train, "compute_loss", spoiled)


@pytest.mark.parametrize("in_gradient", [False, True])
def test_a_step_that_is_not_finite_is_left_out(in_gradient, tiny_run, tmp_path, monkeypatch,
                                               capsys):
    """A NaN in the loss, or in the gradient alone: the step is not taken, is said with its rows, is
    counted, does not count for the EMA model, and the record stays valid JSON. The run goes on."""
    seen, updates, backward, update = [], [], train.backward, EMA.update

    def watched(s, world, scorer, reference_scorer, pairs, beta):
        seen.append((copy.deepcopy(scorer.model.state_dict()), {pair.example_id for pair in pairs}))
        return backward(s, world, scorer, reference_scorer, pairs, beta)

    monkeypatch.setattr(train, "backward", watched)
    monkeypatch.setattr(EMA, "update",
                        lambda self, model: updates.append(None) or update(self, model))
    nan_at(monkeypatch, 3, in_gradient=in_gradient)
    run(tiny_run, tmp_path)
    said = next(line for line in capsys.readouterr().out.splitlines() if "not finite" in line)
    rows = json.loads(said[said.index("["):said.index("]") + 1])
    batch_rows = seen[2][1]
    assert said.startswith("step 3:") and set(rows) <= batch_rows
    assert len(rows) == (len(batch_rows) if in_gradient else 1)
    assert same_state(dict(seen[2][0]), dict(seen[3][0]))
    assert not same_state(dict(seen[3][0]), dict(seen[4][0])) and len(updates) == 5
    records = [json.loads(line, parse_constant=lambda name: pytest.fail(name))
               for line in (tmp_path / "metrics.jsonl").open()]
    assert [record["skipped"] for record in records] == [0, 0, 1, 1, 1, 1]
    assert records[2]["grad_norm" if in_gradient else "loss"] is None
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path).values())


def test_the_run_stops_when_nothing_is_finite(tiny_run, tmp_path, monkeypatch):
    """After --max_bad_steps steps in a row without a finite loss the run ends with status 4 and
    names the checkpoint from before the streak. That one is kept although newer ones of the streak
    fill --keep, and the run goes on from it."""
    nan_at(monkeypatch, 1, 3, 4, 5, 6)
    good = tmp_path / "checkpoints" / "step-000002"
    with pytest.raises(RunFailed, match=f"4 steps in a row .* --resume {good}"):
        run(tiny_run, tmp_path, "--max_bad_steps", "4", "--save_every", "1")
    # Step 6 ended the run before its checkpoint.
    assert checkpoint_names(tmp_path) == ["step-000002", "step-000004", "step-000005"]
    assert len(untimed(tmp_path)) == 6
    monkeypatch.undo()
    train.train(parse(["--resume", str(good)]))
    assert [record["skipped"] for record in untimed(tmp_path)] == [1] * 6
    assert checkpoint_names(tmp_path) == ["step-000005", "step-000006"]


def test_a_streak_goes_on_after_a_resume(tiny_run, tmp_path, monkeypatch):
    """Bad steps in a row are counted across a resume: stopping and resuming hides no streak."""
    nan_at(monkeypatch, 3, 4, 5)
    flags = [*tiny_run, "--buffer_size", "8", "--max_bad_steps", "3", "--out", str(tmp_path)]
    with pytest.raises(Stopped):
        train.train(parse(flags), StopAfter(4))
    with pytest.raises(RunFailed, match="3 steps in a row"):
        train.train(parse(["--resume", str(tmp_path)]))
    assert len(untimed(tmp_path)) == 5


def test_a_nan_on_one_process_stops_both(tiny_run, tmp_path, monkeypatch):
    """A NaN on one of two processes: neither takes the step, and both go on to the end."""
    def spoiled():
        if os.environ["RANK"] == "1":
            nan_at(monkeypatch, 2)
        train.train(parse([*tiny_run, "--micro_batch", "1", "--buffer_size", "8", "--out",
                           str(tmp_path)]))

    assert two_processes(spoiled) == [0, 0]
    assert [record["skipped"] for record in untimed(tmp_path)] == [0, 1, 1, 1, 1, 1]


# ------------------------------------------------------------------------------- kills and signals

@pytest.mark.slow
def test_killed_at_random_moments(tiny_run, tmp_path):
    """SIGKILL at 16 random moments of a run, every third during a save, and resumed each time: the
    same final weights, metrics and checkpoint as undisturbed."""
    rng = np.random.default_rng(0)
    flags = [*tiny_run, "--buffer_size", "8", "--steps", "340", "--save_every", "2"]
    out, whole = tmp_path / "out", tmp_path / "whole"

    def start() -> int:
        begun = ["--resume", str(out)] if (out / SETTINGS).exists() else [*flags, "--out", str(out)]
        return forked(lambda: train.train(parse(begun)))

    assert status_of(forked(lambda: train.train(parse([*flags, "--out", str(whole)])))) == 0
    child, saves = start(), 0
    for kill in range(16):
        if kill % 3 == 0:               # wait for a save to be under way, then for some part of it
            while not list(out.glob("checkpoints/*.partial")):
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended early"
            time.sleep(rng.uniform(0, 0.004))
        else:
            time.sleep(rng.uniform(0.1, 0.9))
        os.kill(child, signal.SIGKILL)
        assert status_of(child) == -signal.SIGKILL, "the run ended before it was killed"
        saves += bool(list(out.glob("checkpoints/*.partial")))
        child = start()
    assert status_of(child) == 0 and saves >= 3
    check_same_run(whole, out)


def slow_program(*arguments: str, seconds: float = 0.7) -> None:
    """train.py with steps that take longer, so that signals come in the middle of one."""
    backward = train.backward

    def slower(*inputs):
        until = time.monotonic() + seconds
        while time.monotonic() < until:         # a signal ends a single sleep early
            time.sleep(0.01)
        return backward(*inputs)

    train.backward = slower
    sys.exit(cli.main(train.train, list(arguments)))


def wait_for_step(out: Path, alive) -> None:
    """Return once the first step is in metrics.jsonl; alive(): is the run still there?"""
    until = time.monotonic() + 100
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_bytes():
        assert time.monotonic() < until and alive()
        time.sleep(0.02)


def check_saved(out: Path) -> int:
    """The newest checkpoint of a stopped run is that of the last step; returns the step."""
    last = read_records(out)[-1]["step"]
    assert step_of(newest_checkpoint(out)) == last == len(untimed(out))
    return last


@pytest.mark.parametrize("number", [
    signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_signals(number, tiny_run, tmp_path, capfd):
    """SIGTERM, Ctrl-C and a closed terminal: the run finishes its step, saves and exits with status
    3 and a sentence. The same signal again at once changes nothing. The run resumes."""
    flags = [*tiny_run, "--buffer_size", "8", "--out", str(tmp_path), "--schedule", "constant"]

    def signalled():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)       # under nohup it is ignored
        slow_program(*flags)
    child = forked(signalled)
    wait_for_step(tmp_path, lambda: os.waitpid(child, os.WNOHANG) == (0, 0))
    for _ in range(3):
        os.kill(child, number)
        time.sleep(0.1)
    assert status_of(child) == 3
    said = capfd.readouterr().err
    assert "stopped by a signal after step" in said and "and saved" in said, said
    assert "Traceback" not in said
    last = check_saved(tmp_path)
    train.train(parse(["--resume", str(tmp_path), "--steps", str(last + 1)]))
    assert len(untimed(tmp_path)) == last + 1


def test_a_second_ctrl_c_ends_at_once(tiny_run, tmp_path):
    """A second Ctrl-C, typed a while after the first, ends the run in the middle of the step."""
    flags = [*tiny_run, "--buffer_size", "8", "--out", str(tmp_path)]
    child = forked(lambda: slow_program(*flags, seconds=5))
    wait_for_step(tmp_path, lambda: os.waitpid(child, os.WNOHANG) == (0, 0))
    time.sleep(0.5)         # the record of step 1 is written before step 1 looks for a signal
    os.kill(child, signal.SIGINT)
    time.sleep(1.2)
    os.kill(child, signal.SIGINT)
    begin = time.monotonic()
    assert status_of(child) == -signal.SIGINT and time.monotonic() - begin < 2
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("other", [True, False])
def test_a_signal_to_some_processes_stops_all(other, tiny_run, tmp_path):
    """A signal that reaches one of two processes, or both at slightly different moments: both stop
    after the same step, and save."""
    def signalled():
        (tmp_path / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
        slow_program(*tiny_run, "--buffer_size", "8", "--out", str(tmp_path / "out"), seconds=0.5)

    def signaller():
        wait_for_step(tmp_path / "out", lambda: True)
        for rank in ("1", "0") if other else ("1",):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), signal.SIGTERM)
            time.sleep(0.2)

    child = forked(signaller)
    assert two_processes(signalled) == [3, 3]
    assert status_of(child) == 0
    check_saved(tmp_path / "out")


def started(out: Path, tiny_run: list[str], folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """A run of two processes under torchrun, in the middle of its second step; the processes' ids.

    They have a session of their own, as the processes of a scheduler's job have.
    """
    program = folder / "program.py"
    program.write_text(f"import sys\nsys.path[:0] = [{str(REPOSITORY / 'tests')!r}, "
                       f"{str(REPOSITORY)!r}]\nfrom test_faults import slow_program\n"
                       "slow_program(*sys.argv[1:], seconds=1.5)\n")
    flags = [*tiny_run, "--buffer_size", "8", "--steps", "100", "--schedule", "constant"]
    process = subprocess.Popen(
        [*TORCHRUN, str(program), *flags, "--out", str(out)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True)
    wait_for_step(out, lambda: process.poll() is None)
    workers = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()
               and f"PPid:\t{process.pid}\n" in read_quietly(folder / "status")]
    assert len(workers) == 2
    return process, workers


def read_quietly(path: Path) -> str:
    """The text of a file of /proc, or nothing where its process ended meanwhile."""
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.mark.slow
def test_a_scheduler_signals_every_process(tiny_run, tmp_path):
    """SIGTERM to torchrun and to both of its processes at once, which torchrun passes on a moment
    later and the scheduler repeats: one request. Both finish the step, and the run resumes."""
    process, workers = started(tmp_path / "out", tiny_run, tmp_path)
    for _ in range(2):
        for number in (*workers, process.pid):
            os.kill(number, signal.SIGTERM)
        time.sleep(0.3)
    said = process.communicate(timeout=90)[0]
    assert process.returncode != 0 and "and saved" in said, said
    last = check_saved(tmp_path / "out")
    more = ["--resume", str(tmp_path / "out"), "--steps", str(last + 1)]
    assert two_processes(lambda: train.train(parse(more))) == [0, 0]
    assert len(untimed(tmp_path / "out")) == last + 1


@pytest.mark.slow
def test_ctrl_c_at_torchruns_terminal(tiny_run, tmp_path):
    """Ctrl-C at torchrun's terminal, which reaches torchrun alone: the processes save."""
    process, _ = started(tmp_path / "out", tiny_run, tmp_path)
    os.kill(process.pid, signal.SIGINT)
    said = process.communicate(timeout=90)[0]
    assert process.returncode != 0 and "and saved" in said, said
    check_saved(tmp_path / "out")


@pytest.mark.slow
def test_one_of_two_processes_is_killed(tiny_run, tmp_path):
    """One of two processes killed: the other ends within a minute, not with status 0, and the run
    resumes from its last checkpoint."""
    flags = [*tiny_run, "--buffer_size", "8", "--save_every", "2"]
    pid = tmp_path / "pid"

    def program():
        if os.environ["RANK"] == "1":
            pid.write_text(str(os.getpid()))
        slow_program(*flags, "--out", str(tmp_path / "out"), seconds=0.5)

    def killer():
        while newest_checkpoint(tmp_path / "out") is None:
            time.sleep(0.02)
        os.kill(int(pid.read_text()), signal.SIGKILL)

    child, begin = forked(killer), time.monotonic()
    statuses = two_processes(program)
    assert statuses == [4, -signal.SIGKILL] and status_of(child) == 0
    assert time.monotonic() - begin < 60
    assert two_processes(lambda: train.train(parse(["--resume", str(tmp_path / "out")]))) == [0, 0]
    assert len(untimed(tmp_path / "out")) == 6
