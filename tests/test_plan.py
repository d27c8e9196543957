"""--dry_run: parameters, steps, tokens and memory, from a configuration alone."""
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import quick_command
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import sapo
from sapo import LOGITS_AT_ONCE, Pair, pair_logps
from support.errors import UserError
from support.plan import activations, logit_changes, logits, memory, micro_batch_for, plan
from support.settings import parse
from test_sapo import tiny

HERE = Path(__file__).resolve().parent.parent
LLAMA = f"@{HERE / 'recipes' / 'sapo-dpo-llama3-8b.txt'}"


def settings_of(flags: str):
    return parse(["--model", "x", "--data", "y", *flags.split()])


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


def gib(text: str, part: str) -> float:
    return float(re.search(rf"{part} +([0-9.]+) GiB", text)[1])


def saved_for_backward(model, run) -> int:
    """Bytes that autograd keeps of run(), weights not counted."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def score(model, pairs):
    """pair_logps as train.py calls it, with the shortcuts that are exact for the model."""
    return pair_logps(model, pairs, shortcuts=sapo.find_shortcuts(model))


def test_a_dry_run_needs_a_configuration_only(tmp_path, monkeypatch, capfd):
    """Without weights, data, network or output folder: Llama 3's parameters and the paper's steps.

    Tokens are an upper bound: 473 steps of 64 pairs of 2 x 2048 tokens.
    """
    monkeypatch.chdir(tmp_path)
    status, out, err = quick_command(LLAMA, "--dry_run", capfd=capfd)
    assert status == 0 and list(tmp_path.iterdir()) == [], err
    assert "8030.26 M parameters" in out
    assert f"{math.ceil(7563 * 4 / 64)} of 64 prompts" in out
    expected = f"{473 * 64 * 4096 / 1e6:.1f} M scored, {473 * 64 * 256 / 1e6:.1f} M written"
    assert expected in out
    assert "micro-batches of 2 pairs; logits in chunks" in out


def test_sharding_divides_what_stays():
    """A process holds 4 bytes per parameter of the policy; --shard divides that by processes."""
    one, eight = (plan(parse([LLAMA, "--plan_processes", n]), 1) for n in ("1", "8"))
    assert gib(one, "policy") == pytest.approx(4 * 8.03026e9 / 2 ** 30, abs=0.01)
    assert gib(eight, "policy") == pytest.approx(gib(one, "policy") / 8, abs=0.01)


def test_what_cant_be_planned_is_refused(tmp_path):
    """A model that is not there and a configuration of no causal model: one sentence each."""
    with pytest.raises(UserError, match=r"--plan_config takes a config\.json"):
        plan(settings_of("--dry_run --plan_rows 10"), 1)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="can't be built without weights"):
        plan(settings_of(f"--dry_run --plan_rows 10 --plan_config {tmp_path}/config.json"), 1)


def test_activations_are_what_a_step_keeps():
    """The planned activations are what autograd keeps of a real forward pass, within a tenth.

    The shares of weights, gradients and optimizer are exact.
    """
    s = settings_of("--max_len 64 --micro_batch 2 --loss dpo")
    model = tiny()
    pair = Pair([1], [1] * 63, [1] * 63, 0)
    measured = saved_for_backward(model, lambda: score(model, [pair] * 2))
    shape = on_meta(model.config)
    # two layers, and one of them again in backward
    assert activations(s, shape) == pytest.approx(measured * 1.5, rel=0.1)
    parts, peak, saved = memory(s, shape, 4)
    parameters = sum(p.numel() for p in model.parameters())
    assert [size / parameters for size in parts.values()][:5] == [4, 4, 8, 4, 4]
    assert peak <= sum(parts.values())
    assert saved == 20 * parameters                     # all that stays but the gradients


CHANGED_LOGITS = {"gemma2": {"head_dim": 8}, "cohere": {}, "granite": {"logits_scaling": 8.0}}


@pytest.mark.parametrize("name", CHANGED_LOGITS)
def test_logits_of_all_positions_are_planned_where_all_are_held(name):
    """Models that scale or cap their logits hold those of every position, and the plan says so.

    Measured with a vocabulary of 40,000: what autograd keeps of the logits, and the one to two
    copies more that computing and differentiating them takes, are within the plan. It once counted
    one chunk of 2 ** 25 logits.
    """
    size, length = 40_000, 64
    changes = CHANGED_LOGITS[name] | {"vocab_size": size}
    model = tiny(name, **changes)
    pair = Pair([1], [1] * (length - 1), [1] * (length - 1), 0)
    copy = 4 * 2 * length * size                        # bytes: fp32, both responses
    kept = saved_for_backward(model, lambda: score(model, [pair])) / copy
    s = settings_of(f"--max_len {length} --micro_batch 1 --loss dpo")
    planned = logits(s, on_meta(model.config)) / copy
    cap = name == "gemma2"                              # kept before the cap, and normalised
    assert kept == pytest.approx(2 if cap else 1, rel=0.1)
    assert planned == round(kept) + 2
    assert logits(s, on_meta(tiny("llama", **changes).config)) / copy == 3


def test_the_plan_lowers_the_micro_batch_and_says_why(tmp_path):
    """Gemma 2's soft cap lowers the planned micro-batch to 1, and the report names the reason."""
    CONFIG_MAPPING["gemma2"](num_hidden_layers=2, hidden_size=64, intermediate_size=64,
                             vocab_size=256_000).save_pretrained(tmp_path)
    flags = f"--dry_run --plan_rows 100 --max_len 512 --plan_config {tmp_path}/config.json"
    capped = plan(settings_of(flags), 1)
    assert "micro-batches of 1 pairs (lowered from 8); logits of all positions" in capped
    assert "because of final_logit_softcapping" in capped
    config = json.loads((tmp_path / "config.json").read_text()) | {"final_logit_softcapping": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "micro-batches of 8 pairs; logits in chunks" in plan(settings_of(flags), 1)
    assert gib(capped, "scoring: activations, logits") > 4 * 4 * 2 * 512 * 256_000 / 2 ** 30


def test_micro_batches_hold_no_more_logits_than_allowed():
    """The largest micro-batch whose logits stay within LOGITS_AT_ONCE, and at least 1.

    A model whose head can be split keeps --micro_batch.
    """
    s = settings_of("--max_len 512 --micro_batch 8")
    assert micro_batch_for(s, 256_000, split_head=True) == 8
    assert micro_batch_for(s, 256_000, split_head=False) == 1
    assert micro_batch_for(s, 100, split_head=False) == 8
    for size in (5_000, 9_000, 16_000):
        count = micro_batch_for(s, size, split_head=False)
        assert 1 <= count * 2 * 512 * size <= LOGITS_AT_ONCE
        assert count == 8 or (count + 1) * 2 * 512 * size > LOGITS_AT_ONCE


KINDS = ["llama", "mistral", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi3", "olmo2", "gpt2",
         "gpt_neox", "gptj", "falcon", "starcoder2", "mixtral", "cohere", "cohere2", "granite",
         "nanochat"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_tells_what_trying_finds(kind):
    """The plan's guess by configuration agrees with find_shortcuts, which tries the model."""
    changes = {"head_dim": 8} if "gemma" in kind or kind == "qwen3" else {}
    changes |= {"rotary_dim": 4} if kind == "gptj" else {}
    changes |= {"logits_scaling": 8.0} if kind == "granite" else {}
    model = tiny(kind, **changes)
    assert sapo.find_shortcuts(model).split_head == (not logit_changes(model.config))


def test_rows_are_counted(tmp_path):
    """Rows come from the file where it is there, otherwise from --plan_rows.

    With --drop_long_prompts the number is said to be one before that.
    """
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a b", "chosen": "c d"}\n' * 300)
    config = f"--plan_config {HERE / 'recipes' / 'mistral-7b.json'} --max_len 32 --dry_run"
    flags = ["--model", "x", *config.split(), "--plan_rows", "120"]
    assert "300 rows, 6 of them held out" in plan(parse([*flags, "--data", str(file)]), 1)
    report = plan(parse([*flags, "--data", "nobody/here", "--drop_long_prompts", "--rows", ":100",
                         "--eval_rows", "0", "--epochs", "2", "--batch_size", "10"]), 1)
    assert "100 rows (by --plan_rows), before --drop_long_prompts, 0 of them held out" in report
    assert "20 of 10 prompts" in report
