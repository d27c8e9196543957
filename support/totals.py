"""What a whole run sums to: seconds by part, tokens, and how its pairs were."""

PARTS = ("generate", "score", "update", "evaluate", "other")
COUNTS = ("generated_tokens", "scored_tokens", "pairs", "identical", "checked", "worse")


class Totals:
    """Sums over a run and all its resumptions. Its state is a part of a checkpoint's progress.

    Work that was lost in a kill is not in the sums: the state is that of the checkpoint.
    """

    def __init__(self, clock, state: dict | None = None):
        """state: what state() gave in the process that wrote the checkpoint."""
        state = state or {}
        self.clock = clock
        self.earlier_seconds = {name: state.get("seconds", {}).get(name, 0.0) for name in PARTS}
        self.counts = {name: state.get("counts", {}).get(name, 0) for name in COUNTS}

    def add(self, world, counts: dict[str, int]) -> None:
        """Add what this process counted in a step. All processes together."""
        names = list(counts)
        for name, count in zip(names, world.sum([counts[name] for name in names]), strict=True):
            self.counts[name] += int(count)

    def state(self) -> dict:
        """Plain numbers, as a checkpoint holds them."""
        return {"seconds": self._seconds(), "counts": dict(self.counts)}

    def _seconds(self) -> dict[str, float]:
        """Seconds of rank 0 by part. other: what no part claims, from loading to saving."""
        now = {name: self.clock.totals.get(name, 0.0) for name in PARTS}
        now["other"] = max(0.0, self.clock.elapsed() - sum(now.values()))
        return {name: self.earlier_seconds[name] + now[name] for name in PARTS}

    def summary(self, steps: int) -> dict:
        """The entries of summary.json. A rate over no pairs is None."""
        seconds, counts = self._seconds(), self.counts
        return {"steps": steps, "seconds": seconds | {"total": sum(seconds.values())},
                "generated_tokens": counts["generated_tokens"],
                "scored_tokens": counts["scored_tokens"],
                "identical": counts["identical"] / counts["pairs"] if counts["pairs"] else None,
                "worse": counts["worse"] / counts["checked"] if counts["checked"] else None}
