"""Tokens a second: generate_segments against model.generate of the installed transformers, and against its bound.

    pip install -r bench/requirements.txt
    python bench/generate.py                            the default job's model
    python bench/generate.py --model FOLDER             another

Both sides sample (temperature 0.7, top-k 50, top-p 0.95) after the same prefixes, about 256 tokens of unequal lengths;
"lengths differ" lets each row have its own limit, from a quarter of the new tokens to all: model.generate goes on until the
longest is done. Greedy, both must give the same tokens first. The bound is the time of one decode step's linear layers
alone at that batch size. "Two steps in one batch": twice the rows at once, against once, in tokens a second of decoding,
the prefill taken off both.
"""
from common import DEVICE, Table, alternate, arguments, load_model, seconds, start

import statistics
import time

import torch

import sapo

SAMPLING = dict(temperature=0.7, top_k=50, top_p=0.95)


def transformers_generate(model, prefixes, limits, **how):
    longest = max(map(len, prefixes))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prefixes], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prefixes], device=DEVICE)
    new = model.generate(ids, attention_mask=mask, max_new_tokens=max(limits), pad_token_id=0, **how)[:, longest:].tolist()
    return [row[:limit] for row, limit in zip(new, limits)]


def same_tokens(model, prefixes, limits) -> bool:
    """Greedy, both give the same tokens; where they part, both were (all but) equally likely there."""
    ours = sapo.generate_segments(model, prefixes, limits, eos_token_id=None, temperature=0)
    for prefix, (mine,), theirs in zip(prefixes, ours, transformers_generate(model, prefixes, limits, do_sample=False)):
        differ = [i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b]
        if differ:
            at = differ[0]
            with torch.no_grad():
                logits = model(torch.tensor([prefix + mine[:at]], device=DEVICE)).logits[0, -1].float()
            if (logits[mine[at]] - logits[theirs[at]]).abs() > (1e-3 if DEVICE.type == "cpu" else 0.2):
                return False
    return True


def decode_step_seconds(model, prefixes, new_tokens: int) -> tuple[float, float]:
    """Median seconds of one of our decode steps, sampling included, and of its linear layers alone."""
    times, choose = [], sapo.sample_tokens

    def watch(*args, **kwargs):
        times.append(time.perf_counter())        # right on a GPU too: every step waits for its tokens
        return choose(*args, **kwargs)

    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = [torch.randn(len(prefixes), 1, module.in_features, device=DEVICE, dtype=module.weight.dtype) for module in linears]
    steps, bound = [], []
    for _ in range(3):
        times.clear()
        sapo.sample_tokens = watch
        sapo.generate_segments(model, prefixes, new_tokens, eos_token_id=None, **SAMPLING)
        sapo.sample_tokens = choose
        steps += [b - a for a, b in zip(times, times[1:])]
        with torch.no_grad():
            bound += [seconds(lambda: [module(x) for module, x in zip(linears, inputs)]) for _ in range(15)]
    return statistics.median(steps), statistics.median(bound)


def main() -> None:
    parser = arguments(__doc__.split("\n")[0], "demo")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--new", type=int, nargs="+", default=[64, 256], help="new tokens")
    parser.add_argument("--prefix", type=int, default=256, help="longest prefix; the shortest has three quarters of it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model)
    start(args, model, "Generation: generate_segments against model.generate")
    table = Table("batch", "new tokens", "lengths", "transformers, tok/s", "ours, tok/s", "ratio", "two steps in one batch")
    random = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    for batch in args.batch:
        lengths = torch.randint(args.prefix * 3 // 4, args.prefix + 1, (2 * batch,), generator=random).tolist()
        prefixes = [torch.randint(3, vocabulary, (n,), generator=random).tolist() for n in lengths]
        for new in args.new:
            for name, limits in (("equal", [new] * batch), ("differ", torch.linspace(new // 4, new, batch).long().tolist())):
                mine = prefixes[:batch]
                if not same_tokens(model, mine, limits):
                    raise SystemExit("the two sides do not give the same tokens")
                sides = {"transformers": lambda: transformers_generate(model, mine, limits, do_sample=True, **SAMPLING),
                         "ours": lambda: sapo.generate_segments(model, mine, limits, eos_token_id=None, **SAMPLING),
                         "one token": lambda: sapo.generate_segments(model, mine, 1, eos_token_id=None, **SAMPLING),
                         "two": lambda: sapo.generate_segments(model, prefixes, limits * 2, eos_token_id=None, **SAMPLING),
                         "two, one token": lambda: sapo.generate_segments(model, prefixes, 1, eos_token_id=None, **SAMPLING)}
                found = alternate(sides, args.rounds)
                table.row(str(batch), str(new), name, sum(limits) / found["transformers"], sum(limits) / found["ours"],
                          found["transformers"] / found["ours"],
                          2 * (found["ours"] - found["one token"]) / (found["two"] - found["two, one token"]))
    print()
    table = Table("batch", "decode step, ms", "its linear layers, ms", "ratio")
    for batch in args.batch:
        step, linear = decode_step_seconds(model, (prefixes * batch)[:batch], 33)
        table.row(str(batch), step * 1e3, linear * 1e3, step / linear)


if __name__ == "__main__":
    main()
