"""The replay buffer of SAPO: first in first out, drawing what was used least. Needs numpy alone.

    buffer = ReplayBuffer(capacity=2000)
    for pair in new_pairs:
        buffer.add(pair)
    batch = buffer.sample(8)
"""
import numpy as np


class ReplayBuffer:
    """A FIFO queue of training pairs with a use counter each (paper, Section 3; Algorithm 1 lines 2, 11 and 14).

    capacity: most items kept; adding one more drops the oldest. seed: of the drawing, whatever numpy's
    default_rng takes.
    An item drawn c times so far has weight 1 / (1 + c), so old and new pairs end up used about evenly.
    Items are anything; where they are tuples (named ones too), a checkpoint holds them as plain tuples.
    Raises ValueError for a capacity below 1.

        capacity 2, add "a", "b", "c"  ->  holds "b", "c"
        counts [0, 3]  ->  the first is drawn with probability 1 / (1 + 1/4) = 0.8
    """

    def __init__(self, capacity: int, seed: int | list[int] = 0):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {capacity}")
        self.capacity = capacity
        self.rng = np.random.default_rng(seed)
        self._items = []                                # a ring once full: _oldest is overwritten next
        self._counts = np.zeros(capacity, dtype=np.int64)
        self._oldest = 0
        self.evicted = 0                                # items dropped since the start
        self.evicted_unused = 0                         # of these, dropped without ever being drawn
        self.drawn_counts = np.zeros(0, dtype=np.int64)     # of the last sample: how often each had been drawn before

    def __len__(self) -> int:
        return len(self._items)

    @property
    def items(self) -> list:
        """The items, oldest first."""
        return self._items[self._oldest:] + self._items[:self._oldest]

    @property
    def counts(self) -> list[int]:
        """How often each item was drawn, oldest first."""
        return np.roll(self._counts[:len(self)], -self._oldest).tolist()

    def add(self, item) -> None:
        """Append an item with count 0; when full, the oldest makes room."""
        if len(self) < self.capacity:
            self._items.append(item)
            return
        self.evicted += 1
        self.evicted_unused += int(self._counts[self._oldest] == 0)
        self._items[self._oldest] = item
        self._counts[self._oldest] = 0
        self._oldest = (self._oldest + 1) % self.capacity

    def sample(self, k: int) -> list:
        """Draw k distinct items, each next one with probability proportional to 1 / (1 + count), and count the use.

        Raises ValueError when k is negative or more than there is.
        """
        if not 0 <= k <= len(self):
            raise ValueError(f"cannot draw {k} of {len(self)} items")
        # The k smallest of Exp(1) / weight are a weighted draw without replacement (Efraimidis and Spirakis 2006).
        # Oldest first, not by place in the ring: a restored buffer has turned its ring and must draw the same.
        keys = self.rng.standard_exponential(len(self)) * (1 + np.roll(self._counts[:len(self)], -self._oldest))
        drawn = np.argpartition(keys, k - 1)[:k] if k else np.zeros(0, dtype=np.int64)
        drawn = (drawn[np.argsort(keys[drawn])] + self._oldest) % len(self) if k else drawn
        self.drawn_counts = self._counts[drawn]
        self._counts[drawn] += 1
        return [self._items[i] for i in drawn]

    def state_dict(self) -> dict:
        """Items and counts oldest first, the random state and the tallies: lists, tuples, numbers and strings only."""
        return {"items": [tuple(item) if isinstance(item, tuple) else item for item in self.items],
                "counts": self.counts, "rng": self.rng.bit_generator.state,
                "evicted": self.evicted, "evicted_unused": self.evicted_unused}

    def load_state_dict(self, state: dict, item=None) -> None:
        """Restore what state_dict gave. item: the type to rebuild tuples with, as in item(*fields); None keeps tuples.

        Raises ValueError when there are more items than this buffer's capacity.
        """
        if len(state["items"]) > self.capacity:
            raise ValueError(f"{len(state['items'])} items do not fit a buffer of capacity {self.capacity}")
        self._items = [item(*fields) if item else fields for fields in state["items"]]
        self._counts[:] = 0
        self._counts[:len(self._items)] = state["counts"]
        self._oldest = 0
        self.rng.bit_generator.state = state["rng"]
        self.evicted, self.evicted_unused = state["evicted"], state["evicted_unused"]
