"""Draw the study's figures from study/results.jsonl into docs/figures.

    pip install -r study/requirements.txt
    python study/plot.py                # every figure that there are results for

    main.svg        exact match of every method on every testbed, seed by seed
    few-rows.svg    exact match against the number of curated rows
    epochs.svg      exact match over a long run
    worse.svg       over a run: pairs that are identical, worse, and how hard they are
    cost.svg        exact match against CPU seconds and generated tokens
"""
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import matplotlib  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402

from study.grid import FEW_ROWS, FEW_ROWS_TRIED, METHODS, TABLES  # noqa: E402
from study.plan import Results, read_results  # noqa: E402
from study.run import RESULTS  # noqa: E402
from study.tables import WITH_PAIRS, cost_curve, curve, deviation, mean, measured  # noqa: E402

FIGURES = REPOSITORY / "docs" / "figures"
matplotlib.use("Agg")
# The same results give the same file: names inside an SVG are made from this salt.
matplotlib.rcParams.update({"svg.hashsalt": "study", "font.size": 9, "axes.grid": True,
                            "grid.alpha": 0.3})


def over_seeds(curves: list[list[tuple[float, float]]]) -> tuple[list, list, list]:
    """Of curves with the same points: x, mean of y, and standard deviation of y (0 for one)."""
    xs = [mean([curve[i][0] for curve in curves]) for i in range(len(curves[0]))]
    ys = [[curve[i][1] for curve in curves] for i in range(len(curves[0]))]
    return xs, [mean(y) for y in ys], [deviation(y) or 0.0 for y in ys]


def draw_curve(panel, curves: list[list[tuple[float, float]]], label: str, color: str) -> None:
    """The mean over seeds as a line, and a band of one standard deviation around it."""
    xs, ys, spread = over_seeds(curves)
    panel.plot(xs, ys, color=color, label=label, marker=".")
    panel.fill_between(xs, [y - s for y, s in zip(ys, spread, strict=True)],
                       [y + s for y, s in zip(ys, spread, strict=True)], color=color, alpha=0.15,
                       linewidth=0)


def draw_main(results: Results) -> plt.Figure | None:
    """A panel per testbed: a point per seed, a bar at the mean, a line at the start model."""
    tables = {table.testbed: measured(table, results) for name, table in TABLES.items()
              if name.startswith("main-")}
    tables = {testbed: rows for testbed, rows in tables.items()
              if any(row.lines for row in rows.values())}
    if not tables:
        return None
    lines = -(-len(tables) // 2)
    figure, panels = plt.subplots(lines, 2, figsize=(9, 3 * lines), sharex=True, sharey=True,
                                  squeeze=False, layout="constrained")
    for panel, (testbed, rows) in zip(panels.flat, tables.items(), strict=False):
        titles = list(rows)[::-1]
        for place, title in enumerate(titles):
            values = list(rows[title].after("exact_match").values())
            if values:
                panel.plot(values, [place] * len(values), "o", color="C0", alpha=0.5, markersize=4)
                panel.plot([mean(values)], [place], "|", color="C0", markersize=14)
        start = next(line["before"]["exact_match"] for row in rows.values()
                     for line in row.lines.values())
        panel.axvline(start, color="0.4", linestyle=":", label="start")
        panel.set(title=testbed, xlabel="exact match")
        panel.xaxis.set_tick_params(labelbottom=True)
        panel.set_yticks(range(len(titles)), titles)
    for panel in panels.flat[len(tables):]:
        panel.remove()
    panels[0][0].legend(frameon=False)
    return figure


def draw_few_rows(results: Results) -> plt.Figure | None:
    """Exact match against the number of curated rows, a line per method."""
    rows = measured(TABLES["few-rows"], results)
    figure, panel = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for i, name in enumerate(FEW_ROWS_TRIED):
        found = [(count, list(rows[f"{METHODS[name].title}, {count} rows"].after(
            "exact_match").values())) for count in FEW_ROWS]
        found = [(count, values) for count, values in found if values]
        if found:
            panel.errorbar([count for count, _ in found], [mean(values) for _, values in found],
                           [deviation(values) or 0.0 for _, values in found], color=f"C{i}",
                           label=METHODS[name].title, marker="o", capsize=3)
    if not panel.lines:
        plt.close(figure)
        return None
    panel.set_xscale("log", base=2)
    panel.set_xticks(FEW_ROWS, map(str, FEW_ROWS))
    panel.set(xlabel="curated rows", ylabel="exact match", title="habits")
    panel.legend(frameon=False)
    return figure


def draw_epochs(results: Results) -> plt.Figure | None:
    """Exact match over the run, with a mark where a round of SPIN begins."""
    rows = {title: row for title, row in measured(TABLES["epochs"], results).items() if row.lines}
    if not rows:
        return None
    figure, panel = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for i, (title, row) in enumerate(rows.items()):
        lines = list(row.lines.values())
        draw_curve(panel, [curve(line) for line in lines], title, f"C{i}")
        rounds = lines[0]["flags"].get("iterations", 1)
        for number in range(1, rounds):
            panel.axvline(lines[0]["steps"] * number / rounds, color=f"C{i}", linewidth=0.6,
                          linestyle=":")
    panel.set(xlabel="optimizer steps (dotted: a round of SPIN begins)", ylabel="exact match",
              title="habits")
    panel.legend(frameon=False)
    return figure


def draw_worse(results: Results) -> plt.Figure | None:
    """Over a run: pairs identical, of the others those worse, and the start model's margin."""
    names = {"identical": "B' = B, share of new pairs",
             "worse": "worse, share of those that differ",
             "start_margin": "margin under the start model, nats"}
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.4), layout="constrained")
    color = 0
    for table in WITH_PAIRS:
        for row in measured(TABLES[table], results).values():
            if not row.lines or row.row.change:
                continue
            label = f"{TABLES[table].testbed}, {METHODS[row.row.method].title}"
            for panel, name in zip(panels, names, strict=True):
                curves = [[(each["step"] / line["steps"], each[name]) for each in line["rates"]
                           if name in each] for line in row.lines.values()]
                if len(set(map(len, curves))) == 1 and curves[0]:
                    draw_curve(panel, curves, label, f"C{color}")
            color += 1
    if not color:
        plt.close(figure)
        return None
    for panel, title in zip(panels, names.values(), strict=True):
        panel.set(xlabel="share of the run", title=title)
    for panel in panels[:2]:
        panel.set_ylim(-0.02, 1.02)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_cost(results: Results) -> plt.Figure | None:
    """Exact match against CPU seconds of training, and against generated tokens."""
    rows = {title: row for title, row in measured(TABLES["cost"], results).items() if row.lines}
    if not rows:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for i, (title, row) in enumerate(rows.items()):
        curves = [cost_curve(line) for line in row.lines.values()]
        draw_curve(panels[0], [[(x, y) for x, _, y in points] for points in curves], title, f"C{i}")
        if any(line["generated_tokens"] for line in row.lines.values()):
            draw_curve(panels[1], [[(x / 1000, y) for _, x, y in points] for points in curves],
                       title, f"C{i}")
    panels[0].set(xlabel="CPU seconds of training", ylabel="exact match", title="habits")
    panels[1].set(xlabel="tokens generated, thousands", title="habits")
    panels[0].legend(frameon=False)
    return figure


DRAWN = {"main": draw_main, "few-rows": draw_few_rows, "epochs": draw_epochs, "worse": draw_worse,
         "cost": draw_cost}


def main() -> int:
    results = Results(read_results(RESULTS))
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWN.items():
        figure = draw(results)
        if figure is None:
            print(f"{name}.svg: nothing was run for this figure yet")
            continue
        # without a date, the same results give the same file
        figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
        print(f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
