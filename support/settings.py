"""The settings of a run: one dataclass, the command line made from it, and what conflicts."""
import argparse
import dataclasses
import datetime
import importlib.util
import math
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from support.errors import UserError, error_text, printable

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = REPOSITORY / "recipes" / "demo.txt"


def setting(default, comment, choices=None, several=False, low=None, high=None):
    """One field: its default, the text that --help shows, the allowed values or bounds.

    several: the flag takes one value for each round of SPIN.
    """
    return field(default=default, metadata={
        "comment": comment, "choices": choices, "several": several, "low": low, "high": high})


@dataclass
class Settings:
    """Every setting of train.py. None: the value depends on other settings or on the model.

    `resolve` works out what depends on other settings; `fit_to_positions`, on the model.
    """
    # what goes in and out
    model: str = setting(
        None, "folder or Hub name of the model to start from (none: the demo, recipes/demo.txt)")
    model_revision: str = setting(
        None, "branch, tag or commit of a model of the Hub (none: its main branch)")
    data: str = setting(
        None, "training rows: a .jsonl, .json or .parquet file, a folder of such files, or a data "
        "set of the Hub as NAME or NAME:SPLIT")
    rows: str = setting(
        None, "rows of --data to use, as FROM:TO, counted from 0, TO not included (none: all rows)")
    eval_data: str = setting(
        None, "held-out rows (none: 2%% of --data, at most 200 rows, the same rows every time)")
    skip_bad_rows: bool = setting(
        False, "leave out rows that can't be used and print how many, instead of stopping at the "
        "first one")
    out: str = setting(None, "output folder (none: a new folder runs/NNNN)")
    overwrite: bool = setting(False, "replace the run in the output folder")
    trust_remote_code: bool = setting(
        False, "run Python code that comes with the model or its tokenizer")
    chat_template: str = setting(
        None, "replace the tokenizer's chat template by one of the paper's (Appendix B)",
        ["chatml", "vicuna"])
    random_init: bool = setting(
        False, "start from random weights; --model needs only a config.json and a tokenizer")
    max_len: int = setting(
        2048, "most tokens of prompt and response together; a longer response loses its end. A "
        "model with fewer positions lowers this", low=2)
    max_prompt_len: int = setting(
        None, "most tokens of a prompt; a longer prompt loses its start (none: 7/8 of --max_len)",
        low=1)
    drop_long_prompts: bool = setting(
        False, "leave out rows whose prompt has --max_prompt_len tokens or more, instead of "
        "cutting the prompt")
    special_tokens_in_prompts: bool = setting(
        False, "special tokens that a prompt spells out are live; otherwise only the chat "
        "template's own are, and those in the data are plain text")
    data_revision: str = setting(
        None, "branch, tag or commit of a data set of the Hub (none: its main branch)")
    template_date: str = setting(
        None, "date and time that chat templates are told, as 2024-05-31T12:00:00 (none: when the "
        "run began)")
    # the method
    loss: str = setting("orpo", "loss that the policy is trained with", ["orpo", "dpo", "sft"])
    rejected: str = setting(
        "ema", "who writes the rejected responses: the EMA model (SAPO), the policy (on-policy), "
        "the policy as it was at the start of the round (spin), or the data's own column (data)",
        ["ema", "policy", "spin", "data"])
    segment_len: int = setting(
        256, "N_seg, the number of tokens in segment B; 0: rewrite the whole response", low=0)
    num_rejected: int = setting(1, "rewrites per chosen response", low=1)
    buffer_size: int = setting(
        None, "pairs in the replay buffer, over all processes; 0: train on the newest pairs only "
        "(none: 2000 with --rejected ema or policy, otherwise 0)", low=0)
    skip_identical: bool = setting(False, "leave out pairs whose two responses are equal")
    beta: float = setting(
        None, "DPO: strength of the pull towards the reference (none: 0.1)", several=True)
    label_smoothing: float = setting(
        0.0, "DPO: assumed share of pairs with chosen and rejected swapped", low=0, high=1)
    lam: float = setting(0.05, "ORPO: weight of the odds ratio term", low=0)
    nll_on: str = setting(
        "response", "ORPO and SFT: tokens in the supervised term; 'prompt' adds the prompt's",
        ["response", "prompt"])
    ref: str = setting(
        None, "DPO: model that the reference is refreshed from (none: ema where a model writes the "
        "rejected responses, otherwise fixed)", ["fixed", "policy", "ema"])
    ref_model: str = setting(
        None, "DPO with --ref fixed: folder or Hub name of a reference model with the policy's "
        "vocabulary (none: the model that training starts from)")
    ref_every: int = setting(108, "DPO: optimizer steps between refreshes of the reference", low=1)
    ema_decay: float = setting(0.5, "alpha of Eq. 6", low=0, high=1)
    ema_every: int = setting(2, "optimizer steps between updates of the EMA model", low=1)
    iterations: int = setting(
        None, "SPIN: number of rounds, each with a new optimizer (none: 4 with --rejected spin)",
        low=1)
    # generation
    temperature: float = setting(0.7, "sampling temperature; 0: greedy", low=0)
    top_k: int = setting(50, "sample among this many most likely tokens; 0: all tokens", low=0)
    top_p: float = setting(
        0.95, "sample among the most likely tokens that together have this probability", low=0,
        high=1)
    max_new_tokens: int = setting(
        256, "most tokens of a response that is written whole, in training and evaluation; with "
        "--tail rewrite, of a rejected response", low=1)
    segment_eos: str = setting(
        "stop", "an end token in B' ends the response (stop), or is never produced there unless B "
        "ends the response (forbid)", ["stop", "forbid"])
    tail: str = setting(
        "keep", "the rejected response is A B' C (keep: Eq. 5), A B' (drop), or A and then "
        "everything after it written anew, until an end token or --max_new_tokens (rewrite)",
        ["keep", "drop", "rewrite"])
    # optimization
    epochs: float = setting(4.0, "passes over the data (SPIN: per round)")
    steps: int = setting(None, "optimizer steps in total; overrides --epochs", low=1)
    batch_size: int = setting(64, "pairs per optimizer step, over all processes", low=1)
    micro_batch: int = setting(
        8, "pairs scored at a time by one process; lower this when scoring runs out of memory",
        low=1)
    generate_batch: int = setting(
        64, "responses generated at a time by one process; lower this when generation runs out of "
        "memory", low=1)
    lr: float = setting(
        None, "learning rate (none: the paper's 5e-6 for orpo, 5e-7 for dpo, 2e-5 for sft)",
        several=True)
    optimizer: str = setting("adamw", "optimizer", ["adamw", "rmsprop"])
    schedule: str = setting(
        "linear", "course of the learning rate after the warm-up",
        ["linear", "cosine", "inverse_sqrt", "constant"])
    warmup: float = setting(
        0.1, "warm-up: a number of steps, or a share of all steps where the value is below 1",
        low=0)
    weight_decay: float = setting(0.0, "weight decay", low=0)
    max_grad_norm: float = setting(1.0, "clip the gradient to this norm; 0: no clipping", low=0)
    dtype: str = setting(
        "fp32", "precision of the computation; with bf16, weights and optimizer stay in fp32 and a "
        "bf16 copy generates", ["fp32", "bf16"])
    grad_checkpoint: bool = setting(
        False, "gradient checkpointing: keep the input of each layer only and compute the rest "
        "again in backward; less memory, more time")
    shard: bool = setting(
        False, "several processes: shard policy, EMA model and reference (FSDP2) instead of "
        "copying them")
    compile: bool = setting(
        False, "torch.compile the policy for scoring: a slow first step, faster steps after it")
    seed: int = setting(
        0, "seed of everything random: order, segments, sampling, buffer, new weights", low=0,
        high=2 ** 63 - 1)
    # watching
    eval_every: int = setting(
        0, "steps between evaluations, besides the first and the last one; 0: only those two",
        low=0)
    eval_rows: int = setting(
        500, "most held-out rows to evaluate on; 0: no evaluation, and train on all rows", low=0)
    print_every: int = setting(50, "steps between printed pairs; 0: print none", low=0)
    tensorboard: bool = setting(
        False, "also write the metrics for TensorBoard, into the output folder (needs the "
        "tensorboard package)")
    save_pairs: bool = setting(
        False, "write every new pair to pairs.jsonl in the output folder: text, token ids, and "
        "log-probabilities under the model that training starts from, which stays in memory for "
        "this")
    save_ema: bool = setting(False, "at the end, save the EMA model, too, as final-ema/")
    save_every_epoch: bool = setting(
        False, "save the policy after every epoch as epochs/1, epochs/2, ... (SPIN: counted over "
        "all rounds; the last epoch of a round ends with the round)")
    # surviving
    save_every: int = setting(
        0, "steps between checkpoints; 0: write one only when a signal ends the run", low=0)
    keep: int = setting(2, "number of newest checkpoints to keep")
    resume: str = setting(
        None, "continue the run in this folder from its newest checkpoint, or from the checkpoint "
        "named; the run's settings apply where no others are given")
    max_bad_steps: int = setting(
        5, "steps in a row without a finite loss and gradient after which the run stops", low=1)
    threads: int = setting(
        None, "CPU threads per process (none: the cores, shared evenly)", low=1)
    # planning
    dry_run: bool = setting(
        False, "print parameters, steps, tokens and memory of the run, and stop; needs no weights, "
        "data or GPU")
    plan_config: str = setting(
        None, "dry run: config.json with the model's shape, if the model itself is not there")
    plan_rows: int = setting(None, "dry run: number of rows, if the data is not there", low=1)
    plan_processes: int = setting(
        None, "dry run: number of processes to plan for (none: those that torchrun started)", low=1)

    @property
    def generates(self) -> bool:
        """Does a model write the rejected responses?"""
        return self.loss != "sft" and self.rejected != "data"

    @property
    def needs_ema(self) -> bool:
        """Is there an EMA model? It writes the rejected responses or is DPO's reference."""
        return (self.generates and self.rejected == "ema") or self.ref == "ema"


def parse(argv: list[str]) -> Settings:
    """Command line -> resolved settings. Without --model, the demo's recipe gives the defaults.

    Exits with status 2 and a usage line on an unknown flag (argparse). Raises UserError on flags
    that conflict, on values out of range and on a flag file that can't be read.
    """
    parser = make_parser()
    given = vars(parser.parse_args(with_flag_files(argv)))
    if "resume" in given:
        return parse_resumed(given)
    demo = [] if "model" in given else with_flag_files([f"@{DEMO}"])
    defaults = vars(parser.parse_args(demo))
    # the demo's own files, whatever folder this is run from
    for name in {"model", "data", "eval_data"} & set(defaults):
        defaults[name] = os.path.relpath(REPOSITORY / defaults[name])
    if "data" in given:
        for name in ("eval_data", "rows"):      # they belong to the demo's data
            defaults.pop(name, None)
    if given.get("loss", defaults.get("loss")) != defaults.get("loss"):
        defaults.pop("lr", None)                # tuned for the demo's loss
    return resolve(Settings(**{**defaults, **given}), explicit=set(given))


# What a resumed run may change. Everything else decides what the run is.
CHANGEABLE = {
    "out", "overwrite", "resume", "save_every", "keep", "max_bad_steps", "threads", "eval_every",
    "print_every", "tensorboard", "compile", "grad_checkpoint", "shard", "micro_batch",
    "generate_batch", "steps", "epochs", "lr", "schedule", "warmup", "max_grad_norm",
    "trust_remote_code", "dry_run", "plan_config", "plan_rows", "plan_processes", "beta", "lam",
    "label_smoothing", "temperature", "top_k", "top_p", "ema_decay", "ema_every", "ref_every",
    "save_pairs", "save_ema", "save_every_epoch"}


# Settings that may name a place on this machine.
PATHS = ("model", "data", "eval_data", "ref_model")


def run_folder(resume: str) -> Path:
    """The run that --resume names, by its own folder or by that of one of its checkpoints."""
    path = Path(resume)
    return path.parent.parent if path.parent.name == "checkpoints" else path


def parse_resumed(given: dict) -> Settings:
    """The settings of the resumed run, with those given now. Refuses those that change the run."""
    from support.run_folder import read_settings  # it imports this file

    run = run_folder(given["resume"])
    known = read_settings(given["resume"])
    if "out" in given and Path(given["out"]).resolve() != run.resolve():
        raise UserError(f"--out {given['out']}: a resumed run continues in its own folder, {run}")
    # The permission to run a model's code is not inherited. New epochs replace steps given before.
    fresh = {"overwrite": False, "trust_remote_code": False, "dry_run": False}
    if "epochs" in given:
        fresh["steps"] = None
    s = Settings(**{**known, **fresh, **given, "out": str(run)})
    # first what was asked for; what follows from that would only hide the reason
    refuse_another_run(given["resume"], {name: known[name] for name in given if name in known}, s)
    s = resolve(s, explicit={"segment_len", *given})
    refuse_another_run(given["resume"], known, s)
    return s


def refuse_another_run(resume: str, saved: dict, s: Settings) -> None:
    """Raise UserError where settings that decide what the run is differ from those saved."""
    # other numbers would move the starts of SPIN's rounds
    fixed_length = {"steps", "epochs"} if s.rejected == "spin" else set()
    refused = {name: change for name, change in changes(saved, s).items()
               if name not in CHANGEABLE - fixed_length}
    if refused:
        raise UserError(f"--resume {resume}: it would be another run with {say_changes(refused)}; "
                        "start a new one for that")


def as_saved(s: Settings) -> dict:
    """The settings as settings.json holds them. Paths are absolute, to resume from any folder."""
    paths = {name: str(located(getattr(s, name)).resolve())
             for name in PATHS
             if getattr(s, name) and located(getattr(s, name)).exists()}
    return dataclasses.asdict(s) | paths


def changes(saved: dict, s: Settings) -> dict[str, tuple]:
    """Settings that differ from those saved: name -> (then, now)."""
    def same(name, then, now):
        if name in PATHS and None not in (then, now):
            return Path(located(then)).resolve() == Path(located(now)).resolve()
        return then == now

    return {name: (then, getattr(s, name)) for name, then in saved.items()
            if hasattr(s, name) and name not in ("resume", "out", "overwrite")
            and not same(name, then, getattr(s, name))}


def say_changes(found: dict[str, tuple]) -> str:
    return ", ".join(f"--{name} {now} (was {then})" for name, (then, now) in found.items())


def run_label(s: Settings) -> str:
    """What a run is called: "SAPO-ORPO", "SPIN-DPO", "on-policy DPO", "ORPO", "SFT"."""
    by = {"ema": "SAPO-", "policy": "on-policy ", "spin": "SPIN-", "data": ""}
    return "SFT" if s.loss == "sft" else by[s.rejected] + s.loss.upper()


class Parser(argparse.ArgumentParser):
    """argparse's parser. Its messages may quote a file: no escape sequence reaches the terminal."""

    def error(self, message: str):
        super().error(printable(message))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="train.py", usage="train.py [@FILE] [--FLAG VALUE ...]", allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Self-Augmented Preference Optimization (arXiv 2405.20830). Without --model: "
                    "the demo. @FILE reads flags from a file, see recipes/.")
    for f in dataclasses.fields(Settings):
        shown = "" if f.default is None else f" (default {f.default})"
        extra = {"help": f.metadata["comment"] + shown}
        if f.type is bool:
            extra["action"] = argparse.BooleanOptionalAction
        elif f.metadata["choices"]:
            extra |= {"type": current_name, "choices": f.metadata["choices"]}
        else:
            extra |= {"type": f.type, "metavar": f.type.__name__.upper()}
        if f.metadata["several"]:
            extra["nargs"] = "+"
        parser.add_argument(f"--{f.name}", **extra)
    return parser


def current_name(value):
    """A setting's value by its current name: `--rejected iteration` is called `spin` now."""
    return "spin" if value == "iteration" else value


def with_flag_files(words: list[str], within: tuple[Path, ...] = ()) -> list[str]:
    """The words of a command line, each @FILE replaced by the words of that file.

    within: files that are being read, the outermost first. Raises UserError on a file that can't be
    read, that holds no text, or that reads itself.
    """
    expanded = []
    for word in words:
        if not word.startswith("@"):
            expanded.append(word)
            continue
        file = Path(word[1:]).resolve()
        if file in within:
            raise UserError(f"{word}: this flag file reads itself, directly or through another; "
                            "remove that line from it")
        try:
            lines = [split_line(line) for line in file.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise UserError(f"{word}: can't read this flag file ({error_text(error)})") from None
        except ValueError as error:
            raise UserError(f"{word}: not a file of flags ({error_text(error)})") from None
        for line in lines:
            expanded += with_flag_files(line, (*within, file))
    return expanded


def split_line(line: str) -> list[str]:
    """A line of a flag file as words. A # that begins a word outside quotes begins a comment."""
    plain = r"""[^'"#\\]|\\.|"(?:[^"\\]|\\.)*"|'[^']*'|(?<=\S)#"""
    found = re.fullmatch(rf"((?:{plain})*)(#.*)?", line)
    return shlex.split(found[1] if found else line)


def resolve(s: Settings, explicit: set[str]) -> Settings:
    """Work out what depends on other settings. Raises UserError on conflicts and wrong values.

    explicit: names of the settings that the user gave. Only those can conflict; every other one
    gets the value that fits the method.
    """
    def refuse(flag, when, why):
        if when and flag in explicit and getattr(s, flag) not in (None, 0):
            given = getattr(s, flag)
            flag = f"--{flag}" if given is True else f"--{flag} {given}"
            raise UserError(f"{flag} makes no sense with {why}")

    spin = s.rejected == "spin" and s.loss != "sft"
    refuse("skip_identical", s.loss == "sft", "--loss sft, which has no rejected responses")
    refuse("rejected", s.loss == "sft" and s.rejected != "data",
           "--loss sft, which trains on chosen responses alone")
    refuse("buffer_size", s.loss == "sft", "--loss sft, which has no pairs to store")
    refuse("buffer_size", s.rejected == "data",
           "--rejected data: all pairs are there from the start")
    refuse("buffer_size", spin,
           "--rejected spin, which writes all responses at the start of a round")
    refuse("num_rejected", not s.generates and s.num_rejected > 1,
           "--loss sft or --rejected data, which generate nothing")
    refuse("tail", not s.generates and s.tail != "keep",
           "--loss sft or --rejected data, which generate nothing")
    refuse("segment_eos", s.tail == "rewrite" and s.segment_eos == "forbid",
           "--tail rewrite: B' reaches to the end of the response")
    refuse("iterations", not spin and s.iterations != 1, "anything but --rejected spin")
    refuse("ref", s.loss != "dpo", f"--loss {s.loss}, which needs no reference model")
    refuse("ref", spin, "--rejected spin: the reference is the policy at the start of the round")

    if spin and "segment_len" not in explicit:
        s.segment_len = 0           # SPIN writes whole responses
    refuse("tail", not s.segment_len and s.tail != "keep",
           "--segment_len 0: a response that is written whole has no part after the segment")
    s.iterations = (s.iterations or 4) if spin else 1
    if not s.generates or spin:
        s.buffer_size = 0
    elif s.buffer_size is None:
        s.buffer_size = 2000
    if s.loss != "dpo" or spin:
        s.ref = None
    elif s.ref is None:
        s.ref = "ema" if s.generates else "fixed"
    if s.ref_model is not None and s.ref != "fixed":
        raise UserError(f"--ref_model {s.ref_model} needs --loss dpo --ref fixed: every other "
                        "reference comes from the policy")
    refuse("save_pairs", not s.generates,
           "--loss sft or --rejected data, which generate nothing")
    refuse("save_ema", not s.needs_ema, f"{run_label(s)}, which has no EMA model")
    for name, default in (("lr", {"orpo": 5e-6, "dpo": 5e-7, "sft": 2e-5}[s.loss]), ("beta", 0.1)):
        value = getattr(s, name)
        value = [default] if value is None else value if isinstance(value, list) else [value]
        if len(value) not in (1, s.iterations):
            raise UserError(f"--{name} takes one value, or one for each of the {s.iterations} "
                            f"rounds, not {len(value)}")
        setattr(s, name, value * s.iterations if len(value) == 1 else value)
    check_ranges(s)
    if s.template_date is None:
        s.template_date = datetime.datetime.now().isoformat(timespec="seconds")
    return s


def fit_to_positions(s: Settings, positions: int | None, flag: str = "model") -> None:
    """Settle max_len and max_prompt_len, given how many positions the model has (None: any number).

    flag: the setting that names the model, for the error.

    max_len is lowered to the model's positions. max_prompt_len stays what the user gave where that
    leaves room for a response; otherwise it is 7/8 of max_len. Raises UserError on a model with a
    single position.
    """
    s.max_len = min(s.max_len, positions or s.max_len)
    if s.max_len < 2:
        raise UserError(f"--{flag} {getattr(s, flag)} has {positions} position: no room for a "
                        "prompt and a response")
    if s.max_prompt_len is None or s.max_prompt_len >= s.max_len:
        s.max_prompt_len = max(1, s.max_len * 7 // 8)


def check_ranges(s: Settings) -> None:
    """Raise UserError on values that a setting can't have."""
    for f in dataclasses.fields(s):
        value, low, high = getattr(s, f.name), f.metadata["low"], f.metadata["high"]
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"--{f.name} must be a finite number, not {number}")
            if number is None:
                continue
            if (low is not None and number < low) or (high is not None and number > high):
                allowed = f"at least {low}" if high is None else f"between {low} and {high}"
                raise UserError(f"--{f.name} must be {allowed}, not {number}")
    if s.epochs <= 0 or min(s.lr) <= 0 or min(s.beta) <= 0:
        raise UserError("--epochs, --lr and --beta must be above 0")
    if s.steps is not None and s.steps < s.iterations:
        raise UserError(f"--steps {s.steps} is less than one step for each of the {s.iterations} "
                        "rounds")
    if s.max_prompt_len is not None and s.max_prompt_len >= s.max_len:
        raise UserError(f"--max_prompt_len {s.max_prompt_len} leaves no room for a response in "
                        f"--max_len {s.max_len}")
    if 0 < s.buffer_size < s.batch_size:
        raise UserError(f"--buffer_size {s.buffer_size} is smaller than --batch_size "
                        f"{s.batch_size}: the buffer could never fill a batch")
    if s.rows is not None and not re.fullmatch(r"\d*:\d*", s.rows):
        raise UserError(f"--rows takes FROM:TO, such as 0:2500 or 2500:, not {s.rows}")
    if s.keep < 2:
        raise UserError(f"--keep must be at least 2, not {s.keep}: one damaged file would lose the "
                        "run")
    try:
        datetime.datetime.fromisoformat(s.template_date or "2000-01-01")
    except ValueError:
        raise UserError("--template_date takes a date and time such as 2024-05-31T12:00:00, not "
                        f"{s.template_date}") from None
    if s.compile and s.shard:
        raise UserError("--compile with --shard was never tried; leave one of the two out")
    if s.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the tensorboard package: pip install tensorboard")
    if s.data is None:
        raise UserError("--data is missing: name a .jsonl, .json or .parquet file, a folder of "
                        "them, or a data set of the Hub")


def located(path: str) -> Path:
    """A path as given. Where nothing is there: the same path beside train.py, if that exists.

    So recipes work from any folder.
    """
    here, there = Path(path), REPOSITORY / path
    return there if not here.exists() and there.exists() else here
