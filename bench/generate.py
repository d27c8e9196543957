"""Tokens per second: generate_segments against model.generate of the installed transformers.

    pip install -r bench/requirements.txt
    python bench/generate.py                            the model in data/model
    python bench/generate.py --model FOLDER             another

Both sides sample (temperature 0.7, top-k 50, top-p 0.95) after the same prefixes, which differ in
length.
"differ": each sequence has its own limit, from a quarter of the new tokens to all of them;
model.generate goes on until the longest is done. Greedy, both must first give the same tokens.
"two steps": twice the sequences in one batch against once, in tokens per second of decoding, the
prefill taken off both. The last table compares one decode step with its linear layers alone.
"""
import functools
import itertools
import statistics
import time

import torch
from common import DEVICE, Table, alternate, arguments, load_model, median, ratio, seconds, start

import sapo
from support.fast_decode import recorded_decode_step

SAMPLING = dict(temperature=0.7, top_k=50, top_p=0.95)


def transformers_generate(model, prefixes, limits, **how):
    longest = max(map(len, prefixes))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prefixes], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prefixes], device=DEVICE)
    new = model.generate(ids, attention_mask=mask, max_new_tokens=max(limits), pad_token_id=0,
                         **how)
    return [row[:limit] for row, limit in zip(new[:, longest:].tolist(), limits, strict=True)]


def fast_step(model):
    """The decode step that train.py would use."""
    return recorded_decode_step(model) if DEVICE.type == "cpu" else None


def same_tokens(model, decode_step, prefixes, limits) -> bool:
    """Greedy, both give the same tokens; where they part, both were (all but) equally likely."""
    ours = sapo.generate_segments(model, prefixes, limits, eos_token_id=None, temperature=0,
                                  decode_step=decode_step)
    theirs = transformers_generate(model, prefixes, limits, do_sample=False)
    for prefix, (mine,), other in zip(prefixes, ours, theirs, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), None)
        if at is not None:
            with torch.no_grad():
                ids = torch.tensor([prefix + mine[:at]], device=DEVICE)
                logits = model(ids).logits[0, -1].float()
            gap = (logits[mine[at]] - logits[other[at]]).abs()
            if gap > (1e-3 if DEVICE.type == "cpu" else 0.2):
                return False
    return True


def decode_step_seconds(model, decode_step, prefixes, new_tokens: int) -> tuple[float, float]:
    """Median seconds of one decode step, sampling included, and of its linear layers alone."""
    step = decode_step or sapo.plain_decode_step(model)
    times = []

    def watched(*args):
        times.append(time.perf_counter())   # right on a GPU too: every step waits for its tokens
        return step(*args)

    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = [torch.randn(len(prefixes), 1, module.in_features, device=DEVICE,
                          dtype=module.weight.dtype) for module in linears]
    steps, bound = [], []
    for _ in range(3):
        times.clear()
        sapo.generate_segments(model, prefixes, new_tokens, eos_token_id=None, decode_step=watched,
                               **SAMPLING)
        steps += [b - a for a, b in itertools.pairwise(times)]
        with torch.no_grad():
            bound += [seconds(lambda: [module(x) for module, x
                                       in zip(linears, inputs, strict=True)]) for _ in range(15)]
    return statistics.median(steps), statistics.median(bound)


def main() -> None:
    parser = arguments(__doc__.split("\n")[0], "demo")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--new", type=int, nargs="+", default=[64, 256], help="new tokens")
    parser.add_argument("--prefix", type=int, default=256,
                        help="longest prefix; the shortest has three quarters of it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model)
    decode_step = fast_step(model)
    start(args, model, "Generation: generate_segments against model.generate")
    table = Table("batch", "new tokens", "lengths", "transformers, tok/s", "ours, tok/s", "ratio",
                  "plain step, tok/s", "two steps")
    random = torch.Generator().manual_seed(0)

    def ours(prefixes, limits, step=decode_step):
        return sapo.generate_segments(model, prefixes, limits, eos_token_id=None, decode_step=step,
                                      **SAMPLING)

    for batch in args.batch:
        lengths = torch.randint(args.prefix * 3 // 4, args.prefix + 1, (2 * batch,),
                                generator=random).tolist()
        twice = [torch.randint(3, model.config.vocab_size, (n,), generator=random).tolist()
                 for n in lengths]
        once = twice[:batch]
        for new in args.new:
            differing = torch.linspace(new // 4, new, batch).long().tolist()
            for name, limits in (("equal", [new] * batch), ("differ", differing)):
                if not same_tokens(model, decode_step, once, limits):
                    raise SystemExit("the two sides do not give the same tokens")
                theirs = functools.partial(transformers_generate, model, once, limits,
                                           do_sample=True, **SAMPLING)
                times = alternate({
                    "transformers": theirs,
                    "ours": functools.partial(ours, once, limits),
                    "plain": functools.partial(ours, once, limits, None),
                    "one token": functools.partial(ours, once, 1),
                    "two": functools.partial(ours, twice, limits * 2),
                    "two, one token": functools.partial(ours, twice, 1)}, args.rounds)
                medians = {side: median(found) for side, found in times.items()}
                decoding = medians["ours"] - medians["one token"]
                table.row(str(batch), str(new), name, sum(limits) / medians["transformers"],
                          sum(limits) / medians["ours"],
                          ratio(times["transformers"], times["ours"]),
                          sum(limits) / medians["plain"],
                          2 * decoding / (medians["two"] - medians["two, one token"]))
    print()
    table = Table("batch", "decode step, ms", "its linear layers, ms", "ratio")
    for batch in args.batch:
        step, linear = decode_step_seconds(model, decode_step, (twice * batch)[:batch], 33)
        table.row(str(batch), step * 1e3, linear * 1e3, step / linear)


if __name__ == "__main__":
    main()
