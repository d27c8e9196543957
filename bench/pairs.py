"""One training step on preference pairs: this code against TRL's trainers and against a plain concatenated pass.

    pip install -r bench/requirements.txt
    python bench/pairs.py

A step is forward, loss, backward and optimizer, on the same pairs of token ids: prompt and A (the prefix, scored once
here) and B C against B' C (the branches). TRL's side is the trainer's own compute_loss on its own collator's batch.
"concatenated" is this code without sharing: [x A B C] and [x A B' C], response positions projected only. Before the
clock starts, all sides must give the same loss and gradient norm. DPO includes the reference model's pass, the same on all sides.
"""
import argparse
import copy
import sys
import tempfile

from common import DEVICE, Table, alternate, arguments, load_model, memory_of, peak_mib, start

import torch

import sapo
from losses import dpo_loss, orpo_loss

BETA, LAM = 0.1, 0.05


def make_pairs(batch: int, total: int, ratio: int, vocabulary: int) -> list[sapo.Pair]:
    """Pairs of prefix : branch = ratio, total tokens a response with its prompt; a quarter of the prefix is A."""
    random = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(3, vocabulary, (n,), generator=random).tolist()

    branch = total // (ratio + 1)
    start = (total - branch) // 4
    pairs = []
    for _ in range(batch):
        a = ids(start)
        pairs.append(sapo.Pair(ids(total - branch - start), a + ids(branch), a + ids(branch), start))
    return pairs


def our_loss(loss: str, model, reference, pairs, share_prefix: bool):
    """ORPO's supervised term covers prompt and response here, because TRL's does."""
    how = dict(average=loss == "orpo", skip_shared=loss == "dpo" and share_prefix, share_prefix=share_prefix, nll_on="prompt" if loss == "orpo" else "response")
    chosen_logps, rejected_logps, chosen_nll = sapo.pair_logps(model, pairs, **how)
    if loss == "orpo":
        return orpo_loss(chosen_logps, rejected_logps, chosen_nll, LAM)[0].mean()
    with torch.no_grad():
        reference_logps = sapo.pair_logps(reference, pairs, **how)
    return dpo_loss(chosen_logps, rejected_logps, *reference_logps[:2], BETA)[0].mean()


def trl_trainer(loss: str, model, reference):
    """TRL's own trainer over a small stand-in data set; only its compute_loss and collator are used."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "</s>": 3}, unk_token="a")),
                                        eos_token="</s>", pad_token="</s>")
    common = dict(output_dir=tempfile.mkdtemp(), report_to=[], beta=LAM if loss == "orpo" else BETA, use_cpu=DEVICE.type == "cpu",
                  max_length=None, gradient_checkpointing=False, bf16=False)
    if loss == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
        return ORPOTrainer(model=model, args=ORPOConfig(**common), train_dataset=rows, processing_class=tokenizer)
    from trl import DPOConfig, DPOTrainer
    return DPOTrainer(model=model, ref_model=reference, args=DPOConfig(**common), train_dataset=rows, processing_class=tokenizer)


def trl_batch(loss: str, trainer, pairs: list[sapo.Pair]) -> dict:
    if loss == "dpo":
        return trainer.data_collator([{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs])
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
    """The three sides of one comparison, each with a model and an optimizer of its own."""

    def __init__(self, args, loss: str, ratio: int, names=("trl", "concatenated", "ours")):
        self.pairs = make_pairs(args.batch, args.total, ratio, args.vocabulary)
        first = load_model(args.model, vocab_size=args.vocabulary) if args.vocabulary != 8192 else load_model(args.model)
        self.losses, self.models = {}, {}
        for name in names:
            model, reference = (first if name == names[-1] else copy.deepcopy(first)), None
            if loss == "dpo":
                reference = copy.deepcopy(first).requires_grad_(False)
            if name == "trl":
                trainer = trl_trainer(loss, model, reference)
                model = trainer.model.eval()
                inputs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in trl_batch(loss, trainer, self.pairs).items()}
                self.losses[name] = lambda trainer=trainer, inputs=inputs, model=model: trainer.compute_loss(model, dict(inputs))
            else:
                self.losses[name] = lambda model=model, reference=reference, name=name: our_loss(loss, model, reference, self.pairs, name == "ours")
            self.models[name] = (model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True))

    def check(self) -> None:
        """All sides give the same loss, and the same gradient norm."""
        found = {}
        for name, (model, optimizer) in self.models.items():
            loss = self.losses[name]()
            loss.backward()
            found[name] = (float(loss.detach()), float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
            optimizer.zero_grad(set_to_none=True)
        expected = found["ours"]
        for name, values in found.items():
            if any(abs(a - b) > (1e-3 if DEVICE.type == "cpu" else 5e-2) * abs(b) for a, b in zip(values, expected)):
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
    parser.add_argument("--ratio", type=int, nargs="+", default=[1, 2, 4, 8], help="prefix : branch")
    parser.add_argument("--loss", nargs="+", default=["orpo", "dpo"])
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--memory", help=argparse.SUPPRESS)       # one side's peak, in a process of its own
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        sides = Sides(args, args.loss[0], args.ratio[0], names=(args.memory,))
        print(memory_of(lambda: [sides.step(args.memory) for _ in range(2)]))
        return
    start(args, load_model(args.model), "A step on pairs: seconds, and MiB beyond the weights at its peak")
    table = Table("loss", "vocabulary", "batch", "ratio", "trl, s", "concat., s", "ours, s", "trl/ours", "concat./ours", "trl, MiB", "ours, MiB", "ours/trl")
    cases = [(loss, 8192, args.batch, ratio) for loss in args.loss for ratio in args.ratio]
    for loss, args.vocabulary, args.batch, ratio in cases + [(loss, 131072, 2, 4) for loss in args.loss]:
        sides = Sides(args, loss, ratio)
        sides.check()
        found = alternate({name: lambda name=name: sides.step(name) for name in sides.models}, args.rounds)
        del sides
        memory = ["-", "-", "-"]
        if ratio == 4:
            flags = ["--model", args.model, "--batch", str(args.batch), "--total", str(args.total), "--ratio", str(ratio), "--loss", loss,
                     "--vocabulary", str(args.vocabulary), "--threads", str(args.threads)]
            trl, ours = (peak_mib(sys.argv[0], "--memory", name, *flags) for name in ("trl", "ours"))
            memory = [trl, ours, ours / trl]
        table.row(loss, str(args.vocabulary), str(args.batch), str(ratio), found["trl"], found["concatenated"], found["ours"],
                  found["trl"] / found["ours"], found["concatenated"] / found["ours"], *memory)


if __name__ == "__main__":
    main()
