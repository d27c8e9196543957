"""Compare the memory that --dry_run plans with the most that a run holds, per process, in MiB.

    python bench/memory.py

The model is a random Llama of 64 M parameters, in fp32 on a CPU. It is trained by one process, by
two with DDP and by two with --shard. The method is SAPO-DPO, which keeps the most copies of the
model. Each run takes two steps, and every pair is as long as --max_len allows.

What is held includes Python with torch and transformers, about 330 MiB, which the plan does not
count. glibc's allocator is told to give large pieces back. With its usual settings it keeps freed
memory, which says nothing about a GPU.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import REPOSITORY, Table
from transformers import AutoTokenizer, LlamaConfig

from support.plan import plan
from support.settings import parse

FLAGS = ["--random_init", "--loss", "dpo", "--max_len", "512", "--segment_len", "64",
         "--batch_size", "8", "--buffer_size", "8", "--micro_batch", "4", "--steps", "2",
         "--eval_rows", "0", "--print_every", "0", "--threads", "1"]


def write_model_and_rows(folder: Path) -> None:
    """Write a configuration, the demo's tokenizer, and rows.jsonl with 16 responses of 600 words.

    The words are numbers of two digits, so that every response is longer than --max_len tokens.
    """
    config = LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=1, pad_token_id=1)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(REPOSITORY / "data" / "model").save_pretrained(folder)
    rng = np.random.default_rng(0)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for _ in range(16):
            numbers = rng.integers(10, 100, 600)
            row = {"prompt": "Go on.", "chosen": " ".join(map(str, numbers))}
            file.write(json.dumps(row) + "\n")


def planned_mib(flags: list[str], processes: int) -> float:
    """The peak per process in the report of --dry_run."""
    report = plan(parse(flags), processes)
    return float(re.search(r"peak, at most +([0-9.]+) GiB", report)[1]) * 1024


def held_mib(flags: list[str], processes: int, out: Path) -> float:
    """Train with these flags. The most that a process held, from the run's metrics.jsonl."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
         str(REPOSITORY / "train.py"), *flags, "--out", str(out)],
        capture_output=True, text=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"})
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(json.loads(line)["peak_memory_mib"] for line in lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model_and_rows(folder)
        flags = ["--model", str(folder), "--data", str(folder / "rows.jsonl"), *FLAGS]
        table = Table("processes", "flags", "planned, MiB", "held, MiB")
        for processes, more in ((1, []), (2, []), (2, ["--shard"])):
            planned = planned_mib([*flags, *more], processes)
            held = held_mib([*flags, *more], processes, folder / f"{processes}{len(more)}")
            table.row(str(processes), " ".join(more), planned, held)


if __name__ == "__main__":
    main()
