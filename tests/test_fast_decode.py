"""The recorded decode step of support/fast_decode.py, and what generation leaves out."""
import copy
import logging
import warnings

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

from sapo import decode, generate_segments, plain_decode_step, prefill
from support.fast_decode import recorded_decode_step
from test_sapo import ARCHITECTURES, greedy, random_ids, tiny

OLD = Version(transformers.__version__) < Version("5.24")
MORE = {"mixtral": {"num_local_experts": 4}, "falcon": {}, "olmo2": {},
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}


def logits_of(decode_step, model, lengths: tuple[int, ...]) -> torch.Tensor:
    """All logits of a greedy decoding with this step: (steps x B, V)."""
    rng, seen = np.random.default_rng(5), []
    prefixes = [random_ids(rng, length) for length in lengths]
    limits = [5 + 4 * (i % 2) for i in range(len(prefixes))]

    def choose(logits):
        seen.append(logits.clone())
        return logits.argmax(-1)

    with torch.no_grad():
        decode(model, decode_step, prefill(model, prefixes, max(limits)), prefixes, limits,
               [False] * len(prefixes), [], choose)
    return torch.cat(seen)


def check_same(decode_step, model) -> None:
    """The step gives the plain step's logits bit for bit, at batch 1, 2 and 5, at many lengths."""
    for lengths in ((7,), (3, 8), (21, 2, 30, 11, 40), (1, 1)):
        expected = logits_of(plain_decode_step(model), model, lengths)
        assert torch.equal(logits_of(decode_step, model, lengths), expected), lengths


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE])
def test_recorded_step_changes_nothing(name):
    """The recorded step is the plain one bit for bit, for any batch, after weights moved too.

    A copy of the model records a step of its own, which follows the copy's weights alone.
    """
    if ("gemma 2" in name or name == "mixtral") and OLD:
        pytest.skip("this transformers decides by values in these models")
    model = tiny(name, **MORE.get(name, {}))
    other = copy.deepcopy(model)
    steps = [recorded_decode_step(one) for one in (model, other)]
    assert None not in steps
    check_same(steps[0], model)
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 1.1)
    check_same(steps[0], model)
    check_same(steps[1], other)


def test_step_is_recorded_anew_for_another_dtype():
    """After model.double() a step that is recorded anew is exact again; so is one in bf16."""
    model = tiny()
    for dtype in (torch.float64, torch.bfloat16):
        model = model.to(dtype)
        check_same(recorded_decode_step(model), model)


def test_generated_tokens_are_the_same():
    """generate_segments writes the same tokens with the recorded step: greedy and sampled."""
    model, prefixes = tiny(), [[5, 6, 7], [8], [9] * 20]
    step = recorded_decode_step(model)
    for temperature in (0, 1.0):
        found = [generate_segments(model, prefixes, 9, eos_token_id=2, temperature=temperature,
                                   num_return=2, generator=torch.Generator().manual_seed(1),
                                   decode_step=one) for one in (None, step)]
        assert found[0] == found[1]


def test_steps_that_depend_on_values_are_not_recorded():
    """A model whose Python looks at a tensor's values has no recorded step, and decodes right.

    The rope here changes with the largest position: recorded, that decision would be frozen.
    """
    model = tiny(rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    assert recorded_decode_step(model) is None
    found = generate_segments(model, [[5, 6, 7]], 5, eos_token_id=None, temperature=0)
    assert found == [[greedy(model, [5, 6, 7], 5, None)]]


def test_models_that_cannot_decode_have_no_recorded_step():
    """Where decoding with the cache is wrong or impossible, there is None and no error."""
    bloom = tiny("bloom", n_layer=2, n_head=4)
    neo = tiny("gpt_neo", num_layers=2, num_heads=4, window_size=4,
               attention_types=[[["global", "local"], 1]])
    assert recorded_decode_step(bloom) is None and recorded_decode_step(neo) is None


def test_recording_leaves_the_host_alone(capfd):
    """Recording prints and warns nothing; logging.disable, filters and training flags stay."""
    model = tiny().train()
    model.model.layers[0].eval()
    training = [module.training for module in model.modules()]
    before, random_state = logging.root.manager.disable, torch.get_rng_state()
    filters = list(warnings.filters)
    try:
        for level in (logging.NOTSET, logging.INFO, logging.CRITICAL):
            logging.disable(level)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert recorded_decode_step(model) is not None
            assert logging.root.manager.disable == level
            assert not caught
    finally:
        logging.disable(before)
    assert warnings.filters == filters and torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == training
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dropout", [0.5])
def test_a_step_recorded_in_training_mode_has_no_dropout(dropout):
    """A model in training mode is recorded in eval mode: its dropout is not part of the step."""
    model = tiny(attention_dropout=dropout).train()
    step = recorded_decode_step(model)
    check_same(step, model.eval())


def test_generation_does_no_more_than_it_must():
    """Each prefix is read once for all its continuations, in groups of like lengths.

    Sequences that are done are dropped once they are a quarter of all.
    """
    model, seen, rng = tiny(), [], np.random.default_rng(7)
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(tuple(args[0].shape)))
    prefixes = [random_ids(rng, n) for n in (40, 6, 41, 7, 8, 42, 39, 9)]
    generate_segments(model, prefixes, [8] * 4 + [2] * 4, eos_token_id=None, num_return=2)
    assert seen[:2] == [(4, 8), (4, 41)]                            # all but the last tokens
    assert seen[2:] == [(16, 1)] * 2 + [(8, 1)] * 6
