"""Tests of support/checkpoint.py: what was written is read back, what is damaged is not."""
import hashlib
import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import checkpoint_names, forked, same_state, status_of
from torch import nn

from buffer import ReplayBuffer
from ema import EMA
from sapo import Pair
from support import checkpoint as checkpoints
from support.checkpoint import (
    all_checkpoints,
    find_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    remove_checkpoint,
    write_checkpoint,
)
from support.errors import RunFailed, UserError


class Processes:
    """Stands for the processes of a run, as threads: their collectives wait for each other."""

    def __init__(self, size=1):
        self.size, self.results = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=30)      # one that waits for ever fails

    def run(self, function):
        """function(world) in each of them -> what each returned or raised, in order of ranks."""
        outcomes = [None] * self.size

        def run_one(rank):
            try:
                outcomes[rank] = function(World(rank, self))
            except Exception as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=run_one, args=[rank]) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes


class World:
    """One of the processes, as write_checkpoint and read_checkpoint see it."""
    sharded = False

    def __init__(self, rank=0, processes=None):
        self.rank, self.processes = rank, processes or Processes()
        self.size, self.is_main = self.processes.size, rank == 0

    def gather(self, thing):
        self.processes.results[self.rank] = thing
        self.processes.barrier.wait()
        results = list(self.processes.results)
        self.processes.barrier.wait()
        return results

    def run_on_all(self, function):
        result = error = None
        try:
            result = function()
        except Exception as raised:
            error = raised
        outcomes = self.gather((result, error))
        for _, error in outcomes:
            if error is not None:
                raise error
        return [result for result, _ in outcomes]

    def run_on_rank0(self, function):
        return self.run_on_all(lambda: function() if self.is_main else None)[0]


def parts(seed: int):
    """What a run keeps: a policy that took a step, its optimizer, an EMA model, and a buffer."""
    torch.manual_seed(seed)
    policy = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(policy.parameters())
    policy(torch.ones(3)).sum().backward()
    optimizer.step()
    ema, buffer = EMA(policy), ReplayBuffer(4, seed=seed)
    for i in range(5):
        buffer.add(Pair(prompt=[seed, i], chosen=[1, 2], rejected=[1, 3], start=1))
    buffer.sample(2)
    return {"policy": policy, "optimizer": optimizer, "ema": ema, "reference": None}, {
        "buffer": buffer}


def write(run: Path, step: int, keep=9, seed=1, **progress) -> Path:
    return write_checkpoint(run, step, World(), *parts(seed), progress, keep)


def write_on_two(run: Path, step: int, **progress) -> list:
    """The same by two processes, each with a buffer of its own -> what each returned or raised."""
    made = [parts(0), parts(1)]         # not in the threads, which share torch's random state
    return Processes(2).run(lambda world: write_checkpoint(
        run, step, world, *made[world.rank], progress, keep=2))


def read(checkpoint: Path):
    return read_checkpoint(checkpoint, World(), *parts(0))


def same_parts(one: dict, other: dict) -> bool:
    return all(same_state(one[name].state_dict(), other[name].state_dict()) for name in one
               if one[name] is not None)


def contents(folder: Path) -> dict:
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def edit_manifest(checkpoint: Path, change) -> None:
    """Change the manifest by a function of what it holds (which may return something else)."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    changed = change(manifest)
    path.write_text(json.dumps(manifest if changed is None else changed))


def forge(checkpoint: Path, name: str, state) -> None:
    """Put another state into a file of a checkpoint, with a manifest that fits it."""
    torch.save(state, checkpoint / name)
    content = (checkpoint / name).read_bytes()
    edit_manifest(checkpoint, lambda manifest: manifest["files"].update(
        {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}))


# ----------------------------------------------------------------------------- there and back

def test_round_trip(tmp_path):
    """Weights, optimizer, EMA, buffer (its items as Pairs, its random state), step and progress
    come back bit for bit, with parts that are None left out."""
    progress = {"before": {"nll": 0.1 + 0.2}, "skipped": 3, "bad_steps_in_a_row": 0}
    written = write(tmp_path, 12, **progress)
    assert written == tmp_path / "checkpoints" / "step-000012"
    replicated, per_rank = parts(seed=2)
    assert not same_parts(replicated, parts(seed=1)[0])
    assert read_checkpoint(written, World(), replicated, per_rank) == (12, progress)
    assert same_parts(replicated, parts(seed=1)[0]) and same_parts(per_rank, parts(seed=1)[1])
    assert all(isinstance(item, Pair) for item in per_rank["buffer"].items)
    assert per_rank["buffer"].sample(3) == parts(seed=1)[1]["buffer"].sample(3)


def test_each_process_has_its_own(tmp_path):
    """Of two processes each gets back its own state; the common one is written once."""
    path, _ = write_on_two(tmp_path, 3, skipped=1)
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json", "rank0.pt", "rank1.pt", "shared.pt"]

    loaded = [parts(7), parts(8)]
    found = Processes(2).run(lambda world: read_checkpoint(path, world, *loaded[world.rank]))
    assert found == [(3, {"skipped": 1})] * 2
    for rank, (replicated, per_rank) in enumerate(loaded):
        assert same_parts(replicated, parts(0)[0]) and same_parts(per_rank, parts(rank)[1])
    with pytest.raises(UserError, match=r"written by 2 processes.*has 1.*--nproc_per_node 2"):
        read(path)


def test_one_step_twice(tmp_path):
    """A checkpoint of a step that there is one of already takes its place."""
    write(tmp_path, 4, seed=1)
    path = write(tmp_path, 4, seed=2)
    replicated, per_rank = parts(0)
    read_checkpoint(path, World(), replicated, per_rank)
    assert same_parts(replicated, parts(2)[0])
    assert [folder.name for folder in path.parent.iterdir()] == ["step-000004"]


def test_find_checkpoint(tmp_path):
    """--resume names a run, for its newest checkpoint, or one checkpoint. Folders that were never
    completed, copies under other names and links are no checkpoints."""
    (tmp_path / "run").mkdir()
    assert find_checkpoint(str(tmp_path / "run")) is None
    run = tmp_path / "run"
    first, second = write(run, 2), write(run, 10)
    shutil.copytree(second, second.with_name("step-000012-mine"))
    shutil.copytree(second, second.with_name("step-000013.partial"))
    second.with_name("step-000014").symlink_to(first)
    second.with_name("step-000015").mkdir()
    assert all_checkpoints(run) == [first, second] and newest_checkpoint(run) == second
    assert find_checkpoint(str(run)) == second and find_checkpoint(str(first)) == first
    for name in ("step-000012-mine", "step-000013.partial", "step-000014", "step-000015", "none"):
        with pytest.raises(UserError, match="not a checkpoint that is complete"):
            find_checkpoint(str(run / "checkpoints" / name))


# ------------------------------------------------------------------------------- what is kept

def test_old_ones_are_pruned(tmp_path):
    """The newest `keep` stay, besides what somebody else put there."""
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=2)
        (tmp_path / "checkpoints" / "step-000001-mine").mkdir(exist_ok=True)
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == [
        "step-000001-mine", "step-000003", "step-000004"]


def test_the_one_just_written_is_never_pruned(tmp_path):
    """Where later checkpoints lie beside it, the one just written stays all the same."""
    for step in (6, 8, 9):
        write(tmp_path, step)
    write(tmp_path, 4, keep=2)
    assert checkpoint_names(tmp_path) == ["step-000004", "step-000008", "step-000009"]


def test_a_streak_of_bad_steps_leaves_one_from_before(tmp_path):
    """While no step is finite, the newest checkpoint from before that is kept besides the newest
    ones; once a step is finite again, it goes as every other does."""
    for step, bad in ((2, 0), (4, 0), (6, 1), (8, 3), (10, 5)):
        write(tmp_path, step, keep=2, bad_steps_in_a_row=bad)
    assert checkpoint_names(tmp_path) == ["step-000004", "step-000008", "step-000010"]
    write(tmp_path, 12, keep=2, bad_steps_in_a_row=0)
    assert checkpoint_names(tmp_path) == ["step-000010", "step-000012"]
    # One with a damaged manifest is not taken for one from before a streak.
    edit_manifest(tmp_path / "checkpoints" / "step-000012", lambda manifest: [])
    write(tmp_path, 14, keep=2, bad_steps_in_a_row=0)
    write(tmp_path, 16, keep=1, bad_steps_in_a_row=1)
    assert checkpoint_names(tmp_path) == ["step-000014", "step-000016"]


def test_remove_checkpoint(tmp_path):
    """A checkpoint is removed, twice does no harm, and the folder of the last one goes with it."""
    run = tmp_path / "run"
    first, second = write(run, 1), write(run, 2)
    remove_checkpoint(second)
    remove_checkpoint(second)
    assert checkpoint_names(run) == ["step-000001"]
    remove_checkpoint(first)
    assert list(run.iterdir()) == []


def test_links_are_not_written_through(tmp_path):
    """A link in the place of a checkpoint that is being written is replaced; what it points to
    stays as it was."""
    other, folder = tmp_path / "other", tmp_path / "run" / "checkpoints"
    other.mkdir(), folder.mkdir(parents=True)
    (other / "mine.txt").write_text("mine")
    for name in ("step-000003.partial", "step-000003", "step-000001.partial"):
        (folder / name).symlink_to(other)
    path = write(tmp_path / "run", 3)
    assert not path.is_symlink() and read(path)[0] == 3
    assert [file.name for file in other.iterdir()] == ["mine.txt"]
    assert [left.name for left in folder.iterdir()] == ["step-000003"]


# ---------------------------------------------------------------- full disks and killed processes

def test_a_full_disk_costs_nothing_that_was_there(tmp_path, capfd):
    """A disk that fills up (a limit on file sizes stands for it) ends in one sentence and a status
    of its own, the checkpoint before stays as it was, and nothing else is left behind."""
    write(tmp_path, 3)
    before = contents(tmp_path)
    limit = max(len(content) for content in before.values()) // 2

    def fill_up():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        write(tmp_path, 6)

    status = status_of(forked(fill_up))
    said = capfd.readouterr().err
    assert status == 4 and said.count("\n") == 1
    assert "could not write the checkpoint" in said and "from step-000003" in said
    assert contents(tmp_path) == before and checkpoint_names(tmp_path) == ["step-000003"]


def test_a_process_that_can_not_write_stops_all(tmp_path, monkeypatch):
    """Where one process can't write its file, every process raises the same sentence, and none
    waits for another."""
    write_state = checkpoints.write_state

    def fail_on_rank_1(path, state):
        if path.name == "rank1.pt":
            raise OSError(28, "No space left on device")
        return write_state(path, state)

    monkeypatch.setattr(checkpoints, "write_state", fail_on_rank_1)
    for error in write_on_two(tmp_path, 6):
        assert isinstance(error, RunFailed)
        assert "No space left" in str(error) and "from the start" in str(error)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_damaged_file_on_one_process_stops_all(tmp_path):
    """What does not fit in one process's file is an error in every process."""
    path, _ = write_on_two(tmp_path, 6)
    forge(path, "rank1.pt", {"buffer": {"items": [1]}})
    made = [parts(0), parts(0)]
    for error in Processes(2).run(lambda world: read_checkpoint(path, world, *made[world.rank])):
        assert isinstance(error, UserError) and "does not fit" in str(error)


def test_killed_while_writing(tmp_path):
    """SIGKILL at 12 moments of writing one checkpoint after another: whatever is then there under
    a checkpoint's name is complete, and no step's checkpoint is lost once a later one is begun."""
    def write_many():
        for step in range(1, 10 ** 6):
            write(tmp_path, step, keep=2)

    saves = 0
    for n in range(12):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        child = forked(write_many)
        while len(all_checkpoints(tmp_path)) < 2:
            time.sleep(0.001)
        time.sleep(0.0013 * n)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saves += any((tmp_path / "checkpoints").glob("*.partial"))
        found = all_checkpoints(tmp_path)
        assert len(found) >= 2
        for path in found:
            assert read(path)[0] == checkpoints.step_of(path)
    assert saves >= 3, "few kills came during a save: the test shows nothing"


# ------------------------------------------------------------------------- nothing is trusted

def flip(content: bytes) -> bytes:
    return content[:999] + bytes([content[999] ^ 4]) + content[1000:]


def halve(content: bytes) -> bytes:
    return content[:len(content) // 2]


@pytest.mark.parametrize("name, harm", [
    ("shared.pt", flip), ("rank0.pt", flip), ("shared.pt", halve), ("rank0.pt", halve),
    ("manifest.json", halve), ("shared.pt", None), ("rank0.pt", None)])
def test_damaged_files_are_named(name, harm, tmp_path):
    """A flipped bit, half a file, no file: the file is named, and the checkpoint before it is
    offered."""
    earlier, path = write(tmp_path, 3), write(tmp_path, 4)
    content = (path / name).read_bytes()
    (path / name).unlink()
    if harm:
        (path / name).write_bytes(harm(content))
    with pytest.raises(UserError, match=f"{name} is damaged .*--resume {earlier}$"):
        read(path)
    shutil.rmtree(earlier)
    with pytest.raises(UserError, match=f"{name} is damaged .*there is none before it$"):
        read(path)


def replace_key(name, value):
    return lambda manifest: manifest | {name: value}


def rename_file(to):
    return lambda manifest: manifest["files"].update({to: manifest["files"].pop("rank0.pt")})


@pytest.mark.parametrize("change", [
    lambda manifest: [],
    lambda manifest: {},
    lambda manifest: "[" * 100_000,
    lambda manifest: manifest | {"more": " " * 2 ** 21},
    lambda manifest: manifest.pop("processes") and None,
    replace_key("more", 1),
    replace_key("step", "4"),
    replace_key("step", 4.0),
    replace_key("step", 5),
    replace_key("step", None),
    replace_key("processes", True),
    replace_key("processes", -1),
    replace_key("processes", 10 ** 12),
    replace_key("processes", float("nan")),
    replace_key("bad_steps_in_a_row", "0"),
    replace_key("bad_steps_in_a_row", {}),
    replace_key("files", None),
    replace_key("files", ["shared.pt", "rank0.pt"]),
    replace_key("files", {"shared.pt": 1, "rank0.pt": 2}),
    lambda manifest: manifest["files"].pop("rank0.pt") and None,
    rename_file("rank1.pt"),
    rename_file("../../../secret"),
    rename_file("/dev/zero"),
    rename_file("rank0.pt/"),
    lambda manifest: manifest["files"]["rank0.pt"].update(sha256=["0" * 64]),
    lambda manifest: manifest["files"]["rank0.pt"].update(sha256="0" * 63),
    lambda manifest: manifest["files"]["rank0.pt"].update(bytes="1"),
    lambda manifest: manifest["files"]["rank0.pt"].update(more=1),
])
def test_manifests_of_other_shapes(change, tmp_path):
    """A manifest with other keys, other types, other file names, too large or too deep: one
    sentence that names it."""
    path = write(tmp_path, 4)
    edit_manifest(path, change)
    with pytest.raises(UserError, match=r"manifest.json is damaged \(.+\); there is none") as error:
        read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def link_to_zero(path):
    path.symlink_to("/dev/zero")


def link_to_copy(path):
    shutil.copyfile(path.with_name("copy"), path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("name", ["manifest.json", "shared.pt", "rank0.pt"])
@pytest.mark.parametrize("put", [link_to_zero, link_to_copy, os.mkfifo, Path.mkdir])
def test_only_regular_files_are_read(name, put, tmp_path):
    """A link (to a device without end, or to the very file), a pipe and a folder in the place of
    a file are refused, and none of them is waited for."""
    path = write(tmp_path, 4)
    (path / name).rename(path / "copy")
    put(path / name)
    begin = time.monotonic()
    with pytest.raises(UserError, match=f"{name} is damaged"):
        read(path)
    assert time.monotonic() - begin < 5


def test_checkpoints_execute_nothing(tmp_path):
    """A file that holds code, with a manifest that fits it, is not executed."""
    path, trap = write(tmp_path / "run", 1), tmp_path / "trap"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    forge(path, "shared.pt", {"policy": Bomb()})
    with pytest.raises(UserError, match=r"shared\.pt: holds something else"):
        read(path)
    assert not trap.exists()


@pytest.mark.parametrize("name, state", [
    ("shared.pt", []), ("shared.pt", {}), ("shared.pt", {"policy": 1}),
    ("rank0.pt", None), ("rank0.pt", {"buffer": []}), ("rank0.pt", {"buffer": {"items": 3}})])
def test_states_of_other_shapes(name, state, tmp_path):
    """A file whose state has another shape than this run's is refused with a sentence."""
    path = write(tmp_path, 1)
    forge(path, name, state)
    with pytest.raises(UserError, match="does not fit this model and these settings"):
        read(path)


def test_no_state_at_all(tmp_path):
    """A file that is no torch file, with a manifest that fits it, is refused with a sentence."""
    path = write(tmp_path, 1)
    for content in (b"", b"hello", (path / "shared.pt").read_bytes()[:-40]):
        forge(path, "shared.pt", {})
        (path / "shared.pt").write_bytes(content)
        facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        edit_manifest(path, lambda manifest, facts=facts: manifest["files"].update(
            {"shared.pt": facts}))
        with pytest.raises(UserError, match=r"shared\.pt: holds something else"):
            read(path)


def test_progress_must_be_a_dictionary(tmp_path):
    """A checkpoint without progress, or with something else in its place, is refused."""
    path = write(tmp_path, 1)
    shared = torch.load(path / "shared.pt", weights_only=True)
    for progress in (None, 3, [1]):
        forge(path, "shared.pt", shared | {"progress": progress})
        with pytest.raises(UserError, match="does not fit"):
            read(path)
