"""The method of SAPO (Self-Augmented Preference Optimization, arXiv 2405.20830): make pairs and score them.

    choose_segment      where B lies in a chosen response A B C                       Algorithm 1 line 8
    generate_segments   write B' after x and A, with a key-value cache                Algorithm 1 line 9
    splice              put A B' C together                                           Algorithm 1 line 10, Eq. 5
    make_pairs          the three of them over a batch
    pair_logps          log-probabilities of both responses, sharing x and A          what Eq. 1 and 3 need

Everything is token ids: nothing is ever decoded and tokenized again. B is the number of prefixes or pairs, T a padded
length, D the hidden size, V the vocabulary. Needs torch, transformers and losses.py.
"""
import contextlib
import logging
import warnings
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from losses import token_logps

LOGITS_AT_ONCE = 2 ** 25        # most logits (tokens x V) held at a time while scoring: 128 MiB in fp32


class Example(NamedTuple):
    """A prompt and its chosen response as token ids; row: where in the data it came from."""
    prompt: list[int]
    chosen: list[int]
    row: int = -1


class Pair(NamedTuple):
    """A preference pair as token ids. start = len(A): chosen[:start] == rejected[:start].

    row: where in the data the example came from. step: the optimizer step the pair was made at.
    """
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    start: int
    row: int = -1
    step: int = 0


# ---------------------------------------------------------------------------------------------- segments and pairs

def choose_segment(response_len: int, segment_len: int, rng: np.random.Generator) -> tuple[int, int]:
    """Where B starts and stops in a response (Eq. 4), the start uniform over every place where B fits.

    A response shorter than segment_len is all B. Raises ValueError when either length is below 1.

        response_len 5, segment_len 3  ->  (0, 3), (1, 4) or (2, 5), a third each
        response_len 2, segment_len 3  ->  (0, 2)
    """
    if response_len < 1 or segment_len < 1:
        raise ValueError(f"response_len and segment_len must be at least 1, not {response_len} and {segment_len}")
    n = min(segment_len, response_len)
    start = int(rng.integers(0, response_len - n + 1))
    return start, start + n


def splice(response: Sequence[int], start: int, stop: int, segment: Sequence[int],
           eos_token_id: int | Sequence[int] | None) -> list[int]:
    """y- = A B' C (Eq. 5): put `segment` (B') in the place of response[start:stop] (B).

    Where B' contains an end token the response ends there and C is dropped: nobody reads on after the end.

        response [1, 2, 3, 4, 5], start 1, stop 3, segment [8, 9], end 0  ->  [1, 8, 9, 4, 5]
        the same with segment [8, 0]                                      ->  [1, 8, 0]
    """
    ends = end_tokens(eos_token_id)
    for i, token in enumerate(segment):
        if token in ends:
            return [*response[:start], *segment[:i + 1]]
    return [*response[:start], *segment, *response[stop:]]


def make_pairs(model, examples: Sequence[Example], segment_len: int, rng: np.random.Generator | Sequence[np.random.Generator], *,
               eos_token_id: int | Sequence[int] | None, num_rejected: int = 1, max_new_tokens: int | Sequence[int] = 256,
               segment_eos: str = "stop", step: int = 0, temperature: float = 0.7, top_k: int = 50,
               top_p: float = 0.95, generator: torch.Generator | None = None) -> list[Pair]:
    """Algorithm 1 lines 7 to 10: rewrite a random segment of each chosen response with `model` (the EMA model).

    examples: (prompt, chosen[, row]) tuples of token ids, such as Example. segment_len: N_seg; 0 rewrites the whole
    response, until an end token or max_new_tokens (one number or one an example; SPIN, "no segment"). rng draws the
    segments (one generator, or one an example), generator the tokens.
    num_rejected: rewrites of each example, all of the same segment, so that the prompt is read once for all of them.
    segment_eos: "stop" ends y- at an end token in B'; "forbid" bans end tokens in B' wherever a C follows.
    Returns num_rejected pairs an example, in the order of the examples. Raises ValueError on an empty response.
    """
    if segment_eos not in ("stop", "forbid"):
        raise ValueError(f"segment_eos must be 'stop' or 'forbid', not {segment_eos!r}")
    examples = [Example(*example) for example in examples]
    spans = [choose_segment(len(e.chosen), segment_len or len(e.chosen), r) for e, r in zip(examples, one_each(rng, examples, "rngs"))]
    segments = generate_segments(
        model, [[*e.prompt, *e.chosen[:start]] for e, (start, _) in zip(examples, spans)],
        [stop - start for start, stop in spans] if segment_len else max_new_tokens, eos_token_id=eos_token_id,
        temperature=temperature, top_k=top_k, top_p=top_p, num_return=num_rejected, generator=generator,
        forbid_eos=[segment_eos == "forbid" and stop < len(e.chosen) for e, (_, stop) in zip(examples, spans)])
    return [Pair(e.prompt, e.chosen, splice(e.chosen, start, stop, segment, eos_token_id), start, e.row, step)
            for e, (start, stop), rewrites in zip(examples, spans, segments) for segment in rewrites]


def end_tokens(eos_token_id: int | Sequence[int] | None) -> list[int]:
    """An end token, a list of them or None, as a list."""
    return [] if eos_token_id is None else np.atleast_1d(eos_token_id).tolist()


# ------------------------------------------------------------------------------------------------------ generation

class KVCache:
    """Keys and values of every layer, allocated once and written in place; what a transformers model calls `update` on.

    A token's column is its position, so rows of different lengths need no left padding: columns beyond a row's own
    position hold leftovers, which the mask hides until the row gets there and overwrites them.
    """
    is_compileable, is_initialized = False, True        # what some models of transformers 5.0 ask their cache

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity = rows, capacity       # capacity: columns
        self.keys, self.values = {}, {}         # layer -> (B, heads, capacity, head size)
        self.position = None            # (B,) column each row writes next; None while blocks are written, columns 0..
        self.block = slice(0, rows)     # the rows that such a block belongs to
        self.length = 0                 # columns that may hold something: attention looks no further

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, heads, new tokens, head size); return all those rows have, (B, heads, length, head size)."""
        return self._write(self.keys, keys, layer_idx), self._write(self.values, values, layer_idx)

    def _write(self, layers: dict, new: Tensor, layer_idx: int) -> Tensor:
        if layer_idx not in layers:     # zeros: a hidden column is multiplied by 0, and 0 times garbage may be NaN
            layers[layer_idx] = new.new_zeros(self.rows, new.shape[1], self.capacity, new.shape[3])
        store = layers[layer_idx]
        if self.position is None:
            store[self.block, :, :new.shape[2]] = new
            return new
        store[torch.arange(store.shape[0], device=store.device), :, self.position] = new[:, :, 0]
        return store[:, :, :self.length]

    def keep_rows(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be named more than once."""
        for layers in (self.keys, self.values):
            for layer_idx, store in layers.items():
                layers[layer_idx] = store[rows]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Part of the transformers cache interface; models that are given position ids do not need it."""
        return self.length


@torch.no_grad()
def generate_segments(model, prefixes: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], *,
                      eos_token_id: int | Sequence[int] | None, temperature: float = 0.7, top_k: int = 50,
                      top_p: float = 0.95, num_return: int = 1, generator: torch.Generator | None = None,
                      forbid_eos: bool | Sequence[bool] = False) -> list[list[list[int]]]:
    """Continue each prefix (Algorithm 1 line 9).

    model: a transformers causal LM. prefixes: token ids, of any lengths but not empty. max_new_tokens: one number or
    one a prefix. eos_token_id: an id, several, or None; a list ends with the end token when one was produced.
    temperature 0 is greedy: what model.generate(do_sample=False) gives, token for token. Otherwise temperature, then
    top_k (0: all), then top_p, in that order. num_return continuations a prefix, which is read once for all of them.
    forbid_eos: one bool or one a prefix: end tokens are never produced there.
    Returns, for each prefix, num_return token lists. Raises ValueError on an empty prefix or lengths that do not match.
    """
    limits, forbid = one_each(max_new_tokens, prefixes, "max_new_tokens"), one_each(forbid_eos, prefixes, "forbid_eos")
    if not all(len(prefix) for prefix in prefixes):
        raise ValueError("a prefix needs at least one token")
    if not len(prefixes) or not max(limits):
        return [[[] for _ in range(num_return)] for _ in prefixes]
    record = check_generation(model) and not torch.is_autocast_enabled(next(model.parameters()).device.type)
    with eval_mode(model):
        lists = _generate(model, prefixes, limits, forbid, end_tokens(eos_token_id), num_return,
                          lambda logits: sample_tokens(logits, temperature, top_k, top_p, generator), record)
    return [lists[i * num_return:(i + 1) * num_return] for i in range(len(prefixes))]


def _generate(model, prefixes, limits, forbid, ends, num_return, choose, record) -> list[list[int]]:
    """generate_segments without its checks; choose: logits (B, V) -> tokens (B,). Returns len(prefixes) * num_return lists."""
    device = next(model.parameters()).device
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    lengths = [len(prefixes[i]) for i in order]
    ids = torch.tensor(pad([prefixes[i] for i in order]), device=device)                        # (prefixes, T)
    cache = KVCache(len(order), lengths[-1] + max(limits))
    columns = torch.arange(cache.capacity, device=device)[None]
    # Prefill: every prefix but its last token, which is the first one decoded; four groups of like lengths, for less
    # padding. That is on the right and each row's own tokens look back only, so it changes nothing.
    size = max(4, -(-len(order) // 4))
    for start in range(0, len(order), size):
        cache.block = slice(start, start + size)
        block = ids[cache.block, :max(1, lengths[cache.block][-1] - 1)]
        seen = columns[:, :block.shape[1]]
        model.base_model(input_ids=block, position_ids=seen.expand(len(block), -1), past_key_values=cache, use_cache=True,
                         attention_mask=attention_mask(model, seen[:, :, None] >= seen[:, None], seen, seen))

    source = torch.arange(len(order), device=device).repeat_interleave(num_return)             # prefix of each row, (B,)
    if num_return > 1:
        cache.keep_rows(source)
    rows = [i * num_return + j for i in order for j in range(num_return)]       # list that each row writes to
    forbidding = any(forbid)
    limits, forbid = ([values[i // num_return] for i in range(len(rows))] for values in (limits, forbid))
    position = torch.tensor(lengths, device=device)[source] - 1
    token, forbid = ids[source, position], torch.tensor([forbid[i] for i in rows], device=device)
    lists = [[] for _ in rows]
    for n in range(max(limits)):
        seen = columns[:, :lengths[-1] + n]
        mask = attention_mask(model, (seen <= position[:, None])[:, None], position[:, None], seen)
        inputs = (token, position, mask, seen, cache.keys, cache.values)
        if n == 0:
            step = recorded_step(model, inputs) if record else Step(model)
        logits = step(*inputs).float()                                                          # (B, V)
        if forbidding:
            logits[:, ends] = logits[:, ends].masked_fill(forbid[:, None], -torch.inf)
        token, position = choose(logits), position + 1
        for i, t in zip(rows, token.tolist()):
            if limits[i]:
                lists[i].append(t)
                limits[i] = 0 if t in ends else limits[i] - 1
        # A finished row costs as much as a running one; leaving it out costs a copy of the cache. So wait for a quarter.
        running = [row for row, i in enumerate(rows) if limits[i]]
        if not running:
            break
        if len(running) <= 0.75 * len(rows):
            rows, keep = [rows[row] for row in running], torch.tensor(running, device=device)
            cache.keep_rows(keep)
            token, position, forbid = token[keep], position[keep], forbid[keep]
    return lists


class Step(torch.nn.Module):
    """One decode step as a function of tensors alone, which is what torch.jit.trace can record."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, position: Tensor, mask, columns: Tensor, keys: dict, values: dict) -> Tensor:
        """token: (B,), the next one of each row, at position (B,); columns: (1, length). Returns the logits after it, (B, V)."""
        cache = KVCache(0, 0)
        cache.keys, cache.values, cache.position, cache.length = keys, values, position, columns.shape[1]
        return self.model(input_ids=token[:, None], position_ids=position[:, None], attention_mask=mask,
                          past_key_values=cache, use_cache=True).logits[:, -1]


# model -> (where its weights lay, its step or None). Not an attribute of the model, so that copying and saving it stay plain.
RECORDED = weakref.WeakKeyDictionary()


def recorded_step(model, inputs):
    """Step(model) recorded by torch.jit.trace, so that no Python runs in it: on a CPU that halves a small model's time a
    token. Recorded once a model; it goes with weights that change in place, and with inputs of any size.

    A step in which Python decides something by a tensor's values would be recorded as it fell this once; jit warns of
    that, and such a model runs as it is. What torch and transformers' attention function ask is about sizes, which are
    recorded rightly.
    """
    weights = [p.data_ptr() for p in model.parameters()]
    if RECORDED.get(model, (None, None))[0] != weights:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for sizes_only in (r"torch\.(?!jit)", r"transformers\.integrations\.sdpa_attention"):
                warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=sizes_only)
            logging.disable(logging.WARNING)        # jit looks at every property of the model, and some of those remark on it
            try:
                step = torch.jit.trace(Step(model), inputs, check_trace=False)
            except Exception:           # whatever a model does that jit can't record
                step = None
            finally:
                logging.disable(logging.NOTSET)
        if any(issubclass(warning.category, torch.jit.TracerWarning) for warning in caught):
            step = None
        RECORDED[model] = weights, step
    return RECORDED[model][1] or Step(model)


def one_each(value, things, name: str) -> list:
    """One value for all things, or a sequence of one for each, as a list."""
    values = [value] * len(things) if np.ndim(value) == 0 else list(value)
    if len(values) != len(things):
        raise ValueError(f"{len(values)} {name} for {len(things)} sequences")
    return values


def sample_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float,
                  generator: torch.Generator | None = None) -> Tensor:
    """One token a row: logits (B, V) -> (B,). Temperature, then top-k, then top-p, as transformers orders them.

        probabilities [0.5, 0.3, 0.2], top_p 0.7  ->  0 and 1 stay (0.5 alone is below 0.7), drawn 5 : 3
    """
    if temperature == 0:
        return logits.argmax(-1)
    values, tokens = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), sorted=True)     # (B, k), best first
    probabilities = (values / temperature).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities       # what better tokens hold; the best one always stays
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    probabilities[:, 0] = probabilities[:, 0].clamp(min=1e-30)      # top_p = 0 keeps the best token alone
    return tokens.gather(-1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


def pad(rows: Sequence[Sequence[int]], value: int = 0) -> list[list[int]]:
    """Rows made equally long on the right. What is put there is never looked at, so any token id will do."""
    longest = max(map(len, rows))
    return [[*row, *[value] * (longest - len(row))] for row in rows]


def attention_mask(model, allowed: Tensor, query_position: Tensor, key_position: Tensor):
    """What `model` takes as attention_mask to let queries see the keys they are allowed to.

    allowed: (B or 1, queries, keys) bool. positions: (B or 1, queries) and (B or 1, keys).
    A model with sliding-window layers gets the window by position, not by column, since columns may hold branches;
    one that mixes them with full layers gets a dictionary of both masks. Masks are floats, added to the scores: what
    eager attention wants, and sdpa would turn a bool mask into, once a layer.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    masks = {"full_attention": allowed[:, None]}                                    # (B, 1, queries, keys)
    if "sliding_attention" in kinds:
        near = query_position[:, :, None] - key_position[:, None] < window
        masks["sliding_attention"] = (allowed & near)[:, None]
    dtype = next(model.parameters()).dtype
    hide = torch.finfo(dtype).min / 2           # halved: autocast may turn it into bf16, whose smallest number is nearer to 0
    masks = {kind: torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, hide) for kind, mask in masks.items()}
    return masks if len(kinds) > 1 else masks[kinds.pop()]


# --------------------------------------------------------------------------------------------------------- scoring

PROMPT, SHARED, CHOSEN, REJECTED = range(4)     # what a scored token belongs to: x, A, B C, B' C


def pair_logps(model, pairs: Sequence[Pair], average: bool = False, share_prefix: bool = True,
               skip_shared: bool = False, nll_on: str = "response") -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of both responses of each pair, (B,) each in at least fp32: chosen_logps, rejected_logps, chosen_nll.

    average: mean over the response's tokens (ORPO) instead of their sum (DPO).
    share_prefix: read x and A once a pair, [x A | B C | B' C] in one row, instead of [x A B C] and [x A B' C]. Same
    numbers, as little as half the work. The first call on a model probes whether that is exact for it; where it is not, the
    pairs are concatenated all the same and one line says so.
    skip_shared: score B C and B' C only; their difference, and so DPO's loss and gradient, is the same without A.
    nll_on: "response" for the mean negative log-likelihood of the chosen response, "prompt" for prompt and response.
    Raises ValueError on an empty prompt, which leaves the first token nothing to be predicted from.
    """
    if nll_on not in ("response", "prompt"):
        raise ValueError(f"nll_on must be 'response' or 'prompt', not {nll_on!r}")
    if not all(len(pair.prompt) for pair in pairs):
        raise ValueError("a pair needs a prompt of at least one token")
    share_exact, split_head = probe(model)
    kinds = [PROMPT] * (nll_on == "prompt") + [SHARED] * (not skip_shared) + [CHOSEN, REJECTED]
    return _score(model, pairs, average, kinds, share_prefix and share_exact, split_head)


def _score(model, pairs, average, kinds, share_prefix, split_head):
    """pair_logps once it is known how; kinds: which tokens to score; split_head: hidden states first, then the head."""
    layout = shared_layout if share_prefix else concatenated_layout
    rows, scored = [], []               # rows: (tokens, positions, branches); scored: (row, column, label, pair, kind)
    for i, pair in enumerate(pairs):
        new_rows, new_scored = layout(pair)
        scored += [(len(rows) + row, column, label, i, kind) for row, column, label, kind in new_scored if kind in kinds]
        rows += new_rows
    device = next(model.parameters()).device
    ids, positions = (torch.tensor(pad([row[i] for row in rows]), device=device) for i in (0, 1))       # (rows, T)
    mask = None                         # right padding behind a causal model: nothing to hide
    if share_prefix:                    # a branch sees the prefix (branch 0) and itself; padding (-1) sees padding
        branches = torch.tensor(pad([row[2] for row in rows], -1), device=device)
        allowed = (branches[:, None] == 0) | (branches[:, None] == branches[:, :, None])
        mask = attention_mask(model, allowed & (positions[:, None] <= positions[:, :, None]), positions, positions)
    row, column, label, pair, kind = torch.tensor(scored, dtype=torch.long, device=device).view(-1, 5).T    # (N,) each
    forward = model.base_model if split_head else model
    output = forward(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    if split_head:
        logps = head_logps(model.get_output_embeddings(), output.last_hidden_state[row, column], label)
    else:
        logps = token_logps(output.logits[row, column], label)                                      # (N,)
    place = pair * 4 + kind
    sums, counts = (logps.new_zeros(len(pairs) * 4).index_add(0, place, values).view(-1, 4)
                    for values in (logps, torch.ones_like(logps)))                                  # (B, kinds) each
    both = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 1], [1, 1, 1, 0]], device=device)      # A counts for y+ and for y-
    totals, lengths = ((x[:, None] * both).sum(-1) for x in (sums, counts))     # (B, 3); autocast would take sums @ both.T in bf16
    means = totals / lengths.clamp(min=1)
    chosen_logps, rejected_logps = (means if average else totals)[:, :2].unbind(1)
    return chosen_logps, rejected_logps, -means[:, 2]


def shared_layout(pair: Pair):
    """One row [x A | B C | B' C]: the branches start at the same position id, and the mask keeps them apart.

    Returns ([(tokens, positions, branches)], [(row, column, label, kind)]). The last token of x A predicts the first
    of both branches; the last token of a branch predicts nothing, so it is left out.

        x = [1], A = [2], B C = [3, 4], B' C = [5, 4]  ->  tokens 1 2 3 5, positions 0 1 2 2, branches 0 0 1 2
    """
    prefix = [*pair.prompt, *pair.chosen[:pair.start]]
    p, x = len(prefix), len(pair.prompt)
    tokens, positions, branches = list(prefix), list(range(p)), [0] * p
    scored = [(0, t - 1, prefix[t], PROMPT if t < x else SHARED) for t in range(1, p)]
    for kind, branch in ((CHOSEN, pair.chosen[pair.start:]), (REJECTED, pair.rejected[pair.start:])):
        columns = [p - 1, *range(len(tokens), len(tokens) + len(branch) - 1)]
        scored += [(0, column, label, kind) for column, label in zip(columns, branch)]
        tokens += branch[:-1]
        positions += range(p, p + len(branch) - 1)
        branches += [kind] * (len(branch) - 1)
    return [(tokens, positions, branches)], scored


def concatenated_layout(pair: Pair):
    """Two rows, [x A B C] and [x A B' C], for models that can't share; A is scored in the first. As shared_layout."""
    x, p = len(pair.prompt), len(pair.prompt) + pair.start
    rows, scored = [], []
    for row, (kind, response) in enumerate([(CHOSEN, pair.chosen), (REJECTED, pair.rejected)]):
        tokens = [*pair.prompt, *response]
        rows.append((tokens[:-1], list(range(len(tokens) - 1)), [0] * (len(tokens) - 1)))
        scored += [(row, t - 1, tokens[t], PROMPT if t < x else SHARED if t < p else kind)
                   for t in range(1 if row == 0 else p, len(tokens))]
    return rows, scored


def head_logps(head, hidden: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label from hidden states: (N, D), (N,) -> (N,), in at least fp32.

    In chunks, each recomputed in backward, because the logits of a whole batch (N x V) are the memory peak of training.
    """
    def chunk_logps(hidden, labels):
        return token_logps(head(hidden), labels)

    size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    if len(labels) <= size:
        return chunk_logps(hidden, labels)
    return torch.cat([checkpoint(chunk_logps, h, y, use_reentrant=False)
                      for h, y in zip(hidden.split(size), labels.split(size))])


# ------------------------------------------------------------------- what a model can do, found out once, not by name

@contextlib.contextmanager
def eval_mode(model):
    """No dropout inside; every module's own mode put back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def trial(model):
    """For trying a model out: eval mode, no gradient, full precision, and a window small enough for a short trial to cross."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    try:
        if window:
            config.sliding_window = 4
        with eval_mode(model), torch.no_grad(), torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield np.random.default_rng(0).integers(0, config.vocab_size, 40).tolist()
    finally:
        if window:
            config.sliding_window = window


def check_generation(model) -> bool:
    """Does decoding with KVCache give what the model gives without a cache? Tried on first use, kept on the model.

    Returns whether the decode step may be recorded (see recorded_step). Raises ValueError for a model whose attention
    can't work with this cache, or has none (Mamba).
    """
    def greedy(logits):
        steps.append(logits)
        return logits.argmax(-1)

    if not hasattr(model, "_sapo_generates"):
        first = next(model.parameters())
        tolerance = 1e-3 if first.dtype in (torch.float32, torch.float64) else 0.1
        on_cpu = first.device.type == "cpu"         # where Python is what is slow; a GPU wants CUDA graphs
        with trial(model) as token:
            prefixes = [token[:9], token[9:23]]
            for record in (True, False) if on_cpu else (False,):
                steps = []
                try:
                    answers = _generate(model, prefixes, [3, 6], [False, False], [], 1, greedy, record)
                    for i, (prefix, answer) in enumerate(zip(prefixes, answers)):
                        expected = model(torch.tensor([prefix + answer[:-1]], device=model.device)).logits[0, len(prefix) - 1:].float()
                        found = torch.stack([logits[-i] for logits in steps[:len(answer)]])     # the longer one is last, then alone
                        if not (found - expected).abs().mean() <= tolerance * expected.std():
                            raise ValueError("its logits differ from those it gives without a cache")
                    break
                except Exception as error:      # whatever a model raises at a cache it does not know
                    reason = error
            else:
                raise ValueError(f"{type(model).__name__} can't generate with KVCache: {reason}") from reason
        model._sapo_generates = record
    return model._sapo_generates


def probe(model) -> tuple[bool, bool]:
    """Which shortcuts of scoring are exact for this model: (shared prefix, head applied apart). Kept on the model.

    Two small pairs are scored the plain way, whole sequences through the model's own logits, and with the shortcuts, and
    the numbers compared. Some models ignore a 4-D mask or position ids, some scale or cap their logits.
    """
    if not hasattr(model, "_sapo_exact"):
        with trial(model) as token:
            pairs = [Pair(token[:9], token[9:25], token[9:13] + token[25:35], 4), Pair(token[:5], token[5:9], token[35:40], 0)]
            expected = torch.stack(_score(model, pairs, False, range(4), False, False))
            tolerance = 1e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 2e-2
            for share_prefix, split_head in ((True, True), (True, False), (False, True), (False, False)):
                try:
                    found = torch.stack(_score(model, pairs, False, range(4), share_prefix, split_head))
                except Exception:               # whatever a model raises at input it does not know, it can't share
                    continue
                if torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
                    break
        if not share_prefix:
            print(f"{type(model).__name__}: sharing the prefix of a pair is not exact for this model; pairs are concatenated")
        model._sapo_exact = (share_prefix, split_head)
    return model._sapo_exact
