"""The method of SAPO (Self-Augmented Preference Optimization, arXiv 2405.20830).

x is the prompt, y+ = A B C the chosen response and y- = A B' C the rejected one. All are token ids;
nothing is decoded and tokenized again. `model` is any causal LM of transformers.
(For other models see the section "talking to models".)

First reading, to the double line, a third into this file:

                        line of Algorithm 1 (see the header of train.py)
    Example, Pair       -               x and y+; x, y+ and y-
    choose_segment      8               where B lies in y+
    splice              10              A B' C
    make_pairs          7 to 10         from a batch of examples to pairs
    generate_segments   9               the EMA model writes B' after x and A
    pair_logps          15              log-probabilities of y+ and y-, for the losses

Functions under "checking arguments" refuse bad ones and bring the others into one form; skip them.
Second reading: how a KV cache is written (prefill, decode), how pairs are scored with less work
(fast_pair_logps), and how to find out what a model can do (find_shortcuts, check_generation).

Needs losses.py, torch >= 2.9, numpy >= 1.26; models of transformers >= 5.0.
MIT licence; from the reference code for SAPO (arXiv 2405.20830).
"""
import contextlib
import copy
import inspect
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    from .losses import sequence_logps, token_logps  # as part of a package
except ImportError:
    from losses import sequence_logps, token_logps


class Example(NamedTuple):
    """A prompt and its chosen response as token ids, with its end token unless it was cut short.

    example_id: its place in the data.
    """
    prompt: list[int]
    chosen: list[int]
    example_id: int = -1


class Pair(NamedTuple):
    """A preference pair as token ids, without padding.

        chosen    y+ = A | B  | C       cut at start and stop
        rejected  y- = A | B' | C       cut at start and rejected_stop; C may be missing here

    start: the length of A, which both responses begin with (0 is allowed: then A is empty).
    stop, rejected_stop: where B and B' end, for reports alone; None: at the end of the response.
    example_id: its place in the data. step: the optimizer step that made the pair.
    """
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    start: int
    stop: int | None = None
    rejected_stop: int | None = None
    example_id: int = -1
    step: int = 0


# ------------------------------------------------------------------------------ segments and pairs

def choose_segment(response_len: int, segment_len: int,
                   rng: np.random.Generator) -> tuple[int, int]:
    """Where B starts and stops in a response (Eq. 4); every start where B fits is equally likely.

    A response shorter than segment_len is all B. Raises ValueError when either length is below 1.

        response_len 5, segment_len 3  ->  (0, 3), (1, 4) or (2, 5), a third each
        response_len 2, segment_len 3  ->  (0, 2)
    """
    if response_len < 1 or segment_len < 1:
        raise ValueError("response_len and segment_len must be at least 1, "
                         f"not {response_len} and {segment_len}")
    n = min(segment_len, response_len)
    start = int(rng.integers(0, response_len - n + 1))
    return start, start + n


def splice(response: Sequence[int], start: int, stop: int, segment: Sequence[int],
           eos_token_id: int | Sequence[int] | None) -> list[int]:
    """y- = A B' C (Eq. 5): put `segment` (B') in the place of response[start:stop] (B).

    Where B' contains an end token, the response ends there and C is dropped.

        response [1, 2, 3, 4, 5], start 1, stop 3, segment [8, 9], end 0  ->  [1, 8, 9, 4, 5]
        the same with segment [8, 0]                                      ->  [1, 8, 0]
    """
    eos_ids, response = eos_ids_of(eos_token_id), as_ids(response, "response")
    segment = as_ids(segment, "segment")
    for i, token in enumerate(segment):
        if token in eos_ids:
            return [*response[:start], *segment[:i + 1]]
    return [*response[:start], *segment, *response[stop:]]


def make_pairs(model, examples: Sequence[Example], segment_len: int,
               rng: np.random.Generator | Sequence[np.random.Generator], *,
               eos_token_id: int | Sequence[int] | None, num_rejected: int = 1,
               tail: str = "keep", segment_eos: str = "stop",
               max_new_tokens: int | Sequence[int] = 256, **sampling) -> list[Pair]:
    """Algorithm 1 lines 7 to 10: `model`, the EMA model, rewrites a segment of each response.

    For one example (x, y), without the variants below:

        start, stop = choose_segment(len(y), segment_len, rng)                      # line 8
        [[b]] = generate_segments(model, [x + y[:start]], stop - start, ...)        # line 9
        rejected = splice(y, start, stop, b, eos_token_id)                          # line 10
        pair = Pair(x, y, rejected, start, stop, rejected_stop=start + len(b))

        y [1, 2, 3, 4, 5], segment_len 2, start 1, b [8, 9]
        ->  chosen [1, 2, 3, 4, 5], rejected [1, 8, 9, 4, 5], start 1, stop 3, rejected_stop 3

    examples: (prompt, chosen[, example_id]) tuples of token ids.
    segment_len: B has this many tokens (N_seg), or all of a shorter y+; B' has at most as many.
    rng: draws where the segments lie (one generator, or one per example).
    sampling: passed on to generate_segments (temperature, top_k, top_p, generator, decode_step).
    Returns a list of Pair in the order of the examples. Where B reaches the end of y+, y- lacks an
    end token unless B' has one. Raises ValueError on an empty response, and where generate_segments
    does.

    Variants, which the paper's SAPO does not use:
    num_rejected: rewrites per example, all of the same segment.
    segment_len 0, tail, max_new_tokens (one, or one per example): see plan_segment.
    segment_eos: "stop" ends y- at an end token in B'; "forbid" bans end tokens in B' where y+ goes
    on after B.
    """
    if segment_eos not in ("stop", "forbid"):
        raise ValueError(f"segment_eos must be 'stop' or 'forbid', not {segment_eos!r}")
    examples = [checked_example(example) for example in examples]
    rngs = one_each(rng, examples, "rng")
    max_lens = one_each(max_new_tokens, examples, "max_new_tokens")

    plans, prefixes, forbid_eos = [], [], []            # one entry per example
    for (prompt, chosen, _), example_rng, max_len in zip(examples, rngs, max_lens, strict=True):
        # plan_segment calls choose_segment. In SAPO limit = stop - start and end = len(chosen).
        plan = plan_segment(len(chosen), segment_len, example_rng, tail, max_len)           # line 8
        plans.append(plan)
        prefixes.append([*prompt, *chosen[:plan.start]])                                    # x A
        forbid_eos.append(segment_eos == "forbid" and plan.stop < len(chosen))
    segments = generate_segments(                                                           # line 9
        model, prefixes, [plan.limit for plan in plans], eos_token_id=eos_token_id,
        num_return=num_rejected, forbid_eos=forbid_eos, **sampling)
    pairs = []
    for (prompt, chosen, example_id), plan, rewrites in zip(examples, plans, segments, strict=True):
        start, stop = plan.start, plan.stop
        for segment in rewrites:
            rejected = splice(chosen[:plan.end], start, stop, segment, eos_token_id)       # line 10
            pairs.append(Pair(prompt, chosen, rejected, start, stop,
                              rejected_stop=start + len(segment), example_id=example_id))
    return pairs


@torch.no_grad()
def generate_segments(model, prefixes: Sequence[Sequence[int]],
                      max_new_tokens: int | Sequence[int], *,
                      eos_token_id: int | Sequence[int] | None, temperature: float = 0.7,
                      top_k: int = 50, top_p: float = 0.95, num_return: int = 1,
                      generator: torch.Generator | None = None,
                      forbid_eos: bool | Sequence[bool] = False,
                      decode_step: Callable | None = None) -> list[list[list[int]]]:
    """Continue each prefix (Algorithm 1 line 9); samples as model.generate(do_sample=True) does.

    `prefill` reads each prefix but its last token into a KV cache, which has a slot (row) per
    prefix. `decode` then goes round by round: in a round the model reads the last token of each
    slot, and the next token is drawn. A slot is done at an end token, or at its limit.

    prefixes: token ids, of any lengths but not empty. max_new_tokens: one, or one per prefix.
    eos_token_id: an id, several, or None.
    temperature 0 is greedy, as model.generate(do_sample=False). Otherwise temperature, then top_k
    (0: all), then top_p, in that order. generator: draws the tokens.
    Returns num_return token lists for each prefix; an end token is kept, as the last one.

    Variants, and speed:
    num_return: continuations per prefix; the model reads the prefix once for all of them.
    forbid_eos: one bool, or one per prefix: no end token is produced there.
    decode_step: a faster replacement for plain_decode_step(model), which is the default.

    During the call, a model in training mode is in eval mode (no dropout). Raises ValueError for
    bad arguments (an empty prefix, what is no token id, lists of unequal length) and for a model
    that is wrapped or not causal; FloatingPointError where logits are not finite. Whether a model
    can work with this cache at all is not tried here: run check_generation once.
    """
    refuse_model(model, "generate_segments", "pass the model inside the wrapper")
    refuse_sampling(num_return, temperature, top_k, top_p)
    prefixes, limits, forbid = checked_prefixes(prefixes, max_new_tokens, forbid_eos)
    eos_ids = eos_ids_of(eos_token_id)
    if not prefixes or max(limits) == 0:
        return [[[] for _ in range(num_return)] for _ in prefixes]

    def draw(logits: Tensor) -> Tensor:
        return sample_tokens(logits, temperature, top_k, top_p, generator)

    with eval_mode(model):
        cache = prefill(model, prefixes, max(limits))
        if num_return > 1:          # copies of each slot; for 2: 0, 0, 1, 1, ...
            slots = [i for i in range(len(prefixes)) for _ in range(num_return)]
            cache.select_slots(slots)
            prefixes, limits, forbid = ([values[i] for i in slots]
                                        for values in (prefixes, limits, forbid))
        outputs = decode(model, decode_step or plain_decode_step(model), cache, prefixes,
                         limits=limits, forbid_eos=forbid, eos_ids=eos_ids, choose=draw)
    return [outputs[i:i + num_return] for i in range(0, len(outputs), num_return)]


# ------------------------------------------------------------- log-probabilities of both responses

class PairLogps(NamedTuple):
    """What the losses need of a batch of pairs: (pairs,) each, in at least fp32.

        chosen_logps        the sum over the tokens of y+ (DPO), or with average their mean (ORPO)
        rejected_logps      the same of y-
        chosen_nll          minus the mean over y+: ORPO's supervised term

    skip_shared, for DPO alone: all three leave A out. A cancels in the difference of two sums, so
    the loss, its gradient and the margin of the rewards stay as they are.
    nll_on="prompt": chosen_nll is over x and y+, A included in any case.
    """
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_nll: Tensor


def pair_logps(model, pairs: Sequence[Pair], average: bool = False,
               shortcuts: "Shortcuts | None" = None, skip_shared: bool = False,
               nll_on: str = "response") -> PairLogps:
    """Log-probabilities of both responses of each pair: (chosen_logps, rejected_logps, chosen_nll).

    average, skip_shared, nll_on ("response" or "prompt"): see PairLogps.
    shortcuts: what find_shortcuts(model) found (second reading); None is plain, and right for every
    causal LM.
    Raises ValueError for an empty list, an empty prompt, values that are not token ids, a pair
    whose responses differ before `start`, and a model that is wrapped or not causal.
    """
    refuse_model(model, "pair_logps", "wrap PairScorer(model) instead, and call that")
    if nll_on not in ("response", "prompt"):
        raise ValueError(f"nll_on must be 'response' or 'prompt', not {nll_on!r}")
    pairs = [checked_pair(pair) for pair in pairs]
    if not pairs:
        raise ValueError("there are no pairs to score")
    if shortcuts is None or not any(shortcuts):
        return plain_pair_logps(model, pairs, average, skip_shared, nll_on)
    return fast_pair_logps(model, pairs, average, skip_shared, nll_on, shortcuts)


def plain_pair_logps(model, pairs: Sequence[Pair], average: bool, skip_shared: bool,
                     nll_on: str) -> PairLogps:
    """The definition: run [x y+] and [x y-] through the model and add up log-probabilities."""
    x_chosen = [[*pair.prompt, *pair.chosen] for pair in pairs]
    x_rejected = [[*pair.prompt, *pair.rejected] for pair in pairs]
    # The first column that counts: of y+ and y-, or with skip_shared of B and B'.
    score_from = [len(pair.prompt) + (pair.start if skip_shared else 0) for pair in pairs]
    # In chosen_nll the same, or with "prompt" from the start of x.
    nll_from = score_from if nll_on == "response" else [0] * len(pairs)
    chosen_logits, rejected_logits = plain_logits(model, x_chosen), plain_logits(model, x_rejected)
    device = chosen_logits.device
    return PairLogps(
        sequence_logps(chosen_logits, labels_from(x_chosen, score_from, device), average),
        sequence_logps(rejected_logits, labels_from(x_rejected, score_from, device), average),
        -sequence_logps(chosen_logits, labels_from(x_chosen, nll_from, device), average=True))


def plain_logits(model, sequences: list[list[int]]) -> Tensor:
    """The model's logits for sequences, padded on the right: (sequences, T, V)."""
    device = next(model.parameters()).device
    mask = pad([[1] * len(sequence) for sequence in sequences])         # 0 on padding
    return model(input_ids=torch.tensor(pad(sequences), device=device),
                 attention_mask=torch.tensor(mask, device=device), use_cache=False).logits


def labels_from(sequences: list[list[int]], score_from: list[int], device: torch.device) -> Tensor:
    """Labels of the tokens from column score_from[i] of each sequence on: (sequences, T).

    -100 stands for the tokens before, and for the padding: sequence_logps ignores it.
    """
    labels = [[-100] * column + sequence[column:]
              for sequence, column in zip(sequences, score_from, strict=True)]
    return torch.tensor(pad(labels, -100), device=device)


def pad(sequences: Sequence[Sequence[int]], value: int = 0) -> list[list[int]]:
    """Sequences made equally long on the right."""
    longest = max(map(len, sequences))
    return [[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences]


# =================================================================================================
# The first reading ends here. What follows: other segments than SAPO's, how segments are generated,
# how pairs are scored with less work for the same numbers, and how to find out what a model can do.
# Shapes: T is a padded length, D the hidden size, V the vocabulary, N a number of tokens. A slot is
# a row of the cache.
# =================================================================================================

# --------------------------------------------------------------------- other segments than SAPO's

class SegmentPlan(NamedTuple):
    """B is response[start:stop], C is response[stop:end]; B' has at most `limit` tokens."""
    start: int
    stop: int
    limit: int
    end: int


def plan_segment(response_len: int, segment_len: int, rng: np.random.Generator, tail: str = "keep",
                 max_new_tokens: int = 256) -> SegmentPlan:
    """choose_segment and its variants. n: segment_len, or all of a shorter y+. m: max_new_tokens.

                            B                            B' has at most             y-
        SAPO                n tokens, anywhere in y+     n tokens                   A B' C
        tail "drop"         the same                     n                          A B', C is empty
        tail "rewrite"      all of y+ behind A           m - len(A), at least n     A B'
        segment_len 0       all of y+                    m                          B'

    Raises ValueError for another tail.
    """
    if tail not in ("keep", "drop", "rewrite"):
        raise ValueError(f"tail must be 'keep', 'drop' or 'rewrite', not {tail!r}")
    start, stop = choose_segment(response_len, segment_len or response_len, rng)
    limit = stop - start if segment_len else max_new_tokens
    if tail == "rewrite":
        stop, limit = response_len, max(limit, max_new_tokens - start)
    return SegmentPlan(start, stop, limit, end=stop if tail == "drop" else response_len)


# ---------------------------------------------------------------------- generation with a KV cache

class KVCache:
    """Keys and values of every layer, allocated once and written in place.

    A slot is a row of the cache, one per sequence. A token's column is its position, so sequences
    of different lengths need no left padding. Columns beyond a slot's own position hold leftovers;
    the mask hides them.
    """

    def __init__(self, slots: int, columns: int):
        self.slots, self.columns = slots, columns
        self.keys: dict[int, Tensor] = {}       # of each layer: (slots, heads, columns, size)
        self.values: dict[int, Tensor] = {}

    def select_slots(self, slots: Sequence[int]) -> None:
        """Keep these slots, in this order. A slot that is named twice is there twice."""
        for stored in (self.keys, self.values):
            for layer, tensor in stored.items():
                stored[layer] = tensor[torch.tensor(slots, device=tensor.device)]
        self.slots = len(slots)


class CacheWriter:
    """What a transformers model takes for its cache during one forward pass.

    Each layer calls `update` with new keys and values and attends to what `update` returns. The two
    subclasses say, in `write`, where new tensors go and what is returned.
    """
    is_compileable, is_initialized = False, True        # some models of transformers 5.0 ask

    def __init__(self, cache: KVCache):
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs):
        """(slots, heads, new tokens, size) each."""
        return (self.write(self.cache.keys, layer_idx, keys),
                self.write(self.cache.values, layer_idx, values))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Part of the interface. Models that are given position ids do not need the answer."""
        return 0


class PrefixWriter(CacheWriter):
    """For a forward pass over whole prefixes, which attend to themselves alone."""

    def __init__(self, cache: KVCache, slots: Sequence[int]):
        super().__init__(cache)
        self.slots = slots

    def write(self, stored: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        """Write into the first columns of the slots; return what was written."""
        if layer not in stored:         # zeros: empty memory may hold NaN, and 0 * NaN is NaN
            stored[layer] = new.new_zeros(
                self.cache.slots, new.shape[1], self.cache.columns, new.shape[3])
        stored[layer][self.slots, :, :new.shape[2]] = new
        return new


class TokenWriter(CacheWriter):
    """For a forward pass over one token per slot, at `position` (slots,)."""

    def __init__(self, cache: KVCache, position: Tensor, length: int):
        super().__init__(cache)
        self.position, self.length = position, length

    def write(self, stored: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        """Write each slot's token; return the first `length` columns of all slots."""
        tensor = stored[layer]
        slots = torch.arange(tensor.shape[0], device=tensor.device)
        # tensor[slot, :, position[slot]] = new[slot, :, 0] for every slot
        tensor.transpose(1, 2).index_put_((slots, self.position), new[:, :, 0])
        return tensor[:, :, :self.length]


def prefill(model, prefixes: list[list[int]], max_new_tokens: int) -> KVCache:
    """Read each prefix but its last token, which the first decode step reads, into a new cache."""
    device = next(model.parameters()).device
    # The last new token is never read, so it needs no column.
    cache = KVCache(len(prefixes), max(map(len, prefixes)) + max_new_tokens - 1)
    # Prefixes of like lengths go together, for less padding. Padding is on the right and a causal
    # model looks back only, so padding changes nothing.
    by_length = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    # Prefilling needs no logits at all; one is the fewest that can be asked for.
    only_last = {"logits_to_keep": 1} if forward_takes(model, "logits_to_keep") else {}
    group_size = max(4, -(-len(prefixes) // 4))         # at most four groups
    for first in range(0, len(prefixes), group_size):
        slots = by_length[first:first + group_size]
        # For a prefix of one token, a stand-in is read; the first decode step overwrites it.
        ids = torch.tensor(pad([prefixes[i][:-1] or [0] for i in slots]), device=device)
        position = torch.arange(ids.shape[1], device=device)[None]                      # (1, T)
        causal = position[:, :, None] >= position[:, None]
        model(input_ids=ids, position_ids=position.expand(len(ids), -1), use_cache=True,
              attention_mask=mask_argument(attention_masks(model, causal, position, position)),
              **{cache_argument(model): PrefixWriter(cache, slots)}, **only_last)
    return cache


def decode(model, decode_step: Callable, cache: KVCache, prefixes: list[list[int]],
           limits: list[int], forbid_eos: list[bool], eos_ids: list[int],
           choose: Callable) -> list[list[int]]:
    """Write up to limits[i] tokens after prefixes[i], which slot i of the cache holds.

    choose: logits (slots, V) -> tokens (slots,). Returns a list of tokens per prefix. A round reads
    one token per slot and gives the next one.

        prefixes of 5 and 3 tokens  ->  round 1 reads positions 4 and 2, with 5 columns in use;
                                        round 2 reads positions 5 and 3, with 6 columns in use
    """
    device = next(model.parameters()).device
    token = torch.tensor([prefix[-1] for prefix in prefixes], device=device)            # (slots,)
    position = torch.tensor([len(prefix) - 1 for prefix in prefixes], device=device)
    # A finished slot goes on, but never past its limit: the model may have no more positions.
    last_position = position + torch.tensor(limits, device=device).clamp(min=1) - 1
    forbid = torch.tensor(forbid_eos, device=device)
    columns = torch.arange(cache.columns, device=device)[None]
    outputs: list[list[int]] = [[] for _ in prefixes]
    # Finished slots are dropped: output_index[slot] is the prefix that a slot still belongs to.
    output_index, remaining = list(range(len(prefixes))), list(limits)
    for length in range(max(map(len, prefixes)), cache.columns + 1):    # columns in use, per round
        seen = columns[:, :length]
        allowed = (seen <= position[:, None])[:, None]
        masks = attention_masks(model, allowed, position[:, None], seen)
        logits = decode_step(token, position, masks, cache).float()                     # (slots, V)
        if not torch.isfinite(logits.amax(-1)).all():
            raise FloatingPointError("the logits of the model that generates are not finite")
        if any(forbid_eos):
            logits[:, eos_ids] = logits[:, eos_ids].masked_fill(forbid[:, None], -torch.inf)
        token = choose(logits)
        position = torch.minimum(position + 1, last_position)
        for slot, new_token in enumerate(token.tolist()):
            if remaining[slot] > 0:
                outputs[output_index[slot]].append(new_token)
                remaining[slot] = 0 if new_token in eos_ids else remaining[slot] - 1
        running = [slot for slot, left in enumerate(remaining) if left > 0]
        if not running:
            break
        # A finished slot costs as much as a running one; dropping it costs a copy of the cache.
        if len(running) <= 0.75 * len(remaining):
            cache.select_slots(running)
            token, position, last_position, forbid = (
                values[running] for values in (token, position, last_position, forbid))
            output_index = [output_index[slot] for slot in running]
            remaining = [remaining[slot] for slot in running]
    return outputs


def plain_decode_step(model) -> Callable:
    """One decode step of `model`: (token, position, masks, cache) -> logits (slots, V).

    The step writes to the cache, and its logits are a tensor of their own. token: (slots,) the next
    id of each slot. position: (slots,) the id's position. masks: what attention_masks gives; their
    last dimension is the number of columns to attend to.
    """
    name = cache_argument(model)

    def decode_step(token: Tensor, position: Tensor, masks: dict[str, Tensor],
                    cache: KVCache) -> Tensor:
        length = next(iter(masks.values())).shape[-1]
        return model(input_ids=token[:, None], position_ids=position[:, None], use_cache=True,
                     attention_mask=mask_argument(masks),
                     **{name: TokenWriter(cache, position, length)}).logits[:, -1]
    return decode_step


def sample_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float,
                  generator: torch.Generator | None = None) -> Tensor:
    """One token per row: logits (rows, V) -> (rows,). Temperature, then top-k, then top-p.

        probabilities 0.5, 0.3, 0.2, top_p 0.7  ->  tokens 0 and 1 stay, because the mass before
        token 1 (0.5) is below 0.7; they are drawn 5 : 3
    """
    if temperature == 0:
        return logits.argmax(-1)
    k = min(top_k or logits.shape[-1], logits.shape[-1])
    values, tokens = logits.topk(k, sorted=True)                        # (rows, k), best first
    # The maximum goes first, so that a very low temperature gives no infinity.
    probabilities = ((values - values[:, :1]) / max(temperature, 1e-30)).softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities       # the mass of the better tokens
        probabilities = probabilities.masked_fill(before >= top_p, 0)
        probabilities[:, 0] = probabilities[:, 0].clamp(min=1e-30)  # top_p = 0 keeps the best one
    return tokens.gather(-1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


# ------------------------------------------------- scoring with a shared prefix and fewer logits

class Shortcuts(NamedTuple):
    """What fast_pair_logps may do for a model because the numbers are the same (find_shortcuts)."""
    share_prefix: bool      # read x and A once per pair
    split_head: bool        # compute logits of the scored tokens alone, from hidden states


class PairScorer(nn.Module):
    """pair_logps as the forward of a module, for DDP or FSDP to wrap.

    They synchronise gradients only for calls of the module that they wrap. A call past the wrapper
    leaves gradients unsynchronised, so pair_logps refuses a wrapped model.
    """

    def __init__(self, model: nn.Module, shortcuts: Shortcuts | None = None):
        super().__init__()
        self.model, self.shortcuts = model, shortcuts

    def forward(self, pairs: Sequence[Pair], **kwargs) -> PairLogps:
        """kwargs: average, skip_shared and nll_on of pair_logps."""
        return pair_logps(self.model, pairs, shortcuts=self.shortcuts, **kwargs)


# The same numbers with less work: one sequence per pair, in which two branches share x and A.
#
#     token       x x x A A   B B C   B' B' C
#     position    0 1 2 3 4   5 6 7   5  6  7        each branch goes on from A
#     attends to  x and A; a token of a branch also to its own branch, never to the other
#
# A token that is read belongs to a branch:     SHARED (x A), CHOSEN (B C) or REJECTED (B' C)
# a token that is scored, to a part:            PROMPT (x), SEGMENT_A (A), CHOSEN or REJECTED
PROMPT, SEGMENT_A, CHOSEN, REJECTED, SHARED = range(5)


def fast_pair_logps(model, pairs: Sequence[Pair], average: bool, skip_shared: bool, nll_on: str,
                    shortcuts: Shortcuts) -> PairLogps:
    """pair_logps with shortcuts: x and A are read once per pair, only scored tokens get logits."""
    # Which parts count for which result.
    response_a = () if skip_shared else (SEGMENT_A,)
    chosen_parts, rejected_parts = (*response_a, CHOSEN), (*response_a, REJECTED)
    nll_parts = (PROMPT, SEGMENT_A, CHOSEN) if nll_on == "prompt" else chosen_parts
    wanted = {*chosen_parts, *rejected_parts, *nll_parts}
    # One sequence with both branches per pair, or a sequence per branch.
    rows = [(CHOSEN, REJECTED)] if shortcuts.share_prefix else [(CHOSEN,), (REJECTED,)]
    sequences, scored = [], []      # scored: (row, column, label, pair, part)
    for i, pair in enumerate(pairs):
        for branches in rows:
            sequence, labels = shared_layout(pair, branches)
            # Parts that do not count are left out. So are x and A in a row without the chosen
            # branch, because the row before scored them.
            scored += [(len(sequences), column, label, i, part) for column, label, part in labels
                       if part in wanted and (part == REJECTED or CHOSEN in branches)]
            sequences.append(sequence)
    device = next(model.parameters()).device
    tokens, positions, branch_of = zip(*sequences, strict=True)
    ids, position = (torch.tensor(pad(x), dtype=torch.long, device=device)
                     for x in (tokens, positions))                                  # (rows, T)
    mask = None                         # padding is on the right: a causal model never sees it
    if shortcuts.share_prefix:          # a branch attends to x, A and itself
        branch = torch.tensor(pad(branch_of, -1), device=device)
        of_query, of_key = branch[:, :, None], branch[:, None]                      # (rows, T, T)
        allowed = (of_key == SHARED) | (of_key == of_query)
        allowed &= position[:, None] <= position[:, :, None]                        # causal
        mask = mask_argument(attention_masks(model, allowed, position, position))
    inputs = dict(input_ids=ids, position_ids=position, attention_mask=mask, use_cache=False)
    row, column, label, pair_index, token_part = torch.tensor(
        scored, dtype=torch.long, device=device).view(-1, 5).T                          # (N,) each
    if shortcuts.split_head:
        hidden = model.base_model(**inputs).last_hidden_state[row, column]              # (N, D)
        logps = head_logps(model.get_output_embeddings(), hidden, label)                # (N,)
    else:
        logps = token_logps(model(**inputs).logits[row, column], label)

    def total(values: Tensor, parts: Sequence[int]) -> Tensor:
        """Sum over the tokens of these parts of each pair: (N,) -> (pairs,)."""
        counted = torch.isin(token_part, torch.tensor(parts, device=device))
        return values.new_zeros(len(pairs)).index_add(0, pair_index, values.where(counted, 0.0))

    def mean(logps: Tensor, parts: Sequence[int]) -> Tensor:
        return total(logps, parts) / total(torch.ones_like(logps), parts).clamp(min=1)

    add_up = mean if average else total
    return PairLogps(add_up(logps, chosen_parts), add_up(logps, rejected_parts),
                     -mean(logps, nll_parts))


def shared_layout(pair: Pair, branches: Sequence[int] = (CHOSEN, REJECTED)):
    """One sequence [x A | B C | B' C]: both branches start at the same position id.

    branches: with one of them, the sequence is plainly [x A B C] or [x A B' C].
    Returns (tokens, positions, branch_of) and a list of (column, label, part), one per scored
    token. branch_of: the branch of each token, or SHARED. The last token of x A predicts the first
    one of every branch; the last token of a branch predicts nothing and is not read.

        x = [1], A = [2], B C = [3, 4], B' C = [5, 4]
        ->  tokens 1 2 3 5, positions 0 1 2 2, branch_of SHARED SHARED CHOSEN REJECTED
            labels (0, 2, SEGMENT_A), (1, 3, CHOSEN), (2, 4, CHOSEN), (1, 5, REJECTED),
                   (3, 4, REJECTED)
    """
    prefix = [*pair.prompt, *pair.chosen[:pair.start]]
    x, p = len(pair.prompt), len(prefix)
    tokens, positions, branch_of = list(prefix), list(range(p)), [SHARED] * p
    labels = [(t - 1, prefix[t], PROMPT if t < x else SEGMENT_A) for t in range(1, p)]
    for part in branches:
        branch = (pair.chosen if part == CHOSEN else pair.rejected)[pair.start:]
        if not branch:
            continue
        columns = [p - 1, *range(len(tokens), len(tokens) + len(branch) - 1)]
        labels += [(column, label, part) for column, label in zip(columns, branch, strict=True)]
        tokens += branch[:-1]
        positions += range(p, p + len(branch) - 1)
        branch_of += [part] * (len(branch) - 1)
    return (tokens, positions, branch_of), labels


LOGITS_AT_ONCE = 2 ** 25        # logits (tokens x V) per chunk of head_logps: 128 MiB in fp32


def head_logps(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label from hidden states: (N, D), (N,) -> (N,), in at least fp32.

    Works in chunks and computes them again in backward. All logits (N x V) at once would take the
    most memory of a training step.
    """
    def chunk_logps(hidden: Tensor, labels: Tensor) -> Tensor:
        return token_logps(head(hidden), labels)

    size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    if len(labels) <= size:
        return chunk_logps(hidden, labels)
    return torch.cat([checkpoint(chunk_logps, h, y, use_reentrant=False)
                      for h, y in zip(hidden.split(size), labels.split(size), strict=True)])


# ------------------------------------------------------------------------------- talking to models
#
# What `model` must offer, as every causal LM of transformers does:
# - model(input_ids=, attention_mask=, use_cache=False).logits (rows, T, V), parameters() and
#   modules();
# - to generate: position_ids= (rows, T), a 4-D attention_mask= that is added to the attention
#   scores, and cache= (or past_key_values=), on which layers call update(keys, values, layer_idx);
# - for shortcuts: base_model(...).last_hidden_state (rows, T, D), get_output_embeddings() and, to
#   find them, base_model_prefix;
# - where layers have a window: config.sliding_window and config.layer_types.

def attention_masks(model, allowed: Tensor, query_position: Tensor,
                    key_position: Tensor) -> dict[str, Tensor]:
    """Which keys each query attends to, for every kind of layer that `model` has.

    allowed: (rows or 1, queries, keys) bool. Positions: (rows or 1, queries) and (rows or 1, keys).
    A sliding window goes by position, not by column, because columns may hold branches.
    Returns (rows or 1, 1, queries, keys) floats to add to the scores: 0, or a very negative number.
    """
    config, window = text_config(model), sliding_window(model)
    kinds = (getattr(config, "layer_types", None)
             or ["sliding_attention" if window else "full_attention"])
    dtype = next(model.parameters()).dtype
    masks = {}
    for kind in dict.fromkeys(kinds):
        visible = allowed
        if kind == "sliding_attention" and window:
            distance = query_position[:, :, None] - key_position[:, None]
            visible = allowed & (distance < window)
        # finfo.min rounds to -inf where autocast makes it bf16; half of it does not.
        blocked = torch.finfo(dtype).min / 2
        mask = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, blocked)
        masks[kind] = mask[:, None]
    return masks


def mask_argument(masks: dict[str, Tensor]):
    """A model with one kind of layers takes a mask, one that mixes them takes the dictionary."""
    return masks if len(masks) > 1 else next(iter(masks.values()))


def cache_argument(model) -> str:
    """The forward argument that takes the cache: past_key_values before transformers 5.24."""
    return "cache" if forward_takes(model, "cache") else "past_key_values"


def forward_takes(model, name: str) -> bool:
    """Does the model's forward take an argument of this name? Wrappers (peft) hand it on inside."""
    return any(name in inspect.signature(module.forward).parameters
               for module in itertools.islice(model.modules(), 4))


def text_config(model):
    """The configuration of the language model, also for a model that reads images; or None."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def sliding_window(model) -> int | None:
    """The tokens that a layer with a window looks back on; None where no layer has one."""
    config = text_config(model)
    if not getattr(config, "use_sliding_window", True):     # the number beside it is a leftover
        return None
    return getattr(config, "sliding_window", None)


@contextlib.contextmanager
def eval_mode(model):
    """No dropout inside. Modules that were in training mode are put back into it after."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ------------------------------------------------------------------------------ checking arguments

def one_each(value, sequences: Sequence, name: str) -> list:
    """One value for all sequences, or one for each, as a list."""
    values = [value] * len(sequences) if np.ndim(value) == 0 else list(value)
    if len(values) != len(sequences):
        raise ValueError(f"{name} has {len(values)} values for {len(sequences)} sequences")
    return values


def eos_ids_of(eos_token_id: int | Sequence[int] | None) -> list[int]:
    """An end token, several of them, or None, as a list. Raises ValueError for what is no id."""
    if eos_token_id is None:
        return []
    return as_ids([eos_token_id] if np.ndim(eos_token_id) == 0 else eos_token_id, "eos_token_id")


def as_ids(ids: Sequence[int], name: str) -> list[int]:
    """Token ids as Python integers. Raises ValueError for text, fractions, nested lists and
    negative numbers (-100 would go unscored)."""
    try:
        checked = [operator.index(token) for token in ids]
    except TypeError:
        checked = [-1]
    if min(checked, default=0) < 0:
        raise ValueError(f"{name} must hold token ids, not {str(ids)[:40]!r}")
    return checked


def checked_prefixes(prefixes, max_new_tokens, forbid_eos) -> tuple[list, list, list]:
    """The arguments of generate_segments that go by prefix, as lists with one entry per prefix."""
    prefixes = [as_ids(prefix, "a prefix") for prefix in prefixes]
    limits = one_each(max_new_tokens, prefixes, "max_new_tokens")
    if not all(prefixes):
        raise ValueError("a prefix needs at least one token")
    if min(limits, default=0) < 0:
        raise ValueError(f"max_new_tokens must not be negative, but is {min(limits)}")
    return prefixes, limits, one_each(forbid_eos, prefixes, "forbid_eos")


def refuse_sampling(num_return: int, temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError for numbers that nothing can be sampled with."""
    if num_return < 1 or not temperature >= 0:                          # NaN is not >= 0
        raise ValueError("num_return must be at least 1 and temperature at least 0, "
                         f"not {num_return} and {temperature}")
    if top_k < 0 or not 0 <= top_p <= 1:
        raise ValueError(f"top_k must be at least 0 and top_p between 0 and 1, not {top_k} and "
                         f"{top_p}")


def checked_example(example: Sequence) -> Example:
    """(prompt, chosen[, example_id]) as an Example, with Python integers for ids."""
    prompt, chosen, example_id = Example(*example)
    return Example(as_ids(prompt, "prompt"), as_ids(chosen, "chosen"), example_id)


def checked_pair(pair: Pair) -> Pair:
    """The pair with Python integers for ids. Raises ValueError where it can't be scored."""
    prompt, chosen, rejected = (as_ids(getattr(pair, name), f"{name} of a pair")
                                for name in ("prompt", "chosen", "rejected"))
    if not prompt:
        raise ValueError("the prompt of a pair is empty: nothing predicts the first token")
    if not 0 <= pair.start <= min(len(chosen), len(rejected)):
        raise ValueError(f"start {pair.start} of a pair lies outside its responses")
    if chosen[:pair.start] != rejected[:pair.start]:
        raise ValueError(f"chosen and rejected of a pair differ before start {pair.start}")
    return pair._replace(prompt=prompt, chosen=chosen, rejected=rejected)


def refuse_model(model, function: str, advice: str) -> None:
    """Raise ValueError for a wrapper (DDP, FSDP, DataParallel) and for what is no causal LM."""
    if hasattr(model, "module"):
        raise ValueError(f"{function} takes a model, not {type(model).__name__}: {advice}")
    config = getattr(model, "config", None)
    is_masked_lm = type(model).__name__.endswith("ForMaskedLM")
    is_encoder = getattr(config, "is_decoder", True) is False and not any(
        getattr(module, "is_causal", False) for module in model.modules())
    if getattr(config, "is_encoder_decoder", False) or is_masked_lm or is_encoder:
        raise ValueError(f"{function} takes a causal language model, "
                         f"which {type(model).__name__} is not")


# --------------------------------------------------- read last: what a model can do, found by trial

def find_shortcuts(model) -> Shortcuts:
    """Which shortcuts of pair_logps give the plain numbers for this model as it is now.

    Tries each shortcut on two random pairs and compares with the plain result: some models ignore
    a 4-D mask or position ids, others scale or cap the logits behind their head. If rounding errors
    are as large as the effect of a wrong context, the trial can't tell; then the shortcut is not
    used. Nothing is remembered: ask again after a change to the model (adapters, dtype, attention,
    hooks).
    """
    refuse_model(model, "find_shortcuts", "pass the model inside the wrapper")
    if (getattr(text_config(model), "max_position_embeddings", None) or 64) < 64:
        return Shortcuts(False, False)          # too few positions for the trial
    with trial(model) as (tokens, low_precision):
        # A long pair with A, B C and B' C of 4, 12 and 10 tokens, and a short one without A.
        prompt, a, bc, new_bc = tokens[:-31], tokens[-31:-27], tokens[-27:-15], tokens[-15:-5]
        pairs = [Pair(prompt, a + bc, a + new_bc, len(a)),
                 Pair(tokens[:5], tokens[5:9], tokens[-5:], 0)]

        def score(score_pairs: Callable, pairs: list[Pair], *shortcuts) -> Tensor:  # (3, pairs)
            return torch.stack(score_pairs(model, pairs, False, False, "prompt", *shortcuts))

        expected = score(plain_pair_logps, pairs)
        # The yardstick: what a wrong context, y+ in front of both responses, does to the numbers.
        # The error of a shortcut must be far smaller.
        mixed = [Pair([*p.prompt, *p.chosen], p.chosen, p.rejected, p.start) for p in pairs]
        effect = (score(plain_pair_logps, mixed) - expected).norm()
        tolerance = 0.05 if low_precision else 0.002
        head = head_can_be_split(model, tokens, 2e-2 if low_precision else 1e-4)
        best_first = [Shortcuts(True, head), Shortcuts(True, False), Shortcuts(False, head)]
        for shortcuts in dict.fromkeys(best_first):
            try:
                error = (score(fast_pair_logps, pairs, shortcuts) - expected).norm()
            except torch.OutOfMemoryError:
                raise
            except Exception:           # whatever a model raises at input that it does not know
                continue
            if error <= tolerance * effect:
                return shortcuts
    return Shortcuts(False, False)


def head_can_be_split(model, tokens: list[int], tolerance: float) -> bool:
    """Is logits = head(hidden states), with no scaling or cap after the head?

    Tried with hidden states scaled until the logits reach 1, 30 and 1000: a soft cap does not show
    on small ones. A shallow copy of the model, whose body is replaced by one that returns these
    states, gives its logits for them; the model itself stays as it is.
    """
    class StandIn(nn.Module):
        def forward(self, *args, **kwargs):
            return output

        def __getattr__(self, name):        # some models call a part of it, such as .decoder
            return self

    try:
        head, device = model.get_output_embeddings(), next(model.parameters()).device
        inputs = dict(input_ids=torch.tensor([tokens[:8]], device=device), use_cache=False)
        output = model.base_model(**inputs)
        hidden = output.last_hidden_state                                               # (1, T, D)
        outer = copy.copy(model)
        outer._modules = {**model._modules, model.base_model_prefix: StandIn()}
        for size in (1, 30, 1000):
            output.last_hidden_state = hidden * (size / head(hidden).abs().max())
            error = outer(**inputs).logits.float() - head(output.last_hidden_state).float()
            if not error.abs().max() <= tolerance * size:
                return False
        return True
    except torch.OutOfMemoryError:
        raise
    except Exception:                   # a model that has no such parts
        return False


def check_generation(model, decode_step: Callable | None = None) -> None:
    """Raise ValueError where decoding with KVCache is not what the model gives without a cache.

    The model decodes given answers, and their logits are compared. The logits differ for models
    that are not causal, keep another kind of cache (Mamba), or have a window by column.
    decode_step: the step to try; None tries the plain one.

    The answers are short, so a model whose rotary embedding changes beyond some length is not
    refused (rope_type "longrope", as in Phi 3.5, and "dynamic"). Keep its sequences within
    original_max_position_embeddings ("dynamic": max_position_embeddings).
    """
    refuse_model(model, "check_generation", "pass the model inside the wrapper")
    steps: list[Tensor] = []
    with trial(model) as (tokens, low_precision):
        prefixes, answers = [tokens[:-20], tokens[-20:-12]], [tokens[-12:-6], tokens[-6:]]

        def choose(logits: Tensor) -> Tensor:       # the tokens of `answers`, whatever the logits
            steps.append(logits)
            return torch.tensor([answer[len(steps) - 1] for answer in answers]).to(logits.device)

        try:
            decode(model, decode_step or plain_decode_step(model), prefill(model, prefixes, 6),
                   prefixes, [6, 6], [False, False], [], choose)
            for i, (prefix, answer) in enumerate(zip(prefixes, answers, strict=True)):
                ids = torch.tensor([[*prefix, *answer]], device=steps[0].device)
                logits = model(input_ids=ids, use_cache=False).logits[0].float()
                expected = logits[len(prefix) - 1:-1]                                   # (6, V)
                error = (torch.stack(steps, 1)[i] - expected).abs().mean()
                if not error <= (0.1 if low_precision else 1e-3) * expected.std():
                    raise ValueError("its logits differ from those without a cache")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:      # whatever a model raises at a cache that it does not know
            raise ValueError(
                f"{type(model).__name__} can't generate with KVCache: {error}") from error


@contextlib.contextmanager
def trial(model):
    """Random tokens to try a model with, and whether the model computes in low precision.

    More tokens than the sliding window has, where there is one. Inside: eval mode, no gradients,
    and none of the caller's autocast.
    """
    config, first = text_config(model), next(model.parameters())
    names = ("window_size", "attention_window_size", "attention_chunk_size")
    windows = [sliding_window(model), *(getattr(config, name, None) for name in names)]
    positions = getattr(config, "max_position_embeddings", None) or 2 ** 20
    # 64: room for the trial's sequences, which are up to 41 tokens longer than the window.
    length = 40 + max((n for n in windows if n and n + 64 <= positions), default=0)
    with eval_mode(model), torch.no_grad(), torch.autocast(first.device.type, enabled=False):
        ids = torch.zeros(1, 8, dtype=torch.long, device=first.device)
        logits = model(input_ids=ids, use_cache=False).logits.float()                   # (1, 8, V)
        tokens = np.random.default_rng(0).integers(0, logits.shape[-1], length).tolist()
        rounded = [logits.to(dtype).float() for dtype in (torch.bfloat16, torch.float16)]
        yield tokens, any(torch.equal(logits, other) for other in rounded)
