"""The settings of a run: one dataclass, the command line built from it, and what makes no sense together."""
import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from support.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = REPOSITORY / "recipes" / "demo.txt"


def setting(default, comment, choices=None, several=False, low=None, high=None):
    """One field: its default, the comment that --help shows, and what it may be, bounds included. several: one value an iteration."""
    return field(default=default, metadata={"comment": comment, "choices": choices, "several": several, "low": low, "high": high})


@dataclass
class Settings:
    """Every setting of train.py. None means that the value depends on others and is worked out by `resolve`."""
    # what goes in and out
    model: str = setting(None, "folder or hub name of the model to start from (none: the demo, recipes/demo.txt)")
    data: str = setting(None, "training rows: a .jsonl, .json or .parquet file, a folder of them, or a data set of the Hub as name or name:split")
    rows: str = setting(None, "which rows of --data to use, as FROM:TO, the first being 0 (none: all)")
    eval_data: str = setting(None, "held-out rows (none: a fixed 2%% of the data, at most 200 rows, is held out)")
    skip_bad_rows: bool = setting(False, "leave out rows that can't be used, and say how many, instead of stopping at the first")
    out: str = setting(None, "output folder (none: a fresh runs/NNNN)")
    overwrite: bool = setting(False, "replace the run that --out holds")
    trust_remote_code: bool = setting(False, "run code that comes with the model or its tokenizer")
    chat_template: str = setting(None, "replace the tokenizer's chat template (paper, Appendix B)", ["chatml", "vicuna"])
    random_init: bool = setting(False, "start from random weights: --model needs only a config.json and a tokenizer")
    max_len: int = setting(2048, "longest prompt and response together, in tokens, or what the model's positions allow; a longer "
                           "response loses its end", low=1)
    max_prompt_len: int = setting(None, "longest prompt in tokens; a longer one loses its start (none: 7/8 of max_len)", low=1)
    # the method
    loss: str = setting("orpo", "what the policy learns from", ["orpo", "dpo", "sft"])
    rejected: str = setting("ema", "who writes the rejected response: the EMA model (SAPO), the policy (on-policy), the "
                            "policy of an iteration's start (SPIN), or the data's own column", ["ema", "policy", "iteration", "data"])
    segment_len: int = setting(256, "N_seg, tokens of B; 0 rewrites the whole response", low=0)
    num_rejected: int = setting(1, "rewrites of each chosen response", low=1)
    buffer_size: int = setting(None, "pairs in the replay buffer, over all processes; 0 trains on what was just generated "
                               "(none: 2000 with --rejected ema or policy, else 0)", low=0)
    skip_identical: bool = setting(False, "leave pairs with B' = B out")
    beta: float = setting(None, "DPO: pull towards the reference (none: 0.1)", several=True)
    label_smoothing: float = setting(0.0, "DPO: assumed share of pairs that are the wrong way round", low=0, high=1)
    lam: float = setting(0.05, "ORPO: weight of the odds ratio term", low=0)
    nll_on: str = setting("response", "ORPO, SFT: tokens of the supervised term; 'prompt' adds the prompt", ["response", "prompt"])
    ref: str = setting(None, "DPO: what the reference is refreshed with (none: ema where --rejected generates, else fixed)",
                       ["fixed", "policy", "ema"])
    ref_every: int = setting(108, "DPO: optimizer steps between refreshes of the reference", low=1)
    ema_decay: float = setting(0.5, "alpha of Eq. 6", low=0, high=1)
    ema_every: int = setting(2, "optimizer steps between refreshes of the EMA model", low=1)
    iterations: int = setting(None, "SPIN: iterations, each with a fresh optimizer (none: 4 with --rejected iteration)", low=1)
    # generation
    temperature: float = setting(0.7, "sampling temperature; 0 is greedy", low=0)
    top_k: int = setting(50, "sample among the k best tokens; 0: all", low=0)
    top_p: float = setting(0.95, "sample among the best tokens that hold this much probability", low=0, high=1)
    max_new_tokens: int = setting(256, "longest answer where the whole response is written, in training and evaluation", low=1)
    segment_eos: str = setting("stop", "an end token in B' ends the response, or is forbidden there", ["stop", "forbid"])
    # optimization
    epochs: float = setting(4.0, "passes over the data (SPIN: in each iteration)")
    steps: int = setting(None, "optimizer steps in all; overrides --epochs", low=1)
    batch_size: int = setting(64, "pairs an optimizer step, over all processes", low=1)
    micro_batch: int = setting(8, "pairs scored at a time in one process; lower it when scoring runs out of memory", low=1)
    generate_batch: int = setting(64, "responses generated at a time in one process; lower it when generating runs out of memory", low=1)
    lr: float = setting(None, "learning rate (none: the paper's 5e-6 for orpo, 5e-7 for dpo, 2e-5 for sft)", several=True)
    optimizer: str = setting("adamw", "optimizer", ["adamw", "rmsprop"])
    schedule: str = setting("linear", "course of the learning rate after the warm-up", ["linear", "cosine", "inverse_sqrt", "constant"])
    warmup: float = setting(0.1, "warm-up in steps, or as a share of all steps where below 1", low=0)
    weight_decay: float = setting(0.0, "weight decay", low=0)
    max_grad_norm: float = setting(1.0, "clip the gradient's norm to this; 0: do not", low=0)
    dtype: str = setting("fp32", "what is computed in; bf16 keeps weights and optimizer in fp32 and generates from a bf16 copy", ["fp32", "bf16"])
    grad_checkpoint: bool = setting(False, "keep each layer's input only and compute the rest again in backward: less memory, more time")
    shard: bool = setting(False, "several processes: cut policy, EMA model and reference up among them (FSDP2) instead of copying them")
    compile: bool = setting(False, "torch.compile the policy for scoring: faster steps after a slow first one")
    seed: int = setting(0, "of everything random: order, segments, sampling, drawing, fresh weights", low=0, high=2 ** 63 - 1)
    # watching
    eval_every: int = setting(0, "steps between evaluations besides those at the start and the end; 0: none between", low=0)
    eval_rows: int = setting(500, "most held-out rows used; 0: no evaluation, and all rows are trained on", low=0)
    print_every: int = setting(50, "steps between printed pairs; 0: never", low=0)
    tensorboard: bool = setting(False, "write what metrics.jsonl gets for TensorBoard too, into the output folder (needs the tensorboard package)")
    # surviving
    save_every: int = setting(0, "steps between checkpoints; 0: only when a signal ends the run", low=0)
    keep: int = setting(2, "checkpoints kept, the newest ones")
    resume: str = setting(None, "go on with the run in this folder, from its newest checkpoint, or from the checkpoint named; "
                          "its settings apply where no others are given")
    max_bad_steps: int = setting(5, "steps in a row without a finite loss and gradient after which the run stops", low=1)
    threads: int = setting(None, "CPU threads of each process (none: the cores, shared evenly)", low=1)
    # planning
    dry_run: bool = setting(False, "print parameters, steps, tokens and memory of the run, and stop; needs neither weights nor data nor a GPU")
    plan_config: str = setting(None, "dry run: config.json with the model's shape, where the model itself is not at hand")
    plan_rows: int = setting(None, "dry run: number of rows, where the data is not at hand", low=1)
    plan_processes: int = setting(None, "dry run: processes to plan for (none: those that torchrun started)", low=1)

    @property
    def generates(self) -> bool:
        """Does a model write the rejected responses?"""
        return self.loss != "sft" and self.rejected != "data"


def parse(argv: list[str]) -> Settings:
    """Command line -> resolved settings. Without --model the demo's recipe applies first, as defaults.

    Exits with status 2 and a usage line on a misspelled flag (argparse); raises UserError on what makes no sense.
    """
    parser = make_parser()
    try:
        given = vars(parser.parse_args(argv))
    except ValueError as error:         # argparse sees to its own; these come from reading a file of flags
        raise UserError(f"{' '.join(word for word in argv if word.startswith('@'))}: not a file of flags ({error})") from None
    if "resume" in given:
        return parse_resumed(given)
    defaults = {} if "model" in given else vars(parser.parse_args([f"@{DEMO}"]))
    for name in {"model", "data", "eval_data"} & set(defaults):     # the demo's own, whatever folder this is run from
        defaults[name] = os.path.relpath(REPOSITORY / defaults[name])
    if "data" in given:
        for name in ("eval_data", "rows"):      # the demo's, of no use for other data
            defaults.pop(name, None)
    if given.get("loss", defaults.get("loss")) != defaults.get("loss"):
        defaults.pop("lr", None)                # tuned for the demo's own loss
    return resolve(Settings(**{**defaults, **given}), explicit=set(given))


# What a resumed run may do otherwise than before. Everything else decides what the run is.
CHANGEABLE = {"out", "overwrite", "resume", "save_every", "keep", "max_bad_steps", "threads", "eval_every", "print_every", "tensorboard", "compile",
              "grad_checkpoint", "shard", "micro_batch", "generate_batch", "steps", "epochs", "lr", "schedule", "warmup", "max_grad_norm",
              "trust_remote_code", "dry_run", "plan_config", "plan_rows", "plan_processes", "beta", "lam", "label_smoothing", "temperature", "top_k", "top_p", "ema_decay", "ema_every", "ref_every"}


def run_folder(resume: str) -> Path:
    """The run that --resume names, by its own folder or by that of one of its checkpoints."""
    path = Path(resume)
    return path.parent.parent if path.parent.name == "checkpoints" else path


def parse_resumed(given: dict) -> Settings:
    """The settings of the run that is resumed, with those given now; refuses those that would make it another run."""
    run = run_folder(given["resume"])
    try:
        saved = json.loads((run / "settings.json").read_text(encoding="utf-8"))
        known = {f.name: saved[f.name] for f in dataclasses.fields(Settings) if f.name in saved}
    except OSError:
        raise UserError(f"--resume {given['resume']}: no run there (no settings.json); name the folder that --out named") from None
    except (ValueError, TypeError):
        raise UserError(f"--resume {given['resume']}: {run / 'settings.json'} is damaged") from None
    if "out" in given and Path(given["out"]).resolve() != run.resolve():
        raise UserError(f"--out {given['out']}: a resumed run goes on in its own folder, {run}")
    # Leave to run a model's code is not inherited, and new epochs count where steps had been given before.
    fresh = {"overwrite": False, "trust_remote_code": False, "dry_run": False} | ({"steps": None} if "epochs" in given else {})
    s = resolve(Settings(**{**known, **fresh, **given, "out": str(run)}), explicit={"segment_len", *given})
    fixed_length = {"steps", "epochs"} if s.rejected == "iteration" else set()         # SPIN's iterations would move
    refused = {name: change for name, change in changes(known, s).items() if name not in CHANGEABLE - fixed_length}
    if refused:
        raise UserError(f"--resume {given['resume']}: it would be another run with " + say_changes(refused) + "; start a new one for that")
    return s


def as_saved(s: Settings) -> dict:
    """The settings as settings.json holds them: paths in full, so that a run can be resumed from any folder."""
    paths = {name: str(located(getattr(s, name)).resolve()) for name in ("model", "data", "eval_data")
             if getattr(s, name) and located(getattr(s, name)).exists()}
    return dataclasses.asdict(s) | paths


def changes(saved: dict, s: Settings) -> dict[str, tuple]:
    """Settings that differ from those saved: name -> (then, now)."""
    def same(name, then, now):
        paths = name in ("model", "data", "eval_data") and None not in (then, now)
        return Path(located(then)).resolve() == Path(located(now)).resolve() if paths else then == now
    return {name: (then, getattr(s, name)) for name, then in saved.items()
            if hasattr(s, name) and name not in ("resume", "out", "overwrite") and not same(name, then, getattr(s, name))}


def say_changes(found: dict[str, tuple]) -> str:
    return ", ".join(f"--{name} {now} (was {then})" for name, (then, now) in found.items())


def method(s: Settings) -> str:
    """What a run is called: "SAPO-ORPO", "SPIN-DPO", "on-policy DPO", "ORPO", "SFT"."""
    by = {"ema": "SAPO-", "policy": "on-policy ", "iteration": "SPIN-", "data": ""}
    return "SFT" if s.loss == "sft" else by[s.rejected] + s.loss.upper()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py", usage="train.py [@FILE] [--FLAG VALUE ...]", fromfile_prefix_chars="@", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Self-Augmented Preference Optimization (arXiv 2405.20830). Without --model: the demo. "
                    "@FILE reads flags from a file, see recipes/.")
    parser.convert_arg_line_to_args = split_line
    for f in dataclasses.fields(Settings):
        shown = "" if f.default is None else f" (default {f.default})"
        extra = {"help": f.metadata["comment"] + shown}
        if f.type is bool:
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra |= {"type": f.type, "choices": f.metadata["choices"], "metavar": None if f.metadata["choices"] else f.type.__name__.upper()}
            if f.metadata["several"]:
                extra["nargs"] = "+"
        parser.add_argument(f"--{f.name}", **extra)
    return parser


def split_line(line: str) -> list[str]:
    """A line of a flag file as words; a comment begins with a # that stands first in a word, outside quotes."""
    found = re.fullmatch(r"""((?:[^'"#\\]|\\.|"(?:[^"\\]|\\.)*"|'[^']*'|(?<=\S)#)*)(#.*)?""", line)
    return shlex.split(found[1] if found else line)


def resolve(s: Settings, explicit: set[str]) -> Settings:
    """Work out what depends on other settings, and refuse what makes no sense. explicit: what the user asked for."""
    def refuse(flag, when, why):
        if flag in explicit and getattr(s, flag) not in (None, 0) and when:
            raise UserError(f"--{flag} {getattr(s, flag)} makes no sense with {why}")

    refuse("rejected", s.loss == "sft" and s.rejected != "data", "--loss sft, which trains on chosen responses alone")
    refuse("buffer_size", s.loss == "sft", "--loss sft, which has no pairs to store")
    refuse("buffer_size", s.rejected == "data", "--rejected data: the pairs are all there from the start")
    refuse("buffer_size", s.rejected == "iteration", "--rejected iteration (SPIN), which writes all answers at the start of an iteration")
    refuse("num_rejected", not s.generates and s.num_rejected > 1, "--loss sft or --rejected data, which generate nothing")
    refuse("iterations", s.rejected != "iteration" and s.iterations != 1, "anything but --rejected iteration (SPIN)")
    refuse("ref", s.loss != "dpo", f"--loss {s.loss}, which needs no reference model")
    refuse("ref", s.rejected == "iteration", "--rejected iteration (SPIN): the reference is the policy of the iteration's start")

    if s.rejected == "iteration" and "segment_len" not in explicit:
        s.segment_len = 0           # SPIN writes whole responses
    s.iterations = (s.iterations or 4) if s.rejected == "iteration" else 1
    if not s.generates or s.rejected == "iteration":
        s.buffer_size = 0
    elif s.buffer_size is None:
        s.buffer_size = 2000
    if s.loss != "dpo" or s.rejected == "iteration":
        s.ref = None
    elif s.ref is None:
        s.ref = "ema" if s.generates else "fixed"
    if s.max_prompt_len is None:
        s.max_prompt_len = s.max_len * 7 // 8
    for name, default in (("lr", {"orpo": 5e-6, "dpo": 5e-7, "sft": 2e-5}[s.loss]), ("beta", 0.1)):
        value = getattr(s, name)
        value = [default] if value is None else value if isinstance(value, list) else [value]
        if len(value) not in (1, s.iterations):
            raise UserError(f"--{name} takes one value, or one for each of the {s.iterations} iterations, not {len(value)}")
        setattr(s, name, value * s.iterations if len(value) == 1 else value)
    check_ranges(s)
    return s


def check_ranges(s: Settings) -> None:
    """Refuse values outside what each setting can be."""
    for f in dataclasses.fields(s):
        value, low, high = getattr(s, f.name), f.metadata["low"], f.metadata["high"]
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"--{f.name} must be a finite number, not {number}")
            if number is not None and (low is not None and number < low or high is not None and number > high):
                allowed = f"at least {low}" if high is None else f"between {low} and {high}"
                raise UserError(f"--{f.name} must be {allowed}, not {number}")
    if s.epochs <= 0 or min(s.lr) <= 0 or min(s.beta) <= 0:
        raise UserError("--epochs, --lr and --beta must be above 0")
    if s.steps is not None and s.steps < s.iterations:
        raise UserError(f"--steps {s.steps} is less than one step for each of the {s.iterations} iterations")
    if s.max_prompt_len >= s.max_len:
        raise UserError(f"--max_prompt_len {s.max_prompt_len} leaves no room for a response in --max_len {s.max_len}")
    if 0 < s.buffer_size < s.batch_size:
        raise UserError(f"--buffer_size {s.buffer_size} is smaller than --batch_size {s.batch_size}: a batch could never be drawn")
    if s.rows is not None and not re.fullmatch(r"\d*:\d*", s.rows):
        raise UserError(f"--rows takes FROM:TO, such as 0:2500 or 2500:, not {s.rows}")
    if s.keep < 2:
        raise UserError(f"--keep must be at least 2, not {s.keep}: with one, a damaged file would be the end of the run")
    if s.compile and s.shard:
        raise UserError("--compile makes no sense with --shard, which it was not tried with")
    if s.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the tensorboard package: pip install tensorboard")
    if s.data is None:
        raise UserError("--data is missing: name a .jsonl, .json or .parquet file, a folder of them, or a data set of the Hub")


def located(path: str) -> Path:
    """A path as given, or, where there is nothing, the same path beside train.py: recipes work from any folder."""
    here, there = Path(path), REPOSITORY / path
    return there if not here.exists() and there.exists() else here
