"""What waiting threads cost when another program takes a core, by how long they spin.

    python bench/contention.py

Each line runs generation and scoring of a random 5 M Llama in a process of its own, on two threads,
alone and beside one busy process, for several settings of GNU OpenMP; on a CPU with the OpenMP of
torch's Linux wheels. Medians over the rounds, settings alternating.
"""
import argparse
import contextlib
import os
import statistics
import subprocess
import sys

BUSY = "while True: pass"
SETTINGS = [("default", {}), ("OMP_WAIT_POLICY=passive", {"OMP_WAIT_POLICY": "passive"}),
            *((f"GOMP_SPINCOUNT={n}", {"GOMP_SPINCOUNT": str(n)})
              for n in (1000, 10000, 100000))]


def work() -> None:
    """Print the seconds of generation and of scoring."""
    import torch  # first: what support/threads.py sets comes too late then
    from common import load_model, seconds  # isort: skip

    import sapo
    from support.fast_decode import recorded_decode_step

    torch.set_num_threads(2)
    model = load_model("5m")
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 8192, (8, 256), generator=random).tolist()
    pairs = [sapo.Pair(row[:128], row[128:], row[128:192] + row[64:128], 64) for row in ids]
    step = recorded_decode_step(model)

    def generate():
        sapo.generate_segments(model, ids, 32, eos_token_id=None, decode_step=step)

    def score():
        logps = sapo.pair_logps(model, pairs, shortcuts=sapo.Shortcuts(True, True))
        logps.chosen_logps.sum().backward()

    generate(), score()
    print(*(statistics.median(seconds(function) for _ in range(3))
            for function in (generate, score)))


@contextlib.contextmanager
def busy(processes: int):
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work()
    clean = {name: value for name, value in os.environ.items()
             if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    found = {}
    for _ in range(args.rounds):
        for name, setting in SETTINGS:
            environment = clean | setting
            for others in (0, 1):
                with busy(others):
                    done = subprocess.run([sys.executable, __file__, "--work"], text=True,
                                          capture_output=True, check=True, env=environment)
                found.setdefault((name, others), []).append(list(map(float, done.stdout.split())))
    print(f"{'seconds':<26}{'generate':>10}{'beside one busy':>18}"
          f"{'score':>10}{'beside one busy':>18}")
    for name, _ in SETTINGS:
        alone, beside = ([statistics.median(values) for values in
                          zip(*found[name, others], strict=True)] for others in (0, 1))
        print(f"{name:<26}{alone[0]:>10.3f}{beside[0]:>10.3f} ({beside[0] / alone[0]:4.1f}x)"
              f"{alone[1]:>10.3f}{beside[1]:>10.3f} ({beside[1] / alone[1]:4.1f}x)")


if __name__ == "__main__":
    main()
