"""Checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint is a folder RUN/checkpoints/step-000120 with shared.pt (the state that all processes
have in common), rank0.pt, rank1.pt, ... (the state of each process) and manifest.json:

    {"step": 120, "processes": 1, "bad_steps_in_a_row": 0,
     "files": {"shared.pt": {"bytes": 8123456, "sha256": "9f86d0..."},
               "rank0.pt": {"bytes": 20480, "sha256": "2c2624..."}}}

The folder is written under another name (.partial), flushed to the disk, and renamed once it is
complete. So a folder named step-NNNNNN was complete once, and the manifest tells whether it still
is. Files are read with weights_only=True: nothing in them is ever executed.

`world` stands for the processes of the run (support/parallel.py). This file uses its rank, size,
is_main, sharded, run_on_rank0(function) and run_on_all(function).
"""
import contextlib
import os
import re
from pathlib import Path

import torch

from buffer import ReplayBuffer
from sapo import Pair
from support.errors import RunFailed, UserError, error_text
from support.files import flush, flush_folder, read_json, remove_tree, sha256, write_json
from support.parallel import lost_process, out_of_memory
from support.settings import run_folder
from support.shard import full_state, local_state

MANIFEST = "manifest.json"
SHARED = "shared.pt"
BAD_STEPS = "bad_steps_in_a_row"


def write_checkpoint(run: Path, step: int, world, replicated_state: dict, per_rank_state: dict,
                     progress: dict, keep: int) -> Path:
    """Write RUN/checkpoints/step-NNNNNN, all processes together, and prune the older ones.

    replicated_state: name -> object with a state_dict(), or None; the same in every process.
    per_rank_state: the same shape; what each process has of its own.
    progress: plain numbers, strings, lists and dictionaries. Its "bad_steps_in_a_row" (0 where
    the key is missing) counts the steps without a finite loss or gradient up to this one.
    keep: how many of the newest checkpoints stay, at least 1. Whatever its number, the checkpoint
    just written stays, and so does the newest one from before a streak of bad steps.

    Returns the checkpoint's folder. Raises RunFailed on every process where one could not write
    (a full disk); the checkpoints that were there before are untouched then.
    """
    final = run / "checkpoints" / f"step-{step:06d}"
    partial = final.with_suffix(".partial")
    try:
        world.run_on_rank0(lambda: make_fresh_folder(partial))
        files = {rank_file(world.rank): states(per_rank_state)}
        # Every process takes part in gathering what is sharded; rank 0 gets the result.
        replicated = full_state(states(replicated_state), keep=world.is_main)
        if world.is_main:
            files[SHARED] = replicated | {"progress": progress}
        written = world.run_on_all(
            lambda: {name: write_state(partial / name, state) for name, state in files.items()})
        manifest = {"step": step, "processes": world.size,
                    BAD_STEPS: int(progress.get(BAD_STEPS, 0)),
                    "files": {name: facts for part in written for name, facts in part.items()}}
        world.run_on_rank0(lambda: complete(partial, final, manifest))
    except (OSError, RuntimeError) as error:    # RuntimeError: torch.save where a write failed
        if lost_process(error) or out_of_memory(error):
            raise
        if world.is_main:
            remove_if_possible(partial)
        newest = newest_checkpoint(run)
        raise RunFailed(
            f"{final}: could not write the checkpoint ({error_text(error)}); make room and go on "
            f"with --resume {run} from {newest.name if newest else 'the start'}") from None
    world.run_on_rank0(lambda: prune(run, final, keep))
    return final


def read_checkpoint(checkpoint: Path, world, replicated_state: dict, per_rank_state: dict,
                    check=None) -> tuple[int, dict]:
    """Load what write_checkpoint wrote into the same objects, all processes together.

    check(progress): called before anything is loaded; raises where the run can't go on from here.
    Returns the step and the progress. Raises UserError on every process: when a file is missing
    or is not what the manifest says (the sentence names the file, and the checkpoint before this
    one), when another number of processes wrote the checkpoint, and when the states do not fit
    the objects.
    """
    manifest = world.run_on_rank0(lambda: verified_manifest(checkpoint))
    processes = manifest["processes"]
    if processes != world.size:
        raise UserError(f"--resume: {checkpoint} was written by {processes} processes and this run "
                        f"has {world.size}; start it with --nproc_per_node {processes}")
    progress = world.run_on_all(
        lambda: load_parts(checkpoint, world, replicated_state, per_rank_state, check))
    return manifest["step"], progress[world.rank]


def load_parts(checkpoint: Path, world, replicated_state: dict, per_rank_state: dict,
               check=None) -> dict:
    """Load this process's objects from the two files that it needs; returns the progress."""
    # mmap: a sharded run reads no more of the file than this process's share.
    shared = load_file(checkpoint / SHARED, mmap=world.sharded)
    own = load_file(checkpoint / rank_file(world.rank), mmap=world.sharded)
    try:
        progress = dict(shared["progress"])
        if check is not None:
            check(progress)
        for name, part in replicated_state.items():
            if part is not None:
                part.load_state_dict(local_state(part, shared[name]) if world.sharded
                                     else shared[name])
        for name, part in per_rank_state.items():
            if isinstance(part, ReplayBuffer):
                part.load_state_dict(own[name], item=Pair)
            elif part is not None:
                part.load_state_dict(own[name])
        return progress
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{checkpoint}: does not fit this model and these settings "
                        f"({error_text(error)})") from None


def load_file(path: Path, mmap: bool) -> dict:
    """The state in a file. Raises UserError for one that holds code, or no state at all."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:      # of bytes that are no state, torch's reader can raise anything
        if out_of_memory(error):
            raise
        raise UserError(f"{path}: holds something else than the tensors, numbers and text of a "
                        "checkpoint; it was not loaded") from None


def find_checkpoint(resume: str) -> Path | None:
    """The checkpoint that --resume names, by itself or as the newest of its run.

    None where the run has written none yet. Raises UserError where `resume` is a folder below
    checkpoints/ that is not a complete checkpoint.
    """
    path, run = Path(resume), run_folder(resume)
    if path == run:
        return newest_checkpoint(run)
    if path not in all_checkpoints(run):
        raise UserError(f"--resume {resume}: not a checkpoint that is complete (a folder "
                        f"step-NNNNNN with a {MANIFEST})")
    return path


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(all_checkpoints(run)), None)


def newest_good_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that was not written during a streak of bad steps, or None."""
    return next((folder for folder in reversed(all_checkpoints(run))
                 if bad_steps_of(folder) == 0), None)


def all_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; no copies under other names, no links."""
    folders = [manifest.parent for manifest in run.glob(f"checkpoints/*/{MANIFEST}")]
    return sorted((folder for folder in folders
                   if re.fullmatch("step-[0-9]+", folder.name) and not folder.is_symlink()),
                  key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint, and the folder checkpoints/ where it was the last one in there.

    Does nothing where it is gone already. Raises OSError where it can't be removed.
    """
    if not checkpoint.exists():
        return
    # Removing takes a while. What is left of it when the process is killed must not look complete.
    partial = checkpoint.with_suffix(".partial")
    remove_tree(partial)
    checkpoint.rename(partial)
    remove_if_possible(partial)
    with contextlib.suppress(OSError):          # not empty
        checkpoint.parent.rmdir()


def prune(run: Path, written: Path, keep: int) -> None:
    """Remove the checkpoints beyond the newest `keep`, but neither `written` nor the newest one
    from before a streak of bad steps. One that can't be removed stays until the next time."""
    checkpoints = all_checkpoints(run)
    kept = {written, *checkpoints[-keep:], newest_good_checkpoint(run)}
    for folder in checkpoints:
        if folder not in kept:
            with contextlib.suppress(OSError):
                remove_checkpoint(folder)


def bad_steps_of(checkpoint: Path) -> int | None:
    """How many steps in a row were not finite when it was written; None: its manifest is bad."""
    try:
        return read_manifest(checkpoint)[BAD_STEPS]
    except (OSError, ValueError):
        return None


def rank_file(rank: int) -> str:
    """The name of the file with the state of one process."""
    return f"rank{rank}.pt"


def states(parts: dict) -> dict:
    """name -> the state of the object of that name, without those that are None."""
    return {name: part.state_dict() for name, part in parts.items() if part is not None}


def make_fresh_folder(folder: Path) -> None:
    """Make an empty folder; what a killed process left there goes."""
    remove_tree(folder)
    folder.mkdir(parents=True)


def write_state(path: Path, state: dict) -> dict:
    """Save a state, flushed to the disk. Returns the file's size and SHA-256."""
    with open(path, "xb") as file:
        torch.save(state, file)
        flush(file)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def complete(partial: Path, final: Path, manifest: dict) -> None:
    """Write the manifest and give the folder its name, which makes it a checkpoint."""
    write_json(partial / MANIFEST, manifest)    # flushes the names in the folder too
    if os.path.lexists(final):                  # of the same step, which the run has come to again
        replaced = final.with_suffix(".replaced.partial")
        remove_tree(replaced)
        final.rename(replaced)
    partial.rename(final)
    flush_folder(final.parent)
    for left in final.parent.glob("*.partial"):
        remove_if_possible(left)


def remove_if_possible(path: Path) -> None:
    """Remove a file or folder whose name says that it is of no use. Some network disks refuse
    while another process has it open; the next checkpoint tries again."""
    with contextlib.suppress(OSError):
        remove_tree(path)


def verified_manifest(checkpoint: Path) -> dict:
    """The manifest, once every file is found to be what was written. Raises UserError, naming the
    first file that is not and the checkpoint before this one."""
    name = MANIFEST
    try:
        manifest = read_manifest(checkpoint)
        for name, facts in manifest["files"].items():
            check_size(checkpoint / name, facts["bytes"])
        for name, facts in manifest["files"].items():
            if sha256(checkpoint / name) != facts["sha256"]:
                raise ValueError("its SHA-256 is not that of what was written")
        return manifest
    except (OSError, ValueError) as error:
        reason = error_text(error)
    earlier = [other for other in all_checkpoints(checkpoint.parent.parent)
               if step_of(other) < step_of(checkpoint)]
    advice = (f"go on from the checkpoint before it with --resume {earlier[-1]}" if earlier
              else "there is none before it")
    raise UserError(f"{checkpoint}: {name} is damaged ({reason}); {advice}")


def check_size(path: Path, size: int) -> None:
    """Raise ValueError unless the file has this many bytes. Tells at once what hashing would tell
    after reading all of the file."""
    found = path.lstat().st_size
    if found != size and not path.is_symlink():         # sha256 has the sentence for a link
        raise ValueError(f"it has {found} bytes of {size}")


def read_manifest(checkpoint: Path) -> dict:
    """The manifest, its keys, types and file names checked; the files themselves are not.

    Raises ValueError with the reason, or OSError where it can't be read.
    """
    manifest = read_json(checkpoint / MANIFEST)
    if set(manifest) != {"step", "processes", BAD_STEPS, "files"}:
        raise ValueError(f"its keys are not step, processes, {BAD_STEPS} and files")
    for name in ("step", "processes", BAD_STEPS):
        if type(manifest[name]) is not int or manifest[name] < 0:       # a bool is an int to Python
            raise ValueError(f"its {name} is not a count")
    if manifest["step"] != step_of(checkpoint):
        raise ValueError("it is of another step than the folder's name says")
    files, processes = manifest["files"], manifest["processes"]
    # The lengths first: a manifest may claim more processes than names fit into memory.
    if not isinstance(files, dict) or len(files) != processes + 1 or processes == 0 or set(
            files) != {SHARED, *(rank_file(rank) for rank in range(processes))}:
        raise ValueError(f"its files are not {SHARED} and one rankN.pt for each process")
    for facts in files.values():
        if not (isinstance(facts, dict) and set(facts) == {"bytes", "sha256"}
                and type(facts["bytes"]) is int and isinstance(facts["sha256"], str)
                and re.fullmatch("[0-9a-f]{64}", facts["sha256"])):
            raise ValueError("it does not give bytes and sha256 of each file")
    return manifest
