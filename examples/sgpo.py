"""SGPO, a reconstruction from its abstract alone (arXiv 2507.20181): a self-improver writes y+.

    python examples/sgpo.py                             the demo's model and rows
    python examples/sgpo.py --model DIR --data FILE.jsonl --eval_data FILE.jsonl --max_new_tokens 96

One model has two roles: policy (it answers x) and improver (it answers "x, your answer y, improve
it"). Stage 1 teaches it the second role, stage 2 trains the first one with DPO on pairs that both
roles write.

| point | given by the abstract | our choice |
| --- | --- | --- |
| improver and policy | one model | the role is in the prompt: x, y as the assistant's turn, IMPROVE |
| data of stage 1 | built with the starting policy, by "referencing supervised fine-tuning outputs" | y0, the policy's response to x; y~, a step from y0 towards the data's y* |
| y~ | "incremental yet discernible" | y0 with its first wrong line as in y*, the rest left or written again; without a check: the model rewrites y0 while it sees y* |
| which y~ are kept | - | those better than y0 and nearer to y0 than y* is, by edit distance |
| loss of stage 1 | - | -log p(y~ given x, y0) - mu log p(y* given x), means per token |
| y0 that is right | - | --copy_right: the improver learns to leave it |
| y-, y+ of stage 2 | the policy's response; the improver's, of that response | both sampled at one temperature, anew in every step |
| loss of stage 2 | DPO | under x alone, against the model after stage 1; pairs with y+ = y- left out |
| prompts, filters, data, numbers | - | all of them |

Rows: JSON lines with messages `prompt` and `chosen`, and where there is one a `check`, a regular
expression whose matches are the steps of an answer.
"""
import argparse
import copy
import json
import re
import sys
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from losses import dpo_loss  # noqa: E402
from sapo import Pair, find_shortcuts, generate_segments, pair_logps  # noqa: E402

IMPROVE = "Improve your answer."
REVISE = ("Here is a better answer:\n\n{answer}\n\nMake your own answer slightly better. Use the "
          "better one only to see what to fix. Write your new answer and nothing else.")


class Row(NamedTuple):
    """A prompt x (messages), the data's answer y* as text, and its check (None: there is none)."""
    messages: list[dict]
    answer: str
    check: str | None


# ------------------------------------------------------------------------------ what is an improvement

def edit_distance(a: list, b: list) -> int:
    """Fewest insertions, deletions and replacements of items that turn a into b."""
    distances = list(range(len(b) + 1))                     # from a[:i] to each b[:j]
    for i, x in enumerate(a, 1):
        before, distances[0] = distances[0], i              # before: from a[:i - 1] to b[:j - 1]
        for j, y in enumerate(b, 1):
            best = min(before + (x != y), distances[j] + 1, distances[j - 1] + 1)
            before, distances[j] = distances[j], best
    return distances[-1]


def gap(row: Row, a: str, b: str) -> float:
    """Edit distance of two answers in the check's matches (words, without one); 0 to 1."""
    a, b = (re.findall(row.check or r"\S+", text) for text in (a, b))
    return edit_distance(a, b) / max(1, len(a), len(b))


def better(row: Row, a: str, b: str) -> bool:
    """Is answer a better than b: nearer to y*?"""
    return gap(row, a, row.answer) < gap(row, b, row.answer)


def put_right(draft: str, answer: str) -> tuple[str, str]:
    """The lines of `draft` up to its first wrong one, that one as in `answer`; the lines after it.

        draft "1+1=2\\n2+2=5\\nSum 5", answer "1+1=2\\n2+2=4\\nSum 4"
        ->  "1+1=2\\n2+2=4", "Sum 5"
    """
    lines, right = draft.split("\n"), answer.split("\n")
    first = next((i for i, (a, b) in enumerate(zip_longest(lines, right)) if a != b), len(right))
    return "\n".join(right[:first + 1]), "\n".join(lines[first + 1:])


def incremental(row: Row, draft: str, new: str) -> bool:
    """Is `new` discernible, that is better than the draft, and nearer to the draft than y* is?"""
    return better(row, new, draft) and gap(row, draft, new) < gap(row, draft, row.answer)


# ------------------------------------------------------------------------------------ the two roles

class Writer:
    """The model in its roles: prompts in, answers out, as token ids and as text."""

    def __init__(self, args, model, tokenizer):
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.generator = torch.Generator(model.device).manual_seed(args.seed)

    def policy_prompt(self, row: Row) -> list[int]:
        return self.chat(row.messages)

    def improver_prompt(self, row: Row, draft: str, request: str = IMPROVE) -> list[int]:
        return self.chat([*row.messages, {"role": "assistant", "content": draft},
                          {"role": "user", "content": request}])

    def chat(self, messages: list[dict]) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    def response(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def write(self, prompts: list[list[int]], temperature: float | None = None) -> list[list[int]]:
        """An answer to each prompt. temperature: --temperature where None; 0 is greedy."""
        temperature, answers = self.args.temperature if temperature is None else temperature, {}
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for first in range(0, len(prompts), self.args.generate_batch):
            places = by_length[first:first + self.args.generate_batch]
            found = generate_segments(
                self.model, [prompts[i] for i in places], self.args.max_new_tokens,
                eos_token_id=self.tokenizer.eos_token_id, temperature=temperature, top_k=0,
                top_p=1.0, generator=self.generator)
            answers |= {i: answer for i, (answer,) in zip(places, found, strict=True)}
        return [answers[i] for i in range(len(prompts))]

    def exact_match(self, rows: list[Row]) -> float:
        """Share of rows whose greedy answer has all the matches of y*, in their order."""
        answers = self.write([self.policy_prompt(row) for row in rows], temperature=0)
        return np.mean([not gap(row, self.text(answer), row.answer)
                        for row, answer in zip(rows, answers, strict=True)])


# ----------------------------------------------------------------------------------------- stage 1

def improver_pairs(writer: Writer, rows: list[Row], rest: str, copy_right: bool):
    """{row number: (improver's prompt, y~)} for the rows whose y~ is kept."""
    drafts = [writer.text(ids) for ids in writer.write([writer.policy_prompt(r) for r in rows])]
    if rest == "model":
        asked = [writer.improver_prompt(row, draft, REVISE.format(answer=row.answer))
                 for row, draft in zip(rows, drafts, strict=True)]
        new = [writer.text(ids).strip() for ids in writer.write(asked)]
    else:
        parts = [put_right(draft, row.answer) for row, draft in zip(rows, drafts, strict=True)]
        if rest == "again":             # written by the policy itself, behind the corrected line
            ends = writer.write([writer.policy_prompt(row) + writer.response(f"{head}\n")[:-1]
                                 for row, (head, _) in zip(rows, parts, strict=True)])
            parts = [(head, writer.text(end) if head != row.answer else "")
                     for row, (head, _), end in zip(rows, parts, ends, strict=True)]
        new = ["\n".join(filter(None, part)) for part in parts]
    kept = {}
    for i, (row, draft, improved) in enumerate(zip(rows, drafts, new, strict=True)):
        if copy_right and row.check and not gap(row, draft, row.answer):
            improved = draft
        elif not incremental(row, draft, improved):
            continue
        kept[i] = (writer.improver_prompt(row, draft), writer.response(improved))
    wrong = sum(gap(row, draft, row.answer) > 0 for row, draft in zip(rows, drafts, strict=True))
    copies = sum(gap(rows[i], drafts[i], rows[i].answer) == 0 for i in kept)
    print(f"stage 1: {len(rows)} drafts, {wrong} differ from y*; {len(kept) - copies} of these have "
          f"a y~ that is kept, {copies} right drafts stay as they are")
    return kept


def target(prompt: list[int], response: list[int]) -> Pair:
    """One response to score: as both sides of a pair whose branches are empty, it is read once."""
    return Pair(prompt, response, response, len(response))


# ----------------------------------------------------------------------------------------- stage 2

def preference_pairs(writer: Writer, rows: list[Row]) -> list[tuple[Row, Pair]]:
    """y- by the policy, y+ by the improver from y-, under the prompt x alone."""
    prompts = [writer.policy_prompt(row) for row in rows]
    rejected = writer.write(prompts)
    chosen = writer.write([writer.improver_prompt(row, writer.text(y))
                           for row, y in zip(rows, rejected, strict=True)])
    pairs = []
    for row, prompt, win, lose in zip(rows, prompts, chosen, rejected, strict=True):
        start = next((i for i, (a, b) in enumerate(zip(win, lose, strict=False)) if a != b),
                     min(len(win), len(lose)))
        pairs.append((row, Pair(prompt, win, lose, start)))
    return pairs


def report(writer: Writer, rows: list[Row]) -> tuple[int, int]:
    """Print and return how often y+ is better than y- and how often worse, by the check."""
    counts = {"better": 0, "worse": 0, "as good": 0, "identical": 0}
    for row, pair in preference_pairs(writer, rows):
        win, lose = writer.text(pair.chosen), writer.text(pair.rejected)
        kind = ("identical" if pair.chosen == pair.rejected else "better" if better(row, win, lose)
                else "worse" if better(row, lose, win) else "as good")
        counts[kind] += 1
    print(f"y+ against y- on {len(rows)} held-out prompts: "
          + ", ".join(f"{kind} {count}" for kind, count in counts.items()))
    return counts["better"], counts["worse"]


# ------------------------------------------------------------------------------------------ training

def train(args, model, steps: int, peak_lr: float, batch_of, losses_of) -> None:
    """`steps` optimizer steps with a linear warm-up and decay of the learning rate.

    batch_of(step): [(pair, weight)]; losses_of(pairs): (pairs,); the loss is their weighted sum.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.0)
    total = 0.0
    for step in range(1, steps + 1):
        warmup = max(1, steps // 10)
        share = min(step / warmup, (steps - step + 1) / max(1, steps - warmup + 1))
        optimizer.param_groups[0]["lr"] = peak_lr * share
        batch = sorted(batch_of(step), key=lambda item: len(item[0].prompt + item[0].chosen))
        for first in range(0, len(batch), args.micro_batch):
            pairs, weights = zip(*batch[first:first + args.micro_batch], strict=True)
            loss = losses_of(pairs) @ torch.tensor(weights, device=model.device)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % args.print_every == 0 or step == steps:
            print(f"  step {step}: loss {total / ((step - 1) % args.print_every + 1):.4f}", flush=True)
            total = 0.0


def dpo_losses(args, model, reference, shortcuts, pairs):
    """DPO's losses (Eq. 1 of SAPO's paper) against the model after stage 1."""
    policy = pair_logps(model, pairs, shortcuts=shortcuts, skip_shared=True)
    with torch.no_grad():
        fixed = pair_logps(reference, pairs, shortcuts=shortcuts, skip_shared=True)
    return dpo_loss(*policy[:2], *fixed[:2], beta=args.beta)[0]


def read_rows(path: str, where: str) -> list[Row]:
    """Rows FROM:TO of a file of JSON lines. Ends the program with a sentence where it can't."""
    try:
        first, last = (int(n) if n else None for n in where.split(":"))
        rows = [json.loads(line) for line in open(path, encoding="utf-8")][first:last]
        return [Row(row["prompt"] if isinstance(row["prompt"], list) else
                    [{"role": "user", "content": row["prompt"]}],
                    row["chosen"] if isinstance(row["chosen"], str) else row["chosen"][-1]["content"],
                    row.get("check")) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path}: no rows with `prompt` and `chosen` ({type(error).__name__}: {error})")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for flag, default, words in [
            ("model", str(ROOT / "data/model"), "folder of the starting policy, with a chat template"),
            ("data", str(ROOT / "data/train.jsonl"), "training rows"),
            ("rows", "2500:", "rows of --data, FROM:TO"),
            ("eval_data", str(ROOT / "data/heldout.jsonl"), "held-out rows"),
            ("eval_rows", 500, "most held-out rows"),
            ("drafts", "left", "y~: the first wrong line put right and the rest 'left', or written "
             "'again'; or y0 rewritten by the 'model'"),
            ("copy_right", 1, "1: the improver learns to leave a right draft as it is"),
            ("improver_steps", 200, "optimizer steps of stage 1"),
            ("dpo_steps", 200, "optimizer steps of stage 2"),
            ("batch_size", 32, "prompts per optimizer step"), ("micro_batch", 32, "pairs at a time"),
            ("generate_batch", 256, "answers written at a time"),
            ("max_prompt_len", 160, "rows with longer prompts are left out"),
            ("max_new_tokens", 80, "rows with longer answers are left out"),
            ("mu", 1.0, "weight of y* in stage 1"), ("improver_lr", 1e-3, "learning rate, stage 1"),
            ("dpo_lr", 2e-5, "learning rate, stage 2"), ("beta", 0.5, "DPO's beta"),
            ("temperature", 1.0, "sampling temperature of both roles"),
            ("print_every", 50, "steps between printed losses"),
            ("seed", 0, "seed"), ("threads", 1, "CPU threads"),
            ("anyway", 0, "1: stage 2 even where y+ is not better than y-"),
            ("out", "", "folder to save the model in")]:
        parser.add_argument(f"--{flag}", type=type(default), default=default, help=words)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        sys.exit(f"--model {args.model}: {str(error).splitlines()[0]}")
    if not tokenizer.chat_template:
        sys.exit(f"--model {args.model}: the tokenizer has no chat template, which gives the roles")
    model.eval()                                            # no dropout
    writer, shortcuts = Writer(args, model, tokenizer), find_shortcuts(model)

    def usable(rows):
        return [row for row in rows if len(writer.policy_prompt(row)) <= args.max_prompt_len
                and len(writer.response(row.answer)) <= args.max_new_tokens]

    rows = usable(read_rows(args.data, args.rows))
    held_out = usable(read_rows(args.eval_data, ":"))[:args.eval_rows]
    if not rows or not held_out:
        sys.exit("no row is short enough; raise --max_prompt_len and --max_new_tokens")

    def evaluate(when):
        nll = [pair_logps(model, [target(writer.policy_prompt(row), writer.response(row.answer))],
                          shortcuts=shortcuts).chosen_nll.item() for row in held_out]
        print(f"{when}: exact match {writer.exact_match(held_out):.4f}, NLL {np.mean(nll):.4f}",
              flush=True)

    def minibatch(step):
        return rng.choice(len(rows), min(args.batch_size, len(rows)), replace=False)

    with torch.no_grad():
        evaluate("start")
        kept = improver_pairs(writer, rows, args.drafts, bool(args.copy_right))

    def stage_1(step):
        chosen = minibatch(step)
        improved = [target(*kept[i]) for i in chosen if i in kept]
        plain = [target(writer.policy_prompt(rows[i]), writer.response(rows[i].answer))
                 for i in chosen]
        return ([(pair, 1 / len(improved)) for pair in improved]
                + [(pair, args.mu / len(plain)) for pair in plain])

    train(args, model, args.improver_steps, args.improver_lr, stage_1,
          lambda pairs: pair_logps(model, pairs, shortcuts=shortcuts).chosen_nll)
    with torch.no_grad():
        evaluate("after stage 1")
    wins, losses = report(writer, held_out)
    if wins <= losses and not args.anyway:
        print("y+ is not better than y-: DPO has nothing to learn from; --anyway 1 goes on")
        return
    reference = copy.deepcopy(model).requires_grad_(False)

    def stage_2(step):
        pairs = [pair for _, pair in preference_pairs(writer, [rows[i] for i in minibatch(step)])
                 if pair.chosen != pair.rejected]
        return [(pair, 1 / len(pairs)) for pair in pairs]

    train(args, model, args.dpo_steps, args.dpo_lr, stage_2,
          lambda pairs: dpo_losses(args, model, reference, shortcuts, pairs))
    with torch.no_grad():
        evaluate("after stage 2")
    report(writer, held_out)
    if args.out:
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
