"""Memory of a process: what --dry_run plans, against the most that a run holds. On a CPU, where the first is in fp32.

    python bench/memory.py          a random 64 M Llama: alone, two processes with DDP, two with --shard

SAPO-DPO, which has the most copies of the model: two steps, in which every pair is as long as --max_len allows. What is held
includes Python with torch and transformers, some 330 MiB, which the plan does not count. glibc is told to give large pieces
back: what it keeps otherwise says nothing about a GPU.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from common import REPOSITORY, Table

import numpy as np
from transformers import AutoTokenizer, LlamaConfig

from support.plan import plan
from support.settings import parse

FLAGS = ("--random_init --loss dpo --max_len 512 --segment_len 64 --batch_size 8 --buffer_size 8 --micro_batch 4 --steps 2 "
         "--eval_rows 0 --print_every 0 --threads 1").split()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(vocab_size=32000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
                    tie_word_embeddings=False, bos_token_id=None, eos_token_id=1, pad_token_id=1).save_pretrained(folder)
        AutoTokenizer.from_pretrained(REPOSITORY / "data" / "model").save_pretrained(folder)
        random = np.random.default_rng(0)
        with open(f"{folder}/rows.jsonl", "w") as file:
            for _ in range(16):
                file.write(json.dumps({"prompt": "Go on.", "chosen": " ".join(map(str, random.integers(10, 100, 600)))}) + "\n")
        table = Table("processes", "flags", "planned, MiB", "held, MiB")
        for processes, more in ((1, []), (2, []), (2, ["--shard"])):
            flags, out = ["--model", folder, "--data", f"{folder}/rows.jsonl", *FLAGS, *more], f"{folder}/{processes}{len(more)}"
            planned = float(re.search(r"at most +([0-9.]+) GiB", plan(parse(flags), processes))[1]) * 1024
            done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), REPOSITORY / "train.py",
                                   *flags, "--out", out], capture_output=True, text=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"})
            if done.returncode:
                raise SystemExit(done.stderr)
            records = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
            table.row(str(processes), " ".join(more), planned, max(record["peak_memory_mib"] for record in records))


if __name__ == "__main__":
    main()
