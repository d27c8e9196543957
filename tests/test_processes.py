"""Runs on several processes: DDP equals one process, and --shard equals DDP."""
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import (
    REPOSITORY,
    TORCHRUN,
    StopAfter,
    check_close_runs,
    check_close_weights,
    check_same_run,
    command,
    flag_value,
    own_buffer,
    read_records,
    read_summary,
    two_processes,
    untimed,
    weights,
)
from transformers import AutoConfig, AutoModelForCausalLM

import train
from support.checkpoint import newest_checkpoint
from support.settings import parse


def train_one(*arguments: str) -> None:
    """A run in this process."""
    train.train(parse([*arguments]))


def train_two(*arguments: str, stop_after: int | None = None, status: int = 0) -> None:
    """A run on two processes, which both end with `status`."""
    stop = [StopAfter(stop_after)] if stop_after else []
    statuses = two_processes(lambda: train.train(parse([*arguments]), *stop))
    assert statuses == [status, status]


# --------------------------------------------------------------------------------------------- DDP

@pytest.mark.parametrize("flags", ["--loss orpo", "--loss dpo --ref policy", "--loss sft"])
def test_two_processes_equal_one(flags, tiny_run, tmp_path):
    """Without generation, two processes give the losses, statistics and weights of one process on
    the same global batch."""
    flags = [*tiny_run, *flags.split()]
    if "sft" not in flags:
        flags += ["--rejected", "data"]
    train_one(*flags, "--out", str(tmp_path / "one"))
    train_two(*flags, "--out", str(tmp_path / "two"))
    check_close_runs(tmp_path / "one", tmp_path / "two")
    one, two = (read_summary(tmp_path / name) for name in ("one", "two"))
    assert one["before"].keys() == two["before"].keys()
    for moment in ("before", "after"):
        for name in ("exact_match", "data_accuracy", "data_margin"):
            assert one[moment][name] == pytest.approx(two[moment][name], rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--loss dpo", "--rejected spin --iterations 2 --loss dpo",
                                   "--num_rejected 2 --skip_identical"])
def test_two_processes_generate(flags, tiny_run, tmp_path):
    """Methods that generate run under torchrun on two processes: losses stay finite, and the buffer
    of both together holds --buffer_size pairs."""
    more = [] if "spin" in flags else ["--buffer_size", "12"]
    out = tmp_path / "out"
    done = command(*tiny_run, *more, *flags.split(), "--out", str(out), launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    records = read_records(out)
    assert [record["step"] for record in records] == list(range(1, 7))
    assert all(math.isfinite(value) for record in records for value in record.values())
    if more and "skip" not in flags:
        assert records[-1]["buffer_size"] == 12


def test_processes_of_one_run_make_different_pairs(tiny_run, tmp_path):
    """Each process takes other rows of the step's mini-batch, and draws from a buffer of its own:
    over both, a step makes pairs of all its rows, each once."""
    def watched():
        rows, add = [], train.ReplayBuffer.add

        def noted(self, pair):
            rows.append([pair.step, pair.example_id])
            add(self, pair)

        train.ReplayBuffer.add = noted
        train_one(*tiny_run, "--buffer_size", "8", "--out", str(tmp_path / "out"))
        (tmp_path / f"rows{os.environ['RANK']}").write_text(json.dumps(rows))

    assert two_processes(watched) == [0, 0]
    first, second = (json.loads((tmp_path / f"rows{rank}").read_text()) for rank in (0, 1))
    for step in range(1, 7):
        of_step = [[row for s, row in rows if s == step] for rows in (first, second)]
        assert [len(rows) for rows in of_step] == [2, 2]
        assert len({*of_step[0], *of_step[1]}) == 4


# ------------------------------------------------------------------------------------------- shard

@pytest.mark.parametrize("flags", [
    "--loss dpo --ref ema",
    "--loss orpo --skip_identical --grad_checkpoint",
    pytest.param("--rejected spin --iterations 2 --loss dpo", marks=pytest.mark.slow),
    pytest.param("--rejected policy --optimizer rmsprop", marks=pytest.mark.slow)])
def test_shard_equals_ddp(flags, tiny_run, tmp_path):
    """--shard on two processes gives DDP's losses, pairs and weights, evaluations included, and
    saves the same folder and a checkpoint with the same names and whole tensors."""
    flags = [*tiny_run, *own_buffer(flags), *flags.split(), "--save_every", "3"]
    ddp, shard = tmp_path / "ddp", tmp_path / "shard"
    train_two(*flags, "--out", str(ddp))
    train_two(*flags, "--shard", "--out", str(shard))
    check_close_runs(ddp, shard)
    a, b = (read_summary(out) for out in (ddp, shard))
    assert a["after"] == pytest.approx(b["after"], rel=1e-3, abs=1e-4)
    a, b = ((out / "final" / "config.json").read_text() for out in (ddp, shard))
    assert a == b
    a, b = (torch.load(newest_checkpoint(out) / "shared.pt", weights_only=True)
            for out in (ddp, shard))
    assert a.keys() == b.keys()
    check_close_weights(a["policy"], b["policy"])


def test_shard_in_bf16(tiny_run, tmp_path):
    """--shard --dtype bf16: losses close to those of fp32 and not equal to them; the weights that
    are saved are fp32."""
    flags = [*tiny_run, "--rejected", "data", "--loss", "orpo", "--grad_checkpoint", "--shard"]
    for dtype in ("fp32", "bf16"):
        train_two(*flags, "--dtype", dtype, "--out", str(tmp_path / dtype))
    a, b = ([record["loss"] for record in untimed(tmp_path / dtype)] for dtype in ("fp32", "bf16"))
    assert a != b and a == pytest.approx(b, rel=0.02)
    assert all(weight.dtype == torch.float32 for weight in weights(tmp_path / "bf16").values())


@pytest.mark.parametrize("tied", [False, True])
def test_shard_equals_one_process(tied, tiny_run, tmp_path):
    """Plain DPO cut up among two processes gives the losses and weights of one process on the same
    global batch, with tied embeddings too."""
    model = shutil.copytree(flag_value(tiny_run, "--model"), tmp_path / "model")
    if tied:
        config = AutoConfig.from_pretrained(model, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
    flags = [*tiny_run, "--model", str(model), "--rejected", "data", "--loss", "dpo"]
    train_one(*flags, "--out", str(tmp_path / "one"))
    train_two(*flags, "--shard", "--out", str(tmp_path / "shard"))
    check_close_runs(tmp_path / "one", tmp_path / "shard")


@pytest.mark.parametrize("gone", [1, 2])
def test_shard_with_unequal_shares(gone, tiny_run, tmp_path, monkeypatch):
    """Where one process has fewer pairs than the other, or none, neither waits for ever, and a step
    is DDP's."""
    def fewer(s, world, scorer, reference_scorer, pairs, beta, backward=train.backward):
        return backward(s, world, scorer, reference_scorer, pairs[gone * world.rank:], beta)

    monkeypatch.setattr(train, "backward", fewer)
    flags = [*tiny_run, "--rejected", "data", "--micro_batch", "1", "--steps", "3"]
    train_two(*flags, "--out", str(tmp_path / "ddp"))
    train_two(*flags, "--shard", "--out", str(tmp_path / "shard"))
    check_close_runs(tmp_path / "ddp", tmp_path / "shard")
    assert all(math.isfinite(record["loss"]) for record in untimed(tmp_path / "shard"))


@pytest.mark.parametrize("first, then", [
    ("--shard", "--shard"), pytest.param("--no-shard", "--shard", marks=pytest.mark.slow),
    pytest.param("--shard", "--no-shard", marks=pytest.mark.slow)])
def test_shard_resumes(first, then, tiny_run, tmp_path):
    """A sharded run stopped after 3 steps and resumed equals one that never stopped, bit for bit. A
    checkpoint of DDP is one for --shard too, and the other way round."""
    flags = [*tiny_run, "--buffer_size", "8", "--loss", "dpo", "--ref", "ema", "--save_every", "6"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    train_two(*flags, "--shard", "--out", str(whole))
    train_two(*flags, first, "--out", str(out), stop_after=3, status=3)
    train_two("--resume", str(out), then)
    check_close_runs(whole, out)
    if first == then:
        check_same_run(whole, out, processes=2)


# ------------------------------------------------------------------------------------------ memory

@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
                    reason="without AVX-512, oneDNN keeps no bf16 kernels, and takes minutes")
def test_bf16_on_a_cpu_takes_no_more_memory_with_every_shape():
    """Batches of ever new lengths in bf16 on a CPU, where oneDNN would keep a kernel for each:
    memory stays within bounds."""
    done = subprocess.run([sys.executable, "-c", """
import torch
from support.parallel import World
world, layer, sizes = World(1, dtype="bf16"), torch.nn.Linear(512, 8000), []
for length in range(100, 250):
    with world.precision():
        layer(torch.ones(length, 512, requires_grad=True)).sum().backward()
    sizes.append(int(open("/proc/self/statm").read().split()[1]) * 4096 / 2 ** 20)
print(sizes[-1] - sizes[0])
"""], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 900         # MiB; 560, and 1500 with torch's own setting
