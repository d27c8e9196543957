"""SGPO, a RECONSTRUCTION FROM THE ABSTRACT of arXiv 2507.20181: the model improves its own answers.

    python examples/sgpo.py
    python examples/sgpo.py --model DIR --data FILE.jsonl --eval_data FILE.jsonl --revise 1

One model has two roles: as policy it answers x, as improver it answers (x, y, "improve it").
Stage 1 teaches it the second role. Stage 2 is DPO with y- by the policy and y+ by the improver.
The first command takes two minutes of one core and prints (every 50th loss is left out here):

    start: exact match 0.524; of 500 pairs, y+ is better than y- in 0 and worse in 500
    y~ kept: 2397 of 2500
    after stage 1: exact match 0.450; of 500 pairs, y+ is better than y- in 36 and worse in 433
    y+ is not better than y-: stage 2 has no signal; --anyway 1 goes on all the same

    point             given by the abstract     our choice
    two roles         one model                 y as the assistant's turn, then the turn IMPROVE
    data of stage 1   made with the start,      y0: the start's answer. y~: y0 up to its first wrong
                      "referencing supervised   line, that as in the data's y*, rest by the start;
                      fine-tuning outputs"      or (--revise 1) y0 revised by the start, shown y*
    which y~          "incremental yet          better than y0 and no farther from y0 than y* is, by
                      discernible"              edit distance; a right y0 is its own y~
    loss of stage 1   -                         -log p(y~|x, y0) - mu log p(y*|x), means per token
    pairs of stage 2  the policy's answer, and  both sampled at one temperature in every step,
                      that answer improved      scored under x alone; pairs with y+ = y- left out
    loss of stage 2   DPO                       reference: the model after stage 1

A row is a JSON line with the messages `prompt` and `chosen`, and `check` where there is one: a
regular expression whose matches are the steps of an answer. Uses no support/, and one device.
"""
import argparse
import copy
import functools
import json
import re
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from losses import dpo_loss  # noqa: E402
from sapo import Pair, find_shortcuts, generate_segments, pair_logps  # noqa: E402

IMPROVE = "Improve your answer."
REVISE = ("Here is a better answer:\n\n{}\n\nMake your own answer slightly better. Use the better "
          "one only to see what to fix. Write your new answer and nothing else.")
Row = namedtuple("Row", "messages answer check")    # x, the text of y*, a check or None


def edit_distance(a: list, b: list) -> int:
    """Fewest insertions, deletions and replacements of items that turn a into b."""
    above = list(range(len(b) + 1))                         # from a[:i - 1] to each b[:j]
    for i, x in enumerate(a, 1):
        row = [i]                                           # from a[:i] to each b[:j]
        for j, y in enumerate(b, 1):
            row.append(min(above[j - 1] + (x != y), above[j] + 1, row[-1] + 1))
        above = row
    return above[-1]


def gap(row: Row, a: str, b: str | None = None) -> int:
    """Edit distance of answers a and b (None: y*), in the check's matches; without one, in words.
    The better answer is the one with the smaller gap to y*."""
    texts = (a, row.answer if b is None else b)
    return edit_distance(*(re.findall(row.check or r"\S+", text) for text in texts))


def step_up(row: Row, draft: str, new: str) -> str | None:
    """y~: `new` where it is better than the draft (discernible) and no farther from it than y* is
    (incremental); the draft where that is right; otherwise None."""
    kept = gap(row, new) < gap(row, draft) and gap(row, new, draft) <= gap(row, draft)
    return draft if gap(row, draft) == 0 else new if kept else None


def put_right(draft: str, answer: str) -> str:
    """The answer up to and with the first line that is wrong in the draft; "" if none is.

        draft "1+1=2\\n2+2=5\\nSum 5", answer "1+1=2\\n2+2=4\\nSum 4"  ->  "1+1=2\\n2+2=4\\n"
    """
    lines, right = draft.split("\n"), answer.split("\n")
    first = next((i for i, line in enumerate(right) if lines[i:i + 1] != [line]), -1)
    return "".join(f"{line}\n" for line in right[:first + 1])


class Roles:
    """The model as policy and as improver. A response is token ids, an answer their text."""

    def __init__(self, args, model, tokenizer):
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.generator = torch.Generator(model.device).manual_seed(args.seed)

    def prompt(self, row: Row, draft: str | None = None, request: str = IMPROVE) -> list[int]:
        """The policy's prompt; with a draft, the improver's."""
        turns = [] if draft is None else [{"role": "assistant", "content": draft},
                                          {"role": "user", "content": request}]
        return self.tokenizer.apply_chat_template(
            [*row.messages, *turns], add_generation_prompt=True)["input_ids"]

    def target(self, prompt: list[int], answer: str) -> Pair:
        """An answer to score: both sides of a pair without branches, so that it is read once."""
        ids = self.tokenizer.encode(answer, add_special_tokens=False)
        response = [*ids, self.tokenizer.eos_token_id]
        return Pair(prompt, response, response, len(response))

    def write(self, prompts: list[list[int]], greedy: bool = False):
        """A response to each prompt, and the answers that they are."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size, responses = self.args.generate_batch, {}
        for batch in (order[first:first + size] for first in range(0, len(order), size)):
            written = generate_segments(
                self.model, [prompts[i] for i in batch], self.args.max_new_tokens, top_k=0, top_p=1,
                eos_token_id=self.tokenizer.eos_token_id,
                temperature=0 if greedy else self.args.temperature, generator=self.generator)
            responses |= {i: response for i, (response,) in zip(batch, written, strict=True)}
        responses = [responses[i] for i in range(len(prompts))]
        return responses, self.tokenizer.batch_decode(responses, skip_special_tokens=True)


def improver_targets(roles: Roles, rows: list[Row]) -> list[Pair | None]:
    """Data of stage 1: for each row, y~ under the improver's prompt, or None where none is kept."""
    _, drafts = roles.write([roles.prompt(row) for row in rows])
    if roles.args.revise:
        _, improved = roles.write([roles.prompt(row, draft, REVISE.format(row.answer))
                                   for row, draft in zip(rows, drafts, strict=True)])
    else:
        begun = [put_right(draft, row.answer) for row, draft in zip(rows, drafts, strict=True)]
        _, rests = roles.write([roles.prompt(row) + roles.target([], text).chosen[:-1]
                                for row, text in zip(rows, begun, strict=True)], greedy=True)
        # Behind the last line of y* there is no rest.
        improved = [row.answer if text == f"{row.answer}\n" else text + rest
                    for row, text, rest in zip(rows, begun, rests, strict=True)]
    kept = [step_up(*three) for three in zip(rows, drafts, improved, strict=True)]
    print(f"y~ kept: {len(rows) - kept.count(None)} of {len(rows)}", flush=True)
    return [text and roles.target(roles.prompt(row, draft), text)
            for row, draft, text in zip(rows, drafts, kept, strict=True)]


def preference_pairs(roles: Roles, rows: list[Row]) -> list[tuple[Pair, int]]:
    """Pairs of stage 2: y- by the policy, y+ by the improver from y-, under the policy's prompt.
    With each comes by how much y+ is better than y-, which training does not look at."""
    prompts = [roles.prompt(row) for row in rows]
    rejected, drafts = roles.write(prompts)
    chosen, improved = roles.write([roles.prompt(*both) for both in zip(rows, drafts, strict=True)])
    return [(Pair(x, y, other, 0), gap(row, draft) - gap(row, new)) for row, x, y, other, new, draft
            in zip(rows, prompts, chosen, rejected, improved, drafts, strict=True)]


def evaluate(roles: Roles, rows: list[Row], when: str) -> bool:
    """Print exact match and how often y+ is better and worse than y-. Is it more often better?"""
    _, answers = roles.write([roles.prompt(row) for row in rows], greedy=True)
    right = [gap(row, answer) == 0 for row, answer in zip(rows, answers, strict=True)]
    signs = [np.sign(gain) for _, gain in preference_pairs(roles, rows)]
    print(f"{when}: exact match {np.mean(right):.3f}; of {len(rows)} pairs, y+ is better than y- "
          f"in {signs.count(1)} and worse in {signs.count(-1)}", flush=True)
    return sum(signs) > 0


def train(args, model, steps: int, lr: float, batch_of, losses_of) -> None:
    """`steps` optimizer steps with a warm-up and a linear decay of the learning rate.
    batch_of(): [(pair, weight)], and losses_of(pairs): (pairs,). The loss is the weighted sum."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(1, steps + 1):
        share = min(step / max(1, steps // 10), (steps + 1 - step) / steps)
        optimizer.param_groups[0]["lr"] = lr * share
        batch, loss = sorted(batch_of(), key=lambda x: len(x[0].prompt) + len(x[0].chosen)), 0.0
        for first in range(0, len(batch), args.micro_batch):
            pairs, weights = zip(*batch[first:first + args.micro_batch], strict=True)
            part = losses_of(pairs) @ torch.tensor(weights, device=model.device)
            part.backward()
            loss += float(part.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % args.print_every == 0:
            print(f"  step {step}: loss {loss:.4f}", flush=True)


def read_rows(path: str, roles: Roles) -> list[Row]:
    """The rows of a file of JSON lines that are short enough."""
    with open(path, encoding="utf-8") as file:
        rows = [Row(row["prompt"], row["chosen"][-1]["content"], row.get("check"))
                for row in map(json.loads, file)]
    return [row for row in rows if len(roles.prompt(row)) <= roles.args.max_prompt_len
            and len(roles.target([], row.answer).chosen) <= roles.args.max_new_tokens]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in {
            "model": f"{ROOT}/data/model", "data": f"{ROOT}/data/train.jsonl", "rows_from": 2500,
            "eval_data": f"{ROOT}/data/heldout.jsonl", "eval_rows": 500, "revise": 0,
            "improver_steps": 100, "improver_lr": 1e-3, "mu": 1.0, "dpo_steps": 100, "dpo_lr": 2e-5,
            "beta": 0.5, "batch_size": 32, "micro_batch": 32, "generate_batch": 256,
            "temperature": 1.0, "max_prompt_len": 160, "max_new_tokens": 80, "print_every": 50,
            "threads": 1, "seed": 0, "out": "", "anyway": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=str(default))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(args.seed)
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        roles = Roles(args, model, AutoTokenizer.from_pretrained(args.model))
        rows = read_rows(args.data, roles)[args.rows_from:]
        held_out = read_rows(args.eval_data, roles)[:args.eval_rows]
        rows[0], held_out[0]
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f"no start from this model and these rows: {type(error).__name__}: {error}")
    score = functools.partial(pair_logps, shortcuts=find_shortcuts(model))

    def minibatch() -> list[int]:
        return rng.choice(len(rows), min(args.batch_size, len(rows)), replace=False).tolist()

    def stage_1_batch():
        drawn = minibatch()
        policy = [roles.target(roles.prompt(rows[i]), rows[i].answer) for i in drawn]
        return ([(targets[i], 1 / len(drawn)) for i in drawn if targets[i]]
                + [(pair, args.mu / len(drawn)) for pair in policy])

    def stage_2_batch():
        pairs = [pair for pair, _ in preference_pairs(roles, [rows[i] for i in minibatch()])
                 if pair.chosen != pair.rejected]
        return [(pair, 1 / len(pairs)) for pair in pairs]

    def dpo_losses(pairs):
        with torch.no_grad():
            fixed = score(reference, pairs)
        return dpo_loss(*score(model, pairs)[:2], *fixed[:2], beta=args.beta)[0]

    evaluate(roles, held_out, "start")
    targets = improver_targets(roles, rows)
    train(args, model, args.improver_steps, args.improver_lr, stage_1_batch,
          lambda pairs: score(model, pairs).chosen_nll)
    if evaluate(roles, held_out, "after stage 1") or args.anyway:
        reference = copy.deepcopy(model).requires_grad_(False)
        train(args, model, args.dpo_steps, args.dpo_lr, stage_2_batch, dpo_losses)
        evaluate(roles, held_out, "after stage 2")
    else:
        print("y+ is not better than y-: stage 2 has no signal; --anyway 1 goes on all the same")
    if args.out:
        model.save_pretrained(args.out)
        roles.tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
