"""One training step on preference pairs: this code, a concatenated pass, and TRL's trainers.

    pip install -r bench/requirements.txt
    python bench/pairs.py

A step is forward, loss, backward and optimizer on the same pairs of token ids: prompt and A (the
prefix, read once here) and B C against B' C (the branches). Sides:

    ours            x and A once per pair, only scored tokens projected
    concatenated    [x A B C] and [x A B' C], only scored tokens projected; else the same code
    trl             TRL's trainer: its own compute_loss on its own collator's batch

Every side scores the same tokens. DPO: B C and B' C, without A, on ours and concatenated. TRL can't
leave A out of its sums, so TRL is compared with "ours, with A". ORPO: TRL's supervised term covers
the prompt, so ours does here. TRL's DPOTrainer projects the vocabulary in chunks by itself (its
fused LM head, always on in 1.16). Its ORPOTrainer has no such thing; Liger's kernels need a GPU.
Before the clock starts, all sides must give the same loss and gradient norm. DPO includes the
reference model's pass on all sides.
"""
import argparse
import copy
import sys
import tempfile

import torch
from common import (
    DEVICE,
    Table,
    alternate,
    arguments,
    load_model,
    median,
    memory_of,
    peak_mib,
    ratio,
    start,
)

import sapo
from losses import dpo_loss, orpo_loss

BETA, LAM = 0.1, 0.05


def make_pairs(batch: int, total: int, prefix_per_branch: int, vocabulary: int) -> list[sapo.Pair]:
    """Pairs of `total` tokens per sequence; a quarter of the prefix is A."""
    random = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(3, vocabulary, (n,), generator=random).tolist()

    branch = total // (prefix_per_branch + 1)
    start = (total - branch) // 4
    pairs = []
    for _ in range(batch):
        a = ids(start)
        pairs.append(sapo.Pair(ids(total - branch - start), a + ids(branch), a + ids(branch),
                               start))
    return pairs


def our_loss(loss: str, model, reference, pairs, share_prefix: bool, skip_shared: bool):
    """The mean loss of the pairs, as train.py computes it."""
    how = dict(average=loss == "orpo", skip_shared=skip_shared,
               nll_on="prompt" if loss == "orpo" else "response",
               shortcuts=sapo.Shortcuts(share_prefix, split_head=True))
    policy = sapo.pair_logps(model, pairs, **how)
    if loss == "orpo":
        return orpo_loss(*policy, lam=LAM)[0].mean()
    with torch.no_grad():
        fixed = sapo.pair_logps(reference, pairs, **how)
    return dpo_loss(policy.chosen_logps, policy.rejected_logps, fixed.chosen_logps,
                    fixed.rejected_logps, BETA)[0].mean()


def trl_trainer(loss: str, model, reference):
    """TRL's own trainer over a stand-in data set; only its compute_loss and collator are used."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    words = models.WordLevel({"a": 0, "b": 1, "c": 2, "</s>": 3}, unk_token="a")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="</s>",
                                        pad_token="</s>")
    common = dict(output_dir=tempfile.mkdtemp(), report_to=[], beta=LAM if loss == "orpo" else BETA,
                  use_cpu=DEVICE.type == "cpu", max_length=None, gradient_checkpointing=False,
                  bf16=False)
    if loss == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
        return ORPOTrainer(model=model, args=ORPOConfig(**common), train_dataset=rows,
                           processing_class=tokenizer)
    from trl import DPOConfig, DPOTrainer
    return DPOTrainer(model=model, ref_model=reference, args=DPOConfig(**common),
                      train_dataset=rows, processing_class=tokenizer)


def trl_batch(loss: str, trainer, pairs: list[sapo.Pair]) -> dict:
    if loss == "dpo":
        return trainer.data_collator([{"prompt_ids": p.prompt, "chosen_ids": p.chosen,
                                       "rejected_ids": p.rejected} for p in pairs])
    rows = []
    for p in pairs:
        row = {"prompt_input_ids": p.prompt, "prompt_attention_mask": [1] * len(p.prompt)}
        for side in ("chosen", "rejected"):
            tokens = p.prompt + getattr(p, side)
            row |= {f"{side}_input_ids": tokens, f"{side}_attention_mask": [1] * len(tokens),
                    f"{side}_labels": [-100] * len(p.prompt) + getattr(p, side)}
        rows.append(row)
    return trainer.data_collator(rows)


class Sides:
    """The sides of one comparison, each with a model and an optimizer of its own."""

    def __init__(self, args, loss: str, prefix_per_branch: int, names: list[str]):
        self.pairs = make_pairs(args.batch, args.total, prefix_per_branch, args.vocabulary)
        changes = {} if args.vocabulary == 8192 else {"vocab_size": args.vocabulary}
        first = load_model(args.model, **changes)
        self.losses, self.models = {}, {}
        for name in names:
            model, reference = (first if name == names[-1] else copy.deepcopy(first)), None
            if loss == "dpo":
                reference = copy.deepcopy(first).requires_grad_(False)
            if name == "trl":
                trainer = trl_trainer(loss, model, reference)
                model = trainer.model.eval()
                inputs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v
                          for k, v in trl_batch(loss, trainer, self.pairs).items()}
                self.losses[name] = lambda trainer=trainer, inputs=inputs, model=model: (
                    trainer.compute_loss(model, dict(inputs)))
            else:
                how = {"share_prefix": name != "concatenated",
                       "skip_shared": loss == "dpo" and name != "ours, with A"}
                self.losses[name] = lambda model=model, reference=reference, how=how: our_loss(
                    loss, model, reference, self.pairs, **how)
            self.models[name] = (model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True))

    def check(self) -> None:
        """All sides give the same loss and the same gradient norm."""
        found = {}
        for name, (model, optimizer) in self.models.items():
            loss = self.losses[name]()
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found[name] = float(loss.detach()), float(torch.nn.utils.get_total_norm(gradients))
            optimizer.zero_grad(set_to_none=True)
        tolerance = 1e-3 if DEVICE.type == "cpu" else 5e-2
        for values in found.values():
            if any(abs(a - b) > tolerance * abs(b)
                   for a, b in zip(values, found["ours"], strict=True)):
                raise SystemExit(f"the sides do not compute the same: {found}")

    def step(self, name: str) -> None:
        optimizer = self.models[name][1]
        self.losses[name]().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = arguments(__doc__.split("\n")[0], "19m")
    parser.add_argument("--batch", type=int, default=4, help="pairs")
    parser.add_argument("--total", type=int, default=480, help="tokens of prefix and one branch")
    parser.add_argument("--ratio", type=int, nargs="+", default=[1, 2, 4, 8],
                        help="tokens of the prefix per token of a branch")
    parser.add_argument("--loss", nargs="+", default=["orpo", "dpo"])
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--large_vocabulary", type=int, default=131072,
                        help="of one more row per loss, with 2 pairs; 0: none")
    parser.add_argument("--without_trl", action="store_true", help="compare with concatenated only")
    parser.add_argument("--memory", help=argparse.SUPPRESS)     # a side, in a process of its own
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        sides = Sides(args, args.loss[0], args.ratio[0], names=[args.memory])
        print(memory_of(lambda: [sides.step(args.memory) for _ in range(2)]))
        return
    start(args, load_model(args.model), "A step on pairs: seconds, and MiB beyond the weights")
    table = Table("loss", "vocabulary", "batch", "ratio", "trl, s", "concat., s", "ours, s",
                  "trl / ours (min-max)", "concat. / ours", "tokens allow", "MiB, ours / trl")
    cases = [(loss, args.vocabulary, args.batch, n) for loss in args.loss for n in args.ratio]
    if args.large_vocabulary:
        cases += [(loss, args.large_vocabulary, 2, 4) for loss in args.loss]
    for loss, args.vocabulary, args.batch, n in cases:
        names = ["concatenated", "ours"]
        against_trl = "ours, with A" if loss == "dpo" else "ours"
        if not args.without_trl:
            names = ["trl", *(["ours, with A"] if loss == "dpo" else []), *names]
        sides = Sides(args, loss, n, names)
        sides.check()
        times = alternate({name: lambda name=name, sides=sides: sides.step(name) for name in names},
                          args.rounds)
        memory = "-"
        if n == 4 and not args.without_trl:
            flags = ["--model", args.model, "--batch", str(args.batch), "--total", str(args.total),
                     "--ratio", str(n), "--loss", loss, "--vocabulary", str(args.vocabulary),
                     "--threads", str(args.threads)]
            trl, ours = (peak_mib(sys.argv[0], "--memory", name, *flags)
                         for name in ("trl", against_trl))
            memory = f"{ours:.0f} / {trl:.0f}"
        trl_seconds = median(times["trl"]) if "trl" in times else "-"
        trl_ratio = ratio(times["trl"], times[against_trl]) if "trl" in times else "-"
        table.row(loss, str(args.vocabulary), str(args.batch), str(n), trl_seconds,
                  median(times["concatenated"]), median(times["ours"]), trl_ratio,
                  ratio(times["concatenated"], times["ours"]), 2 * (n + 1) / (n + 2), memory)


if __name__ == "__main__":
    main()
