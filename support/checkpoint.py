"""Checkpoints: everything a run needs to go on as if it had never stopped, and the folder a run lives in.

A checkpoint is a folder RUN/checkpoints/step-000120 with shared.pt (what all processes have in common), rank0.pt, ...
(what each has of its own) and manifest.json with the SHA-256 of each. It is written under another name, flushed to the
disk, and renamed when it is whole, so that a folder of that name was whole once; the manifest tells whether it still is.
Files are read with weights_only=True: nothing in them is ever executed.
"""
import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import torch

from sapo import Pair
from support.parallel import lost_process, out_of_memory
from support.report import write_json, write_whole
from support.shard import own_share, whole_state
from support.errors import RunFailed, UserError, error_text
from support.settings import Settings, changes, located, run_folder, say_changes

MANIFEST = "manifest.json"
OWN_NAMES = ("metrics.jsonl", "settings.json", "summary.json", "checkpoints", "tensorboard", "final")      # what a run puts into its folder


def new_run_folder(settings: Settings) -> Path:
    """The output folder, made: --out, or the next free runs/NNNN. Raises UserError where it holds a run already, unless
    --overwrite is given: then that run's files are removed, and no others."""
    if settings.out is None:
        numbers = (Path("runs") / f"{number:04d}" for number in itertools.count(1))
        folder = next(folder for folder in numbers if not folder.exists())
    else:
        folder = Path(settings.out)
    old = [folder / name for name in OWN_NAMES if (folder / name).exists()]
    if old and not settings.overwrite:
        raise UserError(f"--out {folder}: holds a run already; name another folder, go on with --resume {folder}, or replace it with --overwrite")
    needed = [located(name).resolve() for name in (settings.model, settings.data, settings.eval_data) if name]
    if any(path.resolve() in (source, *source.parents) for path in old for source in needed):
        raise UserError(f"--overwrite: {folder} holds the model or the data that this run starts from; name another folder")
    try:
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        folder.mkdir(parents=True, exist_ok=settings.out is not None)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None
    return folder


def write_checkpoint(run: Path, step: int, world, shared: dict, own: dict, tally: dict, keep: int) -> None:
    """Write RUN/checkpoints/step-NNNNNN, all processes together; older ones beyond `keep` go once it is whole.

    shared, own: name -> what has a state_dict(), or None; the same in every process, and this one's own. tally: plain
    numbers. Raises RunFailed on every process when one could not write (a full disk): the checkpoints before it are untouched.
    """
    final = run / "checkpoints" / f"step-{step:06d}"
    partial = final.with_suffix(".partial")
    try:
        world.on_main(lambda: fresh_folder(partial))
        files = {f"rank{world.rank}.pt": states(own)}
        common = whole_state(states(shared), keep=world.is_main)        # of sharded models all processes have a part
        if world.is_main:
            files["shared.pt"] = common | {"tally": tally, "step": step}
        parts = world.everywhere(lambda: {name: write_file(partial / name, state) for name, state in files.items()})
        hashes = {name: digest for part in parts for name, digest in part.items()}
        world.on_main(lambda: finish(partial, final, {"step": step, "processes": world.size, "sha256": hashes}, keep))
    except (OSError, RuntimeError) as error:        # RuntimeError: what torch.save makes of a write that failed
        if lost_process(error) or out_of_memory(error):
            raise
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        last = newest(run)
        raise RunFailed(f"{final}: could not write the checkpoint ({error_text(error)}); make room and go on with --resume {run} "
                        + (f"from {last.name}" if last else "from the start")) from None


def states(parts: dict) -> dict:
    return {name: part.state_dict() for name, part in parts.items() if part is not None}


def fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)       # left by a run that was killed while it wrote
    folder.mkdir(parents=True)


def write_file(path: Path, state: dict) -> str:
    """Save a state, flushed to the disk; returns the file's SHA-256."""
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return sha256(path)


def finish(partial: Path, final: Path, manifest: dict, keep: int) -> None:
    """The manifest, then the name, then the old ones: in this order, so that every moment leaves something whole."""
    write_json(partial / MANIFEST, manifest)
    flush_folder(partial)
    shutil.rmtree(final, ignore_errors=True)        # of the same step, from before a resume
    partial.rename(final)
    flush_folder(final.parent)
    for old in all_checkpoints(final.parent.parent)[:-keep]:
        old.rename(old.with_suffix(".partial"))     # removing takes a while, and half of one must not look like one
    for left in final.parent.glob("*.partial"):
        shutil.rmtree(left)


def flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def all_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that were completed, oldest first."""
    found = (manifest.parent for manifest in run.glob(f"checkpoints/*/{MANIFEST}"))
    return sorted((folder for folder in found if re.fullmatch(r"step-\d+", folder.name)), key=step_of)     # no copies of one


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest(run: Path) -> Path | None:
    """The newest completed checkpoint of a run, or None."""
    return next(reversed(all_checkpoints(run)), None)


def to_go_on_from(resume: str) -> Path | None:
    """The checkpoint that --resume names, by itself or as the newest of its run; None where there is none yet."""
    path, run = Path(resume), run_folder(resume)
    if path != run and path not in all_checkpoints(run):
        raise UserError(f"--resume {resume}: not a checkpoint that was completed (a folder step-NNNNNN with a {MANIFEST})")
    return path if path != run else newest(run)


def read_checkpoint(checkpoint: Path, world, shared: dict, own: dict) -> tuple[int, dict]:
    """Load what write_checkpoint wrote into the same parts; returns the step and the tally.

    Raises UserError when a file is missing or not what the manifest says, naming it and the checkpoint before; or when
    another number of processes wrote it.
    """
    manifest = world.on_main(lambda: verified(checkpoint))
    if manifest["processes"] != world.size:
        raise UserError(f"--resume: {checkpoint} was written by {manifest['processes']} processes and this run has {world.size}; "
                        f"start it with --nproc_per_node {manifest['processes']}")
    read = []
    # A sharded run reads its share alone from the disk.
    world.everywhere(lambda: read.extend(load_file(checkpoint / name, mmap=world.sharded) for name in ("shared.pt", f"rank{world.rank}.pt")))
    try:
        for name, part in shared.items():
            if part is not None:
                part.load_state_dict(own_share(part, read[0][name]) if world.sharded else read[0][name])
        for name, part in own.items():
            if part is not None:
                part.load_state_dict(read[1][name], **({"item": Pair} if name == "buffer" else {}))
    except (RuntimeError, ValueError, KeyError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{checkpoint}: does not fit this model and these settings ({error_text(error)})") from None
    return read[0]["step"], read[0]["tally"]


def load_file(path: Path, mmap: bool) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors, numbers and text, so no checkpoint of this program; it was not loaded") from None


def verified(checkpoint: Path) -> dict:
    """The manifest, once every file in it is found to be as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["sha256"])
        wrong = next((name for name, digest in files.items() if sha256(checkpoint / name) != digest), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong = getattr(error, "filename", None) or MANIFEST
    if wrong is None:
        return manifest
    before = [other for other in all_checkpoints(checkpoint.parent.parent) if step_of(other) < step_of(checkpoint)]
    raise UserError(f"{checkpoint}: {Path(wrong).name} is damaged (not what was written, by its SHA-256); "
                    + (f"go on from the checkpoint before it with --resume {before[-1]}" if before else "there is none before it"))


def changed(settings: Settings) -> dict:
    """What differs from the settings of the run that is resumed."""
    return changes(json.loads((run_folder(settings.resume) / "settings.json").read_text(encoding="utf-8")), settings)


def finished(settings: Settings) -> bool:
    """Did the run that is resumed come to its end, and is no more asked of it now?

    Raises UserError where more is asked and no checkpoint was kept to go on from.
    """
    run = run_folder(settings.resume)
    if not (run / "summary.json").exists() or Path(settings.resume) != run:
        return False
    more = {"steps", "epochs"} & set(changed(settings))
    if more and newest(run) is None:
        raise UserError(f"--resume {settings.resume}: the run had finished, and kept no checkpoint to go on from; start a new one with --model {run / 'final'}")
    return not more


def take_up(settings: Settings, done: int, steps: int, other: dict) -> str:
    """Take the folder of the run that is resumed back to the step it goes on from: its records, later checkpoints, its
    summary. steps: where the run is to end. other: settings that differ. Returns what to say of it.

    Raises UserError when the run is beyond its end already.
    """
    run = run_folder(settings.resume)
    if done > steps:
        raise UserError(f"--resume {settings.resume}: {steps} steps are fewer than the {done} it has taken; name a checkpoint from before")
    trim_metrics(run / "metrics.jsonl", done)
    (run / "summary.json").unlink(missing_ok=True)
    later = [checkpoint for checkpoint in all_checkpoints(run) if step_of(checkpoint) > done]
    for checkpoint in later:
        checkpoint.rename(checkpoint.with_suffix(".partial"))
        shutil.rmtree(checkpoint.with_suffix(".partial"))
    return (f"{run}: " + (f"going on after step {done}" if done else "no checkpoint was written yet; starting over")
            + (f", without the later {', '.join(checkpoint.name for checkpoint in later)}" if later else "")
            + (f", with other settings: {say_changes(other)}" if other else ""))


def trim_metrics(path: Path, step: int) -> None:
    """Drop the records after `step`, which the run will write again; what was cut short goes with them."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except ValueError:
            break
        kept.append(line)
    write_whole(path, b"".join(kept))
