"""The modules among other tools: adapters, hooks, patches, wrappers, threads and wrong input.

Nothing is remembered about a model. So after each change to it, plain scoring and generation give
what the model gives now, and so do shortcuts that are asked for anew. Tests with adapters need
peft (passed with 0.21.2), those with accelerate need accelerate (1.15.0); they are skipped without.
"""
import copy
import functools
import itertools
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

import sapo
from buffer import ReplayBuffer
from ema import EMA
from losses import dpo_loss, orpo_loss
from sapo import (
    Pair,
    PairLogps,
    PairScorer,
    Shortcuts,
    check_generation,
    choose_segment,
    find_shortcuts,
    generate_segments,
    make_pairs,
    pair_logps,
)
from test_sapo import plain_logps, random_ids, some_pairs, tiny

MODEL = tiny()


def check_as_it_is_now(model, tolerance: float = 1e-4) -> torch.Tensor:
    """Scoring and generation equal what the model's own forward gives, without a cache, right now.

    Scoring is plain, and with the shortcuts that are found now. Returns the log-probabilities.
    """
    pairs = some_pairs()
    with torch.no_grad():
        expected = torch.stack([torch.stack(plain_logps(model, pair)) for pair in pairs])
        for shortcuts in (None, find_shortcuts(model)):
            found = torch.stack(pair_logps(model, pairs, shortcuts=shortcuts)[:2], 1)
            assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance), shortcuts
    check_generation(model)
    prefixes = [[5, 6, 7], [8] * 12, [9]]
    written = generate_segments(model, prefixes, 6, eos_token_id=None, temperature=0)
    for prefix, [tokens] in zip(prefixes, written, strict=True):
        ids = torch.tensor([[*prefix, *tokens]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prefix) - 1:-1]
        # In low precision two tokens may be equally likely: the written one is as good as the best.
        chosen = logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert (chosen >= logits.amax(-1) - 100 * tolerance).all()
    return expected


def check_changed(*logps: torch.Tensor) -> None:
    """Each state of the model gave other numbers than the one before."""
    for one, other in itertools.pairwise(logps):
        assert not torch.allclose(one, other, rtol=1e-3)


# ---------------------------------------------------------------------------------------- adapters

def with_adapter(model, **changes):
    """The model wrapped by peft, with a random LoRA adapter; skips the test without peft."""
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False,
                "task_type": "CAUSAL_LM", **changes}
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()


def test_adapters_disabled_switched_and_merged():
    """With adapters on, disabled, switched, merged, unmerged and unloaded: as the model is now."""
    model = with_adapter(tiny())
    peft = pytest.importorskip("peft")
    first = check_as_it_is_now(model)
    with model.disable_adapter():
        disabled = check_as_it_is_now(model)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"],
                                               init_lora_weights=False, task_type="CAUSAL_LM"))
    model.set_adapter("other")
    switched = check_as_it_is_now(model)
    check_changed(first, disabled, switched)
    model.merge_adapter()
    assert torch.allclose(check_as_it_is_now(model), switched, rtol=1e-4)
    model.unmerge_adapter()
    model.set_adapter("default")
    assert torch.allclose(check_as_it_is_now(model), first, rtol=1e-4)
    assert torch.allclose(check_as_it_is_now(model.merge_and_unload()), first, rtol=1e-4)


def test_a_model_wrapped_after_the_first_call():
    """A model that was scored and generated with and is wrapped by peft then, its head included."""
    model = tiny()
    before = check_as_it_is_now(model)
    after = check_as_it_is_now(with_adapter(model, target_modules=["q_proj", "lm_head"]))
    check_changed(before, after)


@pytest.mark.parametrize("kind",
                         ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
@pytest.mark.filterwarnings("ignore")
def test_virtual_tokens_are_refused_or_right(kind):
    """Prompt tuning puts tokens before the logits: refused, not scored shifted. Prefix tuning is
    right.

    None of them can generate with the cache, and check_generation says so.
    """
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny(), config).eval()
    with pytest.raises(ValueError, match="can't generate"):
        check_generation(model)
    if kind == "PrefixTuningConfig":
        assert find_shortcuts(model) == Shortcuts(False, False)
        found = pair_logps(model, some_pairs())
        expected = torch.stack([plain_logps(model, pair)[0] for pair in some_pairs()])
        assert torch.allclose(found.chosen_logps, expected, rtol=1e-4)
    else:
        with pytest.raises(ValueError, match="do not match"):
            pair_logps(model, some_pairs())


def test_ema_of_adapters_alone():
    """trainable_only shares the frozen base; adapters alone are averaged and kept as state."""
    model = with_adapter(tiny())
    ema = EMA(model, decay=0.5, update_every=1, trainable_only=True)
    start = {name: value.clone() for name, value in ema.state_dict()["model"].items()}
    assert start and all("lora" in name for name in start)
    ours = dict(ema.model.named_parameters())
    for name, parameter in model.named_parameters():
        shares = parameter.untyped_storage().data_ptr() == ours[name].untyped_storage().data_ptr()
        assert shares == (not parameter.requires_grad) == ("lora" not in name)
    assert not any(parameter.requires_grad for parameter in ours.values())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert ema.update(model)
    for name, value in ema.state_dict()["model"].items():
        assert torch.allclose(value, start[name] + 0.5, atol=1e-6)
    check_as_it_is_now(ema.model)
    restored = EMA(model, trainable_only=True)
    restored.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert all(map(torch.equal, restored.state_dict()["model"].values(),
                   ema.state_dict()["model"].values()))
    with pytest.raises(RuntimeError, match="does not hold the weights"):
        restored.load_state_dict({"model": {}, "steps": 0})


def test_ema_with_nothing_to_average():
    """trainable_only with nothing trainable (all frozen) is no crash at the first refresh."""
    model = nn.Linear(2, 2).requires_grad_(False)
    assert EMA(model, update_every=1, trainable_only=True).update(model)


# -------------------------------------------------------------------------------------- accelerate

def accelerated():
    """A model that accelerate prepared for bf16 by replacing its forward; skips without."""
    accelerate = pytest.importorskip("accelerate")
    # accelerate remembers the first Accelerator of a process; another test may have made one.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(tiny())


def test_accelerates_bf16_is_scored():
    """A model that accelerate runs in bf16 is scored in bf16, with and without shortcuts."""
    model, pairs = accelerated(), some_pairs()
    with torch.no_grad():
        for shortcuts in (None, find_shortcuts(model)):
            found = pair_logps(model, pairs, shortcuts=shortcuts).chosen_logps
            exact = pair_logps(tiny(), pairs).chosen_logps
            assert torch.allclose(found, exact, rtol=2e-2)
            assert not torch.allclose(found, exact, rtol=1e-5)


def test_accelerates_bf16_generates():
    """A model that accelerate runs in bf16 generates what it gives without a cache."""
    check_as_it_is_now(accelerated(), 1e-2)


# ---------------------------------------------------------------------------- hooks, patches, parts

def halve(module, args, output):
    """A forward hook."""
    if hasattr(output, "logits"):
        output.logits = output.logits * 0.5
        return output
    if hasattr(output, "last_hidden_state"):
        output.last_hidden_state = output.last_hidden_state * 0.5
        return output
    return output * 0.5


@pytest.mark.parametrize("place", ["", "model", "model.layers.0.mlp", "lm_head"])
def test_hooks(place):
    """A hook anywhere, on the model itself too, is seen from the moment it is there."""
    model = tiny()
    before = check_as_it_is_now(model)
    handle = model.get_submodule(place).register_forward_hook(halve)
    check_changed(before, check_as_it_is_now(model))
    handle.remove()
    assert torch.equal(check_as_it_is_now(model), before)


@pytest.mark.parametrize("place", ["", "model", "lm_head"])
def test_a_patched_forward(place):
    """A forward that was replaced by a closure is what counts; the head is not split past it."""
    model = tiny()
    before = check_as_it_is_now(model)
    module = model.get_submodule(place)
    original = module.forward
    module.forward = lambda *args, **kwargs: halve(module, args, original(*args, **kwargs))
    check_changed(before, check_as_it_is_now(model))


def test_replaced_parts():
    """Replaced rotary buffers, another attention implementation and another dtype are seen."""
    model = tiny()
    before = check_as_it_is_now(model)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5
    after = check_as_it_is_now(model)
    check_changed(before, after)
    model.set_attn_implementation("eager")
    assert torch.allclose(check_as_it_is_now(model), after, rtol=1e-4)
    assert torch.allclose(check_as_it_is_now(model.double()).float(), after, rtol=1e-4)


@pytest.mark.parametrize("place", ["", "model.layers.1"])
def test_ema_refuses_a_forward_that_is_a_function(place):
    """A copy of a model whose forward is a closure would run the policy: refused by name."""
    model = tiny()
    module = model.get_submodule(place)
    original = module.forward
    module.forward = functools.wraps(original)(lambda *args, **kwargs: original(*args, **kwargs))
    with pytest.raises(ValueError, match=place or "the model"):
        EMA(model)


def test_ema_refuses_a_partial_of_a_function():
    """A functools.partial that holds a closure runs the policy as well."""
    model = nn.Linear(1, 1)
    original = model.forward
    model.forward = functools.partial(lambda x: original(x))
    with pytest.raises(ValueError, match="replaced"):
        EMA(model)


def test_ema_follows_a_bound_forward():
    """A forward replaced by a bound method (accelerate does so) runs the copy's own weights."""
    model = tiny()
    model.forward = types.MethodType(type(model).forward, model)
    ema = EMA(model, decay=0.0, update_every=1)
    before = ema.model(torch.tensor([[5, 6]])).logits
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 1.5)
    assert torch.equal(ema.model(torch.tensor([[5, 6]])).logits, before)
    ema.update(model)
    ids = torch.tensor([[5, 6]])
    assert torch.equal(ema.model(ids).logits, model(ids).logits)


def test_bf16_weights_stall_at_a_high_decay():
    """ema.py's note: in bf16 a small step is rounded away when the decay is high."""
    for dtype, moves in ((torch.bfloat16, False), (torch.float32, True)):
        policy = nn.Linear(1, 1, bias=False, dtype=dtype)
        nn.init.ones_(policy.weight)
        ema = EMA(policy, decay=0.999, update_every=1)
        policy.weight.data.fill_(1.125)
        ema.update(policy)
        assert (ema.model.weight.item() != 1) == moves


# --------------------------------------------------------------------------- wrappers, other models

class Wrapper(nn.Module):
    """What DDP, FSDP and DataParallel look like: the model is their attribute `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_wrappers_are_refused():
    """A wrapped model is refused with what to do; PairScorer is what one wraps."""
    wrapped = Wrapper(MODEL)
    with pytest.raises(ValueError, match=r"Wrapper: .*wrap PairScorer\(model\) instead"):
        pair_logps(wrapped, some_pairs())
    for call in (find_shortcuts, check_generation,
                 lambda model: generate_segments(model, [[5]], 3, eos_token_id=2)):
        with pytest.raises(ValueError, match="pass the model inside the wrapper"):
            call(wrapped)
    scorer, shortcuts = Wrapper(PairScorer(MODEL, Shortcuts(True, True))), Shortcuts(True, True)
    found = scorer(some_pairs(), average=True, nll_on="prompt")
    expected = pair_logps(MODEL, some_pairs(), True, shortcuts, nll_on="prompt")
    assert isinstance(found, PairLogps) and all(map(torch.equal, found, expected))
    assert {*scorer.parameters()} == {*MODEL.parameters()}


ENCODER = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
           "intermediate_size": 64}
OTHERS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(
        vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4)),
    "bert": lambda: BertLMHeadModel(BertConfig(**ENCODER)),
    "masked bert": lambda: BertForMaskedLM(BertConfig(**ENCODER)),
    "distilbert": lambda: DistilBertForMaskedLM(DistilBertConfig(
        vocab_size=97, dim=32, n_layers=1, n_heads=4, hidden_dim=64)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_are_not_causal_are_refused(name):
    """Encoder-decoders and masked models are refused: their numbers would look like any others."""
    model = OTHERS[name]().eval()
    with pytest.raises(ValueError, match="takes a causal language model"):
        pair_logps(model, [Pair([5], [6], [7], 0)])
    with pytest.raises(ValueError, match="takes a causal language model"):
        generate_segments(model, [[5]], 3, eos_token_id=2)


def test_a_bert_decoder_is_a_causal_model():
    """BERT with is_decoder=True is causal, and accepted."""
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(**ENCODER, is_decoder=True)).eval()
    expected = torch.stack([plain_logps(model, pair)[0] for pair in some_pairs()])
    found = pair_logps(model, some_pairs(), shortcuts=find_shortcuts(model)).chosen_logps
    assert torch.allclose(found, expected, rtol=1e-4)


# ------------------------------------------------------------------------------------- wrong input

GOOD = Pair([5, 6], [7, 8, 9], [7, 8, 4], 2)


@pytest.mark.parametrize("pairs, words", [
    ([], "no pairs"), ([GOOD._replace(prompt=[])], "prompt of a pair is empty"),
    ([GOOD._replace(start=3)], "differ before start 3"), ([GOOD._replace(start=4)], "lies outside"),
    ([GOOD._replace(start=-1)], "lies outside"),
    ([GOOD._replace(chosen="abc")], "chosen of a pair"),
    ([GOOD._replace(chosen=[7, 8, -100])], "chosen of a pair must hold token ids"),
    ([GOOD._replace(rejected=[7.0, 8.0])], "rejected of a pair must hold token ids"),
    ([GOOD._replace(prompt=[[5, 6]])], "prompt of a pair must hold token ids"),
    ([GOOD._replace(prompt=np.array([5.5]))], "prompt of a pair must hold token ids")])
def test_pairs_that_cannot_be_scored_are_refused(pairs, words):
    """A wrong start, no pairs, no prompt, text, fractions or negative numbers for ids: one sentence
    each. (-100 would go unscored.)"""
    for shortcuts in (None, Shortcuts(True, True)):
        with pytest.raises(ValueError, match=words):
            pair_logps(MODEL, pairs, shortcuts=shortcuts)


@pytest.mark.parametrize("ids", [np.array, torch.tensor, tuple])
def test_ids_of_other_kinds_are_accepted(ids):
    """numpy arrays, tensors and tuples of ids score and generate as lists do."""
    pair = GOOD._replace(prompt=ids(GOOD.prompt), chosen=ids(GOOD.chosen),
                         rejected=ids(GOOD.rejected))
    for shortcuts in (None, Shortcuts(True, True)):
        found = pair_logps(MODEL, [pair], shortcuts=shortcuts)
        assert all(map(torch.equal, found, pair_logps(MODEL, [GOOD], shortcuts=shortcuts)))
    arguments = {"max_new_tokens": 4, "temperature": 0}
    assert (generate_segments(MODEL, [ids([5, 6])], eos_token_id=ids([2, 3]), **arguments)
            == generate_segments(MODEL, [[5, 6]], eos_token_id=[2, 3], **arguments))


@pytest.mark.parametrize("prefix, eos_token_id, words", [
    ("text", 2, "a prefix must hold token ids"), ([5.0], 2, "a prefix must hold token ids"),
    ([], 2, "at least one token"), ([5], "</s>", "eos_token_id must hold token ids"),
    ([5], ["</s>"], "eos_token_id must hold token ids"), ([5], 2.0, "eos_token_id must hold")])
def test_prefixes_and_end_tokens_that_are_no_ids_are_refused(prefix, eos_token_id, words):
    """Text or fractions for ids are refused with their name; so is an end token spelled out."""
    with pytest.raises(ValueError, match=words):
        generate_segments(MODEL, [prefix], 3, eos_token_id=eos_token_id)


@pytest.mark.parametrize("call, words", [
    (lambda: generate_segments(MODEL, [[5], [6]], [3], eos_token_id=2), "max_new_tokens has 1"),
    (lambda: generate_segments(MODEL, [[5]], 3, eos_token_id=2, forbid_eos=[True] * 2),
     "forbid_eos"),
    (lambda: make_pairs(MODEL, [([5], [6])], 2, [], eos_token_id=2), "rng has 0 values"),
    (lambda: make_pairs(MODEL, [([5], [6])], 2, np.random.default_rng(0), eos_token_id=2,
                        segment_eos="never"), "segment_eos"),
    (lambda: pair_logps(MODEL, [GOOD], nll_on="all"), "nll_on"),
    (lambda: choose_segment(0, 3, np.random.default_rng(0)), "at least 1"),
    (lambda: choose_segment(3, 0, np.random.default_rng(0)), "at least 1"),
    (lambda: EMA(MODEL, decay=1.5), "decay"), (lambda: EMA(MODEL, decay=-0.1), "decay"),
    (lambda: EMA(MODEL, update_every=0), "update_every"),
    (lambda: ReplayBuffer(1).load_state_dict({"items": [1, 2]}), "2 items do not fit")])
def test_arguments_without_sense_are_refused(call, words):
    """Lengths that do not match, unknown words and settings out of range get a sentence."""
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("arguments", [
    {"num_return": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1},
    {"top_p": 1.5}, {"top_p": float("nan")}])
def test_sampling_settings_without_sense_are_refused(arguments):
    """num_return 0, and a temperature, top_k or top_p out of range or NaN, get a sentence."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        generate_segments(MODEL, [[5]], 3, eos_token_id=2, **arguments)


@pytest.mark.parametrize("loss, arguments", [(dpo_loss, 4), (orpo_loss, 3)])
def test_losses_refuse_unequal_shapes(loss, arguments):
    """(n,) beside (n, 1) would broadcast to (n, n) losses; every argument must have one shape."""
    for wrong in range(arguments):
        logps = [torch.full((3,), -1.0) for _ in range(arguments)]
        logps[wrong] = logps[wrong][:, None]
        with pytest.raises(ValueError, match="same shape"):
            loss(*logps)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite(value):
    """A model whose logits are not finite raises FloatingPointError, greedy and sampled."""
    model = tiny()
    model.lm_head.register_forward_hook(lambda module, args, output: output + value)
    for temperature in (0, 0.7):
        with pytest.raises(FloatingPointError, match="not finite"):
            generate_segments(model, [[5]], 3, eos_token_id=2, temperature=temperature)


def test_a_very_low_temperature_is_greedy():
    """temperature 1e-40 divides nothing into infinity: the tokens are the greedy ones."""
    prefixes = [[5, 6], [7]]
    for temperature in (1e-40, 1e-8):
        found = generate_segments(MODEL, prefixes, 9, eos_token_id=2, temperature=temperature)
        assert found == generate_segments(MODEL, prefixes, 9, eos_token_id=2, temperature=0)


def test_make_pairs_worked_example(monkeypatch):
    """The docstring's example: N_seg 2, start 1, B' = [8, 9] make y- = [1, 8, 9, 4, 5]."""
    monkeypatch.setattr(sapo, "generate_segments", lambda *args, **options: [[[8, 9]]])
    rng = types.SimpleNamespace(integers=lambda low, high: 1)
    [pair] = sapo.make_pairs(MODEL, [([7], [1, 2, 3, 4, 5])], 2, rng, eos_token_id=0)
    assert pair == Pair([7], [1, 2, 3, 4, 5], [1, 8, 9, 4, 5], 1, 3, 3)


def test_top_p_1_is_no_filter(monkeypatch):
    """top_p 1 leaves every token its probability, also where fp32 sums reach 1 before the tail."""
    logits, seen = torch.tensor([[0.0, -30.0, -31.0]]), []
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, *args, **kwargs: (
        seen.append(probabilities) or torch.zeros(1, 1, dtype=torch.long)))
    sapo.sample_tokens(logits, 1.0, 0, 1.0)
    assert torch.equal(seen[0], logits.softmax(-1)) and seen[0].min() > 0


def test_forbidding_end_tokens_where_there_are_none():
    """forbid_eos without an end token changes nothing."""
    arguments = {"max_new_tokens": 6, "eos_token_id": None, "temperature": 0}
    assert (generate_segments(MODEL, [[5]], forbid_eos=True, **arguments)
            == generate_segments(MODEL, [[5]], **arguments))


def test_pairs_with_nothing_to_score():
    """Empty responses, and pairs that are all A with skip_shared, have log-probability 0."""
    for pair, skip_shared in ((Pair([5, 6], [], [], 0), False), (Pair([5], [6], [6], 1), True)):
        for shortcuts in (None, Shortcuts(True, True), Shortcuts(False, True)):
            found = pair_logps(MODEL, [pair], shortcuts=shortcuts, skip_shared=skip_shared)
            assert [x.tolist() for x in found] == [[0]] * 3
            torch.stack(found).sum().backward()


# ----------------------------------------------------------------------------------------- threads

def test_two_threads_with_one_model():
    """Two threads that generate with a model in eval mode get their own tokens; its flags stay."""
    rng = np.random.default_rng(0)
    prefixes = [[random_ids(rng, 5)] * 3, [random_ids(rng, 9)] * 3]
    expected = [generate_segments(MODEL, one, 9, eos_token_id=None, temperature=0)
                for one in prefixes]
    found = {}

    def work(thread: int) -> None:
        found[thread] = [generate_segments(MODEL, prefixes[thread], 9, eos_token_id=None,
                                           temperature=0) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(thread,)) for thread in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {thread: [expected[thread]] * 10 for thread in (0, 1)}
    assert not any(module.training for module in MODEL.modules())
