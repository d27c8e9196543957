"""The folder of a run: naming it, locking it, replacing the run in it, and reading back its
settings. What the folder holds of checkpoints is in support/checkpoint.py."""
import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import re
import socket
from pathlib import Path

from support.checkpoint import all_checkpoints, newest_checkpoint, remove_checkpoint, step_of
from support.errors import UserError
from support.files import read_json, remove_tree, write_whole
from support.settings import (
    PATHS,
    Settings,
    changes,
    current_name,
    located,
    run_folder,
    say_changes,
)

SETTINGS = "settings.json"
LOCK = "lock"
# What a run puts into its folder, besides the lock. The settings come last: whoever is stopped
# while removing these leaves a folder that is still known as a run.
FOLDERS = ("checkpoints", "epochs", "final", "final-ema", "tensorboard")
FILES = ("summary.json", "pairs.jsonl", "metrics.jsonl", SETTINGS)
# Settings of this program that no other one writes into a settings.json.
OWN_SETTINGS = {"segment_len", "num_rejected", "buffer_size", "ema_decay", "ema_every"}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def new_run_folder(settings: Settings) -> Path:
    """Make the output folder: --out, or the next free runs/NNNN.

    With --overwrite, the run that --out holds is removed first: what a run writes, and nothing
    else. Everything is looked at before anything is removed. Raises UserError, and removes
    nothing, where the folder holds a run and --overwrite is not given; where what it holds is not
    a run of this program, has a symbolic link in its place, or holds the model or data that the
    new run starts from; and where another process is running the run.
    """
    if settings.out is None:
        return next_numbered_folder(Path("runs"))
    folder = Path(settings.out)
    try:
        present = [folder / name for name in (*FOLDERS, *FILES) if holds_something(folder / name)]
        if present:
            check_replaceable(folder, present, settings)
            with lock_run(folder):
                for path in present:
                    remove_part(path)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None
    return folder


def next_numbered_folder(parent: Path) -> Path:
    """Make the first of PARENT/0001, PARENT/0002, ... that does not exist."""
    for number in itertools.count(1):
        folder = parent / f"{number:04d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:         # also where another run took the number just now
            if not parent.is_dir():
                raise UserError(f"{parent}: is not a folder; name another one with --out") from None
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; name a folder with --out") from None


def holds_something(path: Path) -> bool:
    """Is there anything of that name but an empty file, which a killed run may leave?"""
    return os.path.lexists(path) and (
        path.is_symlink() or not path.is_file() or path.stat().st_size > 0)


def check_replaceable(folder: Path, present: list[Path], settings: Settings) -> None:
    """Raise UserError unless `present`, parts of a run in `folder`, may be removed."""
    if not is_run(folder):
        names = ", ".join(path.name for path in present)
        raise UserError(f"--out {folder}: holds {names}, and no {SETTINGS} that says a run of this "
                        "program wrote them; name another folder")
    if not settings.overwrite:
        raise UserError(f"--out {folder}: holds a run already; name another folder, go on with "
                        f"--resume {folder}, or replace the run with --overwrite")
    for path in present:
        if path.is_symlink():
            raise UserError(f"--overwrite: {path} is a symbolic link, and what it points to is not "
                            "removed; remove the link, or name another folder")
        if path.is_dir() != (path.name in FOLDERS):
            kind = "folder" if path.is_dir() else "file"
            raise UserError(f"--overwrite: {path} is a {kind}, which no run makes of that name; "
                            "remove it, or name another folder")
    inputs = [located(name).resolve()
              for name in (getattr(settings, flag) for flag in PATHS) if name]
    if any(path.resolve() in (source, *source.parents) for path in present for source in inputs):
        raise UserError(f"--overwrite: {folder} holds the model or the data that this run starts "
                        "from; name another folder")


def is_run(folder: Path) -> bool:
    """Does the folder hold a settings.json that this program wrote?"""
    try:
        return set(read_json(folder / SETTINGS)) >= OWN_SETTINGS
    except (OSError, ValueError):
        return False


def remove_part(path: Path) -> None:
    """Remove one of the files and folders of a run; of checkpoints/ what a run made in there."""
    if path.name != "checkpoints":
        return remove_tree(path)
    for inside in path.iterdir():
        if re.fullmatch(r"step-[0-9]+(\.replaced)?(\.partial)?", inside.name):
            remove_tree(inside)
    with contextlib.suppress(OSError):          # somebody else's files are in there
        path.rmdir()


class RunLock:
    """The lock of a run's folder, held until release() or the end of the process, however it ends.

    warning: None, or a sentence for the user where the disk offers no locks and none is held.
    """

    def __init__(self, file, warning: str | None):
        self._file, self.warning = file, warning

    def release(self) -> None:
        """Let go of the lock. The file stays: removing it would take the lock of whoever waits."""
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.release()


def lock_run(folder: Path) -> RunLock:
    """Lock the folder of a run for this process: the only one, rank 0, that writes into it.

    The lock belongs to an open file of the process that called, so keep the object there (it can't
    be sent to another process). The kernel lets go when the process dies. Raises UserError where
    another process holds the lock, on this machine or, on a network disk with locks, on another.
    """
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise UserError(f"{path}: could not be opened to lock the run ({error.strerror})") from None
    file = open(descriptor, "r+b", buffering=0)         # noqa: SIM115 (release() closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return RunLock(file, f"{folder}: this disk offers no locks ({error.strerror}); take "
                                 "care that no second process runs or resumes this run")
        holder = file.read(200).decode(errors="replace").strip()
        file.close()
        raise UserError(f"{folder}: another process runs this run ({holder or 'unknown'}); wait "
                        "for its end, stop it, or name another folder") from None
    with contextlib.suppress(OSError):          # a full disk: the lock holds without these words
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return RunLock(file, None)


def read_settings(resume: str) -> dict:
    """The settings that the run of --resume saved, checked. Raises UserError where there are
    none, or where settings.json is not what this program writes."""
    path = run_folder(resume) / SETTINGS
    try:
        return checked_settings(read_json(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"--resume {resume}: no run there (no {SETTINGS}); name the folder that "
                        "--out named") from None
    except OSError as error:
        raise UserError(f"--resume {resume}: {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--resume {resume}: {path} is damaged: it {error}; put back the file that "
                        "the run wrote, or start a new run") from None


def checked_settings(raw: dict) -> dict:
    """What settings.json holds, as name -> value for the fields of Settings.

    Each value must be of its field's type: a choice one of the choices, None only where None is
    the default, a list only where the field takes several values. Names that are no field of
    this version are left out, and a field that is missing keeps its default. Ranges are
    resolve's to check. Raises ValueError with the reason.
    """
    missing = OWN_SETTINGS - set(raw)
    if missing:
        raise ValueError(f"has no {', '.join(sorted(missing))}, which every run saves")
    raw = raw | {"rejected": current_name(raw.get("rejected"))}
    return {field.name: checked_value(field, raw[field.name])
            for field in dataclasses.fields(Settings) if field.name in raw}


def checked_value(field, value):
    """A value as the field's type (a whole number as a float where the field is a float)."""
    if value is None and field.default is None:
        return None
    if isinstance(value, list) and value and field.metadata["several"]:
        return [checked_number_or_text(field, each) for each in value]
    return checked_number_or_text(field, value)


def checked_number_or_text(field, value):
    """One value as the field's type. Raises ValueError where it is of another type."""
    choices = field.metadata["choices"]
    fits = type(value) is field.type or (field.type is float and type(value) is int)
    if choices:
        fits = fits and value in choices
    if fits and field.type is str:
        # A path can hold neither, and a lone surrogate can't be printed.
        fits = "\0" not in value and not re.search("[\ud800-\udfff]", value)
    if fits and field.type is float:
        with contextlib.suppress(OverflowError):
            return float(value)
        fits = False
    if not fits:
        wanted = f"one of {', '.join(choices)}" if choices else KINDS[field.type]
        shown = json.dumps(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ValueError(f"has {shown} for {field.name}, which is not {wanted}")
    return value


def changed_settings(settings: Settings) -> dict:
    """name -> (then, now) of what differs from the settings of the run that is resumed."""
    return changes(read_settings(settings.resume), settings)


def run_finished(settings: Settings) -> bool:
    """Did the run that is resumed come to its end, and is no more asked of it now?

    Raises UserError where more is asked and no checkpoint was kept to go on from.
    """
    run = run_folder(settings.resume)
    if not (run / "summary.json").exists() or Path(settings.resume) != run:
        return False
    more = {"steps", "epochs"} & set(changed_settings(settings))
    if more and newest_checkpoint(run) is None:
        raise UserError(f"--resume {settings.resume}: the run had finished and kept no checkpoint "
                        f"to go on from; start a new one with --model {run / 'final'}")
    return not more


def rewind_run(settings: Settings, done: int, steps: int, changed: dict) -> str:
    """Take the folder of the run that is resumed back to step `done`, from which it goes on:
    the records and checkpoints after that step go, and so does the summary.

    steps: the step at which the run is to end. changed: settings that differ, as
    changed_settings gives them. Returns what to tell the user. Raises UserError, and changes
    nothing, where `done` is beyond `steps`.
    """
    run = run_folder(settings.resume)
    if done > steps:
        raise UserError(f"--resume {settings.resume}: {steps} steps are fewer than the {done} that "
                        "the run has taken; name an earlier checkpoint")
    # In this order, a kill at any moment leaves a run that --resume takes up without a gap.
    (run / "summary.json").unlink(missing_ok=True)
    later = [checkpoint for checkpoint in all_checkpoints(run) if step_of(checkpoint) > done]
    for checkpoint in reversed(later):
        remove_checkpoint(checkpoint)
    trim_records(run / "metrics.jsonl", done)
    trim_records(run / "pairs.jsonl", done)
    said = (f"{run}: going on after step {done}" if done
            else f"{run}: no checkpoint was written yet; starting over")
    if later:
        said += f", without the later {', '.join(checkpoint.name for checkpoint in later)}"
    if changed:
        said += f", with other settings: {say_changes(changed)}"
    return said


def trim_records(path: Path, step: int) -> None:
    """Drop the records after `step`, which the run will write again, and lines that are no
    records: the end of a line is missing where the run was killed or the disk was full."""
    if path.exists():
        with open(path, "rb") as lines:
            write_whole(path, (line for line in lines if is_record_up_to(line, step)))


def is_record_up_to(line: bytes, step: int) -> bool:
    """Is the line a whole record of this step or an earlier one?"""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
