"""The testbeds of the study: their rows, their bases' recipes, their flag files."""
import importlib.util
import json
from pathlib import Path

import pytest

from support.settings import parse

REPOSITORY = Path(__file__).resolve().parent.parent
STUDY = REPOSITORY / "study"
TESTBEDS = ("habits", "same-rows", "new-rows", "free-wording", "no-habit")


@pytest.fixture
def study_data():
    """study/data.py as a module."""
    spec = importlib.util.spec_from_file_location("study_data", STUDY / "data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prompts_of(file: Path) -> set[str]:
    with open(file, encoding="utf-8") as f:
        return {json.dumps(json.loads(line)["prompt"]) for line in f}


def test_the_rows_of_the_study_are_disjoint(tmp_path, monkeypatch, study_data):
    """prepare() writes every file it names (here fewer rows of each); no prompt is in two of them
    or in the embedded files. It writes again only what is missing."""
    fewer = {name: ["--rows", "300", *flags[2:]] for name, flags in study_data.FILES.items()}
    monkeypatch.setattr(study_data, "FILES", fewer)
    study_data.prepare(tmp_path / "rows")
    files = [tmp_path / "rows" / name for name in fewer]
    embedded = [REPOSITORY / "data" / name for name in ("train.jsonl", "heldout.jsonl")]
    prompts = [prompts_of(file) for file in [*files, *embedded]]
    assert [len(found) for found in prompts] == [*[300] * len(files), 5000, 600]
    assert len(set.union(*prompts)) == sum(map(len, prompts))
    once = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    files[3].unlink()
    study_data.prepare(tmp_path / "rows")
    again = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    assert again[:3] == once[:3] and again[3][1] == once[3][1]


def test_prepare_says_why_it_can_not_write(tmp_path, monkeypatch, study_data):
    """A command of make_data.py that fails ends prepare() with its sentence."""
    monkeypatch.setattr(study_data, "FILES", {"a.jsonl": ["--rows", "0"]})
    with pytest.raises(SystemExit, match="--rows must be at least 1"):
        study_data.prepare(tmp_path)


@pytest.mark.parametrize("name", TESTBEDS)
@pytest.mark.parametrize("method", [
    "--loss orpo --rejected ema", "--loss dpo --rejected ema", "--loss dpo --rejected policy",
    "--loss sft --buffer_size 0", "--loss dpo --rejected data --buffer_size 0",
    "--loss orpo --rejected spin --iterations 3 --segment_len 0 --buffer_size 0"])
def test_a_testbed_and_a_method_are_a_run(name, method, monkeypatch, tmp_path):
    """Every testbed's flag file together with a method's flags is a run of train.py, from any
    folder, and rounds of SPIN are whole epochs."""
    monkeypatch.chdir(tmp_path)
    s = parse([f"@{STUDY}/{name}.txt", *method.split(), "--lr", "1e-4"])
    assert s.steps and s.threads == 1 and s.eval_rows == 2000
    start, _, stop = s.rows.partition(":")
    rows = int(stop or 5000) - int(start or 0)
    epoch = -(-rows // s.batch_size)
    assert s.steps % (3 * epoch) == 0


def test_the_bases_are_made_from_what_the_testbeds_do_not_use(study_data):
    """The rows that `habits` trains on are embedded ones, and its base was made from rows that
    leave all embedded ones out; `same-rows` trains on rows that its base was made from,
    `free-wording` and `no-habit` on others."""
    habits, same, new, free, no_habit = (parse([f"@{STUDY}/{name}.txt"]) for name in TESTBEDS)
    made = {name: parse([f"@{REPOSITORY}/recipes/base-{name}.txt"])
            for name in ("habits", "same-rows", "free-wording", "no-habit")}
    assert Path(habits.data).parts[0] == Path(new.data).parts[0] == "data"
    for recipe in made.values():
        assert Path(recipe.data).name in study_data.FILES
    assert same.data == made["same-rows"].data
    assert made["habits"].model == made["free-wording"].model == same.model
    assert made["no-habit"].model == same.model
    assert Path(free.data).name in study_data.FILES and free.data == no_habit.data
    assert free.data not in (made["free-wording"].data, made["no-habit"].data)
    assert new.rows.startswith("2500:")     # recipes/demo-sft.txt, which made its base, has :2500
    assert parse([f"@{REPOSITORY}/recipes/demo-sft.txt"]).rows == ":2500"
