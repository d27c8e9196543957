"""The settings: defaults, conflicts, flag files, old names, what a resumed run may change."""
import dataclasses
import json
import re
from pathlib import Path

import pytest

from support.errors import UserError
from support.settings import Settings, as_saved, fit_to_positions, make_parser, parse, run_label

HERE = Path(__file__).resolve().parent.parent


def settings_of(flags: str) -> Settings:
    return parse(["--model", "m", "--data", "d", *flags.split()])


@pytest.mark.parametrize("flags, words", [
    ("--rejected spin --buffer_size 2000", "buffer_size 2000 makes no sense with --rejected spin"),
    ("--rejected iteration --buffer_size 2000", "makes no sense with --rejected spin"),
    ("--rejected data --buffer_size 500", "buffer_size 500 makes no sense"),
    ("--loss sft --buffer_size 500", "buffer_size 500 makes no sense"),
    ("--loss sft --ref ema", "ref ema makes no sense"),
    ("--loss orpo --ref fixed", "ref fixed makes no sense"),
    ("--loss dpo --ref_model r", "ref_model r needs --loss dpo --ref fixed"),
    ("--loss orpo --ref_model r", "ref_model r needs --loss dpo --ref fixed"),
    ("--loss dpo --rejected data --ref ema --ref_model r", "ref_model r needs"),
    ("--loss dpo --rejected spin --ref_model r", "ref_model r needs"),
    ("--loss dpo --rejected spin --ref ema", "reference is the policy at the start of the round"),
    ("--loss sft --rejected ema", "trains on chosen"),
    ("--loss sft --buffer_size 1", "buffer_size 1 makes no sense"),
    ("--rejected data --num_rejected 4", "generate nothing"),
    ("--iterations 3", "iterations 3 makes no sense"),
    ("--save_pairs --loss sft", "--save_pairs makes no sense with --loss sft"),
    ("--save_ema --rejected spin", "--save_ema makes no sense with SPIN-ORPO"),
    ("--save_ema --rejected policy", "no EMA model"),
    ("--tail drop --segment_len 0", "tail drop makes no sense with --segment_len 0"),
    ("--tail rewrite --rejected spin", "tail rewrite makes no sense with --segment_len 0"),
    ("--skip_identical --loss sft", "skip_identical makes no sense with --loss sft"),
    ("--tail drop --loss sft", "tail drop makes no sense with --loss sft"),
    ("--tail rewrite --rejected data", "generate nothing"),
    ("--tail rewrite --segment_eos forbid", "B' reaches to the end of the response"),
    ("--segment_len -1", "segment_len"),
    ("--buffer_size 8 --batch_size 16", "smaller than"),
    ("--top_p 1.5", "top_p"),
    ("--lr 1e-5 1e-6", "one value"),
    ("--max_prompt_len 300", "no room"),
    ("--max_len 1", "max_len must be at least 2"),
    ("--batch_size 0", "batch_size"),
    ("--epochs nan", "epochs must be a finite"),
    ("--lr inf", "lr must be a finite"),
    ("--seed 99999999999999999999", "seed must be between"),
    ("--temperature nan", "temperature"),
    ("--rejected spin --steps 3", "less than one step"),
    ("--compile --shard", "never tried"),
    ("--model somewhere", "--data is missing"),
])
def test_conflicts_and_wrong_values_are_refused_with_one_sentence(flags, words):
    """A conflict between explicit flags, and a value out of range, raise one sentence about it."""
    with pytest.raises(UserError, match=words) as error:
        parse(flags.split())
    assert "\n" not in str(error.value)


METHODS = [(loss, rejected) for loss in ("orpo", "dpo")
           for rejected in (None, "ema", "policy", "spin", "data")]


@pytest.mark.parametrize("loss, rejected", [*METHODS, ("sft", None), ("sft", "data")])
def test_only_explicit_settings_conflict(loss, rejected):
    """Every method runs without --buffer_size, --ref and --iterations: unset ones never conflict.

    An explicit 0 is no conflict either: it says what holds anyway.
    """
    method = f"--loss {loss}" + (f" --rejected {rejected}" if rejected else "")
    for more in ("", " --buffer_size 0"):
        s = settings_of(method + more)
        stores = s.generates and s.rejected != "spin" and not more
        assert s.buffer_size == (2000 if stores else 0)
        has_reference = loss == "dpo" and rejected != "spin"
        assert s.ref == (("ema" if s.generates else "fixed") if has_reference else None)
        assert s.iterations == (4 if rejected == "spin" else 1)
        assert s.segment_len == (0 if rejected == "spin" else 256)


def test_the_demos_own_values_never_conflict(monkeypatch, tmp_path):
    """Without --model the demo's recipe gives defaults, which give way to what is asked for."""
    monkeypatch.chdir(tmp_path)
    assert parse([]).buffer_size == 512
    assert parse(["--rejected", "spin"]).buffer_size == 0
    assert parse(["--rejected", "data"]).buffer_size == 0
    s = parse(["--loss", "sft"])
    assert (s.buffer_size, s.ref, s.lr) == (0, None, [2e-5])
    assert parse(["--data", "d"]).eval_data is None
    assert parse([]).eval_data.endswith("heldout.jsonl")


def test_unset_settings_follow_the_method():
    """Learning rate, beta and segment length have the default of the method, or what was given."""
    assert (settings_of("").lr, settings_of("").beta) == ([5e-6], [0.1])
    assert settings_of("--loss dpo").lr == [5e-7] and settings_of("--loss sft").lr == [2e-5]
    spin = settings_of("--rejected spin --loss dpo --lr 5e-7 5e-7 1e-7 1e-7 --buffer_size 0")
    assert (spin.iterations, spin.beta, spin.lr) == (4, [0.1] * 4, [5e-7, 5e-7, 1e-7, 1e-7])
    assert settings_of("--rejected spin --segment_len 32").segment_len == 32


def test_iteration_is_another_name_for_spin(tmp_path):
    """`--rejected iteration` means `--rejected spin`, on the command line and in old runs."""
    old = settings_of("--rejected iteration --loss dpo")
    assert old == settings_of("--rejected spin --loss dpo")
    assert run_label(old) == "SPIN-DPO"
    assert "iteration" not in re.search(r"--rejected \{(.*?)\}", make_parser().format_help())[1]
    saved = as_saved(old) | {"rejected": "iteration"}
    (tmp_path / "settings.json").write_text(json.dumps(saved))
    assert parse(["--resume", str(tmp_path)]).rejected == "spin"
    assert parse(["--resume", str(tmp_path), "--rejected", "iteration"]).rejected == "spin"
    with pytest.raises(UserError, match="another run with --rejected ema"):
        parse(["--resume", str(tmp_path), "--rejected", "ema"])


def test_lengths_follow_the_models_positions():
    """max_len is lowered to the model's positions; an unset max_prompt_len is 7/8 of the result.

    An explicit --max_prompt_len stays where it leaves room for a response, and is 7/8 where not.
    A model with fewer positions than --max_len once got responses of a single token.
    """
    def lengths(flags, positions):
        s = settings_of(flags)
        fit_to_positions(s, positions)
        return s.max_len, s.max_prompt_len

    assert lengths("", None) == lengths("", 8192) == lengths("", 2048) == (2048, 1792)
    assert lengths("", 1024) == (1024, 896)
    assert lengths("--max_prompt_len 1000", 1024) == (1024, 1000)
    assert lengths("--max_prompt_len 1792", 1024) == (1024, 896)
    assert lengths("--max_prompt_len 1023 --max_len 1500", 1024) == (1024, 1023)
    assert lengths("--max_len 160", 1024) == (160, 140)
    assert lengths("", 2) == (2, 1)
    with pytest.raises(UserError, match="1 position"):
        lengths("", 1)


def test_flag_files(tmp_path):
    """Comments, quotes and nested files in flag files are read as written; later flags win.

    A # begins a comment where it begins a word outside quotes.
    """
    file = tmp_path / "flags.txt"
    file.write_text(
        "# the user's own\n--model m  # not \"n\"\n--data d#1.jsonl --out 'a # b'\n\n  #--seed 3\n"
        "--chat_template\tvicuna\t#x\n--eval_data \"a\\\"b\" # c\n"
        "--plan_config it\\'s # the user's\n")
    s = parse([f"@{file}"])
    assert (s.model, s.data, s.out, s.seed) == ("m", "d#1.jsonl", "a # b", 0)
    assert (s.chat_template, s.eval_data, s.plan_config) == ("vicuna", 'a"b', "it's")
    outer = tmp_path / "outer.txt"
    outer.write_text(f"@{file}\n--seed 5\n--model n\n")
    s = parse([f"@{outer}", f"@{outer}", "--seed", "6"])        # twice in a row is no circle
    assert (s.model, s.seed) == ("n", 6)


@pytest.mark.parametrize("content, words", [
    (b"--model it's\n", "not a file of flags"),
    (b"--model \xff\xfe\n", "not a file of flags"),
    (b"--seed 1\n@flags.txt\n", "reads itself"),
    (b"@other.txt\n", "reads itself"),
    (b"@nowhere.txt\n", "@nowhere.txt: can't read"),
])
def test_bad_flag_files_are_refused_with_one_sentence(content, words, tmp_path, monkeypatch):
    """An open quote, bytes that are no text, a missing file and a circle: one sentence each."""
    monkeypatch.chdir(tmp_path)
    Path("flags.txt").write_bytes(content)
    Path("other.txt").write_text("@flags.txt\n")
    with pytest.raises(UserError, match=words) as error:
        parse(["@flags.txt"])
    assert ".txt" in str(error.value) and "\n" not in str(error.value)


def test_every_setting_is_read_and_explained():
    """train.py or support/ reads each field, so that no flag is without effect; --help has each."""
    files = [HERE / "train.py", *(HERE / "support").glob("*.py")]
    sources = "".join(f.read_text() for f in files if f.name != "settings.py")
    explained = make_parser().format_help()
    for f in dataclasses.fields(Settings):
        assert re.search(rf"\b(s|settings)\.{f.name}\b", sources), f"nobody reads --{f.name}"
        assert f"--{f.name}" in explained and len(f.metadata["comment"]) > 5


def test_resuming_keeps_the_runs_own_settings(tmp_path):
    """A resumed run has its own settings; what would make it another run is refused by name.

    The permission to run a model's code is not inherited, and --epochs replaces earlier --steps.
    """
    saved = as_saved(settings_of("--loss dpo --seed 7 --steps 50 --trust_remote_code"))
    (tmp_path / "settings.json").write_text(json.dumps(saved))
    s = parse(["--resume", str(tmp_path), "--lr", "1e-6"])
    assert (s.loss, s.seed, s.steps, s.lr) == ("dpo", 7, 50, [1e-6])
    assert not s.trust_remote_code and s.max_prompt_len is None
    assert parse(["--resume", str(tmp_path), "--epochs", "2"]).steps is None
    with pytest.raises(UserError, match=r"--seed 8 \(was 7\)"):
        parse(["--resume", str(tmp_path), "--seed", "8"])
    with pytest.raises(UserError, match="--model_revision"):
        parse(["--resume", str(tmp_path), "--model_revision", "v2"])
    with pytest.raises(UserError, match="no run there"):
        parse(["--resume", str(tmp_path / "nowhere")])
