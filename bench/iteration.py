"""A whole SAPO iteration, two optimizer steps between two EMA refreshes, against the usual recipe.

    pip install -r bench/requirements.txt
    python bench/iteration.py                           a random 19 M Llama
    python bench/iteration.py --model FOLDER            another

The usual recipe writes the segments with model.generate at every step, runs the concatenated pairs
through the model with full logits, the reference alike, and averages the EMA model parameter by
parameter. Both sides do the same iteration: the same examples and segments, the same buffer and
draws. Greedy, both must give the same pairs and losses before the clock starts; timed, both sample.
The paper's proportions: prompts three quarters of a sequence, segments an eighth of it.
"""
import copy

import numpy as np
import torch
from common import DEVICE, Table, arguments, load_model, median, ratio, seconds, start
from generate import SAMPLING, fast_step, transformers_generate

import sapo
from buffer import ReplayBuffer
from ema import EMA
from losses import dpo_loss, orpo_loss

BETA, LAM, STEPS = 0.1, 0.05, 2     # STEPS: optimizer steps between two refreshes of the EMA model


class Ours:
    """The iteration with this repository's modules."""
    name = "ours"

    def __init__(self, model, loss: str, segment_len: int):
        self.loss, self.segment_len, self.policy = loss, segment_len, copy.deepcopy(model)
        self.ema, self.buffer = EMA(self.policy, 0.5, STEPS), ReplayBuffer(256)
        self.reference = copy.deepcopy(model).requires_grad_(False) if loss == "dpo" else None
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6, fused=True)
        self.shortcuts = sapo.find_shortcuts(model)
        self.decode_step = fast_step(self.ema.model)

    def write(self, examples, rngs, sampling):
        """Pairs of all steps until the EMA model changes, a list per step."""
        pairs = sapo.make_pairs(
            self.ema.model, [e for few in examples for e in few], self.segment_len,
            [rng for few in rngs for rng in few], eos_token_id=None, decode_step=self.decode_step,
            **sampling)
        return [pairs[i:i + len(few)]
                for few, i in zip(examples, range(0, len(pairs), len(examples[0])), strict=True)]

    def logps(self, model, pairs):
        return sapo.pair_logps(model, pairs, average=self.loss == "orpo",
                               skip_shared=self.loss == "dpo", shortcuts=self.shortcuts)

    def move_ema(self):
        self.ema.update(self.policy)

    def iteration(self, examples, seed: int, sampling=SAMPLING) -> tuple[list, list[float]]:
        """STEPS optimizer steps; returns the pairs that were written and the losses."""
        rngs = [[np.random.default_rng([seed, step, i]) for i in range(len(few))]
                for step, few in enumerate(examples)]
        written, losses = [], []
        ahead = self.write(examples, rngs, sampling) if self.name == "ours" else None
        for step in range(STEPS):
            pairs = (ahead[step] if ahead
                     else self.write([examples[step]], [rngs[step]], sampling)[0])
            written += pairs
            for pair in pairs:
                self.buffer.add(pair)
            batch = self.buffer.sample(len(pairs))
            chosen_logps, rejected_logps, nll = self.logps(self.policy, batch)
            if self.loss == "dpo":
                with torch.no_grad():
                    reference = self.logps(self.reference, batch)
                loss = dpo_loss(chosen_logps, rejected_logps, *reference[:2], BETA)[0].mean()
            else:
                loss = orpo_loss(chosen_logps, rejected_logps, nll, LAM)[0].mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.move_ema()
            losses.append(float(loss.detach()))
        return written, losses


class Usual(Ours):
    """The iteration as it is usually written."""
    name = "usual"

    def __init__(self, *args):
        super().__init__(*args)
        self.optimizer, self.steps = torch.optim.AdamW(self.policy.parameters(), lr=1e-6), 0

    def write(self, examples, rngs, sampling):
        spans = [sapo.choose_segment(len(e.chosen), self.segment_len, rng)
                 for e, rng in zip(examples[0], rngs[0], strict=True)]
        greedy = sampling.get("temperature") == 0
        how = {"do_sample": False} if greedy else {"do_sample": True, **sampling}
        segments = transformers_generate(
            self.ema.model, [[*e.prompt, *e.chosen[:a]]
                             for e, (a, _) in zip(examples[0], spans, strict=True)],
            [b - a for a, b in spans], **how)
        return [[sapo.Pair(e.prompt, e.chosen, [*e.chosen[:a], *segment, *e.chosen[b:]], a)
                 for e, (a, b), segment in zip(examples[0], spans, segments, strict=True)]]

    def logps(self, model, pairs):
        rows = [p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs]
        longest = max(map(len, rows))

        def padded(lists):
            return torch.tensor([x + [0] * (longest - len(x)) for x in lists], device=DEVICE)

        ids, mask = padded(rows), padded([[1] * len(row) for row in rows])
        scored = padded([[0] * len(p.prompt) + [1] * (len(row) - len(p.prompt))
                         for p, row in zip(pairs * 2, rows, strict=True)])[:, 1:]
        logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        tokens = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * scored
        sums = tokens.sum(-1) / scored.sum(-1) if self.loss == "orpo" else tokens.sum(-1)
        chosen_logps, rejected_logps = sums.chunk(2)
        return chosen_logps, rejected_logps, -chosen_logps

    @torch.no_grad()
    def move_ema(self):
        self.steps += 1
        if self.steps % STEPS == 0:
            for mine, theirs in zip(self.ema.model.parameters(), self.policy.parameters(),
                                    strict=True):
                mine.mul_(0.5).add_(theirs, alpha=0.5)


def examples_of(batch: int, total: int, vocabulary: int) -> list[list[sapo.Example]]:
    """STEPS batches of random examples; lengths within an eighth of `total`, prompts 3/4 of it."""
    rng = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return rng.integers(3, vocabulary, int(n * rng.uniform(0.875, 1))).tolist()

    return [[sapo.Example(ids(total * 3 // 4), ids(total // 4)) for _ in range(batch)]
            for _ in range(STEPS)]


def main() -> None:
    parser = arguments(__doc__.split("\n")[0], "19m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--total", type=int, default=512,
                        help="longest prompt and response together")
    parser.add_argument("--loss", nargs="+", default=["orpo", "dpo"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model)
    start(args, model, f"A SAPO iteration of {STEPS} steps: batch {args.batch}, "
                       f"{args.total} tokens, segments of {args.total // 8}")
    examples = examples_of(args.batch, args.total, model.config.vocab_size)
    on_cpu = DEVICE.type == "cpu"
    table = Table("loss", "usual, s", "ours, s", "ratio (min-max)")
    for loss in args.loss:
        sides = [kind(model, loss, args.total // 8) for kind in (Usual, Ours)]
        (pairs, losses), (our_pairs, our_losses) = (
            side.iteration(examples, 0, {"temperature": 0}) for side in sides)
        same = np.mean([a.rejected == b.rejected for a, b in zip(pairs, our_pairs, strict=True)])
        tolerance = 1e-4 if on_cpu else 2e-2
        if same < (1 if on_cpu else 0.5) or not np.allclose(losses, our_losses, rtol=tolerance,
                                                            atol=tolerance):
            raise SystemExit(f"the sides do not compute the same: {same:.0%} of the pairs, losses "
                             f"{losses} and {our_losses}")
        times = {side.name: [] for side in sides}
        for n in range(args.rounds):
            for side in sides:
                times[side.name].append(seconds(
                    lambda side=side, n=n: side.iteration(examples, n)))
        table.row(loss, median(times["usual"]), median(times["ours"]),
                  ratio(times["usual"], times["ours"]))


if __name__ == "__main__":
    main()
