"""Tests of support/run_folder.py: the folder of a run, its lock, its settings, going back in it."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import run_folder
from support.errors import UserError
from support.files import write_json
from support.run_folder import (
    changed_settings,
    checked_settings,
    lock_run,
    new_run_folder,
    read_settings,
    rewind_run,
    run_finished,
)
from support.settings import Settings, as_saved, parse

REPOSITORY = Path(__file__).resolve().parent.parent


def settings(*flags) -> Settings:
    return parse(["--model", "hub/model", "--data", "rows.jsonl", *map(str, flags)])


def make_run(folder: Path, steps=6, checkpoints=(3, 6), finished=True) -> Path:
    """The files of a run, as a run leaves them, with a user's notes beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", as_saved(settings("--out", folder, "--steps", steps)))
    records = [json.dumps({"step": step}) + "\n" for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(records))
    for step in checkpoints:
        path = folder / "checkpoints" / f"step-{step:06d}"
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
    (folder / "pairs.jsonl").write_text("".join(records))
    for name in ("epochs/1", "final", "final-ema", "tensorboard"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("of the run")
    if finished:
        (folder / "summary.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    return folder


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def steps_recorded(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]


# ------------------------------------------------------------------------------ a new run's folder

def test_numbered_folders(tmp_path, monkeypatch):
    """Without --out, a run gets the first number that is free, also when another run takes the
    same one in between; what is in the way of runs/ is named."""
    monkeypatch.chdir(tmp_path)
    assert new_run_folder(settings()) == Path("runs/0001") and Path("runs/0001").is_dir()
    Path("runs/0003").mkdir()
    assert [new_run_folder(settings()).name for _ in range(2)] == ["0002", "0004"]
    monkeypatch.chdir(tmp_path / "runs")
    Path("runs").write_text("a file")
    with pytest.raises(UserError, match="Not a directory; name a folder with --out"):
        new_run_folder(settings())
    Path("runs").unlink()
    Path("runs").symlink_to("nowhere")
    with pytest.raises(UserError, match="runs: is not a folder"):
        new_run_folder(settings())


def test_out_is_made_or_refused(tmp_path):
    """--out is made with the folders above it; a folder with other files is taken; a folder with
    a run, and a file, are refused."""
    out = tmp_path / "a" / "b"
    assert new_run_folder(settings("--out", out)) == out and out.is_dir()
    (out / "notes.txt").write_text("mine")
    (out / "metrics.jsonl").touch()         # what a run that was killed at once leaves
    assert new_run_folder(settings("--out", out)) == out
    make_run(out)
    with pytest.raises(UserError, match=r"holds a run already.*--resume.*--overwrite"):
        new_run_folder(settings("--out", out))
    with pytest.raises(UserError, match="File exists"):
        new_run_folder(settings("--out", out / "notes.txt"))


def test_overwrite_removes_the_run_alone(tmp_path):
    """--overwrite removes what a run writes, of checkpoints/ the checkpoints alone, and leaves
    everything else, the targets of links inside included."""
    out, other = make_run(tmp_path / "out"), tmp_path / "other"
    other.mkdir()
    (other / "kept.txt").write_text("kept")
    (out / "final" / "link").symlink_to(other)
    (out / "checkpoints" / "step-000007.partial").mkdir()
    (out / "checkpoints" / "step-000006-mine").mkdir()
    new_run_folder(settings("--out", out, "--overwrite"))
    assert tree(out) == ["checkpoints", "checkpoints/step-000006-mine", "lock", "notes.txt"]
    assert tree(other) == ["kept.txt"]
    (out / "checkpoints" / "step-000006-mine").rmdir(), (out / "checkpoints").rmdir()
    make_run(out)
    new_run_folder(settings("--out", out, "--overwrite"))
    assert tree(out) == ["lock", "notes.txt"]


def other_trainers_folder(out):
    (out / "settings.json").write_text('{"lr": 1, "model": "x", "batch_size": 2}')


def no_settings(out):
    (out / "settings.json").unlink()


def settings_elsewhere(out):
    (out / "settings.json").rename(out / "elsewhere.json")
    (out / "settings.json").symlink_to("elsewhere.json")


def linked(name):
    def link(out):
        (out / name).rename(out.parent / "target")
        (out / name).symlink_to(out.parent / "target")
    return link


def swapped(out):
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").mkdir()


def dangling(out):
    (out / "summary.json").unlink()
    (out / "summary.json").symlink_to("nowhere")


@pytest.mark.parametrize("change, words", [
    (other_trainers_folder, "no settings.json that says a run of this program wrote them"),
    (no_settings, "no settings.json that says"), (settings_elsewhere, "no settings.json that says"),
    (linked("checkpoints"), "checkpoints is a symbolic link"),
    (linked("final"), "final is a symbolic link"),
    (linked("metrics.jsonl"), "metrics.jsonl is a symbolic link"),
    (dangling, "summary.json is a symbolic link"), (swapped, "metrics.jsonl is a folder")])
def test_overwrite_refuses_before_it_removes(change, words, tmp_path):
    """What is no run of this program, and what has a link or something else in the place of a
    run's file, is refused with a sentence, and nothing at all is removed."""
    out = make_run(tmp_path / "out")
    change(out)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=words):
        new_run_folder(settings("--out", out, "--overwrite"))
    assert tree(tmp_path) == before


def test_overwrite_never_removes_its_input(tmp_path):
    """--overwrite is refused where the run starts from what it would remove."""
    out = make_run(tmp_path / "out")
    (tmp_path / "link").symlink_to(out / "final")
    for flags in (["--model", out / "final"], ["--data", out / "metrics.jsonl"],
                  ["--eval_data", out / "tensorboard" / "file"], ["--model", tmp_path / "link"]):
        before = tree(out)
        with pytest.raises(UserError, match="holds the model or the data"):
            new_run_folder(settings(*flags, "--out", out, "--overwrite"))
        assert tree(out) == before


def test_overwrite_can_be_repeated(tmp_path, monkeypatch):
    """Where removing fails half way, the folder is still known as a run: --overwrite again."""
    out, remove_tree = make_run(tmp_path / "out"), run_folder.remove_tree

    def fail(path):
        if path.name == "tensorboard":
            raise OSError(16, "Device or resource busy")
        remove_tree(path)

    monkeypatch.setattr(run_folder, "remove_tree", fail)
    with pytest.raises(UserError, match="Device or resource busy"):
        new_run_folder(settings("--out", out, "--overwrite"))
    assert (out / "settings.json").exists() and not (out / "final").exists()
    monkeypatch.undo()
    new_run_folder(settings("--out", out, "--overwrite"))
    assert tree(out) == ["lock", "notes.txt"]


# ----------------------------------------------------------------------------------------- the lock

HOLD = """
import sys, time
from pathlib import Path
from support.run_folder import lock_run
lock = lock_run(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(100)
"""


def test_two_processes_one_run(tmp_path):
    """While a process holds the lock, another gets one sentence that names it, for --resume and
    for --overwrite; the kernel releases it when the holder is killed."""
    out = make_run(tmp_path / "out")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE,
                              text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    try:
        assert holder.stdout.readline() == "locked\n"
        before = tree(out)
        with pytest.raises(UserError, match=f"another process runs this run .process {holder.pid}"):
            lock_run(out)
        with pytest.raises(UserError, match="another process runs this run"):
            new_run_folder(settings("--out", out, "--overwrite"))
        assert tree(out) == before
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with lock_run(out) as lock:
            assert lock.warning is None
    finally:
        holder.kill()
        holder.communicate()


def test_the_lock_is_released(tmp_path):
    """release() and the end of `with` let the next one in; the same process is refused too."""
    with lock_run(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"):
        lock_run(tmp_path)
    lock = lock_run(tmp_path)
    lock.release()
    lock_run(tmp_path).release()


def test_a_disk_without_locks(tmp_path, monkeypatch):
    """Where the disk offers no locks, the run goes on and there is a sentence to say so."""
    def refuse(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    lock = lock_run(tmp_path)
    assert "offers no locks (Operation not supported)" in lock.warning
    lock.release()


def test_a_lock_that_can_not_be_opened(tmp_path):
    """A link or a folder in the place of the lock gets a sentence, and the link's target stays."""
    (tmp_path / "a").mkdir(), (tmp_path / "b" / "lock").mkdir(parents=True)
    (tmp_path / "a" / "lock").symlink_to(tmp_path / "target")
    for folder in (tmp_path / "a", tmp_path / "b", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="could not be opened to lock the run"):
            lock_run(folder)
    assert not (tmp_path / "target").exists()


# ------------------------------------------------------------------------------------- its settings

def test_settings_come_back(tmp_path):
    """What a run saves of its settings is read back the same, and --resume finds no change."""
    run = make_run(tmp_path / "run", finished=False)
    saved = json.loads((run / "settings.json").read_text())
    assert read_settings(str(run)) == saved == checked_settings(saved)
    resumed = parse(["--resume", str(run)])
    assert changed_settings(resumed) == {}
    assert changed_settings(parse(["--resume", str(run), "--lr", "1e-4", "--keep", "3"])) == {
        "lr": ([5e-6], [1e-4]), "keep": (2, 3)}
    assert read_settings(str(run / "checkpoints" / "step-000003")) == saved


def test_settings_of_other_versions():
    """Names that this version does not have are left out, and missing ones keep their default; a
    whole number will do for a float."""
    saved = as_saved(settings())
    del saved["threads"]
    found = checked_settings(saved | {"of_another_version": 1, "lam": 1})
    assert "threads" not in found and "of_another_version" not in found
    assert found["lam"] == 1.0 and isinstance(found["lam"], float)
    assert set(found) == {field.name for field in dataclasses.fields(Settings)} - {"threads"}


@pytest.mark.parametrize("name, value, words", [
    ("seed", "0", 'has "0" for seed, which is not a whole number'),
    ("seed", 1.0, "not a whole number"), ("seed", True, "not a whole number"),
    ("seed", None, "has null for seed"), ("seed", [1], "not a whole number"),
    ("shard", 1, "not true or false"), ("shard", "false", "not true or false"),
    ("lam", "0.1", "not a number"), ("lam", 10 ** 400, "not a number"), ("lam", {}, "not a number"),
    ("lr", [], "not a number"), ("lr", [1e-5, "x"], "not a number"), ("lr", [[1]], "not a number"),
    ("loss", "other", "not one of orpo, dpo, sft"), ("loss", ["orpo"], "not one of"),
    ("model", 3, "not a text"), ("model", "a\0b", "not a text"), ("model", "\ud800", "not a text"),
    ("model", {"a": "x" * 999}, "not a text")])
def test_settings_of_other_types(name, value, words, tmp_path):
    """A value of another type than its setting's: one sentence with the file, the name, what is
    there and what should be."""
    run = make_run(tmp_path / "run")
    saved = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(saved | {name: value}))
    with pytest.raises(UserError, match=words) as error:
        parse(["--resume", str(run)])
    said = str(error.value)
    assert f"{run / 'settings.json'} is damaged" in said and "\n" not in said
    assert f" {name}," in said and len(said) < 100 + 2 * len(str(run)) + 200


def zero(path):
    path.symlink_to("/dev/zero")


def written(content):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize("put, words", [
    (zero, "symbolic link"), (os.mkfifo, "not a regular file"), (Path.mkdir, "not a regular file"),
    (written(b"{" + b" " * 2 ** 21 + b"}"), "larger than 1048576 bytes"),
    (written(b"[" * 10 ** 5), "not JSON"), (written(b"{"), "not JSON"), (written(b""), "not JSON"),
    (written(b"\xff\xfe{"), "not JSON"), (written(b"[]"), "no JSON object"),
    (written(b"1" * 5000), "not JSON"), (written(b"{}"), "has no buffer_size, ema_decay")])
def test_settings_files_of_other_kinds(put, words, tmp_path):
    """A settings.json that is a link, a device, a pipe, a folder, huge, deep or no JSON object:
    one sentence, at once."""
    run = make_run(tmp_path / "run")
    (run / "settings.json").unlink()
    put(run / "settings.json")
    begin = time.monotonic()
    with pytest.raises(UserError, match=f"settings.json is damaged: it .*{words}"):
        parse(["--resume", str(run)])
    assert time.monotonic() - begin < 5


def test_no_run_to_resume(tmp_path):
    """A folder without a settings.json, no folder and a file are no runs."""
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(UserError, match="no run there"):
            parse(["--resume", str(path)])


# -------------------------------------------------------------------------------- taking a run back

def test_rewind_run(tmp_path):
    """Going on from an older step drops the records and checkpoints after it, and the summary,
    and says so with the settings that differ; copies that somebody made stay."""
    run = make_run(tmp_path / "run", steps=8, checkpoints=(3, 6, 8))
    (run / "checkpoints" / "step-000008-mine").mkdir()
    resumed = parse(["--resume", str(run / "checkpoints" / "step-000003"), "--lr", "1e-4"])
    said = rewind_run(resumed, 3, 8, changed_settings(resumed))
    assert said == (f"{run}: going on after step 3, without the later step-000006, step-000008, "
                    "with other settings: --lr [0.0001] (was [5e-06])")
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == [
        "step-000003", "step-000008-mine"]
    assert steps_recorded(run) == [1, 2, 3] and not (run / "summary.json").exists()
    assert (run / "pairs.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert "no checkpoint was written yet; starting over" in rewind_run(resumed, 0, 8, {})
    assert steps_recorded(run) == []


def test_a_run_can_not_be_shortened(tmp_path):
    """Fewer steps than were taken are refused, and the run stays as it was."""
    run = make_run(tmp_path / "run")
    before = tree(run)
    with pytest.raises(UserError, match="3 steps are fewer than the 6"):
        rewind_run(parse(["--resume", str(run), "--steps", "3"]), 6, 3, {})
    assert tree(run) == before and steps_recorded(run) == [1, 2, 3, 4, 5, 6]


def test_records_that_are_cut_short(tmp_path):
    """Lines that a kill or a full disk cut short are dropped; the whole ones around them stay."""
    run = make_run(tmp_path / "run")
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(b'{"step": 1}\n{"step": 2, "lo\n[1]\n{"no": 2}\n{"step": "3"}\n\xff\n'
                        b'{"step": 3}\n{"step": 4}\n{"step": 5, "lo')
    rewind_run(parse(["--resume", str(run)]), 4, 6, {})
    assert metrics.read_bytes() == b'{"step": 1}\n{"step": 3}\n{"step": 4}\n'
    metrics.unlink()
    rewind_run(parse(["--resume", str(run)]), 4, 6, {})
    assert not metrics.exists()


def test_run_finished(tmp_path):
    """A run with a summary has finished, unless more steps are asked for or one of its checkpoints
    is named; more steps need a checkpoint to go on from."""
    run = make_run(tmp_path / "run")
    assert run_finished(parse(["--resume", str(run)]))
    assert run_finished(parse(["--resume", str(run), "--lr", "1e-4"]))
    assert not run_finished(parse(["--resume", str(run), "--steps", "9"]))
    assert not run_finished(parse(["--resume", str(run / "checkpoints" / "step-000003")]))
    assert not run_finished(parse(["--resume", str(make_run(tmp_path / "other", finished=False))]))
    bare = make_run(tmp_path / "bare", checkpoints=())
    assert run_finished(parse(["--resume", str(bare)]))
    with pytest.raises(UserError, match="kept no checkpoint"):
        run_finished(parse(["--resume", str(bare), "--steps", "9"]))
