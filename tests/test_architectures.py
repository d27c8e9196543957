"""Other models: an iteration of any architecture; what find_shortcuts and check_generation say.

A model that can't share a prefix, split its head or decode with the cache must be noticed whatever
its dtype and however small its weights are: a freshly made or small model has logits that hardly
depend on what a token sees.
"""
import copy

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

import sapo
from buffer import ReplayBuffer
from ema import EMA
from losses import dpo_loss, orpo_loss
from sapo import (
    Example,
    Pair,
    Shortcuts,
    check_generation,
    find_shortcuts,
    generate_segments,
    make_pairs,
    pair_logps,
)
from test_sapo import ARCHITECTURES, greedy, plain_logps, random_ids, some_pairs, tiny

OLD = Version(transformers.__version__) < Version("5.24")
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 160}
BLOOM = {"n_layer": 2, "n_head": 4}
NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
       "window_size": 4}
MORE = {
    "qwen3": {"head_dim": 8}, "olmo2": {}, "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "falcon": {}, "starcoder2": {"sliding_window": 6}, "mixtral": {"num_local_experts": 4},
    "mpt": MPT, "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "granite": {"logits_scaling": 3.0}, "cohere": {"logit_scale": 0.25},
}


def scale_weights(model, factor: float) -> None:
    """Multiply every weight in place."""
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), factor)


def check_exact(model, shortcuts: Shortcuts, tolerance: float = 1e-3) -> None:
    """pair_logps with these shortcuts gives what transformers' own logits give."""
    pairs = some_pairs()
    with torch.no_grad():
        found = pair_logps(model, pairs, shortcuts=shortcuts)
        expected = torch.tensor([[x.item() for x in plain_logps(model, pair)] for pair in pairs])
    found = torch.stack(found[:2], 1)
    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance), (found, expected)


@pytest.mark.parametrize("loss", ["orpo", "dpo"])
@pytest.mark.parametrize("name", [*(name for name in ARCHITECTURES if "eager" not in name), *MORE])
def test_one_iteration_of_any_architecture(name, loss):
    """An iteration of SAPO works with the model as it comes.

    The EMA model writes segments that differ from B. The pairs are scored as transformers' own
    logits score them. Every layer gets gradients. The policy moves; the EMA model follows half way.
    """
    if name == "mpt" and OLD:
        pytest.skip("this transformers has MPT refuse the mask that generation needs")
    model, rng = tiny(name, **MORE.get(name, {})), np.random.default_rng(0)
    examples = [Example(random_ids(rng, 5 + i), [*random_ids(rng, 12), 2], i) for i in range(4)]
    policy = copy.deepcopy(model)
    shortcuts = find_shortcuts(policy)
    check_generation(policy)
    ema, buffer = EMA(policy, update_every=1), ReplayBuffer(8)
    for pair in make_pairs(ema.model, examples, 5, rng, eos_token_id=2):
        buffer.add(pair)
    pairs = buffer.sample(4)
    assert any(pair.chosen != pair.rejected for pair in pairs)
    logps = pair_logps(policy, pairs, average=loss == "orpo", shortcuts=shortcuts)
    with torch.no_grad():
        reference = pair_logps(model, pairs, shortcuts=shortcuts)[:2]
        expected = torch.stack([plain_logps(model, pair)[0] for pair in pairs])
    if loss == "orpo":
        expected = expected / torch.tensor([len(pair.chosen) for pair in pairs])
    assert torch.allclose(logps.chosen_logps, expected, rtol=1e-3, atol=1e-3)
    losses, *_ = orpo_loss(*logps) if loss == "orpo" else dpo_loss(*logps[:2], *reference)
    losses.mean().backward()
    layers = [weight for weight_name, weight in policy.named_parameters()
              if ".1." in weight_name and weight.ndim > 1]
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in layers)
    torch.optim.AdamW(policy.parameters(), 1e-3).step()
    assert ema.update(policy)
    triples = list(zip(model.parameters(), policy.parameters(), ema.model.parameters(),
                       strict=True))
    moved = [not torch.equal(before, after) for before, after, _ in triples]
    assert sum(moved) > len(moved) / 2
    assert all(torch.allclose(averaged, (before + after) / 2, atol=1e-6)
               for before, after, averaged in triples)


# ----------------------------------------------------------------------- models that cannot share

@pytest.mark.parametrize("dtype, scale", [
    (torch.float32, 0.2), (torch.float32, 0.02), (torch.float32, 0.002),
    (torch.bfloat16, 0.2), (torch.bfloat16, 0.02)])
@pytest.mark.skipif(OLD, reason="this transformers has MPT refuse the mask")
def test_a_model_that_ignores_the_mask_cannot_share(dtype, scale):
    """MPT ignores a 4-D mask; find_shortcuts notices in bf16 and with small weights, too."""
    model = tiny("mpt", **MPT, initializer_range=scale).to(dtype)
    assert not find_shortcuts(model).share_prefix


def test_a_model_that_refuses_the_mask_cannot_share():
    """BLOOM raises an error at a 4-D mask; find_shortcuts says so without one, scoring is exact."""
    model = tiny("bloom", **BLOOM)
    shortcuts = find_shortcuts(model)
    assert not shortcuts.share_prefix
    check_exact(model, shortcuts)


@pytest.mark.parametrize("dtype, scale", [
    (torch.float32, 0.2), (torch.float32, 0.02), (torch.bfloat16, 0.2)])
def test_a_wrong_window_is_noticed(dtype, scale, monkeypatch):
    """With the window left out of the mask, find_shortcuts finds that sharing is not exact."""
    model = tiny("mistral, sliding window in every layer", initializer_range=scale).to(dtype)
    assert find_shortcuts(model).share_prefix
    right = sapo.attention_masks
    monkeypatch.setattr(sapo, "attention_masks",
                        lambda model, allowed, q, k: right(model, allowed, q * 0, k * 0))
    assert not find_shortcuts(model).share_prefix
    with pytest.raises(ValueError, match="can't generate"):
        check_generation(model)


# ----------------------------------------------------------------------------------------- windows

def longest_trial(model) -> int:
    """The longest sequence that find_shortcuts and check_generation run through the model."""
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[1]))
    find_shortcuts(model)
    check_generation(model)
    handle.remove()
    return max(seen)


def test_the_trial_reaches_past_the_window():
    """A model with a window of 50 tokens is tried beyond it, one without with short sequences."""
    assert longest_trial(tiny("mistral", sliding_window=50)) > 50 + 10
    assert longest_trial(tiny()) <= 60


def test_a_leftover_window_is_ignored():
    """sliding_window beside use_sliding_window false, as in Qwen 2 configs, changes nothing."""
    model, rng = tiny("qwen2"), np.random.default_rng(0)
    model.config.sliding_window, model.config.use_sliding_window = 4, False
    assert find_shortcuts(model) == Shortcuts(True, True)
    check_generation(model)
    check_exact(model, Shortcuts(True, True))
    prefix = random_ids(rng, 20)
    found = generate_segments(model, [prefix], 9, eos_token_id=None, temperature=0)
    assert found == [[greedy(model, prefix, 9, None)]]


def test_a_leftover_window_makes_no_long_trial():
    """A leftover window of 131,072 (Qwen 2.5) must not be tried: the trial would not fit a GPU."""
    model = tiny("qwen2", max_position_embeddings=1000)
    model.config.sliding_window, model.config.use_sliding_window = 900, False
    assert longest_trial(model) <= 60


def test_a_window_beyond_the_positions_makes_no_long_trial():
    """Phi-3's 128k models have a window of 262,144, but 131,072 positions: it never acts."""
    model = tiny("phi3", sliding_window=262144, max_position_embeddings=1000)
    assert longest_trial(model) <= 60


@pytest.mark.parametrize("chunk", [8, 64])
def test_chunked_attention_is_noticed(chunk):
    """Llama 4 attends within chunks of columns: what find_shortcuts allows is exact beyond one.

    Generation must be exact, or check_generation must refuse the model.
    """
    model = tiny("llama4_text", attention_chunk_size=chunk, head_dim=8, num_local_experts=2,
                 intermediate_size_mlp=64)
    rng = np.random.default_rng(0)
    pair = Pair(random_ids(rng, 70), random_ids(rng, 30), random_ids(rng, 30), 3)
    pair = pair._replace(rejected=pair.chosen[:3] + pair.rejected[3:])
    found = pair_logps(model, [pair], shortcuts=find_shortcuts(model))
    for one, expected in zip(found, pair_logps(model, [pair]), strict=True):
        assert torch.allclose(one, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="can't generate"):
        check_generation(model)


# ---------------------------------------------------------------------------- capped, scaled heads

HEADS = {
    "gemma 2": ("gemma2", {"head_dim": 8}, False),
    "cohere": ("cohere", {"logit_scale": 0.25}, False),
    "cohere 2": ("cohere2", {"logit_scale": 0.25, "sliding_window": 6}, False),
    "granite": ("granite", {"logits_scaling": 3.0}, False), "llama": ("llama", {}, True),
    "tied": ("llama", {"tie_word_embeddings": True}, True), "phi": ("phi", {}, True),
}


@pytest.mark.parametrize("scale", [0.2, 0.02, 0.002])
@pytest.mark.parametrize("name", HEADS)
def test_heads_are_exact_at_any_scale(name, scale):
    """A cap or a scale behind the head is noticed while logits are small, where a cap hardly shows.

    What find_shortcuts says stays exact when the weights grow 30 times afterwards.
    """
    kind, changes, split_head = HEADS[name]
    model = tiny(kind, **changes, initializer_range=scale)
    shortcuts = find_shortcuts(model)
    assert shortcuts.split_head == split_head
    # Where rounding hides what the context does, find_shortcuts does not share.
    assert shortcuts.share_prefix or scale < 0.01
    check_exact(model, shortcuts)
    scale_weights(model, 30)
    check_exact(model, shortcuts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cap_is_noticed_in_low_precision(dtype):
    """Gemma 2 in bf16 and fp16 can share its prefix, but not split its head."""
    for scale in (0.2, 0.02):
        model = tiny("gemma2", head_dim=8, initializer_range=scale).to(dtype)
        assert find_shortcuts(model) == Shortcuts(True, False)


# ---------------------------------------------------------------------- models that cannot generate

@pytest.mark.parametrize("scale", [0.2, 0.02])
@pytest.mark.parametrize("name, changes", [
    ("mamba", {}), ("bloom", BLOOM), ("gpt_neo", NEO),
    ("recurrent_gemma", {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3})])
def test_models_that_cannot_generate_are_refused(name, changes, scale):
    """check_generation refuses a model that would decode wrongly, by name, with small weights too.

    Mamba keeps another kind of cache, RecurrentGemma one more, BLOOM takes positions from
    the mask, GPT-Neo's window goes by column. Each of them can be scored.
    """
    model = tiny(name, **changes, initializer_range=scale)
    with pytest.raises(ValueError, match=r"ForCausalLM can't generate with KVCache"):
        check_generation(model)
    if name != "recurrent_gemma":           # transformers 5.0 keeps a state in its layers
        check_exact(model, find_shortcuts(model))


def test_a_finished_sequence_needs_no_more_positions():
    """A sequence that is done near the last position does not stop the others of its batch.

    Each prefix with its own limit fits the model's positions here.
    """
    model = tiny("gpt2", n_embd=32, n_layer=2, n_head=4, max_position_embeddings=40)
    rng = np.random.default_rng(0)
    prefixes = [random_ids(rng, 36), *(random_ids(rng, 5) for _ in range(7))]
    limits = [2, *[20] * 7]
    found = generate_segments(model, prefixes, limits, eos_token_id=None, temperature=0)
    assert found == [[greedy(model, *one, None)] for one in zip(prefixes, limits, strict=True)]
