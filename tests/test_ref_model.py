"""--ref_model: DPO against a reference model of one's own."""
import math
from pathlib import Path

import pytest
import torch
from conftest import (
    StopAfter,
    flag_value,
    own_buffer,
    read_records,
    results,
    run,
    same_state,
    two_processes,
    weights,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import train
from losses import dpo_loss
from sapo import pair_logps
from support.errors import Stopped, UserError
from support.plan import plan
from support.settings import parse
from test_sapo import tiny

DPO = "--loss dpo --rejected data --ref fixed"


@pytest.fixture
def reference(tiny_run, tmp_path) -> Path:
    """Another model than the policy, of another shape, with the same tokenizer."""
    return saved_reference(tiny_run, tmp_path / "reference")


def saved_reference(tiny_run, folder: Path, **changes) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(flag_value(tiny_run, "--model"))
    end = tokenizer.eos_token_id
    torch.manual_seed(7)
    tiny(**{"vocab_size": len(tokenizer), "pad_token_id": end, "eos_token_id": end,
            "bos_token_id": None, "intermediate_size": 48, **changes}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flags", [DPO, "--loss dpo --ref fixed", "--loss dpo --rejected data"])
def test_dpo_takes_the_reference_that_is_named(flags, tiny_run, reference, tmp_path, monkeypatch):
    """Every step's loss is DPO's with the log-probabilities of the model in --ref_model, which may
    have another shape and stays as it is. Without --rejected data the pairs are SAPO's."""
    seen, compute = [], train.compute_loss

    def noted(s, scorer, reference_scorer, pairs, beta):
        losses, *others = compute(s, scorer, reference_scorer, pairs, beta)
        with torch.no_grad():
            policy, fixed = (pair_logps(model, pairs) for model in (scorer.model, reference_model))
            expected = dpo_loss(*policy[:2], *fixed[:2], beta)[0]
        seen.append((losses.detach(), expected, reference_scorer.model))
        return losses, *others

    reference_model = type(tiny()).from_pretrained(reference)
    monkeypatch.setattr(train, "compute_loss", noted)
    records, _ = run(tiny_run, tmp_path / "out", flags, f"--ref_model {reference}")
    assert len(seen) == 12
    for losses, expected, _ in seen:
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert same_state(dict(seen[-1][2].state_dict()), dict(reference_model.state_dict()))
    # The policy is not the reference, so the first loss is not that of equal models.
    assert abs(records[0]["loss"] - math.log(2)) > 1e-3


def test_the_start_as_reference_model_changes_nothing(tiny_run, tmp_path):
    """--ref_model with the folder of --model is --ref fixed, bit for bit."""
    records, summary = run(tiny_run, tmp_path / "a", DPO)
    named, named_summary = run(tiny_run, tmp_path / "b", DPO,
                               f"--ref_model {flag_value(tiny_run, '--model')}")
    assert [r["loss"] for r in records] == [r["loss"] for r in named]
    assert results(summary) == results(named_summary)
    assert same_state(dict(weights(tmp_path / "a")), dict(weights(tmp_path / "b")))


def other_tokens(tiny_run, folder: Path) -> Path:
    """A reference whose tokenizer gives two tokens each other's ids."""
    saved_reference(tiny_run, folder)
    file = folder / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    first, second = '"!": 2,', '"#": 4,'
    assert first in text and second in text
    file.write_text(text.replace(first, '"!": 4,').replace(second, '"#": 2,'), encoding="utf-8")
    return folder


@pytest.mark.parametrize("make, words", [
    (lambda flags, folder: other_tokens(flags, folder),
     "its vocabulary is not that of --model: the token '[!#]' has the id [24] there and [24] here"),
    (lambda flags, folder: saved_reference(flags, folder, vocab_size=600),
     "its embedding has 600 entries, too few for the 640 tokens of --model"),
    (lambda flags, folder: saved_reference(flags, folder, max_position_embeddings=1),
     "has 1 position: no room"),
    (lambda flags, folder: folder, "not a causal language model with its tokenizer")])
def test_a_reference_that_does_not_fit_is_refused(make, words, tiny_run, tmp_path):
    """Another vocabulary, a smaller embedding, no room for a pair, no model: one sentence that
    names --ref_model, before anything is trained or written."""
    folder = make(tiny_run, tmp_path / "reference")
    with pytest.raises(UserError, match=words) as error:
        run(tiny_run, tmp_path / "out", DPO, f"--ref_model {folder}")
    assert f"--ref_model {folder}" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_reference_with_fewer_positions_shortens_the_rows(tiny_run, tmp_path):
    """Prompt and response fit the reference as well as the policy: --max_len is lowered to the
    positions that both have."""
    folder = saved_reference(tiny_run, tmp_path / "reference", max_position_embeddings=96)
    s = parse([*tiny_run, "--out", str(tmp_path / "out"), *DPO.split(), "--ref_model", str(folder)])
    train.train(s)
    assert (s.max_len, s.max_prompt_len) == (96, 84)


def test_a_reference_that_changed_is_refused_on_resume(tiny_run, reference, tmp_path, monkeypatch):
    """A resumed run with --ref_model goes on to the end of one that never stopped. Another
    --ref_model, or a folder whose weights changed, is refused by name before it trains."""
    flags = [*tiny_run, *DPO.split(), "--ref_model", str(reference), *own_buffer(DPO)]
    train.train(parse([*flags, "--out", str(tmp_path / "whole")]))
    for out in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(Stopped):
            train.train(parse([*flags, "--out", str(out)]), StopAfter(1))
    train.train(parse(["--resume", str(tmp_path / "a")]))
    assert same_state(dict(weights(tmp_path / "a")), dict(weights(tmp_path / "whole")))
    monkeypatch.setattr(train, "backward", lambda *arguments: pytest.fail("it trained"))
    with pytest.raises(UserError, match="--ref_model"):
        parse(["--resume", str(tmp_path / "b"), "--ref_model", flag_value(tiny_run, "--model")])
    path = reference / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the reference model's folder \(--ref_model\) changed"):
        train.train(parse(["--resume", str(tmp_path / "b")]))


def test_overwriting_the_reference_is_refused(tiny_run, tmp_path):
    """--overwrite refuses the folder of a run whose model is the new run's reference."""
    out = tmp_path / "out"
    run(tiny_run, out, "--loss sft")
    with pytest.raises(UserError, match="holds the model or the data that this run starts from"):
        run(tiny_run, out, DPO, f"--ref_model {out}/final --overwrite")
    assert (out / "final" / "model.safetensors").exists()


def test_the_plan_counts_the_references_own_parameters(tiny_run, reference):
    """--dry_run: the reference takes 4 bytes per parameter of its own, not of the policy's."""
    def planned(*more):
        text = plan(parse([*tiny_run, *DPO.split(), "--dry_run", *more]), 1)
        line = next(line for line in text.splitlines() if line.startswith("    reference"))
        return float(line.split()[-4])

    def parameters(folder):
        return sum(p.numel() for p in type(tiny()).from_pretrained(folder).parameters())

    own, other = parameters(flag_value(tiny_run, "--model")), parameters(reference)
    assert own != other and planned() == 4.0
    assert planned("--ref_model", str(reference)) == pytest.approx(4 * other / own, abs=0.006)
    with pytest.raises(UserError, match="--ref_model nowhere: no model's shape there"):
        planned("--ref_model", "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["", "--shard"])
def test_a_reference_in_two_processes(shard, tiny_run, reference, tmp_path):
    """Two processes, with and without --shard, score with the same reference as one process."""
    records, _ = run(tiny_run, tmp_path / "one", DPO, f"--ref_model {reference}")
    out = tmp_path / "two"
    flags = [*tiny_run, *DPO.split(), "--ref_model", str(reference), "--out", str(out),
             *shard.split()]
    assert two_processes(lambda: train.train(parse(flags))) == [0, 0]
    assert [r["loss"] for r in read_records(out)] == pytest.approx(
        [r["loss"] for r in records], rel=1e-3)
