"""Draw loss, margin, buffer age and the rate of B' = B of one or more runs.

    python bench/plot.py docs/runs.svg runs/0001 runs/0002=SAPO-DPO

The first argument is the picture. The others are output folders of runs, each with a metrics.jsonl;
=NAME gives a run the name to show (otherwise: the folder's name).
"""
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# metric -> title of its panel
PANELS = {"loss": "loss", "margin": "margin of the rewards",
          "buffer_age": "age of drawn pairs, steps", "identical": "B' = B, share of new pairs"}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and those before it, at most `window` values. (n,) -> (n,)."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    last = np.arange(len(values)) + 1
    first = np.maximum(last - window, 0)
    return (sums[1:] - sums[first]) / (last - first)


def draw(picture: Path, runs: list[tuple[str, list[dict]]]) -> None:
    """One panel per metric and one line per run, with the value of every step faintly behind it.

    runs: (name, records of metrics.jsonl). A run without a metric has no line in its panel.
    """
    figure, panels = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for panel, (metric, title) in zip(panels.flat, PANELS.items(), strict=True):
        for i, (name, records) in enumerate(runs):
            points = [(record["step"], record[metric]) for record in records
                      if record.get(metric) is not None]
            if points:
                steps, values = np.array(points, dtype=float).T
                smoothed = smooth(values, max(5, len(values) // 20))
                panel.plot(steps, values, color=f"C{i}", alpha=0.25, linewidth=0.8)
                panel.plot(steps, smoothed, color=f"C{i}", label=name)
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
        if metric in ("buffer_age", "identical"):
            panel.set_ylim(bottom=0)        # otherwise a rate that is always 0 lies in the middle
    for panel in panels[-1]:
        panel.set_xlabel("optimizer step")
    lines = {}          # name of a run -> one of its lines
    for panel in panels.flat:
        handles, names = panel.get_legend_handles_labels()
        lines.update(zip(names, handles, strict=True))
    figure.legend(lines.values(), lines.keys(), loc="outside upper center",
                  ncols=max(1, len(lines)), frameon=False)
    # without a date, the same runs give the same file
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


def main(picture: str, *arguments: str) -> None:
    runs = []
    for argument in arguments:
        folder, _, name = argument.partition("=")
        try:
            with open(Path(folder) / "metrics.jsonl", encoding="utf-8") as file:
                records = [json.loads(line) for line in file]
        except (OSError, ValueError) as error:
            sys.exit(f"plot.py: {folder}: can't read metrics.jsonl in this folder ({error})")
        runs.append((name or Path(folder).name, records))
    draw(Path(picture), runs)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__.strip())
    main(*sys.argv[1:])
