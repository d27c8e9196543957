"""How a run's new pairs look to the model that training started from.

    python study/start_margins.py runs/study/ID

Reads pairs.jsonl of a run's folder (--save_pairs) and writes start-margins.json beside it: for each
step, of the pairs made for it whose responses differ, the sum of their margins and their number. A
pair's margin is log p(y+) - log p(y-) under the start model, in nats, over the whole responses. If
pairs get harder over a run, as the paper says, the margins fall.
"""
import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import support.threads  # noqa: E402, F401, I001  (before torch: how its threads wait)
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from sapo import Pair, find_shortcuts, pair_logps  # noqa: E402
from support.files import write_json  # noqa: E402

AT_ONCE = 32            # pairs


@torch.no_grad()
def margins(model, pairs: list[Pair]) -> list[float]:
    """log p(y+) - log p(y-) of each pair, in nats. A is the same on both sides and left out."""
    shortcuts = find_shortcuts(model)
    # Pairs of like lengths go together, for less padding.
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].prompt) + len(pairs[i].chosen))
    found = {}
    for first in range(0, len(order), AT_ONCE):
        batch = order[first:first + AT_ONCE]
        logps = pair_logps(model, [pairs[i] for i in batch], shortcuts=shortcuts, skip_shared=True)
        found |= zip(batch, (logps.chosen_logps - logps.rejected_logps).tolist(), strict=True)
    return [found[i] for i in range(len(pairs))]


def margins_by_step(model, pairs: list[Pair]) -> dict[int, list]:
    """step -> [sum of the margins, number of pairs], over the pairs whose responses differ."""
    pairs = [pair for pair in pairs if pair.chosen != pair.rejected]
    sums: dict[int, list] = {}
    for pair, margin in zip(pairs, margins(model, pairs), strict=True):
        total = sums.setdefault(pair.step, [0.0, 0])
        total[0] += margin
        total[1] += 1
    return sums


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of pairs.jsonl."""
    pairs = []
    with open(path, encoding="utf-8") as file:
        for line in map(json.loads, file):
            ids = line["ids"]
            shared = ids["A"]
            pairs.append(Pair(ids["x"], shared + ids["B"] + ids["C"],
                              shared + ids["B'"] + ids["C'"], len(shared), step=line["step"]))
    return pairs


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(settings["model"]).eval()
    write_json(folder / "start-margins.json",
               margins_by_step(model, read_pairs(folder / "pairs.jsonl")))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__.strip())
    main(Path(sys.argv[1]))
