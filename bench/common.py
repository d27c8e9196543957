"""What the benches share: models, timing side by side, tables.

Every bench compares its sides in one process, alternating, so that a machine that slows down slows
all sides down. A ratio is printed as its median over the rounds, with the smallest and the largest.
"""
import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")            # nothing here needs the Hub
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import support.threads  # noqa: E402, I001  (before torch: how its threads wait)
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Random Llamas; speed does not depend on what the weights are.
SIZES = {
    "5m": dict(vocab_size=8192, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
               num_attention_heads=4),
    "19m": dict(vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=9,
                num_attention_heads=6),
    "1b": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
               num_attention_heads=32, num_key_value_heads=8)}


def arguments(description: str, model: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=model, help="demo (the model in data/model), a random "
                        f"Llama ({', '.join(SIZES)}) or a model folder")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side, alternating")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser


def load_model(name: str, **changes):
    """fp32 on the CPU, bf16 on a GPU."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    transformers.utils.logging.disable_progress_bar()
    if name in SIZES:
        torch.manual_seed(0)
        config = LlamaConfig(**{"max_position_embeddings": 4096, "tie_word_embeddings": True,
                                **SIZES[name], **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        folder = REPOSITORY / "data" / "model" if name == "demo" else name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)     # not the folder's
    return model.to(DEVICE).eval()


def start(args, model, title: str) -> None:
    """Print what is compared, on what."""
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    machine = (torch.cuda.get_device_name() if DEVICE.type == "cuda"
               else f"CPU, {args.threads} threads, {support.threads.described()}")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{title}\n{args.model}, {parameters:.1f} M parameters, "
          f"{next(model.parameters()).dtype}; {machine}; torch {torch.__version__}, "
          f"transformers {transformers.__version__}; medians of {args.rounds}, alternating\n")


def seconds(function) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def alternate(sides: dict, rounds: int) -> dict[str, list[float]]:
    """name -> function; each runs once to warm up, then in turn. Returns each side's seconds."""
    for function in sides.values():
        function()
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, function in sides.items():
            times[name].append(seconds(function))
    return times


def median(values: list[float]) -> float:
    return statistics.median(values)


def ratio(slow: list[float], fast: list[float]) -> str:
    """Round by round, slow / fast: the median, and the smallest and largest in brackets."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def peak_mib(script: str, *flags: str) -> float:
    """Most memory that `script --memory ...` takes in a process of its own, beyond its weights."""
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split()[-1])


def memory_of(function) -> float:
    """MiB that function() takes at its peak beyond what is held before it."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    Path("/proc/self/clear_refs").write_text("5")       # the peak so far is forgotten (Linux)
    before = process_mib("VmRSS")
    function()
    return process_mib("VmHWM") - before


def process_mib(field: str) -> float:
    """VmRSS, what this process holds, or VmHWM, the most it held.

    Not getrusage, which counts the parent's memory before the fork.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


class Table:
    """Rows printed as they come, under one heading."""

    def __init__(self, *columns: str):
        self.widths = [max(10, len(column)) for column in columns]
        self.row(*columns)
        print("  ".join("-" * width for width in self.widths))

    def row(self, *cells) -> None:
        texts = [cell if isinstance(cell, str) else f"{cell:.3g}" if cell < 1000 else f"{cell:.0f}"
                 for cell in cells]
        print("  ".join(text.rjust(width) for text, width in zip(texts, self.widths, strict=True)),
              flush=True)
