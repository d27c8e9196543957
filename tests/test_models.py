"""Models and tokenizers: what is loaded, what is refused, what is saved, and the model card."""
import json
import shutil
from pathlib import Path

import huggingface_hub.utils
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from sapo import generate_segments
from support.errors import RunFailed, UserError
from support.models import (
    checkpoint_layers,
    end_token_ids,
    hub_options,
    load_model,
    model_card,
    positions_of,
    save_model,
)
from support.parallel import World
from support.settings import parse
from test_sapo import greedy, random_ids, tiny

HERE = Path(__file__).resolve().parent.parent


def settings_of(folder, flags: str = ""):
    return parse(["--model", str(folder), "--data", "d", "--threads", "1", *flags.split()])


def load(folder, flags: str = ""):
    """The settings as load_model leaves them, the model and its tokenizer."""
    settings = settings_of(folder, flags)
    return settings, *load_model(settings, World(threads=1))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(HERE / "data" / "model")


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A tiny random Llama with the demo's tokenizer, as a folder that tests may damage."""
    return saved_model(tmp_path / "folder", tokenizer)


def saved_model(folder, tokenizer, name: str = "llama", **changes):
    end = tokenizer.eos_token_id
    ids = {"vocab_size": len(tokenizer), "pad_token_id": end, "eos_token_id": end,
           "bos_token_id": None}
    tiny(name, **{**ids, **changes}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_json(file: Path, **changes) -> None:
    """Change entries of a JSON file; the value ... removes one."""
    entries = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in entries.items() if value is not ...}))


# ---------------------------------------------------------------------------------------- loading

def test_weights_are_fp32_and_the_mode_is_eval(folder, tokenizer):
    """A folder in bf16 loads as fp32, in eval mode, with the same values."""
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    _, model, loaded_tokenizer = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert len(loaded_tokenizer) == len(tokenizer)


@pytest.mark.parametrize("name, changes", [
    ("llama", {"max_position_embeddings": 64}), ("gpt2", {"max_position_embeddings": 64})])
def test_a_model_with_few_positions_lowers_both_lengths(name, changes, tmp_path, tokenizer):
    """With 64 positions, max_len is 64 and max_prompt_len 7/8 of it, so responses have room.

    An explicit --max_prompt_len that fits stays; one that does not fit is 7/8 as well.
    """
    folder = saved_model(tmp_path / "few", tokenizer, name, **changes)
    for flags, expected in (("", (64, 56)), ("--max_prompt_len 60", (64, 60)),
                            ("--max_prompt_len 64 --max_len 100", (64, 56))):
        settings, *_ = load(folder, flags)
        assert (settings.max_len, settings.max_prompt_len) == expected


def test_positions_have_several_names():
    """The positions of Llama, GPT-2 and MPT are found; BLOOM has no limit."""
    for kind, name in (("llama", "max_position_embeddings"), ("gpt2", "n_positions"),
                       ("mpt", "max_seq_len")):
        assert positions_of(CONFIG_MAPPING[kind](**{name: 48})) == 48
    assert positions_of(CONFIG_MAPPING["bloom"]()) is None


def test_longrope_limits_the_positions_to_its_short_factors():
    """Phi 3.5 and Phi 4 mini rotate every position in another way once a sequence is longer than
    original_max_position_embeddings. The KV cache holds keys of the first way then, and decoding
    across that length is wrong, so these are the positions that the program counts with."""
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                "long_factor": [8.0] * 4, "original_max_position_embeddings": 64, "factor": 4.0}
    model = tiny("phi3", max_position_embeddings=256, original_max_position_embeddings=64,
                 rope_parameters=longrope)
    assert positions_of(model.config) == 64
    rng = np.random.default_rng(0)
    for prefix_len, exact in ((40, True), (60, False)):
        prefix = random_ids(rng, prefix_len)
        [[found]] = generate_segments(model, [prefix], 20, eos_token_id=None, temperature=0)
        assert (found == greedy(model, prefix, 20, None)) == exact


@pytest.mark.parametrize("removed", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_missing_weights_are_refused_by_name(removed, folder):
    """A folder without one of its weights is refused with the name of that weight.

    transformers alone would fill in random numbers. --random_init needs no weights.
    """
    weights = load_file(folder / "model.safetensors")
    del weights[removed]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"1 of its weights are missing: {removed}") as error:
        load(folder)
    assert "\n" not in str(error.value)
    load(folder, "--random_init")


def test_tied_weights_are_not_missing(tmp_path, tokenizer):
    """A folder that stores tied embeddings once loads, and they stay tied."""
    folder = saved_model(tmp_path / "tied", tokenizer, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    _, model, _ = load(folder)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value, folder):
    """One NaN or infinite weight is refused with the name of its tensor."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.k_proj.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weight model.layers.0.self_attn.k_proj.weight has NaN"):
        load(folder)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_window_that_is_turned_off_is_no_window(name, tmp_path, tokenizer):
    """`sliding_window` beside `use_sliding_window: false` means nothing: the model sees everything.

    Qwen 2's configurations have both; copies of Qwen 2 as Llama keep them. Decoding with the KV
    cache must equal transformers' own, as for every other model.
    """
    folder = saved_model(tmp_path / "off", tokenizer, name)
    edit_json(folder / "config.json", sliding_window=4, use_sliding_window=False, layer_types=...)
    _, model, _ = load(folder)
    prefix = list(range(5, 25))
    found = generate_segments(model, [prefix], 8, eos_token_id=None, temperature=0)[0][0]
    model.generation_config.eos_token_id = None
    expected = model.generate(torch.tensor([prefix]), max_new_tokens=8, do_sample=False)
    assert found == expected[0, len(prefix):].tolist()


def test_a_window_that_is_used_stays(tmp_path, tokenizer):
    """A model whose layers have a window keeps it."""
    folder = saved_model(tmp_path / "on", tokenizer, "mistral", sliding_window=6)
    _, model, _ = load(folder)
    assert model.config.sliding_window == 6


def test_what_is_no_causal_language_model_is_refused(folder, tmp_path):
    """Empty, cut, contradictory or foreign folders get one sentence that names --model."""
    def damaged(name):
        return shutil.copytree(folder, tmp_path / name)

    empty = tmp_path / "empty"
    empty.mkdir()
    cut = damaged("cut")
    (cut / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    other = damaged("other")
    edit_json(other / "config.json", hidden_size=64)
    foreign = damaged("foreign")
    (foreign / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    for wrong in (empty, cut, other, foreign, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="not a causal language model") as error:
            load(wrong)
        assert f"--model {wrong}" in str(error.value) and "\n" not in str(error.value)


def test_random_init_depends_on_the_seed_alone(folder):
    """--random_init needs a config and a tokenizer only; the same seed gives the same weights."""
    (folder / "model.safetensors").unlink()
    first, again, other = (
        load(folder, f"--random_init --seed {seed}")[1].lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_revision_reaches_every_from_pretrained(folder, monkeypatch):
    """--model_revision is passed on with the tokenizer, the configuration and the weights."""
    asked = []

    def recording(cls):
        original = cls.from_pretrained

        def from_pretrained(name, *args, **options):
            asked.append((cls.__name__, options["revision"], options["trust_remote_code"]))
            return original(name, *args, **options)
        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)

    for cls in (AutoTokenizer, AutoConfig, AutoModelForCausalLM):
        recording(cls)
    load(folder, "--model_revision v1.2")
    ours = [("AutoTokenizer", "v1.2", False), ("AutoConfig", "v1.2", False),
            ("AutoModelForCausalLM", "v1.2", False)]
    assert set(ours) <= set(asked)
    assert hub_options(settings_of(folder))["revision"] == "main"


def test_no_progress_bars_of_loading_and_saving(folder, tokenizer, tmp_path, capfd):
    """Loading and saving print no bars, and the host's own setting is as before, either way."""
    settings, model, _ = load(folder)
    for shown in (True, False):
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        try:
            load(folder)
            save_model(model, tokenizer, [1], tmp_path / "saved", model_card(settings, 1))
            assert logging.is_progress_bar_enabled() == shown
            assert huggingface_hub.utils.are_progress_bars_disabled() != shown
        finally:
            logging.enable_progress_bar()
    assert "it/s" not in "".join(capfd.readouterr())


# --------------------------------------------------------------------------- templates, end tokens

def test_added_template_tokens_resize_the_embeddings(tmp_path):
    """A model that lacks ChatML's tokens gets embeddings for them; Vicuna's template adds none."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"</s>": 0, "x": 1, "y": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    ids = {"pad_token_id": None, "eos_token_id": 0, "bos_token_id": None}
    folder = saved_model(tmp_path / "bare", bare, vocab_size=4, **ids)
    _, model, tokenizer = load(folder, "--chat_template chatml")
    assert len(tokenizer) == 6 == model.get_input_embeddings().num_embeddings
    assert model.get_output_embeddings().weight.shape[0] == 6
    assert "im_start" in tokenizer.chat_template
    _, model, tokenizer = load(folder, "--chat_template vicuna")
    assert len(tokenizer) == 4 == model.get_input_embeddings().num_embeddings
    end = tokenizer.eos_token_id
    assert end_token_ids(model, tokenizer, turn_end=end) == [end]


@pytest.mark.parametrize("changes", [
    {"tie_word_embeddings": True}, {"vocab_size": 700}, {"pad_token_id": None}])
def test_embeddings_of_all_kinds(changes, tmp_path, tokenizer):
    """Loaded and saved again, tied embeddings stay tied and padded vocabularies keep their size.

    A missing pad token does not matter.
    """
    folder = saved_model(tmp_path / "model", tokenizer, **changes)
    settings, model, loaded_tokenizer = load(folder)
    save_model(model, loaded_tokenizer, [1], tmp_path / "saved", model_card(settings, 1))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    size = changes.get("vocab_size", len(tokenizer))
    assert saved.get_input_embeddings().num_embeddings == size
    tied = saved.get_input_embeddings().weight is saved.get_output_embeddings().weight
    assert tied == changes.get("tie_word_embeddings", False)
    for (name, before), after in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(before, after), name


def test_every_end_token_is_found_and_saved(folder, tokenizer, tmp_path):
    """As with Llama 3: the template's end token, the tokenizer's EOS and the model's own, sorted.

    Ids that the model has no embedding for are left out. The saved folder knows them all.
    """
    settings, model, loaded_tokenizer = load(folder)
    turn_end = loaded_tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = [7, turn_end, 10 ** 6]
    eos_ids = end_token_ids(model, loaded_tokenizer, turn_end)
    assert eos_ids == sorted({7, turn_end, loaded_tokenizer.eos_token_id})
    save_model(model, loaded_tokenizer, eos_ids, tmp_path / "saved", model_card(settings, 1))
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == eos_ids
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)


def test_a_generation_config_that_would_not_save_is_repaired(folder, tmp_path):
    """transformers loads sampling values without do_sample but refuses to save them."""
    (folder / "generation_config.json").write_text(
        '{"do_sample": false, "temperature": 0.9, "eos_token_id": 5}')
    settings, model, tokenizer = load(folder)
    save_model(model, tokenizer, [5], tmp_path / "saved", model_card(settings, 1))
    assert (tmp_path / "saved" / "model.safetensors").exists()


def test_a_model_that_cant_be_saved_leaves_nothing_half_written(folder, tmp_path, monkeypatch):
    """Where saving fails, the folder before is still there, nothing partial is, and status is 4."""
    settings, model, tokenizer = load(folder)
    target = tmp_path / "final"
    save_model(model, tokenizer, [1], target, model_card(settings, 1))
    before = sorted(file.name for file in target.iterdir())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(RunFailed, match="No space left") as error:
        save_model(model, tokenizer, [1], target, model_card(settings, 1))
    assert error.value.status == 4
    assert sorted(file.name for file in target.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "folder"]


def test_checkpointed_layers_give_the_same_gradients():
    """checkpoint_layers changes no gradient, keeps dropout off and really recomputes layers."""
    grads, calls = [], []
    for checkpointed in (False, True):
        model = tiny("opt", ffn_dim=64, dropout=0.5, word_embed_proj_dim=32)
        seen = []
        first = model.model.decoder.layers[0].fc1
        first.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        if checkpointed:
            checkpoint_layers(model)
        ids = torch.arange(5, 25)[None]
        model(ids, labels=ids).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        calls.append(len(seen))
    assert torch.allclose(*grads, atol=1e-6) and calls == [1, 2]


# -------------------------------------------------------------------------------------- model card

def card_of(*flags):
    import yaml
    card = model_card(parse([*flags]), 5)
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_names_what_others_can_find(tmp_path):
    """Hub names are in the card's front matter and text; of a path only the last part is."""
    hub = ["--model", "meta-llama/Meta-Llama-3-8B", "--data", "org/rows:train_sft"]
    front, text = card_of(*hub, "--loss", "sft")
    assert front == {"base_model": "meta-llama/Meta-Llama-3-8B", "datasets": ["org/rows"],
                     "library_name": "transformers", "pipeline_tag": "text-generation"}
    assert "# SFT of meta-llama/Meta-Llama-3-8B" in text and "Rejected" not in text
    assert "arxiv.org/abs/2405.20830" in text
    (tmp_path / "my model").mkdir()
    (tmp_path / "rows.jsonl").touch()
    front, text = card_of("--model", str(tmp_path / "my model"), "--loss", "dpo",
                          "--data", str(tmp_path / "rows.jsonl"), "--segment_len", "6")
    assert set(front) == {"library_name", "pipeline_tag"} and str(tmp_path) not in text
    assert "# SAPO-DPO of my model" in text and "`rows.jsonl`" in text
    assert "| segment_len | 6 |" in text and "moving average" in text


def test_the_card_of_random_weights_names_no_base_model():
    """With --random_init nothing was learned from --model, so the card names no base model."""
    front, text = card_of("--model", "meta-llama/Meta-Llama-3-8B", "--data", "org/rows",
                          "--random_init")
    assert "base_model" not in front and "# SAPO-ORPO from random weights" in text


def test_the_card_quotes_odd_names():
    """Names that YAML or Markdown would read otherwise stay what they are."""
    front, text = card_of("--model", "org/a: b #c", "--data", "org/x|y `z`\n# no title")
    assert front["base_model"] == "org/a: b #c" and front["datasets"] == ["org/x|y `z`\n# no title"]
    assert "\n# no title" not in text and r"| data | org/x\|y 'z'\n# no title |" in text
