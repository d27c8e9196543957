"""The data and the model that come with this repository: made by their scripts, small, of use."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import train
from sapo import choose_segment
from support.checks import matches_check
from support.generating import GeneratingModels
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
    script.main()
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
    pairs = train.rewrite(settings, GeneratingModels(model, world), eos_ids, model, few, rngs, 1,
                          torch.Generator().manual_seed(0))
    sums = pair_statistics([pair for pair, in pairs], examples, tokenizer, eos_ids)
    shares = {name: total / count for name, (total, count) in sums.items()}
    assert shares["identical"] < 0.6 and shares["worse"] > 0.5


def test_shipped_model_is_small(embedded_data):
    """data/model is an ordinary Hugging Face folder in safetensors, under 10 MB."""
    folder = embedded_data / "model"
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 10e6
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"


def test_model_is_made_from_nothing(tmp_path, monkeypatch, embedded_data):
    """data/make_tokenizer.py writes the shipped tokenizer and configuration again, and
    recipes/demo-sft.txt starts from those two alone, without weights."""
    script = script_as_module(embedded_data / "make_tokenizer.py")
    (tmp_path / "train.jsonl").write_bytes((embedded_data / "train.jsonl").read_bytes())
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    script.main()
    for name in ("tokenizer.json", "chat_template.jinja"):
        made, shipped = (folder / "model" / name for folder in (tmp_path, embedded_data))
        assert made.read_text() == shipped.read_text()
    made, shipped = (json.loads((folder / "model" / "config.json").read_text())
                     for folder in (tmp_path, embedded_data))
    names = made.keys() - {"dtype", "transformers_version"}
    assert {name: made[name] for name in names} == {name: shipped.get(name) for name in names}
    flags = [f"@{REPOSITORY}/recipes/demo-sft.txt", "--model", str(tmp_path / "model"), "--steps",
             "1", "--eval_rows", "4", "--batch_size", "2", "--print_every", "0"]
    train.train(parse([*flags, "--out", str(tmp_path / "out")]))
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()
