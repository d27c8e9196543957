"""What the shortcuts of pair_logps save, and that each token is scored once after its own past."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sapo
from sapo import (
    Pair,
    Shortcuts,
    check_generation,
    find_shortcuts,
    pair_logps,
    shared_layout,
)
from test_sapo import IDS, plain_logps, some_pairs, tiny


def test_sharing_reads_the_prefix_once():
    """With a shared prefix x and A go through the model once per pair, and no last token does."""
    model, seen = tiny(), []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(args[0].numel()))
    for share_prefix in (True, False):
        pair_logps(model, some_pairs()[:1], shortcuts=Shortcuts(share_prefix, True))
    assert seen == [20 + 7 + 13 + 13, 2 * (20 + 7 + 13)]


def test_the_head_works_in_chunks(monkeypatch):
    """Scoring in chunks that backward computes again gives the same numbers and gradients.

    No more than LOGITS_AT_ONCE logits are held at a time, and prompt tokens get none.
    """
    model, pairs, found, projected = tiny(), some_pairs(), [], []
    scored = sum(len(pair.chosen) + len(pair.rejected) - pair.start for pair in pairs)
    model.lm_head.register_forward_hook(
        lambda module, args, output: projected.append(output.numel() // 97))
    for limit in (2 ** 25, 97 * 5):
        monkeypatch.setattr(sapo, "LOGITS_AT_ONCE", limit)
        projected.clear()
        logps = torch.stack(pair_logps(model, pairs, shortcuts=Shortcuts(True, True)))
        assert sum(projected) == scored and max(projected) == min(scored, limit // 97)
        found.append([logps.detach(), *torch.autograd.grad(logps.sum(), model.parameters())])
    for whole, chunked in zip(*found, strict=True):
        assert torch.allclose(whole, chunked, rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(x=IDS, a=st.lists(st.integers(0, 9), max_size=5), branches=st.tuples(IDS, IDS))
def test_shared_layout_scores_every_token_once(x, a, branches):
    """Every token but x's first is scored once, at the token before, seeing its own past alone."""
    pair = Pair(x, a + branches[0], a + branches[1], len(a))
    (tokens, positions, branch), scored = shared_layout(pair)
    assert len(tokens) == len(x + a) + len(branches[0]) + len(branches[1]) - 2
    found = {kind: [] for kind in range(4)}
    for column, label, kind in scored:
        past = [tokens[i] for i in range(len(tokens)) if branch[i] in (sapo.SHARED, branch[column])
                and positions[i] <= positions[column]]
        found[kind].append([*past, label])
    prefix = x + a
    expected = [prefix[:t + 1] for t in range(1, len(prefix))]
    assert found[sapo.PROMPT] == expected[:len(x) - 1]
    assert found[sapo.SEGMENT_A] == expected[len(x) - 1:]
    for kind, tokens in ((sapo.CHOSEN, branches[0]), (sapo.REJECTED, branches[1])):
        assert found[kind] == [prefix + tokens[:t + 1] for t in range(len(tokens))]


@pytest.mark.parametrize("shortcuts", [None, Shortcuts(True, True), Shortcuts(False, True)])
def test_padding_is_by_length(shortcuts):
    """An end token counts though its id is the pad id; the rest of a batch changes nothing."""
    model = tiny(pad_token_id=2)
    pairs = [Pair([5], [6, 2], [7, 2], 0),
             Pair([5] * 9, [*range(3, 12), 2], [*range(13, 22), 2], 0)]
    together = torch.stack(pair_logps(model, pairs, shortcuts=shortcuts)[:2], 1)
    for pair, found in zip(pairs, together, strict=True):
        assert torch.allclose(found, torch.stack(plain_logps(model, pair)), atol=1e-4)


@pytest.mark.parametrize("shortcuts", [None, Shortcuts(True, True)])
def test_sums_stay_fp32_in_bf16(shortcuts):
    """Under bf16 autocast logps are summed in fp32: bf16's steps exceed DPO's whole margin."""
    model = tiny()
    pairs = [Pair([5], list(range(3, 93)), list(range(10, 90)), 0) for _ in range(3)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sums, means = (pair_logps(model, pairs, average, shortcuts) for average in (False, True))
    assert sums.chosen_logps.dtype == torch.float32
    assert torch.allclose(sums.chosen_logps, means.chosen_logps * 90, rtol=1e-6)
    assert torch.allclose(sums.rejected_logps, means.rejected_logps * 80, rtol=1e-6)
    assert not torch.equal(sums.chosen_logps, sums.chosen_logps.bfloat16().float())


def test_a_model_with_few_positions_is_scored_plainly():
    """40 positions are too few for the trial of find_shortcuts: the answer is plain scoring."""
    model = tiny("gpt2", n_embd=32, n_layer=2, n_head=4, max_position_embeddings=40)
    assert find_shortcuts(model) == Shortcuts(False, False)


def test_a_trial_without_memory_says_so(monkeypatch):
    """Where a trial runs out of memory, that is the error: not "no shortcut", and not a ValueError
    that the model can't generate."""
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name, trial in (("fast_pair_logps", find_shortcuts), ("prefill", check_generation)):
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(sapo, name, fails)
            trial(tiny())
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(sapo.copy, "copy", fails)     # of head_can_be_split
        find_shortcuts(tiny())


def test_one_token_and_nothing_to_score():
    """Prompts of one token with empty responses alone give 0 with separate sequences, too."""
    found = pair_logps(tiny(), [Pair([5], [], [], 0)], shortcuts=Shortcuts(False, True))
    assert found.chosen_logps.tolist() == [0]
