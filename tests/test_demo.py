"""The demo, the benches and the answer files: what is run as a program of its own."""
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, command, forked, status_of

BENCH = REPOSITORY / "bench"


def loaded(path: Path):
    """A script that lies in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_demo(tmp_path):
    """The main job, as the README has it: within 10 minutes on a slow machine, the habit is broken,
    and it says what it did, without a warning or a bar of another library."""
    start = time.perf_counter()
    done = command(cwd=tmp_path)
    assert time.perf_counter() - start < 600
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "0001" / "summary.json").read_text())
    before, after = (summary[when]["exact_match"] for when in ("before", "after"))
    assert 0.4 < before < 0.55
    assert after > before + 0.1                     # +0.164 where the recipe was written
    for words in ("exact_match", "  B' ", "saved runs/0001/final"):
        assert words in done.stdout
    assert not re.search("Loading weights|Writing model shards|[Ww]arning", done.stdout)
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    assert all("step" in line and "%|" in line for line in lines), lines


@pytest.mark.slow
@pytest.mark.parametrize("program", [
    "generate.py --batch 2 --new 8 --prefix 24", "iteration.py --total 64 --batch 2"])
def test_benches_run(program):
    """The benches that need no peer installed run, find that both sides compute the same, and print
    their tables."""
    name, *flags = program.split()
    done = subprocess.run([sys.executable, str(BENCH / name), *flags, "--model", "demo", "--rounds",
                           "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ratio" in done.stdout and len(done.stdout.splitlines()) > 5


QUESTION = {"question_id": 81, "category": "writing",
            "turns": ["Put 12 at the end.", "Now sort it."]}


def answers_to(questions: list[dict], bench: str, model: str, folder: Path) -> str:
    """What bench/answers.py writes for these questions."""
    asked, written = folder / f"{bench}.jsonl", folder / "new" / f"{bench}-tiny.json"
    asked.write_text("".join(json.dumps(question) + "\n" for question in questions))
    script = loaded(BENCH / "answers.py")
    arguments = [bench, model, str(asked), "--max_new_tokens", "5", str(written)]
    assert status_of(forked(script.main, arguments)) == 0
    return written.read_text()


def test_answers_for_mt_bench(tiny_run, tmp_path):
    """bench/answers.py writes what FastChat's judge reads: a line per question with the answers to
    both of its turns."""
    other = QUESTION | {"question_id": 82, "category": "math"}
    text = answers_to([QUESTION, other], "mt-bench", tiny_run[1], tmp_path)
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["question_id"] for line in lines] == [81, 82]
    for line in lines:
        choice, = line["choices"]
        assert len(choice["turns"]) == 2 and choice["index"] == 0
        assert line["model_id"] == "mt-bench-tiny" and line["answer_id"]


def test_answers_for_alpaca_eval(tiny_run, tmp_path):
    """bench/answers.py writes what AlpacaEval's judge reads: an output per instruction."""
    question = {"instruction": "Sort 3 1 2.", "dataset": "d"}
    answer, = json.loads(answers_to([question], "alpaca-eval", tiny_run[1], tmp_path))
    assert isinstance(answer.pop("output"), str)
    assert answer == question | {"generator": "alpaca-eval-tiny"}


def test_answers_refuse_what_they_cannot_read(tiny_run, tmp_path):
    """A file without questions, and a folder without a model: one sentence each."""
    script = loaded(BENCH / "answers.py")
    asked = tmp_path / "q.jsonl"
    asked.write_text('{"instruction": "Sort 3 1 2."}\n')
    for bench, model, words in (("mt-bench", tiny_run[1], "`turns`"),
                                ("alpaca-eval", str(tmp_path / "none"), "load a model")):
        with pytest.raises(SystemExit, match=words):
            script.main([bench, model, str(asked), str(tmp_path / "out.json")])
    assert not (tmp_path / "out.json").exists()
