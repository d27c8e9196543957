"""The command line: exit statuses, sentences about mistakes and bad input, odd models."""
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    DATA,
    check_close_runs,
    command,
    flag_value,
    quick_command,
    run,
    two_processes,
    weights,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import train
from support import cli
from support.errors import UserError
from support.settings import parse
from support.tokenize_rows import RowTokenizer
from test_sapo import tiny

FIRST_RUN = ["--loss", "dpo", "--buffer_size", "8", "--print_every", "3", "--steps", "4"]


@pytest.fixture(scope="module")
def first_run(tiny_run, tmp_path_factory):
    """A run from another folder with `python -W error`: the folder, and the finished process."""
    folder = tmp_path_factory.mktemp("first")
    return folder, command(*tiny_run, *FIRST_RUN, cwd=folder,
                           launcher=(sys.executable, "-W", "error"))


def test_command_line(first_run, tiny_run, monkeypatch, capfd):
    """A real run from another folder: exit 0, a header, a pair, a table. A second run gets a folder
    of its own. What is there is never overwritten."""
    folder, done = first_run
    assert done.returncode == 0, done.stderr
    for words in ("parameters", "12 held out", "settings", "  B' ", "exact_match", "difference"):
        assert words in done.stdout
    monkeypatch.chdir(folder)
    flags = [*tiny_run, *FIRST_RUN]
    assert quick_command(*flags, capfd=capfd)[0] == 0
    for number in ("0001", "0002"):
        assert (folder / "runs" / number / "final" / "model.safetensors").exists()
    status, _, err = quick_command(*flags, "--out", "runs/0001", capfd=capfd)
    assert status == 2 and "holds a run already" in err and "Traceback" not in err


def test_no_warnings(first_run):
    """A run shows nothing on standard error but its own progress: no warning of Python, torch or
    transformers, as `python -W error` proves, no remark in their logs, and none of transformers'
    bars of loading and saving."""
    done = first_run[1]
    assert done.returncode == 0, done.stderr
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    assert lines and all("/4 [" in line and "step" in line for line in lines), lines
    assert not re.search("Loading weights|Writing model shards|it/s", done.stdout + done.stderr)


@pytest.mark.parametrize("flags, words", [
    (["--los", "orpo"], "unrecognized"), (["--loss", "kto"], "invalid choice"),
    (["--data", "nowhere.jsonl", "--model", "nowhere"], "nowhere"),
    (["@nowhere.txt"], "nowhere.txt"), (["--loss", "sft", "--ref", "ema"], "makes no sense"),
    (["--model", "nowhere", "--data", str(DATA / "heldout.jsonl")], "not a causal"),
    (["--resume", "nowhere"], "no run there")])
def test_mistakes_get_a_sentence(flags, words, tmp_path, monkeypatch, capfd):
    """A user's mistake: exit status 2, a sentence that names it, no traceback, no folder."""
    monkeypatch.chdir(tmp_path)
    status, _, err = quick_command(*flags, capfd=capfd)
    assert status == 2 and words in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: "
                 "you tried")])
def test_out_of_memory_says_what_to_lower(error, tiny_run, tmp_path, monkeypatch, capfd):
    """Memory that runs out, on a GPU or a CPU, ends the run with status 4 and the flags to lower;
    no traceback."""
    def fails(*_):
        raise error

    monkeypatch.setattr(train, "backward", fails)
    status, _, err = quick_command(*tiny_run, "--buffer_size", "8", "--out", str(tmp_path / "out"),
                                   capfd=capfd)
    assert status == 4 and "Traceback" not in err
    assert all(flag in err for flag in ("--micro_batch", "--grad_checkpoint", "--shard"))


def test_other_errors_keep_their_traceback(tiny_run, tmp_path, monkeypatch, capfd):
    """A fault of the program itself is not dressed up as the user's: a traceback, and no status of
    ours."""
    def fails(*_):
        raise RuntimeError("something broke")

    monkeypatch.setattr(train, "backward", fails)
    status, _, err = quick_command(*tiny_run, "--buffer_size", "8", "--out", str(tmp_path / "out"),
                                   capfd=capfd)
    assert status not in (0, 2, 3, 4) and "Traceback" in err and "something broke" in err


def test_more_processes_than_gpus_are_refused(monkeypatch, capsys):
    """--nproc_per_node 2 on a machine with one GPU: a sentence, and exit status 2."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert cli.main(train.train, []) == 2
    assert "2 processes on this machine, which has 1 GPU" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--batch_size", "3"], "--batch_size 3"), (["--buffer_size", "9"], "--buffer_size 9")])
def test_shares_that_are_not_equal_are_refused(flags, words, tiny_run, tmp_path, capfd):
    """A batch or buffer that does not divide among the processes: one sentence, on rank 0 alone,
    and exit status 2 on each."""
    flags = [*tiny_run, "--buffer_size", "8", *flags, "--out", str(tmp_path / "out")]
    assert two_processes(lambda: sys.exit(cli.main(train.train, flags))) == [2, 2]
    err = capfd.readouterr().err
    assert err.count(words) == 1 and "divide evenly among 2 processes" in err
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------- bad input

GOOD = '{"prompt": "a b", "chosen": "c d"}\n'
CHAT = ('{"messages": [{"role": "user", "content": "hi"}, '
        '{"role": "assistant", "content": "yes"}]}\n')
JUDGE = ('{"messages": [{"role": "judge", "content": "a"}, '
         '{"role": "assistant", "content": "b"}]}\n')
STRICT_TEMPLATE = ("{% for m in messages %}{% if m.role == 'judge' %}"
                   "{{ raise_exception('no judges') }}{% endif %}{{ m.content }}<|im_end|>"
                   "{% endfor %}")


def odd_model(name: str, model: Path, folder: Path) -> None:
    """Make a copy of a model folder that is odd in one way."""
    shutil.copytree(model, folder)
    settings, config = folder / "tokenizer_config.json", folder / "config.json"
    weight_file = folder / "model.safetensors"
    match name:
        case "STRICT":              # a template that refuses a role
            (folder / "chat_template.jinja").write_text(STRICT_TEMPLATE)
        case "BARE":                # no chat template
            (folder / "chat_template.jinja").unlink()
        case "ENDLESS":             # no end token
            kept = {k: v for k, v in json.loads(settings.read_text()).items() if k != "eos_token"}
            settings.write_text(json.dumps(kept))
            (folder / "special_tokens_map.json").unlink(missing_ok=True)
        case "WIDE":                # a tokenizer with more ids than the embedding
            tiny(vocab_size=50, eos_token_id=1, pad_token_id=1,
                 bos_token_id=None).save_pretrained(folder)
        case "EMPTY":
            shutil.rmtree(folder)
            folder.mkdir()
        case "HALF":                # a download that broke off
            weight_file.write_bytes(weight_file.read_bytes()[:2000])
        case "OTHER":               # weights of another shape
            config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
        case "VIT":                 # no language model
            config.write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')


@pytest.mark.parametrize("content, flags, words", [
    (None, "", ["no such file"]),
    ("", "", ["no rows"]),
    (GOOD + "{nonsense\n", "", ["line 2", "not JSON", "--skip_bad_rows"]),
    (GOOD + '{"messages": [{"role": "user", "content": "a"}]}', "",
     ["line 2", "no assistant turn"]),
    (GOOD + '{"prompt": "a", "chosen": " "}', "", ["line 2", "empty"]),
    (GOOD.encode() + b'{"prompt": "\xff"}\n', "", ["line 2", "UTF-8"]),
    (GOOD + '{"prompt": "a", "chosen": "' + "b" * 10_000_000 + '"}\n', "",
     ["line 2", "10.0 million"]),
    (GOOD, "--rejected data", ["line 1", "rejected"]),
    (JUDGE, "--model STRICT", ["line 1", "template refuses"]),
    (CHAT.replace("hi", "hi " * 300) * 3, "--max_len 40 --max_prompt_len 30",
     ["every prompt", "--max_prompt_len"]),
    (CHAT, "--model BARE", ["line 1", "the tokenizer has none", "--chat_template"]),
    (CHAT * 60, "--model WIDE", ["embedding has 50"]),
    (CHAT * 60, "--model WIDE --skip_bad_rows", ["embedding has 50"]),
    (CHAT, "--model ENDLESS", ["no EOS"]),
    (CHAT, "--model EMPTY", ["not a causal"]),
    (CHAT, "--model VIT", ["not a causal"]),
    (CHAT, "--model HALF", ["not a causal"]),
    (CHAT, "--model OTHER", ["--model"]),
    (CHAT, "--batch_size 16 --buffer_size 8", ["smaller than"]),
    (CHAT, "--segment_len -3", ["segment_len"]),
    (CHAT, "--keep 1", ["keep"]),
])
def test_bad_input_gets_one_sentence(content, flags, words, tiny_run, tmp_path, capsys):
    """Bad input: exit status 2, one sentence on standard error with what, where and what to do, no
    traceback, no output folder."""
    model, data, out = Path(tiny_run[1]), tmp_path / "d.jsonl", tmp_path / "out"
    for name in re.findall("[A-Z]{3,}", flags):
        odd_model(name, model, tmp_path / name)
        flags = flags.replace(name, str(tmp_path / name))
    if content is not None:
        data.write_bytes(content if isinstance(content, bytes) else content.encode())
    capsys.readouterr()
    status = cli.main(train.train, ["--model", str(model), "--data", str(data), *flags.split(),
                                    "--threads", "1", "--steps", "1", "--out", str(out)])
    said = capsys.readouterr().err
    assert status == 2 and not out.exists() and "Traceback" not in said
    sentence, = [line for line in said.splitlines() if line.strip()]
    assert sentence.startswith("train.py: ") and all(word in sentence for word in words), said


def test_bad_rows_can_be_skipped(tiny_run, tmp_path, capsys):
    """--skip_bad_rows leaves bad rows out, says how many and shows the first. Prompts in both sets
    are warned about."""
    data, held = tmp_path / "d.jsonl", tmp_path / "h.jsonl"
    data.write_bytes(CHAT.encode() * 6 + b'{"prompt": "\xff"}\n{oops\n[1]\n'
                     + CHAT.replace("yes", "").encode() + CHAT.replace("hi", "who").encode())
    held.write_text(CHAT + CHAT.replace("hi", "what"))
    flags = ["--model", tiny_run[1], "--data", str(data), "--eval_data", str(held), "--batch_size",
             "2", "--buffer_size", "4", "--steps", "1", "--max_len", "60", "--threads", "1"]
    with pytest.raises(UserError, match="line 7: not UTF-8"):
        train.train(parse([*flags, "--out", str(tmp_path / "a")]))
    train.train(parse([*flags, "--out", str(tmp_path / "b"), "--skip_bad_rows"]))
    said = capsys.readouterr().out
    for words in ("4 of 11 rows left out; the first:", "line 7", "7 rows",
                  "warning: 1 of 2 held-out prompts"):
        assert words in said


# -------------------------------------------------------------------------------------- odd models

def test_a_vision_tower_is_left_alone(tiny_run, tmp_path):
    """A model that could read images, too (Gemma 3's larger ones), trains as the text model it is
    used as, in one process and in two. What it would see with stays as it was."""
    tokenizer, folder = AutoTokenizer.from_pretrained(tiny_run[1]), tmp_path / "model"
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    names = ("image_token_index", "boi_token_index", "eoi_token_index")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma3"](
        text_config={"vocab_size": len(tokenizer) + 8, "num_hidden_layers": 2,
                     "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
                     "sliding_window": 8, **size},
        vision_config={"num_hidden_layers": 1, "image_size": 28, "patch_size": 14, **size},
        mm_tokens_per_image=1,
        **{name: len(tokenizer) + i for i, name in enumerate(names)})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flags = [*tiny_run, "--model", str(folder)]
    run(flags, tmp_path / "one", "--rejected data --steps 3")
    assert two_processes(lambda: run(flags, tmp_path / "two", "--rejected data --steps 3")) == [
        0, 0]
    check_close_runs(tmp_path / "one", tmp_path / "two")
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = weights(tmp_path / "two")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after
                       if "vision" not in name and "multi_modal" not in name}


@pytest.mark.parametrize("changes", [
    {"tie_word_embeddings": True}, pytest.param({"vocab_size": 700}, marks=pytest.mark.slow),
    pytest.param({"pad_token_id": None}, marks=pytest.mark.slow)])
def test_embeddings_of_all_kinds(changes, tiny_run, tmp_path):
    """Tied embeddings stay tied, a vocabulary padded beyond the tokenizer's keeps its size, and a
    missing pad token is no matter: a whole run, saved and loaded again."""
    shutil.copytree(tiny_run[1], tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model", **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    flags = [*tiny_run, "--model", str(tmp_path / "model")]
    run(flags, tmp_path / "out", "--loss dpo --steps 2")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final")
    inputs, outputs = saved.get_input_embeddings(), saved.get_output_embeddings()
    assert inputs.num_embeddings == config.vocab_size
    assert (inputs.weight is outputs.weight) == config.tie_word_embeddings


def test_added_template_tokens_are_saved(tmp_path):
    """A model that lacks the template's tokens gets them before any copy of the model is made, and
    saves them."""
    source, data, out = tmp_path / "bare", tmp_path / "d.jsonl", tmp_path / "out"
    bare = Tokenizer(models.WordLevel({"</s>": 0, "x": 1, "y": 2, "?": 3}, unk_token="?"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>").save_pretrained(source)
    tiny(vocab_size=4, pad_token_id=None, eos_token_id=0, bos_token_id=None).save_pretrained(source)
    data.write_text(CHAT.replace("hi", "x").replace("yes", "y y y") * 60)
    run(["--model", str(source), "--data", str(data), "--threads", "1"], out,
        "--chat_template chatml --max_len 32 --batch_size 2 --steps 2 --segment_len 2 --loss dpo")
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    model = AutoModelForCausalLM.from_pretrained(out / "final")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(tokenizer) == 6 == model.get_input_embeddings().num_embeddings
    assert sorted(model.generation_config.eos_token_id) == [0, end]
    assert "im_start" in tokenizer.chat_template


def test_several_end_tokens(tiny_run, tmp_path):
    """As with Llama 3: the template ends turns with one token, the tokenizer's EOS is another, and
    the model's generation config knows both. Responses end with the template's. Both end
    generation, in training and in the saved folder."""
    shutil.copytree(tiny_run[1], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_run[1])
    eot = tokenizer.convert_tokens_to_ids("<|im_end|>")
    eos = next(i for i in range(len(tokenizer)) if i != eot and tokenizer.decode([i]).isalpha())
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [eos, eot]}))
    row_tokenizer = RowTokenizer(AutoTokenizer.from_pretrained(tmp_path / "model"), 100, 200)
    found = row_tokenizer(json.loads(CHAT), "here", 0)
    assert found.chosen[-1] == eot and eos not in found.chosen[-2:]
    run([*tiny_run, "--model", str(tmp_path / "model")], tmp_path / "out", "--steps 1")
    saved = json.loads((tmp_path / "out" / "final" / "generation_config.json").read_text())
    assert sorted(saved["eos_token_id"]) == sorted([eos, eot])


def test_odd_model_folders(tiny_run, tmp_path):
    """A generation config that transformers loads but refuses to save costs no run its weights."""
    odd = tmp_path / "odd"
    shutil.copytree(flag_value(tiny_run, "--model"), odd)
    (odd / "generation_config.json").write_text(
        '{"do_sample": false, "temperature": 0.9, "eos_token_id": 5}')
    run([*tiny_run, "--model", str(odd)], tmp_path / "saved", "--steps 1")
    assert (tmp_path / "saved" / "final" / "model.safetensors").exists()
