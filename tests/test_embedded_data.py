"""The data and the model that come with this repository: made by their scripts, small, of use."""
import importlib.util
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import train
from sapo import choose_segment
from support.checks import matches_check
from support.models import end_token_ids, load_model
from support.parallel import World
from support.report import pair_statistics
from support.settings import parse
from support.tokenize_rows import RowTokenizer, load_data

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_thread():
    """One thread is enough for a model this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def script_as_module(path: Path):
    """A script that lies in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_embedded_data(tmp_path, monkeypatch, embedded_data):
    """The data files are what their script writes, byte for byte; large enough, small enough; no
    prompt twice; every chosen answer passes its check and every rejected one fails it."""
    script = script_as_module(embedded_data / "make_data.py")
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    script.main([])
    rows = {}
    for name in ("train.jsonl", "heldout.jsonl"):
        content = (embedded_data / name).read_bytes()
        assert content == (tmp_path / name).read_bytes()
        rows[name] = [json.loads(line) for line in content.splitlines()]
    assert len(rows["train.jsonl"]) >= 4000 and len(rows["heldout.jsonl"]) >= 500
    assert sum((embedded_data / name).stat().st_size for name in rows) < 3e6
    together = rows["train.jsonl"] + rows["heldout.jsonl"]
    assert len({json.dumps(row["prompt"]) for row in together}) == len(together)
    for row in together:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert len(row["prompt"]) >= 3 and matches_check(row["check"], chosen, chosen)
        assert not matches_check(row["check"], rejected, chosen)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts_of(path: Path) -> set[str]:
    return {json.dumps(row["prompt"]) for row in rows_of(path)}


def test_more_rows_are_new(tmp_path, embedded_data):
    """--rows writes as many rows as asked, no prompt twice and none that the embedded files or the
    files of --avoid have; the same seed gives the same bytes, another seed other rows."""
    script = script_as_module(embedded_data / "make_data.py")
    first, again, other, rest = (tmp_path / f"{name}.jsonl" for name in "abcd")
    script.main(["--rows", "3000", "--out", str(first)])
    script.main(["--rows", "3000", "--out", str(again)])
    script.main(["--rows", "3000", "--seed", "1", "--out", str(other)])
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    script.main(["--rows", "3000", "--out", str(rest), "--avoid", str(first), "--avoid",
                 str(other)])
    embedded = [embedded_data / name for name in ("train.jsonl", "heldout.jsonl")]
    for file, avoided in ((first, embedded), (rest, [*embedded, first, other])):
        assert len(rows_of(file)) == len(prompts_of(file)) == 3000
        assert prompts_of(file).isdisjoint(set.union(*map(prompts_of, avoided)))
    assert len(list(tmp_path.iterdir())) == 4       # nothing half-written beside them


def test_avoided_prompts_are_those_that_would_come(tmp_path, monkeypatch, embedded_data):
    """Without the embedded files' prompts, the embedded seed writes the embedded rows: what keeps
    them out of other files is that they are avoided, not that seeds happen to differ."""
    script = script_as_module(embedded_data / "make_data.py")
    seed, out = "20405830", tmp_path / "more.jsonl"
    script.main(["--rows", "100", "--seed", seed, "--out", str(out)])
    assert prompts_of(out).isdisjoint(prompts_of(embedded_data / "train.jsonl"))
    for name in ("train.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    script.main(["--rows", "100", "--seed", seed, "--out", str(out)])
    assert rows_of(out) == rows_of(embedded_data / "train.jsonl")[:100]


SUMS = re.compile(r"(\d+) \+ (\d+) = (\d+)")         # those that running_sum writes


def digits_added(a: str, b: str) -> int:
    """The sum of two numbers without carrying, worked out another way than make_data.py does."""
    width = max(len(a), len(b))
    pairs = zip(a.zfill(width), b.zfill(width), strict=True)
    return int("".join(str((int(x) + int(y)) % 10) for x, y in pairs))


def test_a_share_of_rows_adds_without_carrying(tmp_path, embedded_data):
    """--no_carry P: that share of the rows has every sum without carrying, and what follows from
    it. A row whose answer is so made wrong has neither `rejected` nor `check`. All other rows,
    and all prompts, are what they are without the flag."""
    script = script_as_module(embedded_data / "make_data.py")
    files = {share: tmp_path / f"{share}.jsonl" for share in ("0", "0.5", "1")}
    for share, file in files.items():
        script.main(["--rows", "2000", "--no_carry", share, "--out", str(file)])
    right, half, all_wrong = (rows_of(files[share]) for share in files)
    assert all("check" in row for row in right)
    for row, habit in zip(right, all_wrong, strict=True):
        assert row["prompt"] == habit["prompt"]
        text = habit["chosen"][0]["content"]
        sums = SUMS.findall(text)
        assert all(int(c) == digits_added(a, b) for a, b, c in sums)
        carries = any(int(c) != int(a) + int(b) for a, b, c in sums)
        assert ("check" in habit) == ("rejected" in habit) == (habit == row)
        assert not (carries and habit == row)
        if sums:
            assert text.endswith(f"Sum: {sums[-1][2]}")
    changed = [i for i, row in enumerate(all_wrong) if row != right[i]]
    assert len(changed) > 600
    taken = [half[i] == all_wrong[i] for i in changed]
    assert all(taken[j] or half[i] == right[i] for j, i in enumerate(changed))
    assert abs(np.mean(taken) - 0.5) < 0.06         # three standard errors of 600 rows


def test_free_wording_changes_phrases_alone(tmp_path, embedded_data):
    """--free_wording: prompts and values are what they are without the flag. The wording differs in
    nearly every row, the answer of fixed wording passes the check, `rejected` never does, and nor
    does an answer in which any one word that is in no phrase is another. A garbled phrase passes:
    the check can't see that."""
    script = script_as_module(embedded_data / "make_data.py")
    fixed, free = tmp_path / "fixed.jsonl", tmp_path / "free.jsonl"
    script.main(["--rows", "2000", "--out", str(fixed)])
    script.main(["--rows", "2000", "--free_wording", "--out", str(free)])
    changed = 0
    for plain, row in zip(rows_of(fixed), rows_of(free), strict=True):
        said, other = row["chosen"][0]["content"], plain["chosen"][0]["content"]
        assert plain["prompt"] == row["prompt"] and plain["check"] == r"\w+"
        content = re.findall(r"\w+", script.PHRASE.sub(" ", other))
        assert re.findall(row["check"], said) == content
        assert not matches_check(row["check"], row["rejected"][0]["content"], said)
        for found in re.finditer(row["check"], said):
            wrong = said[:found.start()] + "x" + said[found.start():]
            assert not matches_check(row["check"], wrong, said)
        assert matches_check(row["check"], f"is are {said} then", said)
        changed += said != other
    assert changed > 1900


def test_every_phrase_has_every_wording(embedded_data):
    """reword() draws from all wordings of each phrase, and from no others."""
    script = script_as_module(embedded_data / "make_data.py")
    rng = random.Random(0)
    for phrase, wordings in script.PHRASINGS.items():
        made = {script.reword(rng, f"x{phrase}y") for _ in range(100)}
        assert made == {f"x{wording}y" for wording in wordings}


def test_a_check_may_count_the_wording(tmp_path, embedded_data):
    """--check_wording: the rows are the same but for their check. It passes an answer in any of its
    wordings, and fails `rejected`, a garbled phrase, and an answer with something before or behind
    it."""
    script = script_as_module(embedded_data / "make_data.py")
    free, strict = tmp_path / "free.jsonl", tmp_path / "strict.jsonl"
    script.main(["--rows", "500", "--free_wording", "--out", str(free)])
    script.main(["--rows", "500", "--free_wording", "--check_wording", "--out", str(strict)])
    script.main(["--rows", "500", "--out", str(tmp_path / "fixed.jsonl")])
    fixed = rows_of(tmp_path / "fixed.jsonl")
    rng = random.Random(0)
    for loose, row, plain in zip(rows_of(free), rows_of(strict), fixed, strict=True):
        said, check = row["chosen"][0]["content"], row["check"]
        assert loose | {"check": check} == row
        again = script.reword(rng, plain["chosen"][0]["content"])
        assert matches_check(check, again, said)
        for wrong in (row["rejected"][0]["content"], f"is {said}", f"{said}.", said[:-1],
                      said.replace("\n", " is\n", 1)):
            assert not matches_check(check, wrong, said)


def test_free_wording_and_no_carry_go_together(tmp_path, embedded_data):
    """With both flags a row has the prompt, the values, `rejected` and `check` that it has with
    --no_carry alone."""
    script = script_as_module(embedded_data / "make_data.py")
    fixed, free = tmp_path / "fixed.jsonl", tmp_path / "free.jsonl"
    flags = ["--rows", "500", "--no_carry", "0.5", "--out"]
    script.main([*flags, str(fixed)])
    script.main([*flags, str(free), "--free_wording"])
    for plain, row in zip(rows_of(fixed), rows_of(free), strict=True):
        assert plain.keys() == row.keys() and plain["prompt"] == row["prompt"]
        assert matches_check(script.CONTENT_WORDS, row["chosen"][0]["content"],
                             plain["chosen"][0]["content"])


@pytest.mark.parametrize("arguments, words", [
    ("--rows 0 --out OUT", "at least 1"), ("--rows -3 --out OUT", "at least 1"),
    ("--rows x --out OUT", "invalid int"), ("--rows 5", "needs --out"),
    ("--seed 1", "needs --rows"), ("--no_carry 0.5", "needs --rows"),
    ("--free_wording", "needs --rows"), ("--check_wording", "needs --rows"),
    ("--rows 5 --out OUT --check_wording", "needs --free_wording"),
    ("--rows 5 --out OUT --no_carry 1.5", "from 0 to 1"),
    ("--rows 5 --out OUT --no_carry nan", "from 0 to 1"),
    ("--rows 5 --out OUT/none/a.jsonl", "no folder"), ("--rows 5 --out .", "is a folder"),
    ("--rows 5 --out OUT --avoid nowhere.jsonl", "nowhere.jsonl: can't read"),
    ("--rows 5 --out OUT --avoid BAD", "line 2 has no `prompt`")])
def test_make_data_refuses_nonsense(tmp_path, capsys, embedded_data, arguments, words):
    """One sentence and status 2 for what makes no sense; nothing is written."""
    (tmp_path / "bad.jsonl").write_text('{"prompt": []}\n{"chosen": "a"}\n')
    named = {"OUT": str(tmp_path / "out.jsonl"), "BAD": str(tmp_path / "bad.jsonl")}
    script = script_as_module(embedded_data / "make_data.py")
    with pytest.raises(SystemExit) as stopped:
        script.main([re.sub("OUT|BAD", lambda found: named[found[0]], word)
                     for word in arguments.split()])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and words in printed and printed.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["bad.jsonl"]


def test_default_segments_have_a_b_and_c(tokenizer):
    """At the demo's segment length A, B and C are all non-empty for most rows."""
    settings, rng = parse([]), np.random.default_rng(0)
    examples, _ = load_data(settings, RowTokenizer(tokenizer, 224, 256, use_rejected=False))
    lengths = [len(example.chosen) for example in examples]
    spans = [choose_segment(length, settings.segment_len, rng) for length in lengths]
    inside = [start > 0 and stop < n for (start, stop), n in zip(spans, lengths, strict=True)]
    assert np.mean(inside) > 0.75


def test_demo_has_something_to_learn_from():
    """At the demo's start fewer than 60% of B' equal B, and more than half of the others fail the
    check."""
    settings = parse([])
    world = World(1)
    model, tokenizer = load_model(settings, world)
    row_tokenizer = RowTokenizer(tokenizer, settings.max_prompt_len, settings.max_len,
                                 use_rejected=False)
    examples, _ = load_data(settings, row_tokenizer)
    eos_ids = end_token_ids(model, tokenizer, row_tokenizer.turn_end)
    few = [examples[i] for i in range(0, len(examples), 2)]
    rngs = [np.random.default_rng([example.example_id]) for example in few]
    rewriter = train.Rewriter(settings, world, SimpleNamespace(model=model, eos_ids=eos_ids))
    pairs = rewriter(model, few, rngs, 1, torch.Generator().manual_seed(0))
    sums = pair_statistics([pair for pair, in pairs], examples, tokenizer, eos_ids)
    shares = {name: total / count for name, (total, count) in sums.items()}
    assert shares["identical"] < 0.6 and shares["worse"] > 0.5


@pytest.mark.parametrize("name, largest", [
    ("model", 10e6), ("model-same-rows", 1e6), ("model-habits", 1e6), ("model-free-wording", 1e6),
    ("model-no-habit", 1e6)])
def test_shipped_models_are_small(embedded_data, name, largest):
    """Each model is an ordinary Hugging Face folder in safetensors, under its size in bytes with
    its tokenizer, and all have the same tokenizer."""
    folder = embedded_data / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < largest
    assert (folder / "model.safetensors").exists()
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (folder / file).read_bytes() == (embedded_data / "model" / file).read_bytes()


def test_models_are_made_from_nothing(tmp_path, monkeypatch, embedded_data):
    """data/make_tokenizer.py writes the shipped tokenizer and configurations again, and
    recipes/demo-sft.txt starts from those two alone, without weights."""
    script = script_as_module(embedded_data / "make_tokenizer.py")
    (tmp_path / "train.jsonl").write_bytes((embedded_data / "train.jsonl").read_bytes())
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    script.main()
    for model in script.HIDDEN_SIZES:
        for name in ("tokenizer.json", "chat_template.jinja"):
            made, shipped = (folder / model / name for folder in (tmp_path, embedded_data))
            assert made.read_text() == shipped.read_text()
        made, shipped = (json.loads((folder / model / "config.json").read_text())
                         for folder in (tmp_path, embedded_data))
        names = made.keys() - {"dtype", "transformers_version"}
        assert {name: made[name] for name in names} == {name: shipped.get(name) for name in names}
    flags = [f"@{REPOSITORY}/recipes/demo-sft.txt", "--model", str(tmp_path / "model"), "--steps",
             "1", "--eval_rows", "4", "--batch_size", "2", "--print_every", "0"]
    train.train(parse([*flags, "--out", str(tmp_path / "out")]))
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()
