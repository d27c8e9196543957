"""--save_pairs: every new pair of a run in pairs.jsonl, as text and as token ids."""
from pathlib import Path

import torch

from sapo import Pair
from support.report import RecordFile, fails_check


class SavedPairs:
    """Appends pairs to RUN/pairs.jsonl, those of all processes; rank 0 writes."""

    def __init__(self, settings, world, folder: Path, examples, tokenizer, start_scorer, say):
        """start_scorer: scores pairs with the model that training started from.

        examples: those that pairs are made of. say: prints a line.
        """
        self.settings, self.world, self.start_scorer = settings, world, start_scorer
        self.examples, self.tokenizer = examples, tokenizer
        self.file = RecordFile(folder / "pairs.jsonl", say)

    def write(self, pairs: list[Pair]) -> None:
        """Append the new pairs of one step, those of rank 0 first. All processes together."""
        failed = fails_check(pairs, self.examples, self.tokenizer)
        logps = self._start_logps(pairs)
        records = [self._record(pair, fails) | logps[id(pair)]
                   for pair, fails in zip(pairs, failed, strict=True)]
        gathered = self.world.gather(records)
        if self.world.is_main:
            self.file.write([record for part in gathered for record in part])

    def close(self) -> None:
        """No more pairs will come. May be called twice."""
        self.file.close()

    def _record(self, pair: Pair, fails: bool | None) -> dict:
        stop = len(pair.chosen) if pair.stop is None else pair.stop
        rejected_stop = len(pair.rejected) if pair.rejected_stop is None else pair.rejected_stop
        ids = {"x": pair.prompt, "A": pair.chosen[:pair.start], "B": pair.chosen[pair.start:stop],
               "B'": pair.rejected[pair.start:rejected_stop], "C": pair.chosen[stop:]}
        return {"step": pair.step, "row": pair.example_id, "start": pair.start,
                "identical": pair.chosen == pair.rejected, "worse": fails,
                "keeps_C": pair.rejected[rejected_stop:] == ids["C"],
                "text": {name: self.tokenizer.decode(part) for name, part in ids.items()},
                "ids": ids}

    @torch.no_grad()
    def _start_logps(self, pairs: list[Pair]) -> dict[int, dict[str, float]]:
        """id of a pair -> summed log-probabilities of its responses under the start model."""
        found = {}
        for micro_batch, weight in self.world.micro_batches(
                self.start_scorer, pairs, self.settings.micro_batch):
            with self.world.precision():
                logps = self.start_scorer(micro_batch)
            if not weight:                  # scored for another process's sake
                continue
            for pair, chosen, rejected in zip(micro_batch, logps.chosen_logps.tolist(),
                                              logps.rejected_logps.tolist(), strict=True):
                found[id(pair)] = {"chosen_logps_at_start": chosen,
                                   "rejected_logps_at_start": rejected}
        return found
