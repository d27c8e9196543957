"""Held-out rows: exact match by the data's own check, likelihood of the chosen responses, preference over pairs."""
import numpy as np
import torch

from sapo import Example, Pair, generate_segments, make_pairs, pair_logps
from support.checks import matches_check
from support.tokenize_rows import Row


class Evaluation:
    """Evaluates a model on the same held-out rows and pairs every time.

    The pairs come from where training gets its own: the data's rejected column with --rejected data, otherwise rewrites
    of the held-out responses by the model that training starts from, made once, here, whatever the run's seed. Where
    held-out rows have a rejected response, these pairs count besides (data_...), whatever the method.
    """

    def __init__(self, settings, world, tokenizer, ends: list[int], rows: list[Row], start_model, whole):
        """start_model: what training starts from. whole: gives a model as one that can generate (Whole)."""
        self.settings, self.world, self.tokenizer, self.ends, self.whole = settings, world, tokenizer, ends, whole
        self.rows = sorted(rows[world.rank::world.size], key=lambda row: len(row.prompt))
        self.columns = [column_pair(row) for row in self.rows if row.rejected]
        if settings.rejected == "data":
            self.pairs = self.columns
        else:
            generator = torch.Generator(world.device).manual_seed(world.rank)
            with world.precision(), whole.of(start_model) as model:
                self.pairs = write_pairs(settings, model, self.rows, ends, [[row.number] for row in self.rows], generator, 1)

    @torch.no_grad()
    def __call__(self, model) -> dict[str, float]:
        """exact_match, nll, preference_accuracy and _margin, data_accuracy and _margin, chosen_logps, as far as the rows allow."""
        with self.world.precision(), self.whole.of(model) as model:
            scored = self._score(model, self.pairs)
            columns = scored if self.columns is self.pairs else self._score(model, self.columns)
            tallies = {"exact_match": self._exact_match(model),
                       "nll": (-sum(chosen for _, chosen, _ in scored), sum(len(pair.chosen) for pair, _, _ in scored))}
        tallies |= preference("preference", scored, average=self.settings.loss != "dpo")
        tallies |= preference("data", columns, average=True)        # so that runs with different losses compare
        tallies["chosen_logps"] = (sum(chosen for _, chosen, _ in scored), len(scored))
        return self.world.means(tallies)

    def _exact_match(self, model) -> tuple[int, int]:
        """Greedy answers that pass their check, and how many were asked for; a response that was cut can't be matched."""
        right, asked = 0, [row for row in self.rows if row.check and row.chosen[-1] in self.ends]
        for batch in batches(asked, self.settings.generate_batch):
            answers = generate_segments(model, [row.prompt for row in batch], new_tokens(self.settings, batch),
                                        eos_token_id=self.ends, temperature=0)
            texts = self.tokenizer.batch_decode([answer for answer, in answers], skip_special_tokens=True)
            right += sum(matches_check(row.check, text, row.chosen_text) for row, text in zip(batch, texts))
        return right, len(asked)

    def _score(self, model, pairs: list[Pair]) -> list[tuple[Pair, float, float]]:
        """Each pair with the log-probabilities of its two responses, summed over their tokens."""
        return [scored for batch in batches(pairs, self.settings.micro_batch)
                for scored in zip(batch, *(logps.tolist() for logps in pair_logps(model, batch)[:2]))]


def preference(name: str, scored: list[tuple[Pair, float, float]], average: bool) -> dict[str, tuple[float, int]]:
    """(sum, count) of how often and by how much chosen is above rejected, by sums or means a token (average). Identical
    pairs say nothing about preference."""
    gaps = [chosen / len(pair.chosen) - rejected / len(pair.rejected) if average else chosen - rejected
            for pair, chosen, rejected in scored if pair.chosen != pair.rejected]
    return {f"{name}_accuracy": (sum(gap > 0 for gap in gaps), len(gaps)), f"{name}_margin": (sum(gaps), len(gaps))}


def write_pairs(settings, model, rows: list[Row], ends: list[int], seeds: list[list[int]], generator, num_rejected: int) -> list[Pair]:
    """make_pairs with a run's settings, a bounded number of responses at a time, alike lengths together.

    seeds: one a row. Where a row's segment lies depends on its seed alone, not on what else is written with it, nor where.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].chosen))
    pairs = {}
    for batch in batches(order, max(1, settings.generate_batch // num_rejected)):
        examples = [rows[i] for i in batch]
        made = make_pairs(
            model, [Example(row.prompt, row.chosen, row.number) for row in examples], settings.segment_len,
            [np.random.default_rng(seeds[i]) for i in batch], eos_token_id=ends, num_rejected=num_rejected,
            max_new_tokens=new_tokens(settings, examples), segment_eos=settings.segment_eos, temperature=settings.temperature,
            top_k=settings.top_k, top_p=settings.top_p, generator=generator)
        pairs |= dict(zip(batch, batches(made, num_rejected)))
    return [pair for i in range(len(rows)) for pair in pairs[i]]


def new_tokens(settings, rows: list[Row]) -> list[int]:
    """How long each row's whole response may get."""
    return [min(settings.max_new_tokens, settings.max_len - len(row.prompt)) for row in rows]


def column_pair(row: Row) -> Pair:
    """The pair a row brings itself: its rejected response, split where it leaves the chosen one (chosen, if none)."""
    rejected = row.rejected or row.chosen
    start = 0
    while start < min(len(row.chosen), len(rejected)) and row.chosen[start] == rejected[start]:
        start += 1
    return Pair(row.prompt, row.chosen, rejected, start, row.number)


def batches(things: list, size: int) -> list[list]:
    return [things[i:i + size] for i in range(0, len(things), size)]
