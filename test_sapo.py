"""The tests. Each says in its docstring which claim it checks; none needs a network.

    python -m pytest -q             all but the slow ones
    python -m pytest -q -m slow     the slow ones
"""
import copy
import dataclasses
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"      # stands for having no network; read when transformers is imported

import numpy as np
import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CONFIG_MAPPING
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import sapo
import support.evaluate
import support.parallel
import support.tokenize_rows
import train
from buffer import ReplayBuffer
from ema import EMA
from losses import dpo_loss, orpo_loss, sequence_logps
from sapo import Example, Pair, choose_segment, generate_segments, make_pairs, pair_logps, splice
from support.checkpoint import newest, step_of
from support.models import checkpoint_layers, end_token_ids, load_model, model_card, set_template
from support.evaluate import column_pair
from support.parallel import Stop, World
from support.plan import activations, memory, plan
from support.errors import printable
from support.report import ended_early, pair_statistics, parts
from support.data_formats import read_rows, split_row
from support.checks import matches_check
from support.tokenize_rows import Row, Tokenize, load_data
from support.errors import RowFailed, RunFailed, Stopped, UserError
from support.settings import Settings, located, make_parser, parse

HERE = Path(__file__).parent
tqdm.set_lock(threading.RLock())    # its own lock is shared with forks, and stays locked for all when its holder is killed
torch.set_num_threads(1)            # enough for models this small; two wait for each other where another program has a core


def loaded(path: Path):
    """A script that lies in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=160, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ARCHITECTURES = {
    "llama": ("llama", {}),
    "llama eager": ("llama", {"attn_implementation": "eager"}),
    "mistral, sliding window in every layer": ("mistral", {"sliding_window": 6}),
    "gemma 2, sliding and full layers": ("gemma2", {"sliding_window": 6, "head_dim": 8}),
    "gemma 3, sliding and full layers": ("gemma3_text", {"sliding_window": 6, "head_dim": 8}),
    "qwen 2": ("qwen2", {}),
    "gpt-2, absolute positions": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160}),
    "gpt-neox": ("gpt_neox", {}),
    "phi-3": ("phi3", {}),
}


def tiny(name: str = "llama", **changes):
    """A small random model of an architecture, in eval mode. Weights larger than usual, so that what a token sees matters."""
    kind, special = ARCHITECTURES[name] if name in ARCHITECTURES else (name, {})
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SMALL, "initializer_range": 0.2, **special, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=special.get("attn_implementation")).eval()


def random_ids(rng, length: int) -> list[int]:
    return rng.integers(3, 97, length).tolist()


def chi_square_fits(observed, probabilities) -> bool:
    """Does a count fit the probabilities? True unless chi-square is beyond its 99.99% point (Wilson and Hilferty)."""
    observed, probabilities = np.asarray(observed, float), np.asarray(probabilities, float)
    assert observed[probabilities == 0].sum() == 0
    observed, probabilities = observed[probabilities > 0], probabilities[probabilities > 0]
    expected = probabilities / probabilities.sum() * observed.sum()
    df = len(expected) - 1
    return ((observed - expected) ** 2 / expected).sum() < df * (1 - 2 / (9 * df) + 3.72 * math.sqrt(2 / (9 * df))) ** 3


# ----------------------------------------------------------------------------------------------------------- losses

@pytest.mark.parametrize("average", [False, True])
def test_sequence_logps_shift(average):
    """logits[:, t] scores labels[:, t + 1], -100 is left out: the same as a loop over tokens."""
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 11)
    labels = torch.randint(0, 11, (3, 7))
    labels[0, :3] = labels[1, 5:] = labels[2, 3] = -100
    for b in range(3):
        scored = [logits[b, t].log_softmax(-1)[labels[b, t + 1]] for t in range(6) if labels[b, t + 1] != -100]
        expected = sum(scored) / (len(scored) if average else 1)
        assert torch.allclose(sequence_logps(logits, labels, average)[b], expected, atol=1e-5)


def test_sequence_logps_dtype_shape_and_empty():
    """bf16 logits are scored in fp32, float64 stays; a row without labels is 0; unequal shapes are refused."""
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[-100, 1, 2, 3], [-100] * 4])
    assert sequence_logps(logits.bfloat16(), labels).dtype == torch.float32
    assert sequence_logps(logits.double(), labels).dtype == torch.float64
    assert sequence_logps(logits, labels, average=True)[1] == 0
    with pytest.raises(ValueError, match="do not match"):
        sequence_logps(logits, labels[:, 1:])


def test_dpo_hand_worked():
    """Eq. 1 by hand: chosen 1 above the reference, rejected 1 below, beta 0.1 -> -log sigmoid(0.2); smoothing mixes."""
    logps = [torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)]
    losses, chosen_rewards, rejected_rewards = dpo_loss(*logps, beta=0.1)
    assert losses.item() == pytest.approx(0.598139, abs=1e-6)
    assert (chosen_rewards.item(), rejected_rewards.item()) == pytest.approx((0.1, -0.1))
    smoothed, *_ = dpo_loss(*logps, beta=0.1, label_smoothing=0.25)
    assert smoothed.item() == pytest.approx(0.75 * 0.598139 + 0.25 * 0.798139, abs=1e-6)
    assert dpo_loss(*[torch.tensor([-3.0])] * 4)[0].item() == pytest.approx(math.log(2))


def test_orpo_hand_worked():
    """Eq. 2 and 3 by hand: p = 1/2 against 1/4 -> odds 1 and 1/3, -log sigmoid(log 3) = log(4/3)."""
    losses, chosen_rewards, rejected_rewards = orpo_loss(
        torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), torch.tensor([2.0]), lam=0.05)
    assert losses.item() == pytest.approx(2 + 0.05 * math.log(4 / 3), abs=1e-6)
    assert chosen_rewards.item() == pytest.approx(0.05 * math.log(0.5))
    assert rejected_rewards.item() == pytest.approx(0.05 * math.log(0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chosen", [0.0, -1e-8, -1e-3, -1.0, -50.0, -1e4])
@pytest.mark.parametrize("rejected", [0.0, -1e-8, -1e-3, -1.0, -50.0, -1e4])
def test_losses_finite_at_extremes(chosen, rejected, dtype):
    """ORPO's and DPO's losses and gradients are finite for every log-probability <= 0, 0 included."""
    c, r = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (chosen, rejected))
    for losses, chosen_rewards, rejected_rewards in (orpo_loss(c, r, -c), dpo_loss(c, r, r.detach(), c.detach())):
        gradients = torch.autograd.grad(losses.sum(), (c, r))
        assert all(torch.isfinite(x).all() for x in (losses, chosen_rewards, rejected_rewards, *gradients))
        assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad


@pytest.mark.parametrize("chosen, rejected", [(-1e-8, -0.5), (-0.5, -1e-8), (-1e-4, -2.0), (-20.0, -0.1)])
def test_orpo_accurate_close_to_one(chosen, rejected):
    """In fp32 the loss agrees with a float64 computation, also where 1 - p would round to 0 or 1."""
    args = [torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, 1.0)]
    log_odds = [x - torch.log1p(-torch.exp(x)) for x in args[:2]]
    expected = 1.0 - torch.nn.functional.logsigmoid(log_odds[0] - log_odds[1])
    assert torch.allclose(orpo_loss(*(x.float() for x in args), lam=1.0)[0].double(), expected, rtol=1e-4)


# ----------------------------------------------------------------------------------------------- segments and pairs

def test_splice_worked_examples():
    """Eq. 5, and its edges: EOS in B', B with the final EOS, response shorter than the segment, several end tokens."""
    assert splice([1, 2, 3, 4, 5], 1, 3, [8, 9], 0) == [1, 8, 9, 4, 5]
    assert splice([1, 2, 3, 4, 5], 1, 3, [8, 0], 0) == [1, 8, 0]                # C dropped
    assert splice([1, 2, 3, 4, 5], 1, 3, [0, 9], 0) == [1, 0]                   # nor what follows the end in B'
    assert splice([1, 2, 3, 0], 2, 4, [8, 9], 0) == [1, 2, 8, 9]                # B held the EOS, B' did not reach one
    assert splice([1, 2], 0, 2, [8, 9], 0) == [8, 9]                            # B is all there is
    assert splice([1, 2, 3], 0, 1, [8, 7], [0, 7]) == [8, 7]
    assert splice([1, 2, 3], 0, 1, [0], None) == [0, 2, 3]
    assert splice((1, 2, 3), 0, 1, (9,), 0) == [9, 2, 3]


def test_choose_segment():
    """Starts are uniform over every place where B fits (chi-square); a short response is all B; bad lengths are refused."""
    rng = np.random.default_rng(0)
    starts = [choose_segment(20, 6, rng) for _ in range(15000)]
    assert all(stop - start == 6 for start, stop in starts)
    assert chi_square_fits(np.bincount([start for start, _ in starts], minlength=15), np.ones(15))
    assert choose_segment(4, 9, rng) == (0, 4) and choose_segment(1, 1, rng) == (0, 1)
    for lengths in ((0, 3), (3, 0), (3, -1)):
        with pytest.raises(ValueError):
            choose_segment(*lengths, rng)


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(3, 96), min_size=1, max_size=12),
                          st.lists(st.integers(3, 96), max_size=12)), min_size=1, max_size=4),
       st.integers(0, 9), st.integers(1, 3), st.sampled_from(["stop", "forbid"]), st.integers(0, 10 ** 6))
def test_make_pairs_keeps_a_and_c(examples, segment_len, k, segment_eos, seed):
    """Whatever the lengths: k pairs an example in order, A kept, C kept unless B' ended, one EOS at most and at the end,
    nothing longer than asked for."""
    model = MODEL_FOR_PAIRS
    examples = [Example(prompt, [*response, 2], row=10 + i) for i, (prompt, response) in enumerate(examples)]
    pairs = make_pairs(model, examples, segment_len, np.random.default_rng(seed), eos_token_id=2, num_rejected=k, step=7,
                       max_new_tokens=5, segment_eos=segment_eos, generator=torch.Generator().manual_seed(seed), temperature=3.0)
    assert [pair.row for pair in pairs] == [e.row for e in examples for _ in range(k)]
    for pair in pairs:
        n = min(segment_len, len(pair.chosen)) if segment_len else 5
        a, b, b_new, c, cut = parts(pair, [2], segment_len)
        assert pair.step == 7 and a + b + c == pair.chosen and len(b_new) <= n
        assert pair.rejected[:pair.start] == a and pair.chosen[:pair.start] == a
        assert pair.rejected == (a + b_new if cut else a + b_new + c)
        assert 2 not in pair.rejected[:-1] and (len(b_new) == n or b_new[-1] == 2)
        if segment_eos == "forbid" and c:
            assert not cut and len(b_new) == n


MODEL_FOR_PAIRS = tiny()


def test_make_pairs_refuses():
    """An empty response and an unknown segment_eos are errors that say so; plain (prompt, chosen) tuples are accepted."""
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="response_len"):
        make_pairs(MODEL_FOR_PAIRS, [Example([5], [])], 4, rng, eos_token_id=2)
    with pytest.raises(ValueError, match="segment_eos"):
        make_pairs(MODEL_FOR_PAIRS, [Example([5], [6])], 4, rng, eos_token_id=2, segment_eos="never")
    assert make_pairs(MODEL_FOR_PAIRS, [([5], [6, 7])], 4, rng, eos_token_id=2)[0].row == -1


# ------------------------------------------------------------------------------------------------------- generation

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_transformers(name):
    """temperature=0 equals model.generate(do_sample=False) token for token: prefixes of unequal lengths (one of one
    token, one beyond the window), unequal limits, several end tokens, and num_return > 1."""
    model, rng = tiny(name), np.random.default_rng(1)
    prefixes, limits = [random_ids(rng, n) for n in (5, 17, 1, 9, 30)], [12, 20, 15, 1, 20]
    plain = [greedy(model, p, limit, None) for p, limit in zip(prefixes, limits)]
    ends = [plain[0][3], plain[4][10]]                      # tokens that really come up, so rows end at different times
    expected = [greedy(model, p, limit, ends) for p, limit in zip(prefixes, limits)]
    assert any(len(e) < limit for e, limit in zip(expected, limits))
    assert generate_segments(model, prefixes, limits, eos_token_id=None, temperature=0) == [[p] for p in plain]
    assert generate_segments(model, prefixes, limits, eos_token_id=ends, temperature=0) == [[e] for e in expected]
    assert generate_segments(model, prefixes, limits, eos_token_id=ends, temperature=0, num_return=3) == [[e] * 3 for e in expected]


def greedy(model, prefix, limit, ends):
    ids = torch.tensor([prefix])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, eos_token_id=ends, pad_token_id=0)
    return out[0, len(prefix):].tolist()


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mixtral", "falcon", "opt", "olmo2"])
def test_recorded_step_changes_nothing(name):
    """A recorded decode step gives the logits of the model's own, bit for bit: at other batch sizes and lengths than it
    was recorded at, after the weights moved in place, and in a copy of the model, which records its own."""
    model, rng = tiny(name, n_positions=160, ffn_dim=64, word_embed_proj_dim=32), np.random.default_rng(5)
    for lengths, moved in (((3, 8), 1.0), ((21, 2, 30, 11, 40), 1.1)):
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), moved)
        prefixes = [random_ids(rng, n) for n in lengths]
        for one in (model, copy.deepcopy(model)):
            check_same_steps(one, prefixes)
    assert sapo.RECORDED[model][1] is not None and sapo.RECORDED[one][1] is not sapo.RECORDED[model][1]
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.5)      # the copy has its own weights
    check_same_steps(one, prefixes)


def check_same_steps(model, prefixes):
    found = []
    for record in (True, False):
        seen = []
        sapo._generate(model, prefixes, [5, 9] * len(prefixes), [False] * len(prefixes), [], 2, lambda logits: (seen.append(logits), logits.argmax(-1))[1], record)
        found.append(torch.cat(seen))
    assert torch.equal(*found)


def test_generation_does_no_more_than_it_must():
    """Each prefix is read once however many continuations it gets, in groups of like lengths; rows that are done are
    dropped once a quarter is."""
    model, seen = tiny(), []
    sapo.check_generation(model)
    model._sapo_generates = False                           # unrecorded steps, so that the hook sees them
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    rng = np.random.default_rng(7)
    prefixes = [random_ids(rng, n) for n in (40, 6, 41, 7, 8, 42, 39, 9)]
    generate_segments(model, prefixes, [8] * 4 + [2] * 4, eos_token_id=None, num_return=2)
    assert seen[:2] == [(4, 8), (4, 41)]
    assert seen[2:] == [(16, 1)] * 2 + [(8, 1)] * 6


def test_steps_that_depend_on_values_are_not_recorded():
    """A model that decides something in Python by a tensor's values is never recorded, since that would be recorded as it
    fell this once: a rope that changes with the largest position; it still decodes right."""
    model, prefix = tiny(rope_scaling={"rope_type": "dynamic", "factor": 4.0}), [5, 6, 7]
    assert generate_segments(model, [prefix], 5, eos_token_id=None, temperature=0) == [[greedy(model, prefix, 5, None)]]
    assert sapo.RECORDED[model][1] is None


@pytest.mark.parametrize("temperature, top_k, top_p", [(0.7, 50, 0.95), (1.0, 0, 1.0), (1.5, 4, 1.0), (1.0, 0, 0.3), (0.7, 6, 0.8)])
def test_sampling_distribution(temperature, top_k, top_p):
    """Two sampled tokens are distributed as transformers' own temperature, top-k and top-p say (chi-square), and the
    second is drawn given the first, through the cache."""
    model, prefix, draws = tiny(vocab_size=12), [5, 9, 4], 6000

    def distribution(ids):
        logits = model(torch.tensor([ids])).logits[:, -1].detach()
        warpers = [TemperatureLogitsWarper(temperature)] + ([TopKLogitsWarper(top_k)] if top_k else []) + [TopPLogitsWarper(top_p)]
        for warper in warpers:
            logits = warper(None, logits)
        return logits.softmax(-1)[0].double().numpy()

    first = distribution(prefix)
    joint = np.concatenate([first[t] * distribution([*prefix, t]) for t in range(12)])
    samples, = generate_segments(model, [prefix], 2, eos_token_id=None, temperature=temperature, top_k=top_k, top_p=top_p,
                                 num_return=draws, generator=torch.Generator().manual_seed(3))
    counts = np.bincount([a * 12 + b for a, b in samples], minlength=144)
    rare = joint * draws < 5                                # chi-square wants no tiny cells: pool them
    assert counts[joint == 0].sum() == 0
    assert chi_square_fits([*counts[~rare], counts[rare].sum()], [*joint[~rare], joint[rare].sum()])


def test_generation_edges():
    """Nothing asked for gives nothing; an end token is included and closes its list; forbid_eos bans it, row by row;
    an empty prefix is refused; training mode is put back; the same seed gives the same tokens."""
    model = tiny()
    model.train()
    assert generate_segments(model, [], 5, eos_token_id=2) == []
    assert generate_segments(model, [[5], [6]], 0, eos_token_id=2) == [[[]], [[]]]
    with pytest.raises(ValueError, match="at least one token"):
        generate_segments(model, [[5], []], 5, eos_token_id=2)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate_segments(model, [[5], [6]], [5], eos_token_id=2)
    end = generate_segments(model, [[5]], 1, eos_token_id=None, temperature=0)[0][0][0]
    stopped, allowed = generate_segments(model, [[5], [5]], [4, 3], eos_token_id=end, temperature=0, forbid_eos=[False, True])
    assert stopped == [[end]] and len(allowed[0]) == 3 and end not in allowed[0]
    assert model.training
    runs = [generate_segments(model, [[5, 6], [7]], 9, eos_token_id=2, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert runs[0] == runs[1]


# ---------------------------------------------------------------------------------------------------------- scoring

def some_pairs():
    """Pairs of different lengths: A empty, B' shorter than B, identical, one beyond the windows of the test models."""
    rng = np.random.default_rng(2)
    a, prompt, c = random_ids(rng, 7), random_ids(rng, 20), random_ids(rng, 5)
    return [Pair(prompt, a + random_ids(rng, 9) + c, a + random_ids(rng, 9) + c, 7),
            Pair(random_ids(rng, 3), [*random_ids(rng, 6), 2], [*random_ids(rng, 2), 2], 0),
            Pair(random_ids(rng, 1), [*c, 2], [*c, 2], 2), Pair(prompt[:4], c, c, 5), Pair(prompt[:4], c, c[:3], 3)]


def plain_logps(model, pair):
    """Both responses scored one at a time, whole sequences through the model's own logits; sums, and the lengths."""
    found = []
    for response in (pair.chosen, pair.rejected):
        ids = torch.tensor([pair.prompt + response])
        labels = ids.clone()
        labels[:, :len(pair.prompt)] = -100
        found.append(sequence_logps(model(ids).logits, labels)[0])
    return found


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pair_logps_equal_plain_scoring(name, average):
    """Sharing x and A changes no log-probability and no gradient: both ways of pair_logps equal scoring each response
    alone, on sliding-window, mixed and absolute-position models too, with sequences longer than the window."""
    model, pairs = tiny(name), some_pairs()
    assert sapo.probe(model)[0], "this architecture can share its prefix"
    lengths = [(len(p.chosen), len(p.rejected)) if average else (1, 1) for p in pairs]
    plain = [plain_logps(model, p) for p in pairs]
    expected = [torch.stack([logps[i] / n[i] for logps, n in zip(plain, lengths)]) for i in (0, 1)]
    nll = torch.stack([-logps[0] / len(p.chosen) for logps, p in zip(plain, pairs)])
    weights = torch.linspace(1, 2, len(pairs))
    gradients = [torch.autograd.grad(((expected[0] - 2 * expected[1] + nll) * weights).sum(), model.parameters(), allow_unused=True)]
    for share_prefix in (True, False):
        chosen_logps, rejected_logps, chosen_nll = pair_logps(model, pairs, average=average, share_prefix=share_prefix)
        for found, wanted in ((chosen_logps, expected[0]), (rejected_logps, expected[1]), (chosen_nll, nll)):
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
        loss = ((chosen_logps - 2 * rejected_logps + chosen_nll) * weights).sum()
        gradients.append(torch.autograd.grad(loss, model.parameters(), allow_unused=True))
    for other in gradients[1:]:
        for mine, theirs in zip(gradients[0], other):
            if mine is not None and theirs is not None:
                assert (mine - theirs).norm() <= 1e-5 * mine.norm() + 1e-6


def test_sharing_is_really_used():
    """The shared row holds x and A once: fewer tokens go through the model than with concatenated pairs."""
    model, seen = tiny(), []
    sapo.probe(model)
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    for share_prefix in (True, False):
        pair_logps(model, some_pairs()[:1], share_prefix=share_prefix)
    assert seen == [20 + 7 + 13 + 13, 2 * (20 + 7 + 13)]


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_models_that_cannot_share_are_noticed(name, capsys):
    """A model that ignores (MPT) or refuses (BLOOM) the mask is noticed by the probe, said in one line, scored right."""
    model = tiny(name, hidden_size=32, d_model=32, n_layer=2, n_layers=2, n_head=4, n_heads=4, max_seq_len=160)
    pairs = some_pairs()
    chosen_logps, rejected_logps, _ = pair_logps(model, pairs)
    assert capsys.readouterr().out.count("\n") == 1
    expected = torch.tensor([[x.item() for x in plain_logps(model, pair)] for pair in pairs])
    assert torch.allclose(torch.stack([chosen_logps, rejected_logps], 1), expected, rtol=1e-4, atol=1e-4)
    pair_logps(model, pairs)
    assert capsys.readouterr().out == ""                    # said once


@pytest.mark.parametrize("name, changes", [("mamba", {}), ("bloom", {"n_layer": 2, "n_head": 4}), (
    "recurrent_gemma", {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3}), ("gpt_neo", dict(
    num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4, max_position_embeddings=160))])
def test_models_that_cannot_generate_are_refused(name, changes):
    """A model without an attention cache (Mamba), or with more than that (RecurrentGemma), whose positions come from the mask
    (BLOOM), or whose window goes by column (GPT-Neo), is refused by name, not decoded wrongly."""
    for scale in (0.2, 0.02):               # also where its weights are so small that all logits are nearly alike
        with pytest.raises(ValueError, match="ForCausalLM can't generate"):
            generate_segments(tiny(name, **changes, initializer_range=scale), [[5] * 9, [6] * 3], 4, eos_token_id=2)


def test_a_window_that_is_ignored_would_be_noticed(monkeypatch):
    """The probe tells a wrong mask from a right one: with the window left out of the mask, sharing is found inexact."""
    model = tiny("mistral, sliding window in every layer")
    right = sapo.attention_mask
    monkeypatch.setattr(sapo, "attention_mask", lambda model, allowed, q, k: right(model, allowed, q * 0, k * 0))
    assert sapo.probe(model)[0] is False and model.config.sliding_window == 6


def test_projection_in_chunks(monkeypatch):
    """Scoring in chunks that backward recomputes gives the same numbers and gradients as all at once, and never holds
    more logits than LOGITS_AT_ONCE; prompt positions are not projected."""
    model, pairs, found, projected = tiny(), some_pairs(), [], []
    sapo.probe(model)
    model.lm_head.register_forward_hook(lambda module, args, output: projected.append(output.numel() // 97))
    for limit in (2 ** 25, 97 * 5):
        monkeypatch.setattr(sapo, "LOGITS_AT_ONCE", limit)
        projected.clear()
        logps = torch.stack(pair_logps(model, pairs))
        scored = sum(pair.start + len(pair.chosen) - pair.start + len(pair.rejected) - pair.start for pair in pairs)
        assert sum(projected) == scored and max(projected) == min(scored, limit // 97)
        found.append([logps.detach(), *torch.autograd.grad(logps.sum(), model.parameters())])
    for whole, chunked in zip(*found):
        assert torch.allclose(whole, chunked, rtol=1e-5, atol=1e-5)


def test_sums_stay_fp32_in_bf16():
    """Under bf16 autocast the log-probabilities of the tokens are still summed in fp32: over many tokens, bf16's steps
    would be larger than DPO's whole margin."""
    rng = np.random.default_rng(0)
    pairs = [Pair(random_ids(rng, 5), random_ids(rng, 90), random_ids(rng, 80), 0) for _ in range(3)]
    model = tiny()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sums, means = pair_logps(model, pairs), pair_logps(model, pairs, average=True)
    assert sums[0].dtype == torch.float32
    assert torch.allclose(sums[0], means[0] * 90, rtol=1e-6) and torch.allclose(sums[1], means[1] * 80, rtol=1e-6)
    assert not torch.equal(sums[0], sums[0].bfloat16().float())


def test_skip_shared_changes_nothing_for_dpo():
    """DPO's loss, gradient and margin are the same without A; the log-probabilities themselves are not."""
    policy, reference, pairs, found = tiny(), tiny(initializer_range=0.1), some_pairs(), []
    for skip_shared in (False, True):
        logps = pair_logps(policy, pairs, skip_shared=skip_shared)
        reference_logps = pair_logps(reference, pairs, skip_shared=skip_shared)
        losses, chosen_rewards, rejected_rewards = dpo_loss(*logps[:2], *(x.detach() for x in reference_logps[:2]))
        found.append([losses.detach(), chosen_rewards - rejected_rewards, *torch.autograd.grad(losses.sum(), policy.parameters())])
        if skip_shared:
            assert logps[0][0] > whole[0][0] + 1
        whole = logps
    for one, other in zip(*found):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_nll_on_prompt():
    """nll_on="prompt" is the mean over prompt and response; the log-probabilities stay the response's."""
    model, pair = tiny(), some_pairs()[0]
    ids = torch.tensor([pair.prompt + pair.chosen])
    expected = -sequence_logps(model(ids).logits, ids, average=True)
    for share_prefix in (True, False):
        chosen_logps, _, nll = pair_logps(model, [pair], share_prefix=share_prefix, nll_on="prompt")
        assert torch.allclose(nll, expected, rtol=1e-5) and torch.allclose(chosen_logps[0], plain_logps(model, pair)[0], rtol=1e-5)
    with pytest.raises(ValueError, match="nll_on"):
        pair_logps(model, [pair], nll_on="all")
    with pytest.raises(ValueError, match="prompt"):
        pair_logps(model, [pair._replace(prompt=[])])


def test_eos_is_scored_when_pad_equals_eos():
    """Padding is by length: an end token counts although its id is the pad id, and padding does not, whatever its id."""
    model = tiny(pad_token_id=2)
    short, long = Pair([5], [6, 2], [7, 2], 0), Pair([5] * 9, [6] * 9 + [2], [7] * 9 + [2], 0)
    together = pair_logps(model, [short, long])
    for i, pair in enumerate((short, long)):
        expected = plain_logps(model, pair)
        assert [together[0][i].item(), together[1][i].item()] == pytest.approx([x.item() for x in expected], abs=1e-4)


MORE_ARCHITECTURES = {
    "qwen3": {"head_dim": 8}, "olmo2": {}, "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64}, "falcon": {}, "starcoder2": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4}, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 160},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 160}, "granite": {},
}


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "eager" not in name] + list(MORE_ARCHITECTURES))
def test_one_iteration_of_any_architecture(name):
    """A whole iteration of SAPO-ORPO and SAPO-DPO with the model as it comes: segments from the EMA model that differ from
    B, pairs scored as transformers' own logits score them, gradients for every layer, a policy that moves, an EMA that follows."""
    model, rng = tiny(name, **MORE_ARCHITECTURES.get(name, {})), np.random.default_rng(0)
    examples = [Example(random_ids(rng, 5 + i), [*random_ids(rng, 12), 2], i) for i in range(4)]
    for loss in ("orpo", "dpo"):
        policy = copy.deepcopy(model)
        ema, buffer = EMA(policy, update_every=1), ReplayBuffer(8)
        for pair in make_pairs(ema.model, examples, 5, rng, eos_token_id=2):
            buffer.add(pair)
        pairs = buffer.sample(4)
        assert any(pair.chosen != pair.rejected for pair in pairs)
        chosen, rejected, nll = pair_logps(policy, pairs, average=loss == "orpo")
        with torch.no_grad():
            reference = pair_logps(model, pairs)[:2]
            plain = [plain_logps(model, pair)[0] for pair in pairs]
        expected = torch.stack(plain) / torch.tensor([len(pair.chosen) if loss == "orpo" else 1 for pair in pairs])
        assert torch.allclose(chosen, expected, rtol=1e-3, atol=1e-3)
        losses, *_ = orpo_loss(chosen, rejected, nll) if loss == "orpo" else dpo_loss(chosen, rejected, *reference)
        losses.mean().backward()
        layers = [p for p_name, p in policy.named_parameters() if ".1." in p_name and p.ndim > 1]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layers)
        torch.optim.AdamW(policy.parameters(), 1e-3).step()
        assert ema.update(policy)
        moved = [not torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(ema.model.parameters(), policy.parameters(), model.parameters())]
        assert sum(moved) > len(moved) / 2


# ----------------------------------------------------------------------------------------------------------- buffer

def test_buffer_is_fifo():
    """Full, it drops the oldest; counts travel with their items, oldest first; a new item starts at 0."""
    buffer = ReplayBuffer(3)
    for item in "abc":
        buffer.add(item)
    buffer.sample(3)
    buffer.add("d")
    assert buffer.items == ["b", "c", "d"] and buffer.counts == [1, 1, 0] and len(buffer) == 3
    buffer.add("e"), buffer.add("f"), buffer.add("g")
    assert buffer.items == ["e", "f", "g"] and buffer.counts == [0, 0, 0]
    assert (buffer.evicted, buffer.evicted_unused) == (4, 1)            # of a b c d, d was never drawn


def test_buffer_weights():
    """An item drawn c times has weight 1 / (1 + c) (chi-square on single draws), and a pair of distinct items comes as
    drawn one after the other."""
    start, counts = ReplayBuffer(4, seed=1), [0, 1, 3, 9]
    for item in range(4):
        start.add(item)
    state = {**start.state_dict(), "counts": counts}
    singles, doubles = np.zeros(4), np.zeros((4, 4))
    for seed in range(6000):
        for k in (1, 2):
            buffer = ReplayBuffer(4)
            buffer.load_state_dict({**state, "rng": np.random.default_rng(seed).bit_generator.state})
            drawn = buffer.sample(k)
            if k == 1:
                singles[drawn[0]] += 1
            else:
                doubles[tuple(drawn)] += 1
    weights = 1 / (1 + np.array(counts))
    p = weights / weights.sum()
    assert chi_square_fits(singles, p)
    joint = p[:, None] * p / (1 - p[:, None])
    np.fill_diagonal(joint, 0)
    assert chi_square_fits(doubles.ravel(), joint.ravel())


def test_buffer_draws():
    """No item twice in one draw, every draw counted, too many refused; drawn_counts tells the use before the draw."""
    buffer = ReplayBuffer(50)
    for item in range(40):
        buffer.add(item)
    for _ in range(100):
        assert len(set(buffer.sample(17))) == 17
    assert sum(buffer.counts) == 1700 and max(buffer.counts) - min(buffer.counts) <= 25
    before = dict(zip(buffer.items, buffer.counts))
    drawn = buffer.sample(40)
    assert sorted(drawn) == list(range(40)) and buffer.drawn_counts.tolist() == [before[item] for item in drawn]
    assert buffer.sample(0) == []
    for k in (41, -1):
        with pytest.raises(ValueError, match="cannot draw"):
            buffer.sample(k)
    with pytest.raises(ValueError, match="capacity"):
        ReplayBuffer(0)


def test_buffer_state_round_trip(tmp_path):
    """A restored buffer holds the same pairs with the same counts and draws the same from then on; its state is plain
    enough for torch.load(weights_only=True), and what does not fit is refused."""
    buffer = ReplayBuffer(5, seed=4)
    for i in range(8):
        buffer.add(Pair([i], [i, 1], [i, 2], 1, row=i, step=i))
        buffer.sample(1)
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    state = torch.load(tmp_path / "buffer.pt", weights_only=True)
    restored = ReplayBuffer(5)
    restored.load_state_dict(state, item=Pair)
    assert restored.items == buffer.items and isinstance(restored.items[0], Pair) and restored.counts == buffer.counts
    for i in range(20):
        for b in (buffer, restored):
            b.add(Pair([i], [i], [i], 0))
        assert restored.sample(3) == buffer.sample(3) and restored.counts == buffer.counts
    assert (restored.evicted, restored.evicted_unused) == (buffer.evicted, buffer.evicted_unused)
    with pytest.raises(ValueError, match="capacity"):
        ReplayBuffer(4).load_state_dict(state)


# -------------------------------------------------------------------------------------------------------------- EMA

def test_ema_closed_form():
    """Eq. 6: after k refreshes towards a constant theta, ema = decay^k * start + (1 - decay^k) * theta; the policy is
    untouched; decay 0 copies, decay 1 never moves."""
    model = torch.nn.Linear(3, 2)
    for decay in (0.0, 0.5, 0.9, 1.0):
        policy = copy.deepcopy(model)
        ema = EMA(policy, decay=decay, update_every=1)
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(1.0)
        moved = copy.deepcopy(policy.state_dict())
        for _ in range(3):
            assert ema.update(policy) is True
        for name, start in model.state_dict().items():
            expected = decay ** 3 * start + (1 - decay ** 3) * moved[name]
            assert torch.allclose(ema.model.state_dict()[name], expected, atol=1e-6)
            assert torch.equal(policy.state_dict()[name], moved[name])
        if decay in (0.0, 1.0):
            assert torch.equal(ema.model.weight, policy.weight if decay == 0 else model.weight)


def test_ema_interval_buffers_and_state():
    """It moves on every update_every-th call only, copies buffers, asks for no gradient, has no dropout, takes a copy
    made elsewhere, and goes on from a saved state where it was."""
    policy = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    ema = EMA(policy, decay=0.5, update_every=3)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters()) and policy.training
    policy(torch.randn(8, 2))
    policy[0].weight.data.add_(1)
    assert [ema.update(policy) for _ in range(2)] == [False, False]
    assert ema.model[0].num_batches_tracked == 0 and torch.equal(ema.model[0].weight, torch.ones(2))
    mine = copy.deepcopy(policy)
    resumed = EMA(policy, decay=0.5, update_every=3, copy=mine)
    resumed.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert resumed.model is mine
    for e in (ema, resumed):
        assert e.update(policy) is True
        assert e.model[0].num_batches_tracked == 1 and torch.equal(e.model[0].weight, torch.full((2,), 1.5))
    for arguments in ({"decay": 1.5}, {"update_every": 0}):
        with pytest.raises(ValueError):
            EMA(policy, **arguments)


# --------------------------------------------------------------------------------------------------------- settings

@pytest.mark.parametrize("flags, words", [
    ("--rejected iteration --buffer_size 2000", "buffer_size 2000 makes no sense"),
    ("--rejected data --buffer_size 500", "buffer_size 500 makes no sense"),
    ("--loss sft --buffer_size 500", "buffer_size 500 makes no sense"),
    ("--loss sft --ref ema", "ref ema makes no sense"), ("--loss orpo --ref fixed", "ref fixed makes no sense"),
    ("--loss dpo --rejected iteration --ref ema", "reference is the policy"), ("--loss sft --rejected ema", "trains on chosen"),
    ("--loss sft --buffer_size 1", "buffer_size 1 makes no sense"), ("--rejected data --num_rejected 4", "generate nothing"), ("--iterations 3", "iterations 3 makes no sense"),
    ("--segment_len -1", "segment_len"), ("--buffer_size 8 --batch_size 16", "smaller than"), ("--top_p 1.5", "top_p"),
    ("--lr 1e-5 1e-6", "one value"), ("--max_prompt_len 300", "no room"), ("--batch_size 0", "batch_size"),
    ("--epochs nan", "epochs must be a finite"), ("--lr inf", "lr must be a finite"), ("--seed 99999999999999999999", "seed must be between"), ("--temperature nan", "temperature"),
    ("--rejected iteration --steps 3", "less than one step"), ("--compile --shard", "not tried"), ("--model somewhere", "--data is missing"),
])
def test_nonsense_is_refused_with_one_sentence(flags, words):
    """A combination that makes no sense is refused with one sentence that names it."""
    with pytest.raises(UserError, match=words) as error:
        parse(flags.split())
    assert "\n" not in str(error.value)


def test_flag_files(tmp_path):
    """In a flag file # begins a comment where it stands first in a word, outside quotes; an open quote or bytes that are no
    text are refused with a sentence."""
    file = tmp_path / "flags.txt"
    file.write_text("# the user's own\n--model m  # not \"n\"\n--data d#1.jsonl --out 'a # b'\n\n  #--seed 3\n--chat_template\tvicuna\t#x\n"
                    '--eval_data "a\\"b" # c\n--plan_config it\\\'s # the user\'s\n')
    s = parse([f"@{file}"])
    assert (s.model, s.data, s.out, s.seed, s.chat_template) == ("m", "d#1.jsonl", "a # b", 0, "vicuna")
    assert (s.eval_data, s.plan_config) == ('a"b', "it's")
    for content in (b"--model it's\n", b"--model \xff\xfe\n"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="flags.txt: not a file of flags"):
            parse([f"@{file}"])


def test_unset_settings_follow_the_method():
    """Buffer, reference, learning rate and iterations have the default of the method, and 0 is no conflict."""
    def of(flags):
        return parse(["--model", "m", "--data", "d", *flags.split()])
    assert (of("").buffer_size, of("").ref, of("").lr, of("").segment_len) == (2000, None, [5e-6], 256)
    assert (of("--loss dpo").ref, of("--loss dpo").lr, of("--loss dpo --rejected data").ref) == ("ema", [5e-7], "fixed")
    assert of("--rejected policy").buffer_size == 2000 and of("--rejected data").buffer_size == of("--loss sft").buffer_size == 0
    spin = of("--rejected iteration --loss dpo --lr 5e-7 5e-7 1e-7 1e-7 --buffer_size 0")
    assert (spin.iterations, spin.segment_len, spin.buffer_size, spin.ref, spin.beta) == (4, 0, 0, None, [0.1] * 4)
    assert of("--rejected iteration --segment_len 32").segment_len == 32


def test_every_setting_is_read():
    """A flag nobody reads is a failure: each field is used by train.py or support/, and --help explains each."""
    sources = "".join(f.read_text() for f in [HERE / "train.py", *(HERE / "support").glob("*.py")] if f.name != "settings.py")
    explained = make_parser().format_help()
    for f in dataclasses.fields(Settings):
        assert re.search(rf"\b(s|settings)\.{f.name}\b", sources), f"nobody reads --{f.name}"
        assert f"--{f.name}" in explained and len(f.metadata["comment"]) > 5


def test_recipes_parse(tmp_path, monkeypatch):
    """Every recipe is a valid flag file with comments; flags after it win; it works from any folder."""
    recipes = sorted((HERE / "recipes").glob("*.txt"))
    assert {"demo.txt", "demo-sft.txt"} <= {r.name for r in recipes}
    monkeypatch.chdir(tmp_path)
    for recipe in recipes:
        assert parse([f"@{recipe}", "--steps", "7"]).steps == 7
    demo = parse([])
    assert demo.rejected == "ema" and demo.loss in ("orpo", "dpo") and demo.buffer_size > 0
    assert len(read_rows(demo.data)) >= 4000


LLAMA, MISTRAL = "llama3-8b", "mistral-7b"
DPO = {"loss": "dpo", "optimizer": "rmsprop", "schedule": "linear", "warmup": 0.1, "lr": [5e-7], "beta": [0.1]}
ORPO = {"loss": "orpo", "lam": 0.05, "optimizer": "adamw", "schedule": "inverse_sqrt", "warmup": 100, "lr": [5e-6]}
SAPO = {"rejected": "ema", "epochs": 4, "segment_len": 256, "buffer_size": 2000, "num_rejected": 1, "ema_decay": 0.5, "ema_every": 2,
        "temperature": 0.7, "top_k": 50, "top_p": 0.95}
SAPO_DPO = SAPO | DPO | {"ref": "ema", "ref_every": 108}
SPIN = {"rejected": "iteration", "iterations": 4, "epochs": 3, "segment_len": 0, "max_new_tokens": 256, "lr": [5e-7, 5e-7, 1e-7, 1e-7]}
PAPER = {f"sapo-orpo-{model}": SAPO | ORPO for model in (LLAMA, MISTRAL)}
PAPER |= {f"sapo-dpo-{model}": SAPO_DPO for model in (LLAMA, MISTRAL)}
PAPER |= {f"orpo-{model}": ORPO | {"rejected": "data", "epochs": epochs} for model, epochs in ((LLAMA, 4), (MISTRAL, 3))}
PAPER |= {f"dpo-{model}": DPO | {"rejected": "data", "epochs": 3, "ref": "fixed"} for model in (LLAMA, MISTRAL)}
PAPER |= {f"spin-orpo-{model}": ORPO | SPIN for model in (LLAMA, MISTRAL)}
PAPER |= {f"spin-dpo-{model}": DPO | SPIN | {"beta": [0.1, 0.1, 0.1, 5.0]} for model in (LLAMA, MISTRAL)}
PAPER |= {"sft-llama3-8b": {"loss": "sft", "lr": [2e-5], "epochs": 3, "schedule": "cosine", "out": "runs/sft-llama3-8b", "plan_rows": 9500},
          "table3-on-policy": SAPO | ORPO | {"rejected": "policy", "buffer_size": 0}, "table3-no-segment": SAPO | ORPO | {"segment_len": 0}}
PAPER |= {f"table4-{name}-ref-{model}": SAPO_DPO | {"ref": ref} for model in (LLAMA, MISTRAL) for name, ref in (("fix", "fixed"), ("policy", "policy"))}
PAPER |= {f"table5-responses-{k}": SAPO | ORPO | {"num_rejected": k} for k in (4, 8)}
PAPER |= {f"table5-segment-{n}": SAPO | ORPO | {"segment_len": n} for n in (64, 128)}


def test_recipes_are_the_papers():
    """There is a recipe for every trained row of Tables 1 to 5, and each has the paper's settings (Section 5.1, Appendix B),
    or those of the authors' code; none leaves a number of rows, or where a value comes from, unsaid."""
    assert set(PAPER) == {r.stem for r in (HERE / "recipes").glob("*.txt")} - {"demo", "demo-sft"}
    for name, expected in PAPER.items():
        text = (HERE / "recipes" / f"{name}.txt").read_text()
        s = parse([f"@{HERE / 'recipes' / name}.txt"])
        common = {"batch_size": 64, "max_len": 2048, "max_prompt_len": 1792, "eval_rows": 0, "plan_rows": 7563, "shard": True,
                  "chat_template": "vicuna" if expected["loss"] == "orpo" and MISTRAL in name else "chatml"}
        assert {key: getattr(s, key) for key in common | expected} == common | expected, name
        assert ("mistral" in s.plan_config) == (MISTRAL in name) and located(s.plan_config).exists()
        assert ("sft" in s.model) == (s.loss == "dpo") and ("capybara" in s.data) == (s.loss != "sft")
        assert f"@recipes/{name}.txt" in text and text.count("Section 5.1") >= 2


def test_dry_run(tmp_path, monkeypatch, capfd):
    """The dry run needs neither weights nor data nor network: Llama 3's number of parameters, the paper's steps, an upper
    bound on tokens, and memory by part, which --shard divides."""
    flags = [f"@{HERE / 'recipes' / 'sapo-dpo-llama3-8b.txt'}", "--dry_run"]
    done = command(*flags, cwd=tmp_path)
    assert done.returncode == 0 and list(tmp_path.iterdir()) == [], done.stderr
    assert "8030.26 M parameters" in done.stdout and f"{math.ceil(7563 * 4 / 64)} of 64 prompts" in done.stdout
    assert f"{473 * 64 * 4096 / 1e6:.1f} M scored, {473 * 64 * 256 / 1e6:.1f} M written" in done.stdout
    one, eight = (plan(parse([*flags, "--plan_processes", n]), 1) for n in ("1", "8"))
    part = {text: float(re.search(r"policy +([0-9.]+) GiB", text)[1]) for text in (one, eight)}
    assert part[one] == pytest.approx(4 * 8.03026e9 / 2 ** 30, abs=0.01) and part[eight] == pytest.approx(part[one] / 8, abs=0.01)
    monkeypatch.chdir(tmp_path)
    assert "--plan_config" in quick_command("--model", "nobody/nothing", "--data", "x.jsonl", "--dry_run", capfd=capfd)[1].err


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PAPER))
def test_every_recipe_can_be_planned(name):
    """The dry run works for every recipe of the paper and says that it fits 8 GPUs of 80 GB."""
    text = plan(parse([f"@{HERE / 'recipes' / name}.txt", "--dry_run"]), 1)
    assert float(re.search(r"peak, at most +([0-9.]+) GiB", text)[1]) < 75


def test_planned_memory_is_what_a_step_keeps():
    """The plan's activations are what autograd really keeps of a forward pass on the CPU, within a tenth, and its shares
    of weights, gradients and optimizer are exact."""
    s = parse(["--model", "x", "--data", "y", "--max_len", "64", "--micro_batch", "2", "--loss", "dpo"])
    model, kept = tiny(), {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    pair = Pair([1], [1] * 63, [1] * 63, 0)
    pair_logps(model, [pair])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pair_logps(model, [pair] * 2)
    measured = sum(storage.nbytes() for storage in kept.values())
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(model.config)
    assert activations(s, shape) == pytest.approx(measured * 1.5, rel=0.1)         # two layers, and one of them in backward
    parts, peak, saved = memory(s, shape, 4)
    sizes = [size / sum(p.numel() for p in model.parameters()) for size in parts.values()]
    assert sizes[:5] == [4, 4, 8, 4, 4] and peak <= sum(parts.values())
    assert saved == 20 * sum(p.numel() for p in model.parameters())                 # all that stays but the gradients


def test_without_held_out_rows(tiny_run, tmp_path):
    """--eval_rows 0 trains on every row and evaluates nothing."""
    flags = [flag for flag in tiny_run if "heldout" not in flag and flag != "--eval_data"]
    records, summary = run(flags, tmp_path, "--rejected", "data", "--eval_rows", "0", "--steps", "2")
    assert summary == {"before": {}, "after": {}} and records[1]["epoch"] == 2 * 4 / 40


# ------------------------------------------------------------------------------------------------------------- rows

@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(HERE / "data" / "model")


USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}
WRONG = {"role": "assistant", "content": "It is 5."}


@pytest.mark.parametrize("row", [
    {"messages": [USER, ANSWER]},
    {"messages": [USER, ANSWER, {"role": "user", "content": "thanks"}]},                # what follows the last answer is left out
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [WRONG]},
    {"chosen": [USER, ANSWER], "rejected": [USER, WRONG]},                              # prompt implied
    {"prompt": [], "chosen": [USER, ANSWER]}, {"prompt": "2 + 2?", "chosen": [USER, ANSWER]}, {"prompt": "2 + 2?", "chosen": [ANSWER]},
    {"prompt": [USER], "completion": [ANSWER]},
])
def test_message_rows(row, tokenizer):
    """Every shape of message row gives the same prompt ids and response ids; one end token closes the response."""
    found = Tokenize(tokenizer, 100, 200)(row, "here", 3)
    text = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(found.prompt) == text and tokenizer.decode(found.chosen) == "It is 4.<|im_end|>"
    assert found.chosen.count(tokenizer.eos_token_id) == 1 and found.number == 3
    assert found.prompt == tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    if "rejected" in row:
        assert tokenizer.decode(found.rejected) == "It is 5.<|im_end|>"


# The columns of data sets as the Hub has them, one row each.
CAPYBARA = {"source": "Airoboros", "conversation": [{"input": "2 + 2?", "output": "It is 4."}], "original_response": "It is 4.",
            "generation_prompt": ["..."], "raw_generation_responses": ["..."], "new_generations": ["..."], "prompt": "2 + 2?",
            "chosen": [USER, ANSWER], "rejected": [USER, WRONG], "rating_chosen": 5, "rating_rejected": 4, "chosen_model": "a", "rejected_model": "b"}
ULTRAFEEDBACK = {"prompt": "2 + 2?", "prompt_id": "ab12", "chosen": [USER, ANSWER], "rejected": [USER, WRONG], "messages": [USER, ANSWER],
                 "score_chosen": 8.0, "score_rejected": 3.5}
HH_RLHF = {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: It is 4.", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: It is 5."}
ULTRACHAT = {"prompt": "2 + 2?", "prompt_id": "ab12", "messages": [USER, ANSWER]}
DEITA = {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "It is 4."}], "source": "evol", "id": "1"}
TABLE = {"messages": [USER, ANSWER], "prompt": None, "chosen": None, "rejected": None, "check": None}      # tables fill in what a row lacks


@pytest.mark.parametrize("row", [CAPYBARA, ULTRAFEEDBACK, HH_RLHF, ULTRACHAT, DEITA, TABLE])
def test_shapes_of_the_hub(row, tokenizer):
    """Rows shaped as Capybara, UltraFeedback-binarized, HH-RLHF, UltraChat and Deita give the prompt, chosen and rejected
    that their message lists would."""
    found = Tokenize(tokenizer, 100, 200)(row, "here", 0)
    expected = Tokenize(tokenizer, 100, 200)({"prompt": [USER], "chosen": [ANSWER], "rejected": [WRONG]}, "here", 0)
    assert (found.prompt, found.chosen) == (expected.prompt, expected.chosen)
    assert found.rejected == (expected.rejected if row.get("rejected") else None)


def test_hh_rlhf_turns():
    """HH-RLHF's texts of several turns: the last answer is the response; an answer may hold blank lines."""
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d\n\ne"
    prompt, chosen, rejected = split_row({"chosen": text, "rejected": text + "!"}, "here")
    assert [m["content"] for m in prompt] == ["a", "b", "c"] and [m["role"] for m in prompt] == ["user", "assistant", "user"]
    assert (chosen, rejected) == ("d\n\ne", "d\n\ne!")


@pytest.mark.parametrize("row", [{"id": "0", "data": ["a", "b"]}, {"instruction": "a", "output": "b"}])
def test_unknown_shapes_say_how_to_convert(row):
    """UltraChat's raw lists and Alpaca's columns are refused with the columns found and the shape to convert to."""
    with pytest.raises(UserError, match="convert it to one of these") as error:
        split_row(row, "here")
    assert all(name in str(error.value) for name in row)


class FakeTable:
    """What the datasets library gives, as far as read_table asks."""
    def __init__(self, rows):
        self.rows, self.column_names = rows, list(rows[0])

    def select_columns(self, names):
        return FakeTable([{name: row[name] for name in names} for row in self.rows])

    def to_list(self):
        return self.rows


def test_rows_of_the_hub(monkeypatch, tmp_path):
    """A name that is no file is a data set of the Hub, "train" unless it names a split; columns of no use are not kept;
    what the library says becomes one sentence, and its absence does too."""
    calls = []

    def load_dataset(name, split, data_files=None):
        calls.append((name, split))
        if name == "no/such":
            raise RuntimeError("not found\nlong story")
        return FakeTable([CAPYBARA, CAPYBARA])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = read_rows("argilla/capybara")
    assert [where for where, _ in rows] == ["argilla/capybara, row 1", "argilla/capybara, row 2"]
    assert set(rows[0][1]) == {"prompt", "chosen", "rejected"}
    read_rows("org/name:train_sft")
    (tmp_path / "a.parquet").write_bytes(b"")
    assert len(read_rows(str(tmp_path))) == 2
    assert calls == [("argilla/capybara", "train"), ("org/name", "train_sft"), ("parquet", "train")]
    with pytest.raises(UserError, match=r"can't read it \(not found\)"):
        read_rows("no/such")
    monkeypatch.setitem(sys.modules, "datasets", None)          # as if it were not installed
    for name in ("argilla/capybara", str(tmp_path)):
        with pytest.raises(UserError, match="pip install datasets"):
            read_rows(name)
    with pytest.raises(UserError, match="no such file"):
        read_rows("no/such.jsonl")


def test_statistics_look_at_the_pairs_own_rows(tokenizer):
    """A pair is checked against the row it was made of, whatever rows --rows and the held-out split leave out."""
    s = parse(["--model", "m", "--data", str(HERE / "data" / "train.jsonl"), "--rows", "100:400", "--chat_template", "chatml"])
    rows, held = load_data(s, Tokenize(tokenizer, 200, 256, use_rejected=False))
    assert len(rows) == 294 and len(held) == 6
    places = (0, 60, 293)
    wrong = [Pair(rows[i].prompt, rows[i].chosen, rows[i].chosen[3:], 0, rows[i].number) for i in places]
    spaced = [pair._replace(rejected=[*tokenizer(" ", add_special_tokens=False)["input_ids"], *pair.chosen]) for pair in wrong]
    assert [row.number for row in map(rows.__getitem__, places)] == [rows.numbered(pair.row).number for pair in wrong]
    for pairs, worse in ((wrong, 3), (spaced, 0)):
        assert pair_statistics(pairs, rows, tokenizer, [tokenizer.eos_token_id], 0)["worse"] == (worse, 3)


def test_a_row_that_fails_late(tokenizer, tmp_path, monkeypatch):
    """What only tokenizing tells of a row: of few rows it is found before training, and --skip_bad_rows leaves it out; of
    more it ends the run when the row's turn comes, with a sentence of its own and status 4."""
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q {i}", "chosen": "a"}) + "\n" for i in range(1200)))
    tokenize = Tokenize(tokenizer, 100, 200, use_rejected=False)
    plain = tokenize._raw_prompt
    monkeypatch.setattr(tokenize, "_raw_prompt", lambda text: [] if text == "q 701" else plain(text))
    flags = ["--model", "m", "--data", str(file), "--eval_rows", "0"]
    with pytest.raises(UserError, match="line 702: the prompt has no tokens"):
        load_data(parse(flags), tokenize)
    assert len(load_data(parse([*flags, "--skip_bad_rows"]), tokenize)[0]) == 1199
    monkeypatch.setattr(support.rows, "KEPT", 1000)
    rows, _ = load_data(parse(flags), tokenize)
    with pytest.raises(RowFailed, match="line 702: the prompt has no tokens") as error:
        rows[701]
    assert error.value.status == 4 and len(rows[700].prompt) > 0


def test_rows_are_tokenized_when_asked_for(tokenizer, tmp_path):
    """Of 30,000 rows at most 500 are tokenized before training, and each is checked: a bad one at the end is refused."""
    file = tmp_path / "d.jsonl"
    lines = [json.dumps({"prompt": f"q {i}", "chosen": "a"}) for i in range(30_000)]
    file.write_text("\n".join(lines))
    tokenize, count = Tokenize(tokenizer, 100, 200, use_rejected=False), [0]
    monkey = tokenize._raw_prompt
    tokenize._raw_prompt = lambda text: (count.__setitem__(0, count[0] + 1), monkey(text))[1]
    rows, held = load_data(parse(["--model", "m", "--data", str(file), "--eval_rows", "20"]), tokenize)
    assert len(rows) == 30_000 - 200 and len(held) == 20 and count[0] <= 520
    assert rows.numbered(29_998).prompt == tokenizer("q 29998")["input_ids"]
    file.write_text("\n".join([*lines, "[1]"]))
    with pytest.raises(UserError, match="line 30001"):
        load_data(parse(["--model", "m", "--data", str(file)]), tokenize)
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match="gives id .* the model's embedding has 5 entries; they do not belong together$") as error:
        load_data(parse(["--model", "m", "--data", str(file), "--eval_rows", "0"]), Tokenize(tokenizer, 100, 200, use_rejected=False, known_ids=5))
    assert error.value.status == 2


def test_string_rows(tokenizer):
    """Strings are raw text, then EOS: no template."""
    found = Tokenize(tokenizer, 100, 200)({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "here", 0)
    assert tokenizer.decode(found.prompt) == "2 + 2 =" and tokenizer.decode(found.chosen) == " 4<|im_end|>"
    assert found.rejected[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("template, ending", [
    ("{% for m in messages %}<{{ m.role }}> {{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}", "x"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}", "x"),
    ("{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
     "{% if add_generation_prompt %}assistant:{% endif %}", "<think></think>x"),
])
def test_one_end_token_whatever_the_template(template, ending, tokenizer):
    """A template that trims, one that ends turns with no token at all, and one that adds a thought: one end token each,
    and an end token spelled out in the text is not one. An answer that stands in the thought too is told from it."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    changed.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    for said, expected in (("x", ending), ("x<|im_end|>y", ending + "<|im_end|>y"), ("think", ending[:-1] + "think")):
        found = Tokenize(changed, 100, 200)({"messages": [USER, {"role": "assistant", "content": said}]}, "here", 0)
        assert changed.decode(found.chosen) == expected + "<|im_end|>"
        assert found.chosen.count(changed.eos_token_id) == 1 and found.chosen[-1] == changed.eos_token_id
        assert found.chosen.count(changed.convert_tokens_to_ids("<think>")) == ending.count("<think>")


def test_named_templates_match_the_paper(tokenizer):
    """--chat_template chatml and vicuna write what Appendix B shows; tokens a model lacks are added."""
    bare = copy.deepcopy(tokenizer)
    assert set_template(bare, "vicuna") == 0
    assert bare.apply_chat_template([USER, ANSWER], tokenize=False) == "<|user|>\n2 + 2?<|im_end|>\n<|assistant|>\nIt is 4.<|im_end|>\n"
    assert set_template(bare, "chatml") == 0
    assert bare.apply_chat_template([USER], tokenize=False, add_generation_prompt=True) == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"


def test_cuts(tokenizer):
    """A long prompt loses its start, a long response its end and with it the end token; nothing else is cut."""
    row = {"prompt": " a b c d e f", "chosen": " g h i j"}
    whole = Tokenize(tokenizer, 100, 200)(row, "here", 0)
    cut = Tokenize(tokenizer, len(whole.prompt) - 2, len(whole.prompt) + 1)(row, "here", 0)
    assert cut.prompt == whole.prompt[2:] and cut.chosen == whole.chosen[:3] and tokenizer.eos_token_id not in cut.chosen
    fits = Tokenize(tokenizer, len(whole.prompt), len(whole.prompt) + len(whole.chosen))(row, "here", 0)
    assert (fits.prompt, fits.chosen) == (whole.prompt, whole.chosen)


@pytest.mark.parametrize("content, words", [
    ("", "no rows"), ('{"messages": [}', "line 1: not JSON"), ("[1]", "expected an object"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"), ('{"prompt": "a", "chosen": ""}', "empty"),
    ('{"prompt": "a", "chosen": [1]}', "expected `messages`"), ('{"messages": [{"role": "assistant", "content": "a"}]}', "no prompt"),
    ('{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rejected": '
     '[{"role": "user", "content": "c"}, {"role": "assistant", "content": "b"}]}', "differ before"), ("\xff", "UTF-8"),
    ('{"prompt": "a", "chosen": "b", "check": "("}', "not a regular expression"), ('{"prompt": "a", "chosen": "b", "check": 5}', "not a regular"),
    ('{"prompt": "a\\ud83d", "chosen": "b"}', "not valid Unicode"), ('{"prompt": "", "chosen": "b"}', "no prompt"),
])
def test_bad_rows_are_named(content, words, tmp_path, tokenizer):
    """A row that can't be used is refused with its file, its line and what is wrong."""
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=words) as error:
        for i, (where, row) in enumerate(read_rows(str(file))):
            Tokenize(tokenizer, 100, 200)(row, where, i)
    assert "bad.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_a_row_too_long_is_named_in_a_list_too(tmp_path):
    """What a .jsonl refuses as too much for one conversation, a JSON list refuses as well."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": "b" * 3_000_000}]))
    rows = [row for _, row in read_rows(str(file))]
    assert rows[0] == {"prompt": "a", "chosen": "b"} and "row 2: 3.0 million" in str(rows[1])


def test_chosen_text_is_what_is_trained_on(tokenizer):
    """Rejected answers are compared with y+ as it is: cut where it was cut, with what the template adds, so y+ itself
    always passes."""
    row = {"prompt": "a b", "chosen": "first 2 + 3 = 5", "check": "[0-9]+"}
    for room in (200, 6):
        found = Tokenize(tokenizer, 100, room)(row, "here", 0)
        assert matches_check(row["check"], tokenizer.decode(found.chosen, skip_special_tokens=True), found.chosen_text)
    assert "5" not in found.chosen_text


def test_files_and_folders(tmp_path):
    """.jsonl, .json lists and folders of both are read; rows know where they stand."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "1"}\n\n{"prompt": "2"}\n')
    (tmp_path / "b.json").write_text('[{"prompt": "3"}]')
    assert [row["prompt"] for _, row in read_rows(str(tmp_path))] == ["1", "2", "3"]
    assert [where.split("/")[-1] for where, _ in read_rows(str(tmp_path))] == ["a.jsonl, line 1", "a.jsonl, line 3", "b.json, row 1"]


def test_held_out_rows(tmp_path, tokenizer):
    """Without --eval_data a fixed 2%, at most 200 rows, is held out, never trained on, the same every time."""
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q {i}", "chosen": "a"}) + "\n" for i in range(400)))
    tokenize = Tokenize(tokenizer, 100, 200, use_rejected=False)
    split = [load_data(parse(["--model", "m", "--data", str(file)]), tokenize) for _ in range(2)]
    numbers = [[[row.number for row in part] for part in parts] for parts in split]
    assert numbers[0] == numbers[1] and len(numbers[0][1]) == 8 and not set(numbers[0][0]) & set(numbers[0][1])
    assert len(numbers[0][0]) == 392


# ---------------------------------------------------------------------------------------------------- embedded data

def test_held_out_pairs_of_the_data_are_measured(tiny_run, tmp_path):
    """Held-out rows with a rejected response give data_accuracy and data_margin, means a token, whatever the method and
    although training rows' rejected column is not read; with --rejected data --loss orpo they are the preference_ ones."""
    for flags in (["--loss", "sft"], ["--loss", "dpo"], ["--rejected", "data"]):
        run(tiny_run, tmp_path / flags[1], *flags, "--steps", "1")
        before = json.loads((tmp_path / flags[1] / "summary.json").read_text())["before"]
        assert {"data_accuracy", "data_margin"} <= set(before)
    assert before["data_margin"] == before["preference_margin"]


def test_embedded_data(tmp_path, monkeypatch):
    """The data files are what their script writes, byte for byte; large enough, small enough; no prompt twice; every
    chosen answer passes its check and every rejected one fails it."""
    script = loaded(HERE / "data" / "make_data.py")
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    script.main()
    rows = {}
    for name in ("train", "heldout"):
        content = (HERE / "data" / f"{name}.jsonl").read_bytes()
        assert content == (tmp_path / f"{name}.jsonl").read_bytes()
        rows[name] = [json.loads(line) for line in content.splitlines()]
    assert len(rows["train"]) >= 4000 and len(rows["heldout"]) >= 500
    assert sum((HERE / "data" / f"{name}.jsonl").stat().st_size for name in rows) < 3e6
    prompts = [json.dumps(row["prompt"]) for part in rows.values() for row in part]
    assert len(set(prompts)) == len(prompts)
    for row in rows["train"] + rows["heldout"]:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert len(row["prompt"]) >= 3 and matches_check(row["check"], chosen, chosen) and not matches_check(row["check"], rejected, chosen)


def test_default_segments_have_a_b_and_c():
    """At the demo's segment length A, B and C are all non-empty for most rows."""
    s = parse([])
    tokenizer = AutoTokenizer.from_pretrained(HERE / "data" / "model")
    rows, rng = load_data(s, Tokenize(tokenizer, s.max_prompt_len, s.max_len))[0], np.random.default_rng(0)
    spans = [(choose_segment(len(row.chosen), s.segment_len, rng), len(row.chosen)) for row in rows]
    assert np.mean([start > 0 and stop < n for (start, stop), n in spans]) > 0.75


def test_demo_has_something_to_learn_from():
    """At the demo's start fewer than 60% of B' equal B, and more than half of the others fail the check."""
    s = parse([])
    model, tokenizer = load_model(s, World(2))
    tokenize = Tokenize(tokenizer, s.max_prompt_len, s.max_len, use_rejected=False)
    rows, ends = load_data(s, tokenize)[0], end_token_ids(model, tokenizer, tokenize.turn_end)
    pairs = support.evaluate.write_pairs(s, model, rows, ends, [[row.number] for row in rows], torch.Generator().manual_seed(0), 1)
    tallies = pair_statistics(pairs, rows, tokenizer, ends, s.segment_len)
    shares = {name: total / count for name, (total, count) in tallies.items()}
    assert shares["identical"] < 0.6 and shares["worse"] > 0.5


def test_shipped_model_is_small():
    """data/model is an ordinary Hugging Face folder in safetensors, under 10 MB."""
    folder = HERE / "data" / "model"
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) < 10e6
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"


def test_model_is_made_from_nothing(tmp_path, monkeypatch):
    """data/make_tokenizer.py writes the shipped tokenizer and configuration again, and recipes/demo-sft.txt starts from
    those two alone, without weights."""
    script = loaded(HERE / "data" / "make_tokenizer.py")
    (tmp_path / "train.jsonl").write_bytes((HERE / "data" / "train.jsonl").read_bytes())
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    script.main()
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "model" / name).read_text() == (HERE / "data" / "model" / name).read_text()
    made, shipped = (json.loads((folder / "model" / "config.json").read_text()) for folder in (tmp_path, HERE / "data"))
    same = made.keys() - {"dtype", "transformers_version"}
    assert {k: made[k] for k in same} == {k: shipped.get(k) for k in same}
    train.train(parse([f"@{HERE}/recipes/demo-sft.txt", "--model", str(tmp_path / "model"), *"--steps 1 --eval_rows 4 --batch_size 2 --print_every 0".split(),
                       "--out", str(tmp_path / "out")]))
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()


def test_rows_of_a_file(tmp_path, tokenizer):
    """--rows takes a part of the file, numbered as in the whole; a part that is empty or misspelled is refused."""
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q {i}", "chosen": "a"}) + "\n" for i in range(40)))
    def numbers(part):
        s = parse(["--model", "m", "--data", str(file), "--rows", part])
        return [row.number for row in load_data(s, Tokenize(tokenizer, 100, 200, use_rejected=False))[0]]
    assert numbers("30:") == list(range(30, 40)) and numbers(":3") == [0, 1, 2] and numbers("5:7") == [5, 6]
    for part in ("50:", "1-3"):
        with pytest.raises(UserError, match="--rows"):
            numbers(part)


def test_check_worked_example():
    """matches_check(): every match counts, in order."""
    assert matches_check("[0-9]+", "2 + 3 = 5.", "2+3=5") and not matches_check("[0-9]+", "2+3=6", "2+3=5")


# ------------------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Flags of a run that takes about a second: a tiny random model with the demo's tokenizer, a few embedded rows."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = AutoTokenizer.from_pretrained(HERE / "data" / "model")
    end = tokenizer.eos_token_id
    tiny(vocab_size=len(tokenizer), pad_token_id=end, eos_token_id=end, bos_token_id=None).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name in ("train", "heldout"):
        lines = (HERE / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:40 if name == "train" else 12]))
    return (f"--model {folder}/model --data {folder}/train.jsonl --eval_data {folder}/heldout.jsonl --max_len 160 --batch_size 4 "
            "--micro_batch 2 --steps 6 --lr 1e-3 --segment_len 6 --max_new_tokens 8 --ref_every 3 --warmup 0 --threads 1").split()


def run(flags, out, *more):
    """One run in this process -> its records, its summary and the folder."""
    threads = torch.get_num_threads()
    own = [*more] if "--buffer_size" in more or "--loss sft" in " ".join(more) or {"data", "iteration"} & set(more) else ["--buffer_size", "8", *more]
    train.train(parse([*flags, "--out", str(out), *own]))
    torch.set_num_threads(threads)
    return [json.loads(line) for line in (out / "metrics.jsonl").open()], json.loads((out / "summary.json").read_text())


AXES = ["--loss orpo", "--loss dpo", "--loss dpo --ref policy", "--loss dpo --ref fixed", "--loss sft", "--rejected policy",
        "--rejected policy --loss dpo --buffer_size 0", "--rejected data", "--rejected data --loss dpo --ref ema",
        "--rejected iteration --iterations 2 --loss dpo", "--rejected iteration --iterations 2 --loss orpo --segment_len 6",
        "--segment_len 0", "--num_rejected 4", "--num_rejected 2 --buffer_size 0", "--segment_eos forbid --nll_on prompt",
        "--ema_decay 0.9 --ema_every 1 --temperature 1 --top_k 0 --top_p 1", "--skip_identical --temperature 0",
        "--optimizer rmsprop --schedule cosine", "--schedule inverse_sqrt --max_grad_norm 0 --weight_decay 0.1"]


@pytest.mark.parametrize("flags", AXES)
def test_axes(flags, tiny_run, tmp_path):
    """Every axis of the methods table runs from the command line, alone and combined: finite losses, one flat record a
    step, a summary before and after, and a folder that transformers loads."""
    records, summary = run(tiny_run, tmp_path, *flags.split())
    assert [r["step"] for r in records] == list(range(1, 7))
    assert all(math.isfinite(v) for r in records for v in r.values())
    assert set(summary["before"]) == set(summary["after"]) >= {"exact_match", "nll", "chosen_logps"}
    parts_of_time = [records[-1][f"seconds_{part}"] for part in ("generate", "score", "update")]
    assert records[-1]["seconds"] == pytest.approx(sum(parts_of_time))
    assert ("identical" in records[0]) == ("--rejected data" not in flags and "--loss sft" not in flags)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path / "final").eos_token_id
    assert json.loads((tmp_path / "settings.json").read_text())["steps"] == 6


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()


@pytest.mark.parametrize("flags", ["--rejected ema", "--rejected iteration --iterations 2 --loss dpo", "--loss sft"])
def test_rejected_column_is_ignored(flags, tiny_run, tmp_path):
    """SAPO, SPIN and SFT never look at the rejected column: with nonsense in its place, or without it, every metric and
    weight is the same, but for what is measured on the held-out rows' own pairs."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("train", "heldout"):
        source = Path(tiny_run[tiny_run.index("--data" if name == "train" else "--eval_data") + 1])
        rows = [json.loads(line) for line in source.open()]
        for i, row in enumerate(rows):
            row.update(rejected=[]) if i % 2 else row.pop("rejected")
        (bare / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with_column = run(tiny_run, tmp_path / "a", *flags.split())
    without = run([*tiny_run, "--data", str(bare / "train.jsonl"), "--eval_data", str(bare / "heldout.jsonl")], tmp_path / "b", *flags.split())
    untimed = [[{k: v for k, v in r.items() if "seconds" not in k and "memory" not in k} for r in records] for records, _ in (with_column, without)]
    own = {when: {k: v for k, v in result.items() if not k.startswith("data_")} for when, result in with_column[1].items()}
    assert untimed[0] == untimed[1] and own == without[1]
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "a").values(), weights(tmp_path / "b").values()))
    assert not torch.equal(next(iter(weights(tmp_path / "a").values())), next(iter(AutoModelForCausalLM.from_pretrained(tiny_run[1]).state_dict().values())))


def test_algorithm_1_order(tiny_run, tmp_path, monkeypatch):
    """The loop is Algorithm 1: pairs are written by the EMA model, stored, drawn; the EMA model moves on every second
    optimizer step and only then, and is asked once for the steps in between; the buffer never holds more than its size."""
    events, updates = [], []
    make, add, sample, update = support.evaluate.make_pairs, ReplayBuffer.add, ReplayBuffer.sample, EMA.update
    monkeypatch.setattr(support.evaluate, "make_pairs", lambda model, *a, **k: events.append(("write", model)) or make(model, *a, **k))
    monkeypatch.setattr(ReplayBuffer, "add", lambda self, item: (events.append(("store", len(self))), add(self, item))[1])
    monkeypatch.setattr(ReplayBuffer, "sample", lambda self, k: (events.append(("draw", k)), sample(self, k))[1])
    monkeypatch.setattr(EMA, "update", lambda self, model: (events.append(("ema", self.model)), updates.append(update(self, model)))[1])
    run(tiny_run, tmp_path)
    events = events[1:]                                     # the first was the evaluation's own held-out pairs
    assert [name for name, _ in events] == (["write"] + (["store"] * 4 + ["draw", "ema"]) * 2) * 3
    ema_model = next(thing for name, thing in events if name == "ema")
    assert all(thing is ema_model for name, thing in events if name in ("write", "ema"))
    assert updates == [False, True] * 3 and max(size for name, size in events if name == "store") <= 8


def test_bf16(tiny_run, tmp_path, monkeypatch):
    """--dtype bf16: losses close to fp32's and not equal to them, pairs written by a bf16 copy that is the EMA model
    rounded, and everything that is kept is fp32."""
    losses = [run(tiny_run, tmp_path / dtype, "--rejected", "data", "--dtype", dtype)[0] for dtype in ("fp32", "bf16")]
    assert losses[0][0]["loss"] == pytest.approx(losses[1][0]["loss"], rel=0.02) and losses[0][0]["loss"] != losses[1][0]["loss"]
    written, emas, make, update = [], [], support.evaluate.make_pairs, EMA.update
    monkeypatch.setattr(support.evaluate, "make_pairs", lambda model, *a, **k: written.append([p.clone() for p in model.parameters()]) or make(model, *a, **k))
    monkeypatch.setattr(EMA, "update", lambda self, model: (update(self, model), emas.append([p.clone() for p in self.model.parameters()]))[0])
    run(tiny_run, tmp_path / "sapo", "--dtype", "bf16", "--loss", "dpo")
    for copied, ema in zip(written[2:], (emas[1], emas[3])):        # written[0]: held-out pairs; the EMA model moves at steps 2 and 4
        assert all(a.dtype == torch.bfloat16 and b.dtype == torch.float32 and torch.equal(a, b.bfloat16()) for a, b in zip(copied, ema))
    assert len(written) == 4 and all(w.dtype == torch.float32 for w in weights(tmp_path / "sapo").values())


def test_grad_checkpoint_changes_nothing(tiny_run, tmp_path):
    """--grad_checkpoint: the same weights, from layers that run twice; without dropout, even where a layer has its own."""
    for flags in ([], ["--grad_checkpoint"]):
        run(tiny_run, tmp_path / str(len(flags)), "--loss", "dpo", *flags)
    for one, other in zip(weights(tmp_path / "0").values(), weights(tmp_path / "1").values()):
        assert torch.allclose(one, other, atol=1e-6)
    for name, layers in (("llama", lambda m: m.model.layers), ("opt", lambda m: m.model.decoder.layers)):
        model, calls = tiny(name, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5), []
        expected = torch.stack(pair_logps(model, some_pairs()))
        checkpoint_layers(model)
        layers(model)[0].self_attn.register_forward_hook(lambda *a: calls.append(1))
        found = torch.stack(pair_logps(model, some_pairs()))
        assert torch.allclose(expected, found, atol=1e-6) and len(calls) == 1
        found.sum().backward()
        assert len(calls) == 2


@pytest.mark.slow
def test_compile_changes_nothing(tiny_run, tmp_path):
    """--compile: the same losses, in a run that generates and evaluates too."""
    records = []
    for flags in ([], ["--compile"]):
        done = command(*tiny_run, "--buffer_size", "8", "--temperature", "0", "--out", str(tmp_path / str(len(flags))), *flags)
        assert done.returncode == 0, done.stderr
        records.append([json.loads(line)["loss"] for line in (tmp_path / str(len(flags)) / "metrics.jsonl").open()])
    assert records[0] == pytest.approx(records[1], rel=1e-4)


@pytest.mark.parametrize("ema_every, grouped", [(2, 3), (3, 2), (4, 2)])
def test_grouping_changes_nothing(ema_every, grouped, tiny_run, tmp_path, monkeypatch):
    """Segments of all steps between two EMA refreshes are written in one batch, and each step stores what it would have
    stored alone: greedy, the buffer gets the same pairs at every step, and the weights end the same."""
    calls, added = [], []
    make, add = support.evaluate.make_pairs, ReplayBuffer.add
    monkeypatch.setattr(support.evaluate, "make_pairs", lambda model, examples, *a, **k: calls[-1].append(len(examples)) or make(model, examples, *a, **k))
    monkeypatch.setattr(ReplayBuffer, "add", lambda self, item: (added[-1].append(item), add(self, item))[1])
    for room in (4, 64):
        calls.append([]), added.append([])
        run(tiny_run, tmp_path / str(room), "--temperature", "0", "--ema_every", str(ema_every), "--generate_batch", str(room))
    assert calls[0][3:] == [4] * 6 and calls[1][1:] == [4 * ema_every] * grouped                   # before: held-out pairs
    assert [pair.step for pair in added[0]] == sorted([*range(1, 7)] * 4) and added[0] == added[1]
    assert any(pair.chosen != pair.rejected for pair in added[0])
    for one, other in zip(weights(tmp_path / "4").values(), weights(tmp_path / "64").values()):
        assert torch.equal(one, other)


def test_segments_do_not_depend_on_the_batch():
    """Where a row's segment lies depends on its own seed alone: not on the other rows, their order, or the batch size."""
    s, model = parse("--model m --data d --segment_len 5 --temperature 0".split()), tiny()
    rng = np.random.default_rng(4)
    rows = [Row(random_ids(rng, n), random_ids(rng, n + 9), None, n, None, "") for n in (9, 3, 14, 5, 7)]
    def pairs(rows, size):
        seeds = [[row.number] for row in rows]
        return support.evaluate.write_pairs(dataclasses.replace(s, generate_batch=size), model, rows, [2], seeds, None, 2)
    together, reversed_one_by_one = pairs(rows, 64), pairs(rows[::-1], 1)
    assert [pair.row for pair in together] == [n for n in (9, 3, 14, 5, 7) for _ in range(2)]
    assert sorted(together) == sorted(reversed_one_by_one) and len({pair.start for pair in together}) > 2


@pytest.mark.parametrize("ref, fresh", [("fixed", [1]), ("policy", [1, 4]), ("ema", [1])])
def test_reference_refreshes(ref, fresh, tiny_run, tmp_path):
    """Table 4's references: DPO's loss is log 2 exactly when the reference equals the policy, that is at the first step,
    and with policy-ref after each refresh (every 3 steps here)."""
    records, _ = run(tiny_run, tmp_path, "--loss", "dpo", "--ref", ref)
    assert [r["step"] for r in records if abs(r["loss"] - math.log(2)) < 1e-6] == fresh


def test_ema_reference_follows_the_ema(tiny_run, tmp_path, monkeypatch):
    """ema-ref: after ref_every steps the reference holds the EMA model's weights, not the policy's."""
    seen = []
    learn = train.learn
    def watch(s, world, scorer, reference, *rest):
        seen.append((copy.deepcopy(reference.policy.state_dict()), copy.deepcopy(scorer.policy.state_dict())))
        return learn(s, world, scorer, reference, *rest)
    monkeypatch.setattr(train, "learn", watch)
    emas = []
    update = EMA.update
    monkeypatch.setattr(EMA, "update", lambda self, model: (update(self, model), emas.append(copy.deepcopy(self.model.state_dict())))[0])
    run(tiny_run, tmp_path, "--loss", "dpo", "--ref", "ema")
    def same(a, b):
        return all(torch.equal(a[k], b[k]) for k in a)
    assert same(seen[0][0], seen[2][0]) and not same(seen[2][0], seen[3][0])
    assert same(seen[3][0], emas[2]) and not same(seen[3][0], seen[3][1]) and same(seen[3][0], seen[5][0])


def test_spin(tiny_run, tmp_path, monkeypatch):
    """SPIN: each iteration answers its prompts once with the policy frozen at its start, uses that policy as reference
    (loss log 2 at its first step), starts the optimizer afresh and takes its own lr; within it an answer never changes."""
    made, learned, optimizers = [], [], []
    make, learn, make_optimizer = support.evaluate.make_pairs, train.learn, train.make_optimizer
    monkeypatch.setattr(support.evaluate, "make_pairs", lambda model, examples, *a, **k: made.extend(e.row for e in examples) or make(model, examples, *a, **k))
    monkeypatch.setattr(train, "make_optimizer", lambda *a: optimizers.append(len(learned)) or make_optimizer(*a))
    monkeypatch.setattr(train, "learn", lambda s, w, sc, ref, pairs, beta: (
        learned.append(([(p.row, tuple(p.rejected)) for p in pairs], beta)), learn(s, w, sc, ref, pairs, beta))[1])
    records, _ = run(tiny_run, tmp_path, *("--rejected iteration --iterations 2 --loss dpo --lr 1e-3 5e-4 --beta 0.1 5 --steps 24 --schedule constant").split())
    used = [sorted({row for pairs, _ in half for row, _ in pairs}) for half in (learned[:12], learned[12:])]
    assert sorted(made[12:]) == sorted(used[0] + used[1]) and used[0] == [*range(40)]       # the first 12 are the evaluation's
    assert [r["step"] for r in records if abs(r["loss"] - math.log(2)) < 1e-6] == [1, 13]
    assert [r["lr"] for r in records] == [1e-3] * 12 + [5e-4] * 12 and [beta for _, beta in learned] == [0.1] * 12 + [5.0] * 12
    assert optimizers == [0, 0, 12]                         # one in the set-up, one an iteration
    for half in (learned[:12], learned[12:]):
        answers = {}
        for pairs, _ in half:
            assert all(answers.setdefault(row, answer) == answer for row, answer in pairs)


def test_spin_answers_no_more_than_it_trains_on(tiny_run, tmp_path, monkeypatch):
    """Where the steps of an iteration come to fewer rows than there are, only those are answered, and each once."""
    made, learned, make, learn = [], [], train.write_pairs, train.learn
    monkeypatch.setattr(train, "write_pairs", lambda s, model, rows, *a: made.append([row.number for row in rows]) or make(s, model, rows, *a))
    monkeypatch.setattr(train, "learn", lambda s, w, sc, ref, pairs, beta: learned.append({p.row for p in pairs}) or learn(s, w, sc, ref, pairs, beta))
    run(tiny_run, tmp_path, *"--rejected iteration --iterations 2 --loss dpo --steps 5".split())
    assert [len(rows) for rows in made] == [2 * 4, 3 * 4] and [set(rows) for rows in made] == [set.union(*learned[:2]), set.union(*learned[2:])]


def test_spin_iterations_without_steps(tiny_run, tmp_path):
    """Without --steps each SPIN iteration takes --epochs of the data, also where a batch holds more than all rows."""
    flags = [f for i, f in enumerate(tiny_run) if f != "--steps" and tiny_run[i - 1] != "--steps"]
    records, _ = run(flags, tmp_path, *"--rejected iteration --iterations 3 --epochs 1 --batch_size 64 --lr 1e-3 2e-3 3e-3 --schedule constant".split())
    assert [r["lr"] for r in records] == [1e-3, 2e-3, 3e-3]


def test_epochs_are_permutations():
    """Each epoch sees every row once, in another order; processes share a batch without overlap; the seed decides."""
    s, rows = parse("--model m --data d --batch_size 6 --seed 1".split()), list(range(30))
    class Rank:
        size = 2
        def __init__(self, rank):
            self.rank = rank
    steps = [[train.rows_of_step(s, rows, step, Rank(r)) for r in (0, 1)] for step in range(1, 11)]
    epochs = [[row for both in steps[i:i + 5] for part in both for row in part] for i in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == rows and epochs[0] != epochs[1]
    other = dataclasses.replace(s, seed=2)
    assert train.rows_of_step(other, rows, 1, Rank(0)) != steps[0][0]


def test_learning_rate():
    """Linear warm-up to the peak, then each schedule's own course; warm-up in steps or as a share."""
    def course(**changes):
        s = dataclasses.replace(parse(["--model", "m", "--data", "d"]), **changes)
        return [train.learning_rate(s, step, 10, 1.0) for step in range(1, 11)]
    assert course(schedule="constant", warmup=4) == [0.25, 0.5, 0.75] + [1.0] * 7
    assert course(schedule="linear", warmup=0.2) == pytest.approx([0.5, 1] + [1 - i / 9 for i in range(1, 9)])
    assert course(schedule="inverse_sqrt", warmup=4)[-1] == pytest.approx(math.sqrt(4 / 10))
    assert course(schedule="cosine", warmup=0)[4] == pytest.approx((1 + math.cos(math.pi * 5 / 11)) / 2)


def test_column_pair():
    """A row's own rejected response becomes a pair that starts where it leaves the chosen one."""
    row = Row([1], [5, 6, 7, 2], [5, 6, 8, 2], 3, None, "")
    assert column_pair(row) == Pair([1], [5, 6, 7, 2], [5, 6, 8, 2], 2, 3)
    assert column_pair(dataclasses.replace(row, rejected=None)).start == 4


def test_printed_pairs_are_told_apart_and_harmless():
    """A, B, B' and C are found again from a pair; control characters in generated text never reach the terminal."""
    pair = Pair([1], [10, 11, 12, 13, 2], [10, 21, 22, 13, 2], 1)
    assert parts(pair, [2], 2) == ([10], [11, 12], [21, 22], [13, 2], False)
    assert parts(pair._replace(rejected=[10, 2]), [2], 2) == ([10], [11, 12], [2], [13, 2], True)
    assert ended_early(pair._replace(rejected=[10, 21, 2]), [2], 2) and not ended_early(pair, [2], 2)
    assert printable("a\x1b[31mb\nc\x00") == "a\\x1b[31mb\\nc\\x00"


def test_added_template_tokens_are_saved(tmp_path, tiny_run):
    """A model that lacks the template's tokens gets them, resized before any copy is made, and saves them."""
    source = tmp_path / "bare"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    bare = Tokenizer(models.WordLevel({"</s>": 0, "x": 1, "y": 2, "?": 3}, unk_token="?"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>").save_pretrained(source)
    tiny(vocab_size=4, pad_token_id=None, eos_token_id=0, bos_token_id=None).save_pretrained(source)
    data = tmp_path / "d.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y y y"}]}\n' * 60)
    run(["--model", str(source), "--data", str(data), *"--chat_template chatml --max_len 32 --batch_size 2 --steps 2 --segment_len 2 --loss dpo".split()], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "final")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(tokenizer) == 6 == model.get_input_embeddings().num_embeddings
    assert sorted(model.generation_config.eos_token_id) == [0, end] and "im_start" in tokenizer.chat_template


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"vocab_size": 700}, {"pad_token_id": None}])
def test_embeddings_of_all_kinds(changes, tiny_run, tmp_path):
    """Tied embeddings stay tied, a vocabulary padded beyond the tokenizer's keeps its size, and a missing pad token is no
    matter: a whole run, saved and loaded again."""
    shutil.copytree(tiny_run[1], tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model", **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    for loss in ("dpo", "orpo"):
        records, _ = run([*tiny_run, "--model", str(tmp_path / "model")], tmp_path / loss, "--loss", loss, "--steps", "2")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / loss / "final")
        assert all(math.isfinite(record["loss"]) for record in records)
        assert saved.get_input_embeddings().num_embeddings == config.vocab_size
        assert (saved.get_input_embeddings().weight is saved.get_output_embeddings().weight) == config.tie_word_embeddings


def test_several_end_tokens(tiny_run, tmp_path):
    """As with Llama 3: the template ends turns with one token, the tokenizer's EOS is another and the model's generation
    config knows both. Responses end with the template's; both end generation, in training and in the saved folder."""
    shutil.copytree(tiny_run[1], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_run[1])
    eot = tokenizer.convert_tokens_to_ids("<|im_end|>")
    eos = next(i for i in range(len(tokenizer)) if i != eot and tokenizer.decode([i]).isalpha())
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, eot]}))
    found = Tokenize(AutoTokenizer.from_pretrained(tmp_path / "model"), 100, 200)({"messages": [USER, ANSWER]}, "here", 0)
    assert found.chosen[-1] == eot and eos not in found.chosen[-2:]
    run([*tiny_run, "--model", str(tmp_path / "model")], tmp_path / "out", "--steps", "1")
    saved = json.loads((tmp_path / "out" / "final" / "generation_config.json").read_text())
    assert sorted(saved["eos_token_id"]) == sorted([eos, eot])


def test_odd_model_folders(tiny_run, tmp_path):
    """A generation config that transformers loads but refuses to save costs no run its weights; a tokenizer with ids
    beyond the embedding is refused with a sentence, before any folder is made."""
    odd = tmp_path / "odd"
    AutoModelForCausalLM.from_pretrained(tiny_run[1]).save_pretrained(odd)
    tokenizer = AutoTokenizer.from_pretrained(tiny_run[1])
    tokenizer.save_pretrained(odd)
    (odd / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9, "eos_token_id": 5}')
    run([*tiny_run, "--model", str(odd)], tmp_path / "saved", "--steps", "1")
    assert (tmp_path / "saved" / "final" / "model.safetensors").exists()
    tiny(vocab_size=50, eos_token_id=1, pad_token_id=1, bos_token_id=None).save_pretrained(odd)
    with pytest.raises(UserError, match="embedding has 50"):
        run([*tiny_run, "--model", str(odd)], tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


# ------------------------------------------------------------------------------------------------ the command line

def command(*arguments, launcher=(sys.executable,), cwd=None):
    """Run train.py as a user does."""
    return subprocess.run([*launcher, str(HERE / "train.py"), *arguments], capture_output=True, text=True, cwd=cwd, timeout=280)


def quick_command(*arguments, capfd):
    """The same in a forked child, without the seconds that imports take; returns its exit status and what it printed."""
    status = status_of(forked(lambda: (setattr(sys, "argv", ["train.py", *arguments]), train.main())))
    return status, capfd.readouterr()


def test_command_line(tiny_run, tmp_path, monkeypatch, capfd):
    """A real run from another folder: exit 0, a header, a pair, a table; a second run gets a folder of its own, and what
    is there is never overwritten."""
    flags = [*tiny_run, "--buffer_size", "8", "--print_every", "3", "--eval_every", "2"]
    done = command(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("parameters", "12 held out", "settings", "  B' ", "exact_match", "difference"):
        assert words in done.stdout
    monkeypatch.chdir(tmp_path)
    assert quick_command(*flags, capfd=capfd)[0] == 0
    for number in ("0001", "0002"):
        assert (tmp_path / "runs" / number / "final" / "model.safetensors").exists()
    records = [json.loads(line) for line in (tmp_path / "runs/0001/metrics.jsonl").open()]
    assert [r["step"] for r in records if "eval_nll" in r] == [2, 4]
    status, said = quick_command(*flags, "--out", "runs/0001", capfd=capfd)
    assert status == 2 and "holds a run already" in said.err and "Traceback" not in said.err


@pytest.mark.parametrize("flags, words", [
    (["--los", "orpo"], "unrecognized"), (["--data", "nowhere.jsonl", "--model", "nowhere"], "nowhere"), (["@nowhere.txt"], "nowhere.txt"),
    (["--loss", "sft", "--ref", "ema"], "makes no sense"), (["--model", "nowhere", "--data", str(HERE / "data" / "heldout.jsonl")], "not a causal"),
])
def test_mistakes_get_a_sentence(flags, words, tmp_path, monkeypatch, capfd):
    """A user's mistake: exit status 2, a sentence that names it, no traceback, no output folder."""
    monkeypatch.chdir(tmp_path)
    status, said = quick_command(*flags, capfd=capfd)
    assert status == 2 and words in said.err and "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def test_two_processes_equal_one(tiny_run, tmp_path):
    """Plain ORPO on two processes gives the losses and weights of one process on the same global batch."""
    flags = ["--rejected", "data", "--steps", "4"]
    run(tiny_run, tmp_path / "one", *flags)
    done = command(*tiny_run, *flags, "--out", str(tmp_path / "two"), launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        for name in ("loss", "nll", "chosen_logps", "rejected_logps", "reward_accuracy", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    for a, b in zip(weights(tmp_path / "one").values(), weights(tmp_path / "two").values()):
        assert torch.allclose(a, b, atol=1e-5)


def test_more_processes_than_gpus_are_refused(monkeypatch, capsys):
    """--nproc_per_node 2 on a machine with one GPU: a sentence, and exit status 2."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2 and "2 processes on this machine, which has 1 GPU" in capsys.readouterr().err


def test_a_vision_tower_is_left_alone(tiny_run, tmp_path):
    """A model that could read images too (Gemma 3's larger ones) trains as the text model it is used as, in one process and
    in two; what it would see with stays as it was."""
    tokenizer, size = AutoTokenizer.from_pretrained(tiny_run[1]), dict(hidden_size=32, intermediate_size=64, num_attention_heads=4)
    ids = {name: len(tokenizer) + i for i, name in enumerate(("image_token_index", "boi_token_index", "eoi_token_index"))}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma3"](
        text_config=dict(vocab_size=len(tokenizer) + 8, num_hidden_layers=2, num_key_value_heads=2, head_dim=8, initializer_range=0.2, **size),
        vision_config=dict(num_hidden_layers=1, image_size=28, patch_size=14, **size), mm_tokens_per_image=1, **ids)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = [*tiny_run, "--model", str(tmp_path / "model"), "--rejected", "data", "--steps", "3"]
    train.train(parse([*flags, "--out", str(tmp_path / "one")]))
    assert two_processes(lambda: train.train(parse([*flags, "--out", str(tmp_path / "two")]))) == [0, 0]
    check_close_runs(tmp_path / "one", tmp_path / "two")
    before, after = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict(), weights(tmp_path / "two")
    assert {name for name in after if not torch.equal(before[name], after[name])} == {name for name in after if "vision" not in name and "multi_modal" not in name}


def test_every_metric_is_explained(tiny_run, tmp_path):
    """The README's glossary has every key of metrics.jsonl and of summary.json, and no other."""
    glossary = (HERE / "README.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    explained = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in glossary.splitlines() if line.startswith("|"))))
    records, summary = run(tiny_run, tmp_path, "--steps", "12", "--eval_every", "2")
    logged = set().union(*records)
    assert explained == {name for name in logged if not name.startswith("eval_")}
    assert {f"eval_{name}" for name in summary["before"]} == {name for name in logged if name.startswith("eval_")}
    assert all(f"`{name}`" in glossary for name in summary["before"])


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--loss dpo", "--rejected iteration --iterations 2 --loss dpo", "--num_rejected 2 --skip_identical"])
def test_two_processes_generate(flags, tiny_run, tmp_path):
    """Methods that generate run on two processes: the buffer's size over both does not depend on their number, and the
    losses stay finite."""
    more = [] if "iteration" in flags else ["--buffer_size", "12"]
    done = command(*tiny_run, *more, *flags.split(), "--out", str(tmp_path / "out"), launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert len(records) == 6 and all(math.isfinite(v) for r in records for v in r.values())
    if more and "skip" not in flags:
        assert records[-1]["buffer_size"] == 12


@pytest.mark.slow
def test_the_demo(tmp_path):
    """The main job, as the README has it: under 4 minutes, clearly better than its start, and it says what it did."""
    start = time.perf_counter()
    done = command(cwd=tmp_path)
    assert time.perf_counter() - start < 240
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/0001/summary.json").read_text())
    assert 0.3 < summary["before"]["exact_match"] < 0.75
    assert summary["after"]["exact_match"] > summary["before"]["exact_match"] + 0.03       # the spread over seeds is below that
    assert "exact_match" in done.stdout


# ------------------------------------------------------------------------------------------- among other tools

def test_model_card(tiny_run, tmp_path):
    """The saved folder says what the model is: base, data, method, settings, the paper; no path of this machine."""
    run(tiny_run, tmp_path, "--loss", "dpo", "--steps", "1")
    card = (tmp_path / "final" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name") and "# SAPO-DPO of model" in card and "arxiv.org/abs/2405.20830" in card
    assert "| segment_len | 6 |" in card and "`train.jsonl`" in card and "moving average" in card and str(tmp_path) not in card
    s = parse(["--model", "meta-llama/Meta-Llama-3-8B", "--data", "org/rows:train_sft", "--loss", "sft"])
    assert "base_model: meta-llama/Meta-Llama-3-8B\ndatasets: org/rows\n" in model_card(s, 5) and "Rejected" not in model_card(s, 5)


def test_tensorboard(tiny_run, tmp_path, monkeypatch):
    """--tensorboard writes every value of metrics.jsonl; without the package it is refused with a sentence, before anything."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    with pytest.raises(UserError, match="pip install tensorboard"):
        parse([*tiny_run, "--tensorboard"])
    written = []
    board = types.SimpleNamespace(add_scalar=lambda *record: written.append(record), close=lambda: written.append("closed"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name == "tensorboard" else found(name))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: board))
    records, _ = run(tiny_run, tmp_path, "--tensorboard", "--steps", "2")
    assert written[:-1] == [(name, value, record["step"]) for record in records for name, value in record.items()]
    assert written[-1] == "closed"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_says_what_to_lower(error, tiny_run, tmp_path, monkeypatch, capfd):
    """Memory that runs out, on a GPU or a CPU, ends the run with status 4 and the flags to lower; no traceback."""
    monkeypatch.setattr(train, "learn", lambda *a: (_ for _ in ()).throw(error))
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny_run, "--buffer_size", "8", "--out", str(tmp_path / "out")])
    assert status_of(forked(train.main)) == 4
    said = capfd.readouterr().err
    assert "--micro_batch" in said and "--grad_checkpoint" in said and "--shard" in said and "Traceback" not in said


MT_BENCH = {"question_id": 81, "category": "writing", "turns": ["Put 12 at the end.", "Now sort it."]}


def test_answer_files(tiny_run, tmp_path):
    """bench/answers.py writes what FastChat's and AlpacaEval's judges read: both turns of each question; one output each."""
    answers = loaded(HERE / "bench" / "answers.py")
    for bench, question in (("mt-bench", [MT_BENCH, MT_BENCH | {"question_id": 82, "category": "math"}]), ("alpaca-eval", [{"instruction": "Sort 3 1 2.", "dataset": "d"}])):
        (tmp_path / f"{bench}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in question))
        assert status_of(forked(answers.main, [bench, tiny_run[1], str(tmp_path / f"{bench}.jsonl"), "--max_new_tokens", "5",
                                               str(tmp_path / "new" / f"{bench}-tiny.json")])) == 0
    lines = [json.loads(line) for line in (tmp_path / "new" / "mt-bench-tiny.json").open()]
    assert [line["question_id"] for line in lines] == [81, 82] and all(line["model_id"] == "mt-bench-tiny" for line in lines)
    assert all(len(line["choices"][0]["turns"]) == 2 and line["choices"][0]["index"] == 0 and line["answer_id"] for line in lines)
    answer, = json.loads((tmp_path / "new" / "alpaca-eval-tiny.json").read_text())
    assert answer["instruction"] == "Sort 3 1 2." and answer["generator"] == "alpaca-eval-tiny" and answer["dataset"] == "d"
    assert isinstance(answer["output"], str)


# ------------------------------------------------------------------------------------------ never losing a run

class StopAfter:
    """Stands for a signal that comes during step n: the loop asks once a step."""
    training = False

    def __init__(self, step: int):
        self.left = step

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left <= 0


def untimed(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{k: v for k, v in r.items() if "seconds" not in k and "memory" not in k} for r in records]


def same_state(a, b) -> bool:
    """Two states of plain types and tensors, equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def check_same_run(one, other, processes: int = 1):
    """The same metrics, final weights, and everything else in the last checkpoint: optimizer, EMA, reference, buffers."""
    assert untimed(one) == untimed(other)
    assert all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(other).values()))
    last = sorted((one / "checkpoints").iterdir())[-1].name
    for name in ["shared.pt", *(f"rank{r}.pt" for r in range(processes))]:
        a, b = (torch.load(folder / "checkpoints" / last / name, weights_only=True) for folder in (one, other))
        assert same_state(a, b), name


def own_buffer(flags: str) -> list[str]:
    return [] if {"data", "iteration", "sft", "--buffer_size"} & set(flags.split()) else ["--buffer_size", "8"]


def one_thread():
    """In a forked child: OpenMP's threads are not there any more, and waiting for them would be for ever."""
    support.parallel.cores = lambda: 1
    torch.set_num_threads(1)


def forked(function, *arguments) -> int:
    """Run in a forked child, which needs no imports and so no time; returns its process id. It exits as train.py would."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            signal.alarm(300)       # one that hangs ends, and its test fails
            one_thread()
            function(*arguments)
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except UserError as error:
            status = error.status
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def two_processes(function, *arguments) -> list[int]:
    """function in two forked processes with torchrun's environment; returns their exit statuses."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]

    def rank(r: int):
        os.environ.update(RANK=str(r), WORLD_SIZE="2", LOCAL_RANK=str(r), LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
        function(*arguments)

    return [status_of(child) for child in [forked(rank, r) for r in (0, 1)]]


def check_close_runs(one, other):
    """The same losses and statistics at every step, and the same final weights, up to rounding."""
    for a, b in zip(untimed(one), untimed(other), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    check_close_weights(weights(one), weights(other))


def check_close_weights(a, b):
    """Equal up to rounding; of a few weights Adam turns a gradient of nearly nothing into a whole step either way."""
    assert a.keys() == b.keys()
    gaps = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert gaps.mean() < 1e-6 and (gaps > 1e-5).float().mean() < 1e-3, (gaps.mean(), gaps.max())


SHARDED = ["--loss dpo --ref ema", "--loss orpo --skip_identical --grad_checkpoint", "--rejected iteration --iterations 2 --loss dpo",
           "--rejected policy --optimizer rmsprop"]


@pytest.mark.parametrize("flags", SHARDED)
def test_shard_equals_ddp(flags, tiny_run, tmp_path):
    """--shard on two processes gives DDP's losses, pairs and weights, evaluations included, and saves the same folder."""
    flags = [*tiny_run, *own_buffer(flags), *flags.split(), "--save_every", "3"]
    for out, more in (("ddp", []), ("shard", ["--shard"])):
        assert two_processes(lambda: train.train(parse([*flags, *more, "--out", str(tmp_path / out)]))) == [0, 0]
    check_close_runs(tmp_path / "ddp", tmp_path / "shard")
    a, b = (json.loads((tmp_path / out / "summary.json").read_text()) for out in ("ddp", "shard"))
    assert a["after"] == pytest.approx(b["after"], rel=1e-3, abs=1e-4)
    a, b = ((tmp_path / out / "final" / "config.json").read_text() for out in ("ddp", "shard"))
    assert a == b
    last = "checkpoints/step-000006/shared.pt"
    a, b = (torch.load(tmp_path / out / last, weights_only=True) for out in ("ddp", "shard"))
    assert a.keys() == b.keys()
    check_close_weights(a["policy"], b["policy"])


def test_shard_in_bf16(tiny_run, tmp_path):
    """--shard --dtype bf16: losses close to fp32's and not equal to them, fp32 weights in the end."""
    flags = [*tiny_run, "--rejected", "data", "--loss", "orpo", "--grad_checkpoint"]
    for dtype in ("fp32", "bf16"):
        assert two_processes(lambda: train.train(parse([*flags, "--shard", "--dtype", dtype, "--out", str(tmp_path / dtype)]))) == [0, 0]
    a, b = ([r["loss"] for r in untimed(tmp_path / dtype)] for dtype in ("fp32", "bf16"))
    assert a != b and a == pytest.approx(b, rel=0.02)
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "bf16").values())


@pytest.mark.slow
def test_bf16_on_a_cpu_takes_no_more_memory_with_every_shape():
    """Batches of ever new lengths in bf16 on a CPU, where oneDNN would keep a kernel for each: memory stays within bounds."""
    done = subprocess.run([sys.executable, "-c", """
import torch
from support.parallel import World
world, layer, sizes = World(1, dtype="bf16"), torch.nn.Linear(512, 8000), []
for length in range(100, 250):
    with world.precision():
        layer(torch.ones(length, 512, requires_grad=True)).sum().backward()
    sizes.append(int(open("/proc/self/statm").read().split()[1]) * 4096 / 2 ** 20)
print(sizes[-1] - sizes[0])
"""], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 900         # MB; 560, and 1500 with torch's own setting


def test_shard_equals_one_process(tiny_run, tmp_path):
    """Plain DPO cut up among two processes gives the losses and weights of one process on the same global batch, with tied
    embeddings too."""
    flags = [*tiny_run, "--rejected", "data", "--loss", "dpo"]
    train.train(parse([*flags, "--out", str(tmp_path / "one")]))
    assert two_processes(lambda: train.train(parse([*flags, "--shard", "--out", str(tmp_path / "shard")]))) == [0, 0]
    check_close_runs(tmp_path / "one", tmp_path / "shard")
    tied = tmp_path / "tied"
    shutil.copytree(tiny_run[1], tied)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tied, tie_word_embeddings=True)).save_pretrained(tied)
    flags = [*flags, "--model", str(tied)]
    train.train(parse([*flags, "--out", str(tmp_path / "one tied")]))
    assert two_processes(lambda: train.train(parse([*flags, "--shard", "--out", str(tmp_path / "shard tied")]))) == [0, 0]
    check_close_runs(tmp_path / "one tied", tmp_path / "shard tied")


def test_shard_with_unequal_shares(tiny_run, tmp_path, monkeypatch):
    """Where one process has fewer pairs than the other, so fewer micro-batches, neither waits for ever, and a step is DDP's."""
    write = train.Writer.__call__
    monkeypatch.setattr(train.Writer, "__call__", lambda self, step: write(self, step)[self.world.rank:])
    flags = [*tiny_run, "--rejected", "data", "--micro_batch", "1", "--steps", "3"]
    for out, more in (("ddp", []), ("shard", ["--shard"])):
        assert two_processes(lambda: train.train(parse([*flags, *more, "--out", str(tmp_path / out)]))) == [0, 0]
    check_close_runs(tmp_path / "ddp", tmp_path / "shard")


@pytest.mark.parametrize("first, then", [("--shard", "--shard"), pytest.param("--no-shard", "--shard", marks=pytest.mark.slow),
                                         pytest.param("--shard", "--no-shard", marks=pytest.mark.slow)])
def test_shard_resumes(first, then, tiny_run, tmp_path):
    """A sharded run stopped after 3 steps and resumed equals one that never stopped, bit for bit; a checkpoint of DDP is one
    for --shard too, and the other way round."""
    flags = [*tiny_run, "--buffer_size", "8", "--loss", "dpo", "--ref", "ema", "--save_every", "6"]
    assert two_processes(lambda: train.train(parse([*flags, "--shard", "--out", str(tmp_path / "whole")]))) == [0, 0]
    assert two_processes(lambda: train.train(parse([*flags, first, "--out", str(tmp_path / "out")]), StopAfter(3))) == [3, 3]
    assert two_processes(lambda: train.train(parse(["--resume", str(tmp_path / "out"), then]))) == [0, 0]
    check_close_runs(tmp_path / "whole", tmp_path / "out")
    if first == then:
        check_same_run(tmp_path / "whole", tmp_path / "out", processes=2)


RESUMED = [*AXES, "--generate_batch 4", "--ema_every 4 --num_rejected 2", "--ema_every 3 --loss dpo --ref ema", "--dtype bf16 --grad_checkpoint"]


@pytest.mark.slow
def test_an_extended_run_equals_a_long_one(tiny_run, tmp_path):
    """A run of 3 steps extended to 6 equals one of 6, although step 4 shares its segments' batch with step 3."""
    flags = [*tiny_run, "--buffer_size", "8", "--schedule", "constant", "--save_every", "3", "--steps"]
    for out, steps in (("short", "3"), ("long", "6")):
        train.train(parse([*flags, steps, "--out", str(tmp_path / out)]))
    train.train(parse(["--resume", str(tmp_path / "short"), "--steps", "6"]))
    check_same_run(tmp_path / "short", tmp_path / "long")


def check_resume(flags, tiny_run, tmp_path):
    flags = [*tiny_run, "--save_every", "6", *own_buffer(flags), *flags.split()]
    threads = torch.get_num_threads()
    train.train(parse([*flags, "--out", str(tmp_path / "whole")]))
    with pytest.raises(Stopped):
        train.train(parse([*flags, "--out", str(tmp_path / "stopped")]), StopAfter(3))
    train.train(parse(["--resume", str(tmp_path / "stopped")]))
    torch.set_num_threads(threads)
    check_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("flags", ["--loss dpo --ref ema", "--rejected iteration --iterations 2 --loss dpo"])
def test_resume_is_exact(flags, tiny_run, tmp_path):
    """A run of 6 steps stopped after 3 and resumed equals one that never stopped, bit for bit: metrics, weights, optimizer,
    EMA, reference, buffer with its counts and random state; with segments of step 4 already written at the stop."""
    check_resume(flags, tiny_run, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("flags", RESUMED)
def test_resume_is_exact_for_every_method(flags, tiny_run, tmp_path):
    """The same for every method of the axes table."""
    check_resume(flags, tiny_run, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("flags", RESUMED)
def test_resume_is_exact_on_two_processes(flags, tiny_run, tmp_path):
    """The same with two processes, each with its own buffer."""
    flags = [*tiny_run, "--save_every", "6", *own_buffer(flags), *flags.split()]
    assert two_processes(lambda: train.train(parse([*flags, "--out", str(tmp_path / "whole")]))) == [0, 0]
    assert two_processes(lambda: train.train(parse([*flags, "--out", str(tmp_path / "stopped")]), StopAfter(3))) == [3, 3]
    assert two_processes(lambda: train.train(parse(["--resume", str(tmp_path / "stopped")]))) == [0, 0]
    check_same_run(tmp_path / "whole", tmp_path / "stopped", processes=2)


def test_resume_says_and_refuses(tiny_run, tmp_path, capsys):
    """Nothing old is picked up without being asked: a folder with a run is refused, --overwrite replaces it and leaves other
    files; --resume refuses what would make it another run and says what else differs; a finished run has nothing to do;
    one without a checkpoint starts over; another number of processes or other data are refused."""
    out, flags = tmp_path / "out", [*tiny_run, "--buffer_size", "8"]
    with pytest.raises(Stopped):
        train.train(parse([*flags, "--out", str(out)]), StopAfter(2))
    with pytest.raises(UserError, match="holds a run already"):
        run(tiny_run, out)
    for more, words in ((["--seed", "1"], "--seed 1 .was 0"), (["--batch_size", "2"], "--batch_size 2"), (["--model", str(HERE / "data" / "model")], "--model"),
                        (["--data", str(HERE / "data" / "heldout.jsonl")], "--data"), (["--loss", "dpo"], "--loss dpo"), (["--out", "other"], "own folder")):
        with pytest.raises(UserError, match=words):
            parse(["--resume", str(out), *more])
    for nowhere in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match="no run there"):
            parse(["--resume", str(nowhere)])
    manifest = out / "checkpoints" / "step-000002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(UserError, match="nproc_per_node 2"):
        train.train(parse(["--resume", str(out)]))
    manifest.write_text(manifest.read_text().replace('"processes": 2', '"processes": 1'))
    capsys.readouterr()
    train.train(parse([*flags, "--resume", str(out), "--out", str(out), "--lr", "5e-4"]))
    said = capsys.readouterr().out
    assert "going on after step 2" in said and "--lr [0.0005] (was [0.001])" in said
    assert len(untimed(out)) == 6
    train.train(parse(["--resume", str(out)]))
    assert "had finished" in capsys.readouterr().out
    (out / "notes.txt").write_text("mine")
    train.train(parse([*flags, "--out", str(out), "--overwrite", "--steps", "1"]))
    assert len(untimed(out)) == 1 and not (out / "checkpoints").exists() and (out / "notes.txt").read_text() == "mine"
    (out / "summary.json").unlink()
    (out / "metrics.jsonl").write_bytes((out / "metrics.jsonl").read_bytes() + b'{"step": 2, "lo')
    train.train(parse(["--resume", str(out)]))
    assert "starting over" in capsys.readouterr().out and len(untimed(out)) == 1
    data = Path(tiny_run[tiny_run.index("--data") + 1])
    text = data.read_text()
    with pytest.raises(Stopped):
        train.train(parse([*flags, "--out", str(tmp_path / "changed")]), StopAfter(1))
    try:
        data.write_text("".join(text.splitlines(keepends=True)[::-1]))
        with pytest.raises(UserError, match="not what it was"):
            train.train(parse(["--resume", str(tmp_path / "changed")]))
    finally:
        data.write_text(text)


def test_runs_that_are_extended_or_taken_back(tiny_run, tmp_path, capsys, monkeypatch):
    """A finished run is extended from its last checkpoint, and while that goes on it is not finished; without a checkpoint
    it is left as it is. Going back to an older checkpoint drops what came after it, and says so; a run can't be shortened; a
    copy that somebody made of a checkpoint is neither used nor in the way. A resumed run is found from any folder,
    reports no change where there is none, does not inherit --trust_remote_code, and --overwrite never removes its input."""
    out, flags = tmp_path / "out", [*tiny_run, "--buffer_size", "8", "--schedule", "constant", "--max_len", "400"]
    monkeypatch.chdir(Path(tiny_run[1]).parent)
    flags[flags.index("--model") + 1] = "model"                     # a relative path
    train.train(parse([*flags, "--out", str(out), "--save_every", "2", "--trust_remote_code"]))
    monkeypatch.chdir(tmp_path)
    assert parse(["--resume", str(out)]).trust_remote_code is False
    assert untimed(out)[-1]["step"] == 6
    with pytest.raises(Stopped):
        train.train(parse(["--resume", str(out), "--steps", "9"]), StopAfter(2))
    assert [r["step"] for r in untimed(out)] == list(range(1, 9))
    assert not (out / "summary.json").exists()
    capsys.readouterr()
    with pytest.raises(UserError, match="3 steps are fewer than the 8"):
        train.train(parse(["--resume", str(out), "--steps", "3"]))
    shutil.copytree(out / "checkpoints" / "step-000006", out / "checkpoints" / "step-000006-mine")
    with pytest.raises(UserError, match="not a checkpoint"):
        train.train(parse(["--resume", "out/checkpoints/step-000006-mine"]))
    train.train(parse(["--resume", "out/checkpoints/step-000006", "--save_every", "3"]))
    said = capsys.readouterr().out
    assert "going on after step 6, without the later step-000008" in said and "max_len" not in said.split("SAPO-ORPO:")[0]
    assert sorted(folder.name for folder in (out / "checkpoints").iterdir()) == ["step-000006", "step-000006-mine", "step-000009"] and len(untimed(out)) == 9
    whole, spin = tmp_path / "whole", [*tiny_run, "--rejected", "iteration", "--iterations", "2", "--loss", "dpo"]
    train.train(parse([*tiny_run, "--buffer_size", "8", "--schedule", "constant", "--steps", "9", "--out", str(whole)]))
    assert untimed(out) == untimed(whole)
    with pytest.raises(UserError, match="kept no checkpoint"):
        train.train(parse(["--resume", str(whole), "--steps", "20"]))
    assert len(untimed(whole)) == 9 and (whole / "final").exists()
    for inside in (["--model", str(whole / "final")], ["--data", str(whole / "metrics.jsonl")]):
        with pytest.raises(UserError, match="holds the model or the data"):
            train.new_run_folder(parse([*tiny_run, *inside, "--out", str(whole), "--overwrite"]))
    with pytest.raises(Stopped):
        train.train(parse([*spin, "--out", str(tmp_path / "spin")]), StopAfter(1))
    with pytest.raises(UserError, match="--steps 8"):
        parse(["--resume", str(tmp_path / "spin"), "--steps", "8"])


def test_damaged_checkpoints_are_noticed(tiny_run, tmp_path):
    """A bit-flipped, truncated, missing file or a broken manifest: named, and the checkpoint before it offered, which
    works; what was never finished is not taken for a checkpoint; only --keep of them are kept."""
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        train.train(parse([*tiny_run, "--buffer_size", "8", "--save_every", "1", "--out", str(out)]), StopAfter(4))
    kept = sorted((out / "checkpoints").iterdir())
    assert [folder.name for folder in kept] == ["step-000003", "step-000004"]
    shutil.copytree(kept[0], out / "checkpoints" / "step-000009.partial")
    for name, harm in (("shared.pt", lambda content: content[:999] + bytes([content[999] ^ 4]) + content[1000:]), ("rank0.pt", lambda content: content[:len(content) // 2]),
                       ("manifest.json", lambda content: content[:len(content) // 2]), ("shared.pt", lambda content: None)):
        content = (kept[1] / name).read_bytes()
        (kept[1] / name).unlink()
        if harm(content) is not None:
            (kept[1] / name).write_bytes(harm(content))
        with pytest.raises(UserError, match=f"{name} is damaged.*--resume {kept[0]}"):
            train.train(parse(["--resume", str(out)]))
        (kept[1] / name).write_bytes(content)
    (kept[1] / "shared.pt").unlink()
    train.train(parse(["--resume", str(kept[0])]))
    whole = tmp_path / "whole"
    train.train(parse([*tiny_run, "--buffer_size", "8", "--out", str(whole)]))
    assert all(torch.equal(a, b) for a, b in zip(weights(out).values(), weights(whole).values())) and untimed(out) == untimed(whole)


def test_checkpoints_execute_nothing(tiny_run, tmp_path):
    """A checkpoint that holds code, with a manifest that fits it, is not executed: weights_only refuses it."""
    out, trap = tmp_path / "out", tmp_path / "trap"
    with pytest.raises(Stopped):
        train.train(parse([*tiny_run, "--buffer_size", "8", "--out", str(out)]), StopAfter(1))
    checkpoint = out / "checkpoints" / "step-000001"

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(trap),))

    torch.save({"policy": Bomb()}, checkpoint / "shared.pt")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"]["shared.pt"] = hashlib.sha256((checkpoint / "shared.pt").read_bytes()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="shared.pt"):
        train.train(parse(["--resume", str(out)]))
    assert not trap.exists()


def test_a_full_disk_costs_nothing(tiny_run, tmp_path, capfd):
    """A disk that fills up while a checkpoint, or the final model, is written (stood for by a limit on file sizes): a
    sentence, a status of its own, the checkpoint before it intact and the run resumable."""
    out, flags = tmp_path / "out", [*tiny_run, "--buffer_size", "8", "--save_every", "3"]

    def full(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.stderr = sys.__stderr__
        sys.argv = ["train.py", "--resume", str(out)]
        train.main()

    with pytest.raises(Stopped):
        train.train(parse([*flags, "--out", str(out)]), StopAfter(3))
    before = {file: file.read_bytes() for file in (out / "checkpoints").rglob("*.pt")}
    child = forked(full, 100_000)
    assert status_of(child) == 4
    said = capfd.readouterr().err
    assert "could not write the checkpoint" in said and "step-000003" in said and "Traceback" not in said
    assert {file: file.read_bytes() for file in (out / "checkpoints").rglob("*.pt")} == before
    assert not list((out / "checkpoints").glob("*.partial"))
    train.train(parse(["--resume", str(out)]))
    train.train(parse([*flags, "--out", str(tmp_path / "whole")]))
    check_same_run(out, tmp_path / "whole")
    shutil.rmtree(out / "final"), (out / "summary.json").unlink()
    assert status_of(forked(full, 100_000)) == 4 and "could not" in capfd.readouterr().err
    assert not (out / "final").exists() and not list(out.glob("*.partial"))


def nan_at(monkeypatch, *steps, in_gradient=False):
    """Make the loss (or its gradient alone) of one pair NaN at these steps."""
    count, losses = [0], train.pair_losses

    def spoiled(s, logps, reference_logps, beta):
        count[0] += 1
        found = losses(s, logps, reference_logps, beta)
        if (count[0] + 1) // 2 in steps and count[0] % 2:       # two micro-batches a step
            spoil = torch.zeros_like(found[0])
            spoil[0] = torch.nan
            if in_gradient:
                found[0].register_hook(lambda gradient: gradient + spoil)
                return found
            return (found[0] + spoil, *found[1:])
        return found

    monkeypatch.setattr(train, "pair_losses", spoiled)


@pytest.mark.parametrize("in_gradient", [False, True])
def test_a_step_that_is_not_finite_is_left_out(in_gradient, tiny_run, tmp_path, monkeypatch, capsys):
    """A NaN in the loss, or in the gradient alone: the step is not taken, said with its rows, counted, does not count for
    the EMA model, and the record stays valid JSON; the run goes on."""
    moved, update, learn, seen = [], EMA.update, train.learn, []
    monkeypatch.setattr(EMA, "update", lambda self, model: moved.append(1) or update(self, model))
    def watch(s, world, scorer, reference, pairs, beta):
        seen.append((copy.deepcopy(scorer.policy.state_dict()), sorted(pair.row for pair in pairs)))
        return learn(s, world, scorer, reference, pairs, beta)
    monkeypatch.setattr(train, "learn", watch)
    nan_at(monkeypatch, 3, in_gradient=in_gradient)
    run(tiny_run, tmp_path)
    said = next(line for line in capsys.readouterr().out.splitlines() if "not finite" in line)
    rows = json.loads(said[said.index("["):said.index("]") + 1])
    assert said.startswith("step 3:") and set(rows) <= set(seen[2][1]) and len(rows) == (len(set(seen[2][1])) if in_gradient else 1)
    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a.values(), b.values()))
    assert same(seen[2][0], seen[3][0]) and not same(seen[3][0], seen[4][0]) and len(moved) == 5
    records = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in (tmp_path / "metrics.jsonl").open()]
    assert [r["skipped"] for r in records] == [0, 0, 1, 1, 1, 1] and records[2]["grad_norm" if in_gradient else "loss"] is None
    assert all(torch.isfinite(w).all() for w in weights(tmp_path).values())


def test_the_run_stops_when_nothing_is_finite(tiny_run, tmp_path, monkeypatch):
    """After --max_bad_steps steps in a row without a finite loss the run ends, and the last checkpoint stays good."""
    nan_at(monkeypatch, 3, 5, 6)
    with pytest.raises(RunFailed, match="2 steps in a row"):
        run(tiny_run, tmp_path, "--max_bad_steps", "2", "--save_every", "4")
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-000004"] and len(untimed(tmp_path)) == 6
    monkeypatch.undo()
    train.train(parse(["--resume", str(tmp_path)]))
    assert [r["skipped"] for r in untimed(tmp_path)] == [0, 0, 1, 1, 1, 1]


@pytest.mark.slow
def test_a_nan_on_one_process_stops_both(tiny_run, tmp_path, monkeypatch):
    """A NaN on one of two processes: the step is left out, and both go on to the end."""
    def spoiled():
        if os.environ["RANK"] == "1":
            nan_at(monkeypatch, 2, in_gradient=False)
        train.train(parse([*tiny_run, "--micro_batch", "1", "--buffer_size", "8", "--out", str(tmp_path)]))
    assert two_processes(spoiled) == [0, 0]
    assert [r["skipped"] for r in untimed(tmp_path)] == [0, 1, 1, 1, 1, 1]


@pytest.mark.slow
def test_killed_at_random_moments(tiny_run, tmp_path):
    """SIGKILL at 24 random moments of a run, every third during a save, and resumed each time: the same final weights,
    metrics and buffer as undisturbed."""
    flags, rng = [*tiny_run, "--buffer_size", "8", "--steps", "500", "--save_every", "2"], np.random.default_rng(0)
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert status_of(forked(lambda: train.train(parse([*flags, "--out", str(whole)])))) == 0
    child = forked(lambda: train.train(parse([*flags, "--out", str(out)])))
    saves = 0
    for n in range(24):
        if n % 3 == 0:                                      # wait for a save to be under way, then for some part of it
            while not list((out / "checkpoints").glob("*.partial")) and os.waitpid(child, os.WNOHANG) == (0, 0):
                pass
            time.sleep(rng.uniform(0, 0.004))
        else:
            time.sleep(rng.uniform(0.1, 0.9))
        os.kill(child, signal.SIGKILL)
        saves += bool(list((out / "checkpoints").glob("*.partial")))
        assert status_of(child) == -signal.SIGKILL, "it ended before it was killed often enough"
        child = forked(lambda: train.train(parse([*flags, *(["--resume", str(out)] if (out / "settings.json").exists() else ["--out", str(out), "--overwrite"])])))
    assert status_of(child) == 0 and saves >= 3
    check_same_run(whole, out)


@pytest.mark.slow
def test_signals(tiny_run, tmp_path):
    """SIGTERM and Ctrl-C finish the step, save and exit with status 3, under torchrun too; a second one ends at once; the
    run resumes. One of two processes killed: the other ends within a minute, not with 0, and the checkpoint resumes."""
    flags = [*tiny_run, "--buffer_size", "8", "--steps", "100000", "--schedule", "constant", "--save_every", "5"]

    def started(out, *launcher):
        process = subprocess.Popen([*launcher, str(HERE / "train.py"), *flags, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        while not (out / "checkpoints" / "step-000005").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        return process

    for number in (signal.SIGTERM, signal.SIGINT):
        out = tmp_path / number.name
        process = started(out, sys.executable)
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 3 and "and saved" in said and "Traceback" not in said
        steps = len(untimed(out))
        assert (out / "checkpoints" / f"step-{steps:06d}" / "manifest.json").exists()
        done = command("--resume", str(out), "--steps", str(steps + 2))
        assert done.returncode == 0 and len(untimed(out)) == steps + 2, done.stderr
    out = tmp_path / "torchrun"
    process = started(out, *TORCHRUN)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    steps = len(untimed(out))
    assert process.returncode != 0 and (out / "checkpoints" / f"step-{steps:06d}" / "manifest.json").exists()
    out = tmp_path / "killed"
    process = started(out, *TORCHRUN)
    workers = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and f"PPid:\t{process.pid}\n" in read_quietly(p / "status")]
    os.kill(workers[-1], signal.SIGKILL)
    begin = time.perf_counter()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.perf_counter() - begin < 60
    last = newest(out)
    done = command("--resume", str(out), "--steps", str(step_of(last) + 2), launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr


def read_quietly(path) -> str:
    try:
        return path.read_text()
    except OSError:             # a process that ended meanwhile
        return ""


def test_a_second_signal_ends_at_once():
    """The first signal is noted and hands the signals back to the system; before training there is nothing to wait for."""
    stop, old = Stop(), [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    try:
        stop.listen()
        stop.training = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        early = Stop()
        early.listen()
        with pytest.raises(KeyboardInterrupt, match="before training"):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), old):
            signal.signal(number, handler)


GOOD = '{"prompt": "a b", "chosen": "c d"}\n'
CHAT = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}\n'


@pytest.mark.parametrize("content, flags, words", [
    (None, "", ["no such file"]), ("", "", ["no rows"]), (GOOD + "{nonsense\n", "", ["line 2", "not JSON"]),
    (GOOD + '{"messages": [{"role": "user", "content": "a"}]}', "", ["line 2", "no assistant turn"]), (GOOD + '{"prompt": "a", "chosen": " "}', "", ["line 2", "empty"]),
    ('{"messages": [{"role": "judge", "content": "a"}, {"role": "assistant", "content": "b"}]}', "--model STRICT", ["line 1", "template refuses"]),
    (CHAT.replace("hi", "hi " * 300) * 3, "--max_len 40 --max_prompt_len 30", ["every prompt", "--max_prompt_len"]),
    (CHAT, "--model BARE", ["line 1", "the tokenizer has none", "--chat_template"]), (GOOD, "--rejected data", ["line 1", "rejected"]),
    (CHAT * 60, "--model WIDE", ["embedding has 50"]), (CHAT * 60, "--model WIDE --skip_bad_rows", ["embedding has 50"]), (CHAT, "--model ENDLESS", ["no EOS"]), (CHAT, "--batch_size 16 --buffer_size 8", ["smaller than"]),
    (CHAT, "--segment_len -3", ["segment_len"]), (CHAT, "--segmentlen 3", ["unrecognized"]), (CHAT, "--model EMPTY", ["not a causal"]),
    (CHAT, "--model BERT", ["not a causal"]), (CHAT, "--model HALF", ["not a causal"]), (CHAT, "--model OTHER", ["not a causal"]), (GOOD.encode() + b'{"prompt": "\xff"}\n', "", ["line 2", "UTF-8"]),
    (GOOD + '{"prompt": "a", "chosen": "' + "b" * 10_000_000 + '"}\n', "", ["line 2", "10.0 million"]), (CHAT, "--keep 1", ["keep"]), (CHAT, "--resume nowhere", ["no run there"]),
])
def test_bad_input_gets_one_sentence(content, flags, words, tiny_run, tmp_path, capsys, monkeypatch):
    """Bad input: exit status 2, one sentence on stderr with what, where and what to do, no traceback, no output folder."""
    model = Path(tiny_run[1])
    for name in re.findall("[A-Z]{4,}", flags):
        made = tmp_path / name
        shutil.copytree(model, made)
        settings = json.loads((made / "tokenizer_config.json").read_text())
        if name == "STRICT":
            (made / "chat_template.jinja").write_text("{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}{{ m.content }}<|im_end|>{% endfor %}")
        elif name == "BARE":
            (made / "chat_template.jinja").unlink()
        elif name == "ENDLESS":
            (made / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
            (made / "special_tokens_map.json").unlink(missing_ok=True)
        elif name == "WIDE":
            tiny(vocab_size=50, eos_token_id=1, pad_token_id=1, bos_token_id=None).save_pretrained(made)
        elif name == "EMPTY":
            shutil.rmtree(made), made.mkdir()
        elif name == "HALF":
            (made / "model.safetensors").write_bytes((made / "model.safetensors").read_bytes()[:2000])
        elif name == "OTHER":
            (made / "config.json").write_text((made / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
        elif name == "BERT":
            (made / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
        flags = flags.replace(name, str(made))
    data = tmp_path / "d.jsonl"
    if content is not None:
        data.write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "out"
    given = ["--model", str(model)] * ("--model" not in flags) + ["--data", str(data), *flags.split()] + ["--out", str(out)] * ("--resume" not in flags)
    monkeypatch.setattr(sys, "argv", ["train.py", *given, "--steps", "1"])
    with pytest.raises(SystemExit) as end:
        train.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and not out.exists() and "Traceback" not in said
    sentence = next(line for line in said.splitlines() if line.startswith("train.py: "))
    assert all(word in sentence for word in words), said


def test_bad_rows_can_be_skipped(tiny_run, tmp_path, capsys):
    """--skip_bad_rows leaves bad rows out, says how many and shows the first; prompts in both sets are warned about."""
    data, held = tmp_path / "d.jsonl", tmp_path / "h.jsonl"
    data.write_bytes(CHAT.encode() * 6 + b'{"prompt": "\xff"}\n{oops\n[1]\n' + CHAT.replace("yes", "").encode() + CHAT.replace("hi", "who").encode())
    held.write_text(CHAT + CHAT.replace("hi", "what"))
    flags = ["--model", tiny_run[1], "--data", str(data), "--eval_data", str(held), *"--batch_size 2 --buffer_size 4 --steps 1 --max_len 60".split()]
    with pytest.raises(UserError, match="line 7: not UTF-8"):
        train.train(parse([*flags, "--out", str(tmp_path / "a")]))
    train.train(parse([*flags, "--out", str(tmp_path / "b"), "--skip_bad_rows"]))
    said = capsys.readouterr().out
    assert "4 of 11 rows left out; the first:" in said and "line 7" in said and "warning: 1 of 2 held-out prompts" in said and "7 rows" in said


IDS = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@hypothesis_settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=6), end=st.integers(0, 9), segment_len=st.integers(0, 6), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_pairs_always_hold_together(rows, end, segment_len, k, seed):
    """Whatever the prompts, lengths, segment lengths and end tokens, with ids that are the pad id too: A and C are kept to
    the token, y- never goes on after an end token in B', and both layouts score every response token once, after what it
    follows."""
    examples = [Example(prompt, [t for t in chosen[:-1] if t != end] + chosen[-1:], i) for i, (prompt, chosen) in enumerate(rows)]
    pairs = make_pairs(MODEL_FOR_PAIRS, examples, segment_len, np.random.default_rng(seed), eos_token_id=end, num_rejected=k,
                       max_new_tokens=4, temperature=1.0, top_k=0, top_p=1.0, generator=torch.Generator().manual_seed(seed))
    assert [pair.row for pair in pairs] == [i for i in range(len(rows)) for _ in range(k)]
    for pair in pairs:
        example = examples[pair.row]
        stop = min(pair.start + segment_len, len(pair.chosen)) if segment_len else len(pair.chosen)
        assert pair.chosen == example.chosen and pair.rejected[:pair.start] == example.chosen[:pair.start]
        assert end not in pair.rejected[:-1]
        written = pair.rejected[pair.start:]
        if end not in written[:stop - pair.start] and segment_len:
            assert pair.rejected[stop:] == example.chosen[stop:] and len(written) >= stop - pair.start
        for layout in (sapo.shared_layout, sapo.concatenated_layout):
            laid, scored = layout(pair)
            labels = {kind: [] for kind in range(4)}
            for row, column, label, kind in scored:
                tokens, positions, branches = laid[row]
                labels[kind].append((label, positions[column], tokens[column]))
            assert [label for label, *_ in labels[sapo.PROMPT]] == pair.prompt[1:] and [label for label, *_ in labels[sapo.SHARED]] == pair.chosen[:pair.start]
            for kind, response in ((sapo.CHOSEN, pair.chosen), (sapo.REJECTED, pair.rejected)):
                branch = response[pair.start:]
                whole = [*pair.prompt, *response]
                first = len(pair.prompt) + pair.start - 1
                assert labels[kind] == [(label, first + i, whole[first + i]) for i, label in enumerate(branch)]


@hypothesis_settings(max_examples=60, deadline=None)
@given(capacity=st.integers(1, 9), moves=st.lists(st.integers(0, 4), max_size=30), seed=st.integers(0, 9))
def test_buffer_always_holds_together(capacity, moves, seed):
    """Whatever is added and drawn: never over capacity, counts are the draws, and a round trip through a file with plain
    types only changes nothing that follows."""
    buffer, drawn, added = ReplayBuffer(capacity, seed), [], 0
    for move in moves:
        if move < 3:
            buffer.add(Pair([added], [1], [2], 0, added))
            added += 1
        else:
            drawn += [pair.row for pair in buffer.sample(min(move, len(buffer)))]
        assert len(buffer) == min(added, capacity) and [pair.row for pair in buffer.items] == list(range(max(0, added - capacity), added))
        assert buffer.counts == [drawn.count(pair.row) for pair in buffer.items]
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    other = ReplayBuffer(capacity)
    other.load_state_dict(torch.load(file, weights_only=True), item=Pair)
    for one in (buffer, other):
        one.add(Pair([9], [9], [9], 0, -5))
    assert [buffer.sample(len(buffer)) for _ in range(3)] == [other.sample(len(other)) for _ in range(3)]
    assert buffer.state_dict() == other.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("program", ["generate.py --batch 2 --new 8 --prefix 24", "iteration.py --total 64 --batch 2"])
def test_benches_run(program):
    """The benches that need no peer installed run, find that both sides compute the same, and print their tables."""
    name, *flags = program.split()
    done = subprocess.run([sys.executable, str(HERE / "bench" / name), *flags, "--model", "demo", "--rounds", "1"], capture_output=True, text=True)
    assert done.returncode == 0 and "ratio" in done.stdout and len(done.stdout.splitlines()) > 5, done.stderr


@pytest.mark.parametrize("files, use", [
    (["losses.py"], "losses.dpo_loss(*[torch.zeros(1)] * 4)"), (["buffer.py"], "buffer.ReplayBuffer(2).add(1)"),
    (["ema.py"], "ema.EMA(torch.nn.Linear(1, 1))"), (["losses.py", "sapo.py"], "sapo.splice([1, 2], 0, 1, [3], 0)")])
def test_modules_can_be_copied_alone(files, use, tmp_path):
    """losses.py, buffer.py and ema.py each work in another project alone, sapo.py together with losses.py."""
    for file in files:
        (tmp_path / file).write_bytes((HERE / file).read_bytes())
    module = files[-1].removesuffix(".py")
    done = subprocess.run([sys.executable, "-c", f"import torch, {module}; {use}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_commands_are_what_ci_runs():
    """The README's test command is the line that CI runs, the main job is there, and every recipe it names exists."""
    readme, ci = (HERE / "README.md").read_text(), (HERE / ".ci" / "run").read_text()
    for line in ("pip install -r requirements.txt && torchrun train.py", "pip install -r requirements.txt && python -m pytest -q"):
        assert f"\n{line}\n" in readme
    assert "\npip install -r requirements.txt && python -m pytest -q\n" in ci
    for recipe in re.findall(r"@(recipes/[\w.-]+)", readme):
        assert (HERE / recipe).exists()
