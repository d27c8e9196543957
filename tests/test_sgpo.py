"""examples/sgpo.py: what is an improvement, who writes what, the two losses, a whole run."""
import argparse
import json
import math
import re

import pytest
import torch
from conftest import REPOSITORY, flag_value
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import sgpo
from examples.sgpo import IMPROVE, Roles, Row, edit_distance, gap, put_right, step_up
from sapo import pair_logps

WORDS = st.lists(st.sampled_from("abc"), max_size=6)
CHAT = [{"role": "user", "content": "Add 1 and 1, then 2."}]
ROW = Row(CHAT, "1+1=2\n2+2=4\nSum 4", r"\w+")


@pytest.fixture(scope="module")
def demo():
    """The embedded model, its tokenizer, and rows with their wrong answers."""
    folder = REPOSITORY / "data" / "model"
    with open(REPOSITORY / "data" / "heldout.jsonl") as file:
        rows = [json.loads(line) for line in file][:24]
    return (AutoModelForCausalLM.from_pretrained(folder).eval(),
            AutoTokenizer.from_pretrained(folder),
            [Row(row["prompt"], row["chosen"][0]["content"], row["check"]) for row in rows],
            [row["rejected"][0]["content"] for row in rows])


def roles_of(demo, **changes) -> Roles:
    settings = {"temperature": 1.0, "seed": 0, "max_new_tokens": 80, "generate_batch": 7,
                "revise": 0}
    return Roles(argparse.Namespace(**settings | changes), demo[0], demo[1])


@given(WORDS, WORDS, WORDS)
def test_edit_distance_is_the_least_number_of_edits(a, b, c):
    """edit_distance is what the recursive definition gives, and a metric."""
    def least(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(least(a[1:], b[1:]) + (a[0] != b[0]), least(a[1:], b) + 1, least(a, b[1:]) + 1)

    assert edit_distance(a, b) == least(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@pytest.mark.parametrize("draft, begun", [
    ("1+1=2\n2+2=5\nSum 5", "1+1=2\n2+2=4\n"), ("1+1=3\n3+2=5\nSum 5", "1+1=2\n"),
    ("1+1=2\n2+2=4\nSum 5", "1+1=2\n2+2=4\nSum 4\n"), ("1+1=2", "1+1=2\n2+2=4\n"),
    ("", "1+1=2\n"), (ROW.answer, "")])
def test_the_first_wrong_line_is_put_right(draft, begun):
    """put_right keeps what is right, takes the first other line from y*, and nothing after it."""
    assert put_right(draft, ROW.answer) == begun


def test_a_kept_step_is_discernible_and_incremental():
    """y~ must be nearer to y* than y0 is, and no farther from y0 than y* is. A right draft is kept
    as it is. Distances are in the check's matches; without a check, in words."""
    draft = "1+1=3\n3+2=5\nSum 5"
    assert gap(ROW, draft) == 4 and gap(ROW, ROW.answer) == 0
    assert gap(ROW, "1 + 1 = 2;  2+2=4, Sum 4") == 0
    assert gap(ROW._replace(check=None), "1+1=2 2+2=4 Sum 5") == 1
    better = "1+1=2\n2+2=5\nSum 5"
    assert step_up(ROW, draft, better) == better
    assert step_up(ROW, draft, ROW.answer) == ROW.answer        # all of it was one mistake
    assert step_up(ROW, draft, draft) is None                   # not discernible
    assert step_up(ROW, draft, "1+1=3\n3+2=6\nSum 6") is None   # as bad as the draft
    # Better, but farther from the draft than y* is: 0 of its words are the draft's.
    words = Row(CHAT, "a b c d", None)
    assert gap(words, "a x y") == 3 and gap(words, "b c d") == 1
    assert gap(words, "b c d", "a x y") == 3 and step_up(words, "a x y", "b c d") == "b c d"
    assert gap(words, "a b c d e f", "a x y") == 5 and gap(words, "a b c d e f") == 2
    assert step_up(words, "a x y", "a b c d e f") is None
    assert step_up(ROW, ROW.answer, draft) == ROW.answer


def test_stage_1_data_is_a_corrected_draft(demo, monkeypatch):
    """Without --revise, y~ begins as y* up to the draft's first wrong line. It is what the policy
    itself goes on with, or y*'s end. The improver's prompt is x, the draft, and IMPROVE."""
    roles, (_, tokenizer, rows, wrong) = roles_of(demo), demo
    drafts, asked, write = [*wrong[:-1], rows[-1].answer], [], Roles.write

    def written(self, prompts, greedy=False):
        asked.append((prompts, greedy))
        return write(self, prompts, greedy) if greedy else (None, drafts)

    monkeypatch.setattr(Roles, "write", written)
    targets = sgpo.improver_targets(roles, rows)
    (first, greedy), (second, again) = asked
    assert (greedy, again) == (False, True)
    assert first == [roles.prompt(row) for row in rows]
    assert [x[:len(y)] for x, y in zip(second, first, strict=True)] == first
    kept = 0
    for row, draft, target in zip(rows, drafts, targets, strict=True):
        if target is None:
            continue
        answer = tokenizer.decode(target.chosen[:-1])
        assert target.chosen[-1] == tokenizer.eos_token_id
        prompt = tokenizer.decode(target.prompt)
        assert prompt.endswith(
            f"<|im_start|>assistant\n{draft}<|im_end|>\n<|im_start|>user\n{IMPROVE}<|im_end|>\n"
            "<|im_start|>assistant\n")
        assert f"{answer}\n".startswith(put_right(draft, row.answer))
        kept += draft != row.answer and gap(row, answer) < gap(row, draft)
    assert kept >= 12
    assert tokenizer.decode(targets[-1].chosen[:-1]) == rows[-1].answer     # a right draft stays


def test_revised_drafts_come_from_the_model_that_sees_the_answer(demo, monkeypatch):
    """With --revise 1 the model is shown x, y0 and y*, and what it writes is kept where it is a
    step from y0 towards y*."""
    roles, (_, tokenizer, rows, wrong) = roles_of(demo, revise=1), demo
    said, asked = [wrong, [row.answer for row in rows[:-1]] + ["nothing"]], []
    monkeypatch.setattr(Roles, "write", lambda self, prompts, greedy=False: (
        asked.append(prompts), (None, said[len(asked) - 1]))[1])
    targets = sgpo.improver_targets(roles, rows)
    for row, draft, prompt in zip(rows, wrong, asked[1], strict=True):
        text = tokenizer.decode(prompt)
        assert text.index(draft) < text.index(row.answer)
    assert targets[-1] is None and None not in targets[:-1]
    assert tokenizer.decode(targets[0].chosen[:-1]) == rows[0].answer


def test_both_sides_of_a_pair_are_the_models_own(demo, monkeypatch):
    """y- answers x, y+ answers x with y- in front of it, both sampled alike; the pair stands under
    x alone. The gain is positive where y+ is nearer to y*."""
    roles, rows, asked, generate = roles_of(demo), demo[2], [], sgpo.generate_segments

    def generated(model, prompts, *arguments, temperature, **more):
        found = generate(model, prompts, *arguments, temperature=temperature, **more)
        asked.extend((prompt, temperature, response)
                     for prompt, (response,) in zip(prompts, found, strict=True))
        return found

    monkeypatch.setattr(sgpo, "generate_segments", generated)
    pairs = sgpo.preference_pairs(roles, rows)
    assert len(asked) == 2 * len(rows) and {temperature for _, temperature, _ in asked} == {1.0}
    text, gains = roles.tokenizer.decode, []
    for row, (pair, gain) in zip(rows, pairs, strict=True):
        draft, new = (text(y, skip_special_tokens=True) for y in (pair.rejected, pair.chosen))
        assert pair.prompt == roles.prompt(row)
        assert (pair.prompt, 1.0, pair.rejected) in asked
        assert (roles.prompt(row, draft), 1.0, pair.chosen) in asked
        assert gain == gap(row, draft) - gap(row, new)
        gains.append(gain)
    assert len(set(gains)) > 2


SMALL = ("--improver_steps 2 --dpo_steps 1 --batch_size 4 --micro_batch 3 --eval_rows 4 "
         "--print_every 1 --rows_from 34 --max_prompt_len 200")


def flags_of(tiny_run, more: str) -> list[str]:
    names = ("--model", "--data", "--eval_data")
    return [word for name in names for word in (name, flag_value(tiny_run, name))] + [
        *SMALL.split(), *more.split()]


def test_the_losses_of_both_stages(tiny_run, tmp_path, monkeypatch):
    """Stage 1: a batch's loss is the mean of -log p(y~ | x, y0) plus mu times that of y* given x,
    per token. Stage 2: the reference is the model after stage 1, so the first loss is log 2."""
    seen, train = [], sgpo.train

    def spied(args, model, steps, lr, batch_of, losses_of):
        batch = batch_of()
        pairs, weights = zip(*batch, strict=True)
        with torch.no_grad():
            seen.append((pairs, weights, losses_of(pairs), pair_logps(model, pairs).chosen_nll))
        train(args, model, steps, lr, batch_of, losses_of)

    monkeypatch.setattr(sgpo, "train", spied)
    sgpo.main(flags_of(tiny_run, f"--mu 0.5 --anyway 1 --out {tmp_path}"))
    (pairs, weights, losses, nll), (_, second_weights, second, _) = seen
    torch.testing.assert_close(losses, nll, rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    plain = [IMPROVE not in tokenizer.decode(pair.prompt) for pair in pairs]
    assert plain.count(True) == 4
    assert list(weights) == [0.5 / 4 if is_plain else 1 / 4 for is_plain in plain]
    assert second.tolist() == pytest.approx([math.log(2)] * len(second), abs=1e-5)
    assert sum(second_weights) == pytest.approx(1)
    start = AutoModelForCausalLM.from_pretrained(flag_value(tiny_run, "--model")).state_dict()
    end = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert any(not torch.equal(start[name], end[name]) for name in start)


@pytest.mark.parametrize("gain, more, stages", [
    (0, "", 1), (-1, "", 1), (-1, "--anyway 1", 2), (1, "", 2)])
def test_without_a_signal_the_run_ends_before_dpo(gain, more, stages, tiny_run, monkeypatch,
                                                  capsys):
    """The report after stage 1 decides: where y+ is not more often better than worse, the example
    says so and stops, unless --anyway 1 is given."""
    trained, pairs = [], sgpo.preference_pairs
    monkeypatch.setattr(sgpo, "train", lambda args, model, steps, *rest: trained.append(steps))
    monkeypatch.setattr(sgpo, "preference_pairs", lambda roles, rows: [
        (pair, gain) for pair, _ in pairs(roles, rows)])
    sgpo.main(flags_of(tiny_run, more))
    printed = capsys.readouterr().out
    assert len(trained) == stages
    assert len(re.findall(r"exact match [\d.]+; of 4 pairs", printed)) == stages + 1
    assert ("stage 2 has no signal" in printed) == (stages == 1)
    assert f"better than y- in {4 * (gain > 0)} and worse in {4 * (gain < 0)}" in printed


@pytest.mark.parametrize("flags", [
    "--model nowhere", "--data nowhere", "--max_new_tokens 2", "--rows_from 99999"])
def test_bad_input_is_one_sentence(flags, tiny_run):
    """No model, no rows, no row short enough: the program ends with one sentence and status 1."""
    with pytest.raises(SystemExit) as end:
        sgpo.main([*flags_of(tiny_run, ""), *flags.split()])
    assert isinstance(end.value.code, str) and "no start from this model" in end.value.code


def test_the_page_is_one_page():
    """At most 250 lines, nothing of support/, and the first line says that it is a
    reconstruction."""
    text = (REPOSITORY / "examples" / "sgpo.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    assert not re.search(r"^\s*(from|import) support", text, re.M)
    assert "RECONSTRUCTION FROM THE ABSTRACT" in text.splitlines()[0]
