"""The replay buffer of SAPO: first in, first out; it prefers the pairs that were used least.

    buffer = ReplayBuffer(capacity=2000)
    for pair in new_pairs:
        buffer.add(pair)
    batch = buffer.sample(8)

Needs numpy >= 1.26. MIT licence; from the reference code for SAPO (arXiv 2405.20830).
"""
import numpy as np


class ReplayBuffer:
    """A FIFO queue of training pairs; each has a counter of its uses (Algorithm 1 lines 2, 11, 14).

    capacity: the most items kept; adding one more drops the oldest. seed: for the drawing, as
    numpy.random.default_rng takes it. An item that was drawn c times so far has weight 1 / (1 + c),
    so items that were used less are drawn more often. Raises ValueError for a capacity below 1.

        capacity 2, add "a", "b", "c"     ->  holds "b", "c"
        counts [0, 3], weights 1 and 1/4  ->  the first is drawn with probability 0.8

    .items and .counts are lists, oldest first.
    """

    def __init__(self, capacity: int, seed: int | list[int] = 0):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {capacity}")
        self.capacity = capacity
        self.rng = np.random.default_rng(seed)
        self.items, self.counts = [], []
        # For reports alone: the dropped items, those of them that were never drawn, and how often
        # each item of the last sample had been drawn before.
        self.evicted = self.evicted_unused = 0
        self.drawn_counts = []

    def __len__(self) -> int:
        return len(self.items)

    def add(self, item) -> None:
        """Append an item with count 0. When the buffer is full, the oldest item makes room."""
        if len(self) == self.capacity:
            self.evicted += 1
            self.evicted_unused += self.counts[0] == 0
            del self.items[0], self.counts[0]
        self.items.append(item)
        self.counts.append(0)

    def sample(self, k: int) -> list:
        """Draw k distinct items, one after the other, and count their use.

        Each has probability proportional to 1 / (1 + count) among those that are left, as numpy's
        choice draws them. Adds 1 to the counts of what was drawn. Raises ValueError when k is
        negative or larger than the number of items.
        """
        if not 0 <= k <= len(self):
            raise ValueError(f"cannot draw {k} of {len(self)} items")
        weights = 1 / (1 + np.array(self.counts, dtype=float))
        drawn = []
        if k:                           # choice refuses an empty buffer, even for k = 0
            drawn = self.rng.choice(len(self), k, replace=False, p=weights / weights.sum())
        self.drawn_counts = [self.counts[i] for i in drawn]
        for i in drawn:
            self.counts[i] += 1
        return [self.items[i] for i in drawn]

    def state_dict(self) -> dict:
        """The state to save, with that of the random generator. Named tuples become plain tuples.

        Holds lists, tuples, numbers and strings only, if the items do: the file that torch.save
        makes of it can be read by torch.load(weights_only=True).
        """
        items = [tuple(item) if isinstance(item, tuple) else item for item in self.items]
        return {"items": items, "counts": list(self.counts), "rng": self.rng.bit_generator.state,
                "evicted": self.evicted, "evicted_unused": self.evicted_unused}

    def load_state_dict(self, state: dict, item=None) -> None:
        """Restore what state_dict gave. item: the class of named tuple to make of the items again.

        Raises ValueError when there are more items than this buffer's capacity.
        """
        if len(state["items"]) > self.capacity:
            raise ValueError(f"{len(state['items'])} items do not fit a buffer of capacity "
                             f"{self.capacity}")
        self.items = [item(*fields) if item else fields for fields in state["items"]]
        self.counts = list(state["counts"])
        self.rng.bit_generator.state = state["rng"]
        self.evicted, self.evicted_unused = state["evicted"], state["evicted_unused"]
        self.drawn_counts = []
