"""Draw metrics.jsonl of one or more runs: loss, margin, age of what is drawn from the buffer, rate of B' = B.

    python bench/plot.py docs/runs.svg runs/0001 runs/0002=SAPO-DPO        folders, each with a name to show if you like
"""
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = {"loss": "loss", "margin": "margin of the rewards", "buffer_age": "age of drawn pairs, steps", "identical": "B' = B, share of new pairs"}


def smooth(values: np.ndarray, over: int) -> np.ndarray:
    """Mean of each value and the ones before it, up to `over` of them."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    first = np.maximum(np.arange(len(values)) + 1 - over, 0)
    return (sums[1:] - sums[first]) / (np.arange(len(values)) + 1 - first)


def draw(picture: Path, runs: list[tuple[str, list[dict]]]) -> None:
    """One panel a metric, one line a run, the step's own values behind it faintly. A run that lacks a metric is left out there."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for panel, (metric, title) in zip(panels.flat, SHOWN.items()):
        for i, (name, records) in enumerate(runs):
            points = [(record["step"], record[metric]) for record in records if record.get(metric) is not None]
            if points:
                steps, values = np.array(points, dtype=float).T
                panel.plot(steps, values, color=f"C{i}", alpha=0.25, linewidth=0.8)
                panel.plot(steps, smooth(values, max(5, len(values) // 20)), color=f"C{i}", label=name)
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
        if metric in ("buffer_age", "identical"):
            panel.set_ylim(bottom=0)        # a rate that is 0 throughout would else lie in the middle
    for panel in panels[-1]:
        panel.set_xlabel("optimizer step")
    lines = {label: line for panel in panels.flat for line, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=max(1, len(lines)), frameon=False)
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


def main(picture: str, *folders: str) -> None:
    runs = []
    for argument in folders:
        folder, _, name = argument.partition("=")
        try:
            runs.append((name or Path(folder).name, [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open(encoding="utf-8")]))
        except (OSError, ValueError) as error:
            sys.exit(f"plot.py: {folder}: no metrics.jsonl that can be read ({error})")
    draw(Path(picture), runs)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__.strip())
    main(*sys.argv[1:])
