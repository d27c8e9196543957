"""Held-out rows: exact match by the data's own check, likelihood of the chosen responses, preference over pairs."""
import numpy as np
import torch

from sapo import Example, Pair, generate_segments, make_pairs, pair_logps
from support.rows import Row, passes

# What a larger value means is in the README's glossary.
NAMES = ("exact_match", "nll", "preference_accuracy", "margin", "chosen_logps")


class Evaluation:
    """Evaluates a model on the same held-out rows and pairs every time.

    The pairs come from where training gets its own: the data's rejected column with --rejected data, otherwise rewrites
    of the held-out responses by the model that training starts from, made once, here.
    """

    def __init__(self, settings, world, tokenizer, ends: list[int], rows: list[Row], start_model):
        self.settings, self.world, self.tokenizer, self.ends = settings, world, tokenizer, ends
        self.rows = sorted(rows[world.rank::world.size], key=lambda row: len(row.prompt))
        self.has_pairs = settings.rejected != "data" or bool(rows) and all(row.rejected for row in rows)
        self.pairs = [column_pair(row) for row in self.rows]
        if settings.rejected != "data":
            rng = np.random.default_rng([settings.seed, world.rank])
            generator = torch.Generator(world.device).manual_seed(settings.seed + world.rank)
            self.pairs = [pair for batch in batches(self.rows, 64) for pair in make_pairs(
                start_model, [Example(row.prompt, row.chosen, row.number) for row in batch], settings.segment_len, rng,
                eos_token_id=ends, max_new_tokens=settings.max_new_tokens, segment_eos=settings.segment_eos,
                temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, generator=generator)]
            # A rewrite that came out as the original says nothing about preference.
            self.preferred = [pair.chosen != pair.rejected for pair in self.pairs]
        else:
            self.preferred = [True] * len(self.pairs)

    @torch.no_grad()
    def __call__(self, model) -> dict[str, float]:
        """The metrics of NAMES, as far as the rows allow them; {} without held-out rows."""
        right, checked, nll, tokens, preferred, margin, pairs = 0, 0, 0.0, 0, 0, 0.0, 0
        for batch in batches([row for row in self.rows if row.check], 64):
            answers = generate_segments(model, [row.prompt for row in batch], self.settings.max_new_tokens,
                                        eos_token_id=self.ends, temperature=0)
            texts = self.tokenizer.batch_decode([answer for answer, in answers], skip_special_tokens=True)
            right += sum(passes(row.check, text, row.chosen_text) for row, text in zip(batch, texts))
            checked += len(batch)
        numbered = list(zip(self.pairs, self.preferred))
        for batch in batches(numbered, self.settings.micro_batch):
            chunk = [pair for pair, _ in batch]
            chosen, rejected, _ = (x.tolist() for x in pair_logps(model, chunk))
            for (pair, counts), chosen_logps, rejected_logps in zip(batch, chosen, rejected):
                nll, tokens = nll - chosen_logps, tokens + len(pair.chosen)
                if counts and self.has_pairs:
                    # The loss's own measure: DPO compares sums, ORPO (and SFT, for comparison) means.
                    if self.settings.loss != "dpo":
                        chosen_logps, rejected_logps = chosen_logps / len(pair.chosen), rejected_logps / len(pair.rejected)
                    preferred, margin, pairs = preferred + (chosen_logps > rejected_logps), margin + chosen_logps - rejected_logps, pairs + 1
        right, checked, nll, tokens, preferred, margin, pairs, rows = self.world.sum(
            [right, checked, nll, tokens, preferred, margin, pairs, len(self.rows)])
        result = {}
        if checked:
            result["exact_match"] = right / checked
        if rows:
            result["nll"] = nll / tokens
        if pairs:
            result |= {"preference_accuracy": preferred / pairs, "margin": margin / pairs}
        if rows:
            result["chosen_logps"] = -nll / rows
        return result


def column_pair(row: Row) -> Pair:
    """The pair a row brings itself: its rejected response, split where it leaves the chosen one (chosen, if none)."""
    rejected = row.rejected or row.chosen
    start = 0
    while start < min(len(row.chosen), len(rejected)) and row.chosen[start] == rejected[start]:
        start += 1
    return Pair(row.prompt, row.chosen, rejected, start, row.number)


def batches(things: list, size: int) -> list[list]:
    return [things[i:i + size] for i in range(0, len(things), size)]
