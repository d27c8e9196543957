"""README, docs/ and CHANGELOG.md: links resolve, flags exist, commands and the loop run.

Commands are run with small data and few steps, in place of DIR and FILE.jsonl what comes with the
repository. What can't run here stands in NOT_RUN with the reason.
"""
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, forked, status_of
from test_examples import NEEDS

import train
from support import cli
from support.settings import Settings, parse

README = REPOSITORY / "README.md"
PAGES = [README, REPOSITORY / "CHANGELOG.md", *sorted((REPOSITORY / "docs").glob("*.md")),
         REPOSITORY / "examples/README.md"]
NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]

# Pages that are linked to and being written. An entry goes when its page is there.
COMING: set[str] = set()
# Flags of other programs that the pages name.
OTHER_FLAGS = {
    "help", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "shutdown-timeout",
    "model_args", "tasks", "num_fewshot", "apply_chat_template", "gen_kwargs", "include_path",
    "device", "limit", "model-list", "model_outputs", "annotators_config"}

# Beginnings of commands that no test can run, and why.
NOT_RUN = {
    "pip": "needs the package index",
    "lm_eval": "needs lm-evaluation-harness and its data",
    "alpaca_eval": "needs a judge's API",
    "cp mine.jsonl FASTCHAT": "needs FastChat",
    "cd FASTCHAT": "needs FastChat and a judge's API",
}
# What a page writes, and what stands in its place here. The first that fits is taken.
IN_PLACE = {
    "seq 40": "seq 1", "--save_every 200": "--save_every 1", "step-000400": "step-000001",
    "DIR_OR_HUB_NAME": "data/model", "SMOLLM2": "data/model", "GEMMA3": "data/model",
    "runs/mine/final": "data/model", "DIR": "data/model",
    "FILE.jsonl": "rows.jsonl", "pairs.jsonl": "rows.jsonl", "heldout.jsonl": "rows.jsonl",
    "runs/0001 runs/0002": "old/run old/run",
}
# test_examples_print_what_their_headers_show runs these as they stand.
RUN_BY_TEST_EXAMPLES = [[f"examples/{name}.py"] for name in NEEDS]

# What makes commands short: of train.py, and of each program in bench/.
SHORT = ["--steps", "2", "--batch_size", "2", "--micro_batch", "2", "--eval_rows", "2",
         "--max_new_tokens", "4", "--print_every", "0", "--eval_every", "0", "--threads", "1"]
SHORT_BENCHES = {
    "bench/generate.py": "--rounds 1 --threads 1 --batch 2 --new 8 --prefix 24",
    "bench/pairs.py": "--rounds 1 --threads 1 --model 5m --batch 1 --total 32 --ratio 1 "
                      "--large_vocabulary 0 --without_trl",
    "bench/iteration.py": "--rounds 1 --threads 1 --model demo --batch 2 --total 64",
    "bench/answers.py": "--max_new_tokens 4",
    "bench/plot.py": ""}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    """A page without code: neither links nor headings are looked for there."""
    return re.sub(r"`[^`\n]*`", "`code`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page.

        ## Sum, or mean?  ->  sum-or-mean
    """
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.+?) *$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.M | re.S)


# ------------------------------------------------------------------------------- links and numbers

@pytest.mark.parametrize("name", NAMES)
def test_links_and_anchors_resolve(name):
    """Every relative link of a page names a file that is there, and a heading that it has."""
    page = REPOSITORY / name
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(page)))
    broken = []
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if str(target.relative_to(REPOSITORY)) in COMING:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_no_page_is_coming_any_more_that_is_there():
    """A link to a page that was being written is checked as soon as the page is there."""
    assert not COMING & set(NAMES)


def test_anchors_are_githubs():
    """The worked example, and a heading with code and a comma."""
    assert "paper-authors-code-this-code" in anchors(README)
    assert "precision-fp32-and-bf16" in anchors(REPOSITORY / "docs/models.md")


def test_the_readme_is_short_and_leads_everywhere():
    """The README has at most 13,000 bytes and links to every other page."""
    assert len(README.read_bytes()) <= 13_000
    unlinked = [name for name in NAMES[1:] if f"({name})" not in text_of(README).replace("#", ")")]
    assert not unlinked


def test_the_readmes_test_command_is_that_of_ci():
    """The command that the README gives for the tests is a line of .ci/run."""
    command, = [block.strip() for block in blocks(README, "sh") if "pytest" in block]
    assert command in (REPOSITORY / ".ci/run").read_text().splitlines()


def test_the_reading_order_tells_the_lengths():
    """The numbers of lines in the reading order are right to a tenth."""
    rows = re.findall(r"^\| \[`(\w+\.py)`\]\(\1\) \| (\d+) \|", text_of(README), re.M)
    assert [name for name, _ in rows] == [
        "losses.py", "buffer.py", "ema.py", "sapo.py", "train.py", "test_sapo.py"]
    for name, lines in rows:
        length = len((REPOSITORY / name).read_text(encoding="utf-8").splitlines())
        assert abs(int(lines) - length) <= length / 10, f"{name} has {length} lines"


def test_the_flags_table_has_the_defaults_first():
    """In the table of flags, the first value of every flag is its default."""
    s = parse(["--model", "m", "--data", "d"])
    s.ref = parse(["--model", "m", "--data", "d", "--loss", "dpo"]).ref
    section = text_of(README).split("## One loop, all the methods")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `--")]
    assert len(rows) == 10
    for flags, values in rows:
        names = re.findall(r"--(\w+)", flags)
        # Several flags: one value for each, between ";" or ",". One flag: what comes first.
        shown = re.split(r"[;,]", values) if len(names) > 1 else [re.split(r"[;, ]", values[1:])[0]]
        if names == ["ref", "ref_every"]:
            shown = [shown[0], shown[-1]]
        for name, value in zip(names, shown, strict=len(names) > 2):
            default = {False: "off"}.get(getattr(s, name), getattr(s, name))
            if name != "steps":
                assert value.strip(" `") in (str(default), f"{default:g}"
                                             if isinstance(default, float) else None), name


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_that_is_named_exists(name):
    """Every --flag on a page is a flag of train.py, of a program in bench/, data/, study/ or
    examples/, or of a known tool."""
    own = {f.name for f in fields(Settings)}
    own |= {f"no-{f.name}" for f in fields(Settings) if f.type is bool}
    for program in [path for folder in ("bench", "data", "study")
                    for path in (REPOSITORY / folder).glob("*.py")]:
        own |= set(re.findall(r'add_argument\("--(\w+)"', program.read_text(encoding="utf-8")))
    sgpo = (REPOSITORY / "examples/sgpo.py").read_text(encoding="utf-8")
    own |= set(re.findall(r'"(\w+)": ', sgpo))              # its table of flags and defaults
    named = set(re.findall(r"(?<![\w|-])--([a-zA-Z][\w-]*)", text_of(REPOSITORY / name)))
    assert named <= own | OTHER_FLAGS


# ----------------------------------------------------------------------------- the loop, the tests

def test_the_readmes_loop_runs(monkeypatch):
    """The method on one screen, as it is printed, trains the model that comes with it."""
    block, = blocks(README, "python")
    monkeypatch.chdir(REPOSITORY)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert torch.isfinite(names["losses"]).all()
    assert len(names["buffer"]) == 20 * 16 and names["ema"].steps == 20
    start = type(names["policy"]).from_pretrained("data/model").state_dict()
    for model in (names["policy"], names["ema"].model):
        assert any(not torch.equal(value, start[name])
                   for name, value in model.state_dict().items())


@pytest.mark.slow
def test_every_test_command_selects_tests():
    """Every pytest command on a page selects at least one test."""
    selections = {line.strip().split(" #")[0].removeprefix("python -m pytest -q").strip()
                  for page in PAGES for line in re.findall(r"python -m pytest -q[^`\n]*",
                                                           text_of(page))}
    assert len(selections) > 5
    program = """
import contextlib, io, shlex, sys
import pytest
for selection in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()):
        status = pytest.main(["--collect-only", "-q", *shlex.split(selection)])
    if status:
        print(selection)
"""
    done = subprocess.run([sys.executable, "-c", program, *sorted(selections)], cwd=REPOSITORY,
                          capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-1000:]


# ---------------------------------------------------------------------------------------- commands

SHELL_BLOCKS = [pytest.param(page, block, id=f"{page.parent.name} {page.stem} {i}",
                             marks=[pytest.mark.slow] if re.search("(bench|examples)/", block)
                             else [])
                for page in PAGES for i, block in enumerate(blocks(page, "sh"))]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder to run commands in, as in a checkout, with rows, questions and an old run."""
    modules = ("losses.py", "buffer.py", "ema.py", "sapo.py")
    for name in ("data", "recipes", "bench", "examples", *modules):     # no command writes to them
        (tmp_path / name).symlink_to(REPOSITORY / name)
    lines = (REPOSITORY / "data/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name in ("rows.jsonl", "mine.jsonl"):
        (tmp_path / name).write_text("".join(lines[:8]), encoding="utf-8")
    (tmp_path / "question.jsonl").write_text(
        '{"question_id": 1, "category": "math", "turns": ["Add 1 and 2.", "Now add 3."]}\n')
    (tmp_path / "alpaca_eval.json").write_text('[{"instruction": "Add 1 and 2."}]\n')
    (tmp_path / "old/run").mkdir(parents=True)
    (tmp_path / "old/run/metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "margin": 0.1}\n')
    return tmp_path


def words_of(block: str, folder: Path) -> list[list[str]]:
    """The programs that a block of shell commands starts, with their arguments.

    bash runs the block, so variables, loops and files written by the block are its own. Each
    program is a script that writes down its arguments.
    """
    bin, log = folder / "bin", folder / "programs"
    bin.mkdir()
    log.touch()
    for name in ("python", "torchrun", "pip", "lm_eval", "alpaca_eval"):
        (bin / name).write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@" >> "{log}"\n'
                                f'echo >> "{log}"\n')
        (bin / name).chmod(0o755)
    subprocess.run(["bash", "-e", "-c", block], cwd=folder, check=True, timeout=60,
                   env={**os.environ, "PATH": f"{bin}:{os.environ['PATH']}"})
    return [line.split("\0")[:-1] for line in log.read_text().splitlines()]


def run_words(words: list[str], folder: Path) -> int:
    """Run one program in `folder`; its exit status. Without what no test can run: 0."""
    arguments = words[1:]
    have_their_own_test = (arguments[:2] == ["-m", "pytest"]
                           or arguments in RUN_BY_TEST_EXAMPLES)
    if shlex.join(words).startswith(tuple(NOT_RUN)) or have_their_own_test:
        return 0
    script = next(i for i, word in enumerate(arguments) if word.endswith(".py"))
    arguments = arguments[script:]
    if arguments[0] != "train.py":          # a program of bench/ or examples/
        short = SHORT_BENCHES.get(arguments[0], "").split()
        return subprocess.run([sys.executable, *arguments, *short], cwd=folder,
                              timeout=300).returncode
    flags = arguments[1:]
    if any(flag.startswith("@recipes/") and "demo" not in flag for flag in flags):
        flags.append("--dry_run")           # needs GPUs and the Hub otherwise
    elif "--resume" not in flags:           # a resumed run has its own settings
        flags += SHORT

    def in_folder():
        os.chdir(folder)
        sys.exit(cli.main(train.train, flags))
    return status_of(forked(in_folder))


def test_line_counts_of_the_reading_order():
    """The table "Read it in this order" gives the length of each file as it is."""
    rows = re.findall(r"^\| \[`(\w+\.py)`\]\(\1\) \| (\d+) \|", README.read_text("utf-8"), re.M)
    assert len(rows) == 6
    assert {name: len((REPOSITORY / name).read_text("utf-8").splitlines()) for name, _ in rows} == {
        name: int(lines) for name, lines in rows}


@pytest.mark.parametrize("page, block", SHELL_BLOCKS)
def test_commands_run(page, block, checkout):
    """Every command of a page ends with status 0, on small data and for a few steps.

    torchrun's commands run as one process, the paper's recipes as a dry run, the benches on small
    shapes.
    """
    kept = [line for line in block.splitlines()
            if not line.startswith(("cp mine.jsonl FASTCHAT", "cd FASTCHAT"))]
    text = re.sub("|".join(map(re.escape, IN_PLACE)), lambda found: IN_PLACE[found[0]],
                  "\n".join(kept))
    for words in words_of(text, checkout):
        if words[1:2] == ["bench/plot.py"]:
            pytest.importorskip("matplotlib")
        assert run_words(words, checkout) == 0, shlex.join(words)


def test_what_is_not_run_is_on_a_page():
    """Each entry of the list of commands that no test can run stands on a page."""
    everything = "\n".join(block for page in PAGES for block in blocks(page, "sh"))
    assert all(re.search(rf"(^|\| ){re.escape(name)}", everything, re.M) for name in NOT_RUN)
