"""What several test files share: small runs, forked processes, comparisons of runs.

Tests of whole runs call train.train in their own process, or in a forked child where they need an
exit status, a signal or a second process: a fork needs no imports and so no time.

    from conftest import run, weights
    records, summary = run(tiny_run, tmp_path, "--loss", "dpo")
"""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"      # no test needs a network; transformers reads it on import

import pytest
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import support.parallel
import train
from support import cli
from support.checkpoint import all_checkpoints
from support.errors import UserError
from support.settings import Settings, parse
from test_sapo import tiny

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY / "data"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]

# tqdm's own lock is shared with forks. Killed while holding that lock, a fork stops all others.
tqdm.set_lock(threading.RLock())
torch.set_num_threads(1)                # enough for models this small


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """All tests run in two processes where pytest-xdist is installed (-n says how many)."""
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    is_worker = hasattr(config, "workerinput")
    if everything and not is_worker and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses, config.option.dist = 2, "worksteal"


# Every axis of the methods table, alone and combined.
AXES = [
    "--loss orpo", "--loss dpo", "--loss dpo --ref policy", "--loss dpo --ref fixed", "--loss sft",
    "--rejected policy", "--rejected policy --loss dpo --buffer_size 0", "--rejected data",
    "--rejected data --loss dpo --ref ema", "--rejected spin --iterations 2 --loss dpo",
    "--rejected iteration --iterations 2 --loss orpo --segment_len 6", "--segment_len 0",
    "--num_rejected 4", "--num_rejected 2 --buffer_size 0",
    "--segment_eos forbid --nll_on prompt",
    "--tail drop --segment_eos forbid --loss dpo", "--tail rewrite --num_rejected 2",
    "--ema_decay 0.9 --ema_every 1 --temperature 1 --top_k 0 --top_p 1",
    "--skip_identical --temperature 0", "--optimizer rmsprop --schedule cosine",
    "--schedule inverse_sqrt --max_grad_norm 0 --weight_decay 0.1"]
# Those whose values other default tests run, too: by themselves they are slow tests.
RUN_ELSEWHERE = {
    "--rejected policy", "--rejected data", "--num_rejected 4", "--skip_identical --temperature 0",
    "--tail drop --segment_eos forbid --loss dpo", "--tail rewrite --num_rejected 2"}


@pytest.fixture(scope="session")
def embedded_data() -> Path:
    """The folder of the data and the model that come with this repository."""
    return DATA


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded model's tokenizer. Tests that change it take a copy."""
    return AutoTokenizer.from_pretrained(DATA / "model")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> list[str]:
    """Flags of a run that takes about a second: a tiny random model with the demo's tokenizer, and
    a few of the embedded rows. tiny_run[1] is the model's folder."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = AutoTokenizer.from_pretrained(DATA / "model")
    end = tokenizer.eos_token_id
    model = tiny(vocab_size=len(tokenizer), pad_token_id=end, eos_token_id=end, bos_token_id=None)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, rows in (("train", 40), ("heldout", 12)):
        lines = (DATA / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:rows]))
    return (f"--model {folder}/model --data {folder}/train.jsonl "
            f"--eval_data {folder}/heldout.jsonl --max_len 160 --batch_size 4 --micro_batch 2 "
            "--steps 6 --lr 1e-3 --segment_len 6 --max_new_tokens 8 --ref_every 3 --warmup 0 "
            "--threads 1").split()


@pytest.fixture(scope="session")
def finished_run(tiny_run, tmp_path_factory):
    """finished_run(flags) -> the folder of a run that ended well.

    Each is made once, for all tests that only read that folder.
    """
    folders = {}

    def folder_of(flags: str = "--loss orpo") -> Path:
        if flags not in folders:
            out = tmp_path_factory.mktemp("finished") / "out"
            run(tiny_run, out, flags)
            folders[flags] = out
        return folders[flags]

    return folder_of


# ------------------------------------------------------------------------------------ single runs

def own_buffer(flags: str) -> list[str]:
    """A buffer that 6 steps of 4 pairs overflow, for the methods that have one."""
    without = {"data", "spin", "iteration", "sft", "--buffer_size"}
    return [] if without & set(flags.split()) else ["--buffer_size", "8"]


def parsed(flags: str) -> Settings:
    """Settings of a command line written as one text."""
    return parse(flags.split())


def run(flags: list[str], out: Path, *more: str) -> tuple[list[dict], dict]:
    """One run in this process -> the records of its metrics.jsonl, and its summary.

    more: further flags, one or several to a text: run(tiny_run, out, "--loss dpo --ref ema").
    """
    more = " ".join(more)
    train.train(parse([*flags, "--out", str(out), *own_buffer(more), *more.split()]))
    return read_records(out), read_summary(out)


def read_records(out: Path) -> list[dict]:
    """metrics.jsonl of a run's folder."""
    with (out / "metrics.jsonl").open() as file:
        return [json.loads(line) for line in file]


def read_summary(out: Path) -> dict:
    """summary.json of a run's folder."""
    return json.loads((out / "summary.json").read_text())


def untimed(out: Path) -> list[dict]:
    """The records without what differs between two equal runs: seconds and memory."""
    return [{name: value for name, value in record.items()
             if "seconds" not in name and "memory" not in name} for record in read_records(out)]


def results(summary: dict) -> dict:
    """The part of a summary that two equal runs have in common: all but the seconds."""
    return {name: value for name, value in summary.items() if name != "seconds"}


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The weights that a run saved."""
    return AutoModelForCausalLM.from_pretrained(out / "final").state_dict()


def checkpoint_names(out: Path) -> list[str]:
    """The complete checkpoints of a run, oldest first."""
    return [folder.name for folder in all_checkpoints(out)]


def flag_value(flags: list[str], name: str) -> str:
    """The value of a flag: flag_value(tiny_run, "--data")."""
    return flags[flags.index(name) + 1]


class StopAfter:
    """Stands for a signal that comes during step n of a run: the loop asks once per step.

        train.train(settings, StopAfter(3))     raises Stopped after the third step of this call
    """
    training = False

    def __init__(self, step: int):
        self.left = step

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left <= 0

    def heard_elsewhere(self) -> None:
        """There are no handlers to keep."""


# -------------------------------------------------------------------------------------- processes

def command(*arguments: str, launcher=(sys.executable,), cwd=None, **options):
    """Run train.py as a user does; options go to subprocess.run."""
    return subprocess.run([*launcher, str(REPOSITORY / "train.py"), *arguments],
                          capture_output=True, text=True, cwd=cwd, timeout=700, **options)


def quick_command(*arguments: str, capfd) -> tuple[int, str, str]:
    """The same in a forked child: exit status, standard output, standard error."""
    capfd.readouterr()
    status = status_of(forked(lambda: sys.exit(cli.main(train.train, list(arguments)))))
    return status, *capfd.readouterr()


def one_thread() -> None:
    """For a forked child: OpenMP's threads are gone there, and waiting for them takes for ever."""
    support.parallel.cores = lambda: 1
    torch.set_num_threads(1)


def forked(function, *arguments) -> int:
    """Call a function in a forked child; returns the child's process id.

    The child's exit status is 0, that of a SystemExit or UserError, or 70 with a traceback.
    """
    child = os.fork()
    if child == 0:
        status = 70
        try:
            # Those that pytest puts in their place lose what is written here.
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            signal.alarm(300)           # a child that hangs ends, and its test fails
            one_thread()
            function(*arguments)
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except UserError as error:
            print(error, file=sys.stderr)
            status = error.status
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return child


def status_of(child: int) -> int:
    """Wait for a child; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def two_processes(function, *arguments) -> list[int]:
    """Call a function in two forked processes, in torchrun's environment; their exit statuses."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]

    def one_of_two(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
                          LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
        function(*arguments)

    children = [forked(one_of_two, rank) for rank in (0, 1)]
    return [status_of(child) for child in children]


# ------------------------------------------------------------------------------ comparing two runs

def same_state(a, b) -> bool:
    """Are two states of plain types and tensors equal bit for bit?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def check_same_run(one: Path, other: Path, processes: int = 1) -> None:
    """The same metrics, final weights and last checkpoint: optimizer, EMA, reference, buffers."""
    assert untimed(one) == untimed(other)
    assert same_state(dict(weights(one)), dict(weights(other)))
    last = sorted((one / "checkpoints").glob("step-*"))[-1].name
    for name in ["shared.pt", *(f"rank{rank}.pt" for rank in range(processes))]:
        a, b = (torch.load(out / "checkpoints" / last / name, weights_only=True)
                for out in (one, other))
        for state in (a, b):
            if name == "shared.pt":
                state["progress"]["totals"].pop("seconds")
        assert same_state(a, b), name


def check_close_runs(one: Path, other: Path) -> None:
    """The same losses and statistics at every step, and the same final weights, up to rounding."""
    for a, b in zip(untimed(one), untimed(other), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    check_close_weights(weights(one), weights(other))


def check_close_weights(a: dict, b: dict) -> None:
    """Equal up to rounding. Of a few weights, Adam turns a gradient of nearly nothing into a whole
    step either way."""
    assert a.keys() == b.keys()
    gaps = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert gaps.mean() < 1e-6 and (gaps > 1e-5).float().mean() < 1e-3, (gaps.mean(), gaps.max())
