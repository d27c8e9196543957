"""The method of SAPO as a specification: each docstring is a claim. To be read after sapo.py.

The order is that of the modules: losses, buffer, EMA, segments and pairs, generation, scoring.
What a run needs around the method is tested in tests/, which imports the small models from here.

    python -m pytest -q test_sapo.py
"""
import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.generation import logits_process

import sapo
from buffer import ReplayBuffer
from ema import EMA
from losses import dpo_loss, orpo_loss, sequence_logps
from sapo import Pair, Shortcuts, generate_segments, make_pairs, pair_logps, splice

torch.set_num_threads(1)        # enough for models this small

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BOTH_KINDS = {"sliding_window": 6, "head_dim": 8,
              "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES = {
    "llama": ("llama", {}),
    "llama eager": ("llama", {"attn_implementation": "eager"}),
    "mistral, sliding window in every layer": ("mistral", {"sliding_window": 6}),
    "gemma 2, sliding and full layers": ("gemma2", BOTH_KINDS),
    "gemma 3, sliding and full layers": ("gemma3_text", BOTH_KINDS),
    "qwen 2": ("qwen2", {}),
    "gpt-2, absolute positions": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4,
                                           "n_positions": 160}),
    "gpt-neox": ("gpt_neox", {}),
    "phi-3": ("phi3", {}),
}


def tiny(name: str = "llama", **changes):
    """A small random model of an architecture, in eval mode.

    Its weights are larger than usual, so that what a token sees matters.
    """
    kind, special = ARCHITECTURES.get(name, (name, {}))
    config = {**SMALL, "initializer_range": 0.2, **special, **changes}
    attention = config.pop("attn_implementation", None)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[kind](**config), attn_implementation=attention).eval()


def random_ids(rng: np.random.Generator, length: int) -> list[int]:
    """Token ids without the special ones."""
    return rng.integers(3, 97, length).tolist()


def some_pairs() -> list[Pair]:
    """Pairs longer than any window here, with A empty, B' shorter than B, y- = y+, end = pad."""
    rng = np.random.default_rng(2)
    a, prompt, c = random_ids(rng, 7), random_ids(rng, 20), random_ids(rng, 5)
    return [Pair(prompt, a + random_ids(rng, 9) + c, a + random_ids(rng, 9) + c, 7),
            Pair(random_ids(rng, 3), [*random_ids(rng, 6), 2], [*random_ids(rng, 2), 2], 0),
            Pair(random_ids(rng, 1), [*c, 0], [*c, 0], 2),
            Pair(prompt[:4], c, c, 5), Pair(prompt[:4], c, c[:3], 3)]


def chi_square_fits(observed, probabilities) -> bool:
    """Do counts fit the probabilities? False beyond chi-square's 99.99% point (Wilson-Hilferty)."""
    observed, probabilities = np.asarray(observed, float), np.asarray(probabilities, float)
    assert observed[probabilities == 0].sum() == 0
    observed, probabilities = observed[probabilities > 0], probabilities[probabilities > 0]
    expected = probabilities / probabilities.sum() * observed.sum()
    df = len(expected) - 1
    limit = df * (1 - 2 / (9 * df) + 3.72 * math.sqrt(2 / (9 * df))) ** 3
    return ((observed - expected) ** 2 / expected).sum() < limit


# ------------------------------------------------------------------------------------------- losses

@pytest.mark.parametrize("average", [False, True])
def test_sequence_logps_shift(average):
    """logits[:, t] scores labels[:, t + 1], and -100 is left out, as in a loop over tokens.

    labels [[-100, 7, 8, -100]]  ->  logits[0, 0] at 7  +  logits[0, 1] at 8
    """
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 11)
    labels = torch.randint(0, 11, (3, 7))
    labels[0, :3] = labels[1, 5:] = labels[2, 3] = -100
    for b in range(3):
        scored = [logits[b, t].log_softmax(-1)[labels[b, t + 1]]
                  for t in range(6) if labels[b, t + 1] != -100]
        expected = sum(scored) / (len(scored) if average else 1)
        assert torch.allclose(sequence_logps(logits, labels, average)[b], expected, atol=1e-5)
    logps, labels = logits[:1].log_softmax(-1), torch.tensor([[-100, 7, 8, *[-100] * 4]])
    assert torch.allclose(sequence_logps(logits[:1], labels), logps[0, 0, 7] + logps[0, 1, 8])


def test_sequence_logps_dtype_shape_and_empty():
    """bf16 is scored in fp32, fp64 stays; a row without labels is 0; other shapes are refused."""
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[-100, 1, 2, 3], [-100] * 4])
    assert sequence_logps(logits.bfloat16(), labels).dtype == torch.float32
    assert sequence_logps(logits.double(), labels).dtype == torch.float64
    assert sequence_logps(logits, labels, average=True)[1] == 0
    with pytest.raises(ValueError, match="do not match"):
        sequence_logps(logits, labels[:, 1:])


def test_dpo_worked_by_hand():
    """Eq. 1: chosen 1 above the reference, rejected 1 below, beta 0.1  ->  -log sigmoid(0.2).

    label_smoothing mixes in the loss of the pair the other way round. Equal logps give log 2.
    """
    logps = [torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)]
    losses, chosen_rewards, rejected_rewards = dpo_loss(*logps, beta=0.1)
    assert losses.item() == pytest.approx(0.598139, abs=1e-6)
    assert (chosen_rewards.item(), rejected_rewards.item()) == pytest.approx((0.1, -0.1))
    smoothed, *_ = dpo_loss(*logps, beta=0.1, label_smoothing=0.25)
    assert smoothed.item() == pytest.approx(0.75 * 0.598139 + 0.25 * 0.798139, abs=1e-6)
    losses, *rewards = dpo_loss(*[torch.tensor([-3.0])] * 4)
    assert losses.item() == pytest.approx(0.6931, abs=1e-4) and rewards == [0, 0]


def test_orpo_worked_by_hand():
    """Eq. 2 and 3: p = 1/2 and 1/4 have odds 1 and 1/3, so the second term is lam log(4/3)."""
    half, quarter, nll = torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), torch.tensor([2.0])
    losses, chosen_rewards, rejected_rewards = orpo_loss(half, quarter, nll, lam=0.05)
    assert losses.item() == pytest.approx(2 + 0.05 * math.log(4 / 3), abs=1e-6)
    assert chosen_rewards.item() == pytest.approx(0.05 * math.log(0.5))
    assert rejected_rewards.item() == pytest.approx(0.05 * math.log(0.25))
    losses, *_ = orpo_loss(half, half, nll, lam=0.5)
    assert losses.item() == pytest.approx(2 + 0.5 * 0.6931, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_losses_are_finite_at_extremes(dtype):
    """Losses and gradients are finite for every logp <= 0, 0 included. Rewards are detached."""
    extremes = [0.0, -1e-8, -1e-3, -1.0, -50.0, -1e4]
    for values in itertools.product(extremes, extremes):
        c, r = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in values)
        for losses, *rewards in (orpo_loss(c, r, -c), dpo_loss(c, r, r.detach(), c.detach())):
            gradients = torch.autograd.grad(losses.sum(), (c, r))
            assert all(torch.isfinite(x).all() for x in (losses, *rewards, *gradients)), values
            assert not any(reward.requires_grad for reward in rewards)


@pytest.mark.parametrize("chosen, rejected",
                         [(-1e-8, -0.5), (-0.5, -1e-8), (-1e-4, -2.0), (-20.0, -0.1)])
def test_orpo_is_accurate_close_to_one(chosen, rejected):
    """fp32 agrees with fp64, also where 1 - p would round to 0 or to 1."""
    exact = [torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, 1.0)]
    log_odds = [x - torch.log1p(-torch.exp(x)) for x in exact[:2]]
    expected = 1.0 - torch.nn.functional.logsigmoid(log_odds[0] - log_odds[1])
    found, *_ = orpo_loss(*(x.float() for x in exact), lam=1.0)
    assert torch.allclose(found.double(), expected, rtol=1e-4)


# ------------------------------------------------------------------------------------------- buffer

def test_buffer_is_fifo():
    """A full buffer drops the oldest item; counts stay with their items; a new item starts at 0."""
    buffer = ReplayBuffer(3)
    for item in "abc":
        buffer.add(item)
    buffer.sample(3)
    buffer.add("d")
    assert buffer.items == ["b", "c", "d"] and buffer.counts == [1, 1, 0] and len(buffer) == 3
    for item in "efg":
        buffer.add(item)
    assert buffer.items == ["e", "f", "g"] and buffer.counts == [0, 0, 0]
    assert (buffer.evicted, buffer.evicted_unused) == (4, 1)    # of a b c d, d was never drawn


def drawn_after(counts: list[int], k: int, draws: int) -> np.ndarray:
    """Draw k of as many items as counts, `draws` times, each time with these counts: (draws, k)."""
    buffer = ReplayBuffer(len(counts), seed=1)
    for item in range(len(counts)):
        buffer.add(item)
    found = []
    for _ in range(draws):
        buffer.load_state_dict({**buffer.state_dict(), "counts": counts})
        found.append(buffer.sample(k))
    return np.array(found)


def test_buffer_weights():
    """An item drawn c times has weight 1 / (1 + c); several are drawn one after the other."""
    assert chi_square_fits(np.bincount(drawn_after([0, 3], 1, 4000)[:, 0]), [0.8, 0.2])
    counts = [0, 1, 3, 9]
    p = 1 / (1 + np.array(counts))
    p /= p.sum()
    assert chi_square_fits(np.bincount(drawn_after(counts, 1, 6000)[:, 0], minlength=4), p)
    joint = p[:, None] * p / (1 - p[:, None])
    np.fill_diagonal(joint, 0)
    first, second = drawn_after(counts, 2, 6000).T
    assert chi_square_fits(np.bincount(first * 4 + second, minlength=16), joint.ravel())


def test_buffer_draws():
    """All items end up used about equally often; drawn_counts tells each one's use before."""
    buffer = ReplayBuffer(50)
    for item in range(40):
        buffer.add(item)
    for _ in range(100):
        assert len(set(buffer.sample(17))) == 17
    assert sum(buffer.counts) == 1700 and max(buffer.counts) - min(buffer.counts) <= 25
    before, drawn = list(buffer.counts), buffer.sample(40)
    assert buffer.drawn_counts == [before[item] for item in drawn]
    assert buffer.sample(0) == [] == ReplayBuffer(1).sample(0)
    for k in (41, -1):
        with pytest.raises(ValueError, match="cannot draw"):
            buffer.sample(k)


@settings(max_examples=60, deadline=None)
@given(capacity=st.integers(1, 9), moves=st.lists(st.integers(0, 4), max_size=30),
       seed=st.integers(0, 9))
def test_buffer_always_holds_together(capacity, moves, seed):
    """Whatever is added and drawn: never over capacity, and the counts are the draws.

    A buffer restored from its state, through a file of plain types, draws the same from then on.
    """
    buffer, drawn, added = ReplayBuffer(capacity, seed), [], 0
    for move in moves:
        if move < 3:
            buffer.add(Pair([added], [1], [2], 0, example_id=added))
            added += 1
        else:
            drawn += [pair.example_id for pair in buffer.sample(min(move, len(buffer)))]
        held = [pair.example_id for pair in buffer.items]
        assert held == list(range(max(0, added - capacity), added))
        assert buffer.counts == [drawn.count(example_id) for example_id in held]
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    restored = ReplayBuffer(capacity)
    restored.load_state_dict(torch.load(file, weights_only=True), item=Pair)
    assert all(isinstance(pair, Pair) for pair in restored.items)
    for one in (buffer, restored):
        one.add(Pair([9], [9], [9], 0))
    for _ in range(3):
        assert buffer.sample(len(buffer)) == restored.sample(len(restored))
    assert buffer.state_dict() == restored.state_dict()


# ---------------------------------------------------------------------------------------------- EMA

@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
def test_ema_closed_form(decay):
    """Eq. 6: after k refreshes with start 0 and theta 1 the EMA model's weights are 1 - decay^k.

    decay 0.5 gives 0.5, 0.75, 0.875; 0 copies the policy; 1 never moves. The policy is untouched.
    """
    policy = torch.nn.Linear(3, 2)
    for weight in policy.parameters():
        torch.nn.init.zeros_(weight)
    ema = EMA(policy, decay=decay, update_every=1)
    for weight in policy.parameters():
        torch.nn.init.ones_(weight)
    for k in (1, 2, 3):
        assert ema.update(policy)
        for weight, theta in zip(ema.model.parameters(), policy.parameters(), strict=True):
            assert torch.allclose(weight, torch.full_like(weight, 1 - decay ** k), atol=1e-6)
            assert (theta == 1).all()


def test_ema_interval_buffers_and_state():
    """The EMA model moves at every update_every-th call only, and buffers are copied then.

    No parameter requires a gradient, there is no dropout, the policy stays as it is. An EMA
    restored from a state, into a copy made elsewhere, goes on where the saved one was.
    """
    policy = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    ema = EMA(policy, decay=0.5, update_every=3)
    assert policy.training and not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    policy(torch.randn(8, 2))
    policy[0].weight.data.add_(1)
    for steps_left in (3, 2):
        assert ema.steps_until_refresh() == steps_left and not ema.update(policy)
    assert ema.model[0].num_batches_tracked == 0 and ema.model[0].weight.tolist() == [1, 1]
    made_elsewhere = copy.deepcopy(policy)
    restored = EMA(policy, decay=0.5, update_every=3, model_copy=made_elsewhere)
    restored.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert restored.model is made_elsewhere
    for one in (ema, restored):
        assert one.steps_until_refresh() == 1 and one.update(policy)
        assert one.model[0].num_batches_tracked == 1
        assert one.model[0].weight.tolist() == [1.5, 1.5]


# ------------------------------------------------------------------------------- segments and pairs

def test_choose_segment():
    """The start is uniform over all places where B fits; a short response is all B."""
    rng = np.random.default_rng(0)
    assert {sapo.choose_segment(5, 3, rng) for _ in range(99)} == {(0, 3), (1, 4), (2, 5)}
    assert sapo.choose_segment(2, 3, rng) == (0, 2) and sapo.choose_segment(1, 1, rng) == (0, 1)
    segments = [sapo.choose_segment(20, 6, rng) for _ in range(15000)]
    assert all(stop - start == 6 for start, stop in segments)
    assert chi_square_fits(np.bincount([start for start, _ in segments], minlength=15), np.ones(15))


def test_splice_worked_examples():
    """Eq. 5 and its edges: what follows an end token in B' is dropped, and C with it."""
    assert splice([1, 2, 3, 4, 5], 1, 3, [8, 9], 0) == [1, 8, 9, 4, 5]
    assert splice([1, 2, 3, 4, 5], 1, 3, [8, 0], 0) == [1, 8, 0]                # C dropped
    assert splice([1, 2, 3, 4, 5], 1, 3, [0, 9], 0) == [1, 0]                   # and the rest of B'
    assert splice([1, 2, 3, 0], 2, 4, [8, 9], 0) == [1, 2, 8, 9]                # B held the end
    assert splice([1, 2], 0, 2, [8, 9], 0) == [8, 9]                            # B is all there is
    assert splice([1, 2, 3], 0, 1, [8, 7], [0, 7]) == [8, 7]                    # several end tokens
    assert splice([1, 2, 3], 0, 1, [0], None) == [0, 2, 3]                      # none
    assert splice((1, 2, 3), 0, 1, (9,), 0) == [9, 2, 3]


MODEL = tiny()
IDS = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@settings(max_examples=120, deadline=None)
@given(rows=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5), end=st.integers(0, 9),
       segment_len=st.integers(0, 6), k=st.integers(1, 3), seed=st.integers(0, 99),
       eos=st.sampled_from(["stop", "forbid"]), tail=st.sampled_from(["keep", "drop", "rewrite"]))
def test_pairs_always_hold_together(rows, end, segment_len, k, seed, eos, tail):
    """Whatever the lengths and the end token: y+ = A B C and y- = A B' C, to the token.

    C is missing only with tail="drop" or where B' ends with an end token, which can only be y-'s
    last. B' is no longer than B; with tail="rewrite" B reaches to the end of y+, and y- may have
    max_new_tokens. Every example gets k pairs of one segment, in their order.
    """
    examples = [sapo.Example(prompt, [t for t in chosen[:-1] if t != end] + chosen[-1:], 10 + i)
                for i, (prompt, chosen) in enumerate(rows)]
    pairs = make_pairs(MODEL, examples, segment_len, np.random.default_rng(seed), eos_token_id=end,
                       num_rejected=k, max_new_tokens=4, segment_eos=eos, tail=tail, top_k=9,
                       generator=torch.Generator().manual_seed(seed))
    assert [(pair.prompt, pair.chosen, pair.example_id) for pair in pairs] == [
        tuple(example) for example in examples for _ in range(k)]
    for chosen, pair in ((pair.chosen, pair) for pair in pairs):
        a, b, c = chosen[:pair.start], chosen[pair.start:pair.stop], chosen[pair.stop:]
        written = pair.rejected[pair.start:pair.rejected_stop]
        segment = min(segment_len or len(chosen), len(chosen))
        assert len(b) >= segment and (not c if tail == "rewrite" else len(b) == segment)
        limit = max(segment, 4 - len(a) if tail == "rewrite" else 0) if segment_len else 4
        ended = written[-1] == end
        assert pair.rejected == a + written + ([] if ended or tail == "drop" else c)
        assert 1 <= len(written) <= limit and (ended or len(written) == limit)
        assert end not in pair.rejected[:-1]
        assert not (ended and c and eos == "forbid")
    starts = [pair.start for pair in pairs]
    assert starts == [start for start in starts[::k] for _ in range(k)]


def test_make_pairs_accepts_and_refuses():
    """Plain (prompt, chosen) tuples will do; an empty response and another tail are refused."""
    rng = np.random.default_rng(0)
    assert make_pairs(MODEL, [([5], [6, 7])], 4, rng, eos_token_id=2)[0].example_id == -1
    assert make_pairs(MODEL, [], 4, rng, eos_token_id=2) == []
    for chosen, tail, words in (([], "keep", "response_len"), ([6], "cut", "tail must be")):
        with pytest.raises(ValueError, match=words):
            make_pairs(MODEL, [([5], chosen)], 4, rng, eos_token_id=2, tail=tail)


# --------------------------------------------------------------------------------------- generation

def greedy(model, prefix: list[int], limit: int, eos_ids: list[int] | None) -> list[int]:
    """What transformers' own greedy generation writes after one prefix."""
    ids = torch.tensor([prefix])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit,
                             do_sample=False, eos_token_id=eos_ids, pad_token_id=0)
    return written[0, len(prefix):].tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_transformers(name):
    """temperature=0 equals model.generate(do_sample=False) token for token, for every architecture.

    So it is for prefixes of different lengths in one batch (one token, more than the window),
    different limits, several end tokens, and several continuations per prefix.
    """
    model, rng = tiny(name), np.random.default_rng(1)
    prefixes, limits = [random_ids(rng, n) for n in (5, 17, 1, 9, 30)], [12, 20, 15, 1, 20]

    def expected(eos_ids):
        return [greedy(model, *one, eos_ids) for one in zip(prefixes, limits, strict=True)]

    def found(eos_ids, num_return=1):
        return generate_segments(model, prefixes, limits, eos_token_id=eos_ids, temperature=0,
                                 num_return=num_return)

    unended = expected(None)
    assert found(None) == [[tokens] for tokens in unended]
    eos_ids = [unended[0][3], unended[4][10]]           # two that come up, so that some end early
    ended = expected(eos_ids)
    assert ended != unended
    assert found(eos_ids) == [[tokens] for tokens in ended]
    assert found(eos_ids, num_return=3) == [[tokens] * 3 for tokens in ended]


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (0.7, 50, 0.95), (1.0, 0, 1.0), (1.5, 4, 1.0), (1.0, 0, 0.3), (0.7, 6, 0.8)])
def test_sampling_distribution(temperature, top_k, top_p):
    """Tokens are drawn as transformers' temperature, top-k and top-p say (chi-square).

    The second token is drawn given the first one, through the cache.
    """
    model, prefix, draws = tiny(vocab_size=12), [5, 9, 4], 6000
    warpers = [logits_process.TemperatureLogitsWarper(temperature),
               *([logits_process.TopKLogitsWarper(top_k)] if top_k else []),
               logits_process.TopPLogitsWarper(top_p)]

    def distribution(ids):
        logits = model(torch.tensor([ids])).logits[:, -1].detach()
        for warper in warpers:
            logits = warper(None, logits)
        return logits.softmax(-1)[0].double().numpy()

    first = distribution(prefix)
    joint = np.concatenate([first[t] * distribution([*prefix, t]) for t in range(12)])
    samples, = generate_segments(
        model, [prefix], 2, eos_token_id=None, temperature=temperature, top_k=top_k, top_p=top_p,
        num_return=draws, generator=torch.Generator().manual_seed(3))
    counts = np.bincount([a * 12 + b for a, b in samples], minlength=144)
    assert counts[joint == 0].sum() == 0
    rare = joint * draws < 5                            # chi-square wants no tiny cells: pool them
    assert chi_square_fits([*counts[~rare], counts[rare].sum()], [*joint[~rare], joint[rare].sum()])


def test_sample_tokens_worked_example():
    """Probabilities [0.5, 0.3, 0.2], top_p 0.7  ->  0 and 1 stay, drawn 5 : 3.

    top_p 0, top_k 1 and a very low temperature leave the best token alone.
    """
    logits, generator = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.Generator().manual_seed(0)
    tokens = sapo.sample_tokens(logits.expand(6000, -1), 1.0, 0, 0.7, generator)
    assert chi_square_fits(torch.bincount(tokens, minlength=3), [5, 3, 0])
    for arguments in ((1.0, 0, 0.0), (1.0, 1, 1.0), (1e-40, 0, 1.0), (0, 0, 1.0)):
        assert not sapo.sample_tokens(logits.expand(200, -1), *arguments, generator).any()


def test_generation_edges():
    """An end token closes its list and is part of it; forbid_eos bans it, prefix by prefix.

    Nothing asked for gives nothing. The same seed gives the same tokens.
    """
    assert generate_segments(MODEL, [], 5, eos_token_id=2) == []
    assert generate_segments(MODEL, [[5], [6]], 0, eos_token_id=2) == [[[]], [[]]]
    end = generate_segments(MODEL, [[5]], 1, eos_token_id=None, temperature=0)[0][0][0]
    stopped, allowed, none = generate_segments(
        MODEL, [[5], [5], [5]], [4, 3, 0], eos_token_id=end, temperature=0,
        forbid_eos=[False, True, True])
    assert stopped == [[end]] and len(allowed[0]) == 3 and end not in allowed[0] and none == [[]]
    seeded = [generate_segments(MODEL, [[5, 6], [7]], 9, eos_token_id=2,
                                generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert seeded[0] == seeded[1]


# ------------------------------------------------------------------------------------------ scoring

def plain_logps(model, pair: Pair) -> list[torch.Tensor]:
    """Both responses scored one at a time, through the model's own logits, summed."""
    found = []
    for response in (pair.chosen, pair.rejected):
        ids = torch.tensor([[*pair.prompt, *response]])
        labels = ids.clone()
        labels[:, :len(pair.prompt)] = -100
        found.append(sequence_logps(model(ids).logits, labels)[0])
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shortcuts_change_nothing(name):
    """pair_logps, with any shortcuts or none, equals scoring each response alone, gradients too.

    It does so on models with windows or absolute positions too, beyond the window. Every model of
    this file can share the prefix; all but Gemma 2, which caps its logits, can split the head.
    """
    model, pairs = tiny(name), some_pairs()
    split_head = "gemma 2" not in name
    assert sapo.find_shortcuts(model) == Shortcuts(share_prefix=True, split_head=split_head)
    logps = [plain_logps(model, pair) for pair in pairs]
    chosen, rejected = (torch.stack(column) for column in zip(*logps, strict=True))
    nll = -chosen / torch.tensor([len(pair.chosen) for pair in pairs])

    def gradient(logps):
        weighted = (logps[0] - 2 * logps[1] + logps[2]) * torch.linspace(1, 2, len(pairs))
        gradients = torch.autograd.grad(weighted.sum(), model.parameters(), allow_unused=True)
        return torch.cat([g.flatten() for g in gradients if g is not None])

    expected = gradient((chosen, rejected, nll))
    for shortcuts in (None, Shortcuts(True, False), Shortcuts(True, split_head),
                      Shortcuts(False, split_head)):
        found = pair_logps(model, pairs, shortcuts=shortcuts)
        for one, wanted in zip(found, (chosen, rejected, nll), strict=True):
            assert torch.allclose(one, wanted, rtol=1e-5, atol=1e-5)
        assert (gradient(found) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("shortcuts", [None, Shortcuts(True, True), Shortcuts(False, True)])
def test_averages_and_nll(shortcuts):
    """average=True divides by each response's own length; chosen_nll always is a mean per token.

    nll_on="prompt" takes it over prompt and response, and changes nothing else.
    """
    pairs = some_pairs()
    sums, means = (pair_logps(MODEL, pairs, average, shortcuts) for average in (False, True))
    for field, response in (("chosen_logps", "chosen"), ("rejected_logps", "rejected")):
        lengths = torch.tensor([len(getattr(pair, response)) for pair in pairs])
        assert torch.allclose(getattr(sums, field), getattr(means, field) * lengths, rtol=1e-5)
    assert torch.allclose(sums.chosen_nll, -means.chosen_logps)
    whole = pair_logps(MODEL, pairs, shortcuts=shortcuts, nll_on="prompt")
    for pair, nll in zip(pairs, whole.chosen_nll, strict=True):
        ids = torch.tensor([[*pair.prompt, *pair.chosen]])
        expected = -sequence_logps(MODEL(ids).logits, ids, average=True)[0]
        assert torch.allclose(nll, expected, rtol=1e-5)
    assert torch.equal(whole.chosen_logps, sums.chosen_logps)


@pytest.mark.parametrize("shortcuts", [None, Shortcuts(True, True)])
def test_skip_shared_changes_nothing_for_dpo(shortcuts):
    """DPO's loss, margin and gradient are the same without A; the logps themselves are not."""
    reference, pairs, results, logps = tiny(initializer_range=0.1), some_pairs(), [], []
    for skip_shared in (False, True):
        policy_logps, reference_logps = (
            pair_logps(model, pairs, shortcuts=shortcuts, skip_shared=skip_shared)
            for model in (MODEL, reference))
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            *policy_logps[:2], *(x.detach() for x in reference_logps[:2]))
        results.append([losses.detach(), chosen_rewards - rejected_rewards,
                        *torch.autograd.grad(losses.sum(), MODEL.parameters())])
        logps.append(policy_logps.chosen_logps.detach())
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert logps[1][0] > logps[0][0] + 1 and logps[1][3] == 0           # the fourth pair is all A


def test_shared_layout_worked_example():
    """x = [1], A = [2], B C = [3, 4], B' C = [5, 4]  ->  1 2 3 5 at 0 1 2 2; 1 and 2 are shared."""
    sequence, labels = sapo.shared_layout(Pair([1], [2, 3, 4], [2, 5, 4], 1))
    assert sequence == ([1, 2, 3, 5], [0, 1, 2, 2], [4, 4, 2, 3])       # SHARED is 4
    assert labels == [(0, 2, sapo.SEGMENT_A), (1, 3, sapo.CHOSEN), (2, 4, sapo.CHOSEN),
                      (1, 5, sapo.REJECTED), (3, 4, sapo.REJECTED)]
