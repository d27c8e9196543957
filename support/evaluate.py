"""Held-out rows: exact match by the data's own check, likelihood of the responses, preference."""
import numpy as np
import torch

from sapo import Pair, generate_segments, pair_logps
from support.checks import matches_check
from support.pair_sources import column_pair
from support.parallel import batches
from support.tokenize_rows import TokenizedExample


class Evaluation:
    """Evaluates a model on the same held-out examples and pairs every time.

    The pairs come from where training gets its own. With --rejected data that is the rejected
    column. Otherwise the model that training starts from rewrites the held-out responses, once,
    here, whatever the run's seed. Held-out rows with a rejected response are measured besides
    (data_...), whatever the method.
    """

    def __init__(self, settings, world, loaded, start_model, rewriter):
        """loaded: what loading.load gave. start_model: what training starts from.

        rewriter: rewriter(model, examples, rngs, num_rejected, generator) gives a list of pairs per
        example; rewriter.generating is a GeneratingModels.
        """
        self.settings, self.world, self.rewriter = settings, world, rewriter
        self.tokenizer, self.eos_ids = loaded.tokenizer, loaded.eos_ids
        self.shortcuts = loaded.shortcuts
        self.examples = sorted(loaded.eval_examples[world.rank::world.size],
                               key=lambda e: len(e.prompt))
        self.column_pairs = [column_pair(e) for e in self.examples if e.rejected]
        if settings.rejected == "data" and settings.loss != "sft":
            self.pairs = self.column_pairs
        else:
            generator = torch.Generator(world.device).manual_seed(world.rank)
            rngs = [np.random.default_rng([e.example_id]) for e in self.examples]
            with world.precision():
                pairs = rewriter(start_model, self.examples, rngs, 1, generator)
            self.pairs = [pair for pair, in pairs]

    @torch.no_grad()
    def __call__(self, model) -> dict[str, float]:
        """exact_match, nll, preference_..., data_... and chosen_logps, as far as the rows allow."""
        with self.world.precision(), self.rewriter.generating(model) as (full_model, decode_step):
            scored = self._score(full_model, self.pairs)
            columns = (scored if self.column_pairs is self.pairs
                       else self._score(full_model, self.column_pairs))
            sums = {"exact_match": self._exact_match(full_model, decode_step),
                    "nll": (-sum(chosen for _, chosen, _ in scored),
                            sum(len(pair.chosen) for pair, _, _ in scored))}
        sums |= preference("preference", scored, average=self.settings.loss != "dpo")
        # By means per token whatever the loss, so that runs with different losses compare.
        sums |= preference("data", columns, average=True)
        sums["chosen_logps"] = (sum(chosen for _, chosen, _ in scored), len(scored))
        return self.world.means(sums)

    def _exact_match(self, model, decode_step) -> tuple[int, int]:
        """Greedy answers that pass their check, and how many were asked for.

        A chosen response that was cut can't be matched: it is left out.
        """
        right = 0
        asked = [e for e in self.examples if e.check and e.chosen[-1] in self.eos_ids]
        for batch in batches(asked, self.settings.generate_batch):
            answers = generate_segments(
                model, [e.prompt for e in batch], new_tokens(self.settings, batch),
                eos_token_id=self.eos_ids, temperature=0, decode_step=decode_step)
            texts = self.tokenizer.batch_decode([answer for answer, in answers],
                                                skip_special_tokens=True)
            right += sum(matches_check(e.check, text, e.chosen_text)
                         for e, text in zip(batch, texts, strict=True))
        return right, len(asked)

    def _score(self, model, pairs: list[Pair]) -> list[tuple[Pair, float, float]]:
        """Each pair with the log-probabilities of its two responses, summed over their tokens."""
        scored = []
        for batch in batches(pairs, self.settings.micro_batch):
            logps = pair_logps(model, batch, shortcuts=self.shortcuts)
            scored += zip(batch, logps.chosen_logps.tolist(), logps.rejected_logps.tolist(),
                          strict=True)
        return scored


def preference(name: str, scored: list[tuple[Pair, float, float]],
               average: bool) -> dict[str, tuple[float, int]]:
    """(sum, count) of how often and by how much chosen is above rejected.

    average: by means per token instead of sums. Identical pairs say nothing about preference.
    """
    gaps = [chosen / len(pair.chosen) - rejected / len(pair.rejected) if average
            else chosen - rejected
            for pair, chosen, rejected in scored if pair.chosen != pair.rejected]
    return {f"{name}_accuracy": (sum(gap > 0 for gap in gaps), len(gaps)),
            f"{name}_margin": (sum(gaps), len(gaps))}


def new_tokens(settings, examples: list[TokenizedExample]) -> list[int]:
    """The longest whole response that may be written for each example, in tokens."""
    return [min(settings.max_new_tokens, settings.max_len - len(e.prompt)) for e in examples]
