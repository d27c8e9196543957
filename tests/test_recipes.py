"""The recipes: each row of the paper's tables, every setting that matters, the paper's numbers."""
import dataclasses
import re
from pathlib import Path

import pytest

from support.data_formats import read_rows
from support.plan import plan
from support.settings import Settings, located, parse, with_flag_files

HERE = Path(__file__).resolve().parent.parent
RECIPES = {file.stem: file for file in sorted((HERE / "recipes").glob("*.txt"))}
PAGE = HERE / "docs" / "paper-runs.md"

# Recipes of the models and the rows that come with this repository.
EMBEDDED = {"demo", "demo-sft", "new-rows", "base-same-rows", "base-habits", "base-free-wording",
            "base-no-habit"}

LLAMA, MISTRAL = "llama3-8b", "mistral-7b"
DPO = {"loss": "dpo", "optimizer": "rmsprop", "schedule": "linear", "warmup": 0.1, "lr": [5e-7],
       "beta": [0.1]}
ORPO = {"loss": "orpo", "lam": 0.05, "optimizer": "adamw", "schedule": "inverse_sqrt",
        "warmup": 100, "lr": [5e-6]}
SAPO = {"rejected": "ema", "epochs": 4, "segment_len": 256, "buffer_size": 2000, "num_rejected": 1,
        "tail": "keep", "ema_decay": 0.5, "ema_every": 2, "temperature": 0.7, "top_k": 50,
        "top_p": 0.95, "max_grad_norm": 1.0, "drop_long_prompts": False, "batch_size": 64}
SAPO_DPO = SAPO | DPO | {"ref": "ema", "ref_every": 108}
SAPO_ORPO = SAPO | ORPO | {"nll_on": "response"}
AUTHORS = {"buffer_size": 16000, "ema_every": 1, "max_grad_norm": 0, "drop_long_prompts": True}
SPIN = {"rejected": "spin", "iterations": 4, "epochs": 3, "segment_len": 0, "max_new_tokens": 256,
        "lr": [5e-7, 5e-7, 1e-7, 1e-7], "temperature": 1, "top_k": 0, "top_p": 1, "batch_size": 64}
EXPECTED = {
    "sft-llama3-8b": {
        "loss": "sft", "lr": [2e-5], "epochs": 3, "schedule": "cosine", "warmup": 0.1,
        "batch_size": 128, "nll_on": "prompt", "max_grad_norm": 0, "out": "runs/sft-llama3-8b"},
    "table3-on-policy": SAPO_ORPO | {"rejected": "policy", "buffer_size": 0},
    "table3-no-segment": SAPO_ORPO | {"segment_len": 0, "max_new_tokens": 256}}
for model in (LLAMA, MISTRAL):
    EXPECTED |= {
        f"sapo-orpo-{model}": SAPO_ORPO,
        f"sapo-dpo-{model}": SAPO_DPO,
        f"authors-sapo-orpo-{model}": SAPO_ORPO | AUTHORS | {"nll_on": "prompt"},
        f"authors-sapo-dpo-{model}": SAPO_DPO | AUTHORS,
        f"orpo-{model}": ORPO | {"rejected": "data", "batch_size": 32, "nll_on": "prompt",
                                 "epochs": 4 if model == LLAMA else 3},
        f"dpo-{model}": DPO | {"rejected": "data", "batch_size": 64, "epochs": 3, "ref": "fixed"},
        f"spin-orpo-{model}": ORPO | SPIN,
        f"spin-dpo-{model}": DPO | SPIN | {"beta": [0.1, 0.1, 0.1, 5.0]},
        f"table4-fix-ref-{model}": SAPO_DPO | {"ref": "fixed"},
        f"table4-policy-ref-{model}": SAPO_DPO | {"ref": "policy"}}
EXPECTED |= {f"table5-responses-{k}": SAPO_ORPO | {"num_rejected": k} for k in (4, 8)}
EXPECTED |= {f"table5-segment-{n}": SAPO_ORPO | {"segment_len": n} for n in (64, 128)}

# Settings that decide nothing of a result, that only start, name or watch a run, or that say which
# version of something is meant.
NEED_NOT_BE_NAMED = {
    "model_revision", "data_revision", "rows", "eval_data", "skip_bad_rows", "out", "overwrite",
    "trust_remote_code", "random_init", "special_tokens_in_prompts", "steps", "compile",
    "eval_every", "print_every", "tensorboard", "save_pairs", "save_ema", "save_every_epoch",
    "keep", "resume", "max_bad_steps", "threads", "dry_run", "template_date"}
ALWAYS = {
    "model", "data", "chat_template", "max_len", "max_prompt_len", "drop_long_prompts", "loss",
    "epochs", "batch_size", "micro_batch", "lr", "optimizer", "schedule", "warmup", "weight_decay",
    "max_grad_norm", "dtype", "grad_checkpoint", "shard", "seed", "eval_rows", "save_every",
    "plan_config", "plan_rows", "plan_processes"}
WHERE_A_MODEL_WRITES = {
    "segment_len", "num_rejected", "buffer_size", "skip_identical", "temperature", "top_k", "top_p",
    "segment_eos", "tail", "generate_batch"}
# setting -> does the method use it
WHERE_USED = {
    "rejected": lambda s: s.loss != "sft",
    "max_new_tokens": lambda s: s.generates and (not s.segment_len or s.tail == "rewrite"),
    "ema_decay": lambda s: s.generates and s.rejected == "ema",
    "ema_every": lambda s: s.generates and s.rejected == "ema",
    "iterations": lambda s: s.rejected == "spin",
    "lam": lambda s: s.loss == "orpo",
    "nll_on": lambda s: s.loss != "dpo",
    "beta": lambda s: s.loss == "dpo",
    "label_smoothing": lambda s: s.loss == "dpo",
    "ref": lambda s: s.loss == "dpo" and s.rejected != "spin",
    "ref_model": lambda s: s.ref_model is not None,
    "ref_every": lambda s: s.ref in ("policy", "ema")}


def test_every_recipe_is_a_flag_file(tmp_path, monkeypatch):
    """Every recipe parses from any folder; flags after a recipe win. The demo has its rows."""
    monkeypatch.chdir(tmp_path)
    assert set(RECIPES) >= EMBEDDED
    for recipe in RECIPES.values():
        assert parse([f"@{recipe}", "--steps", "7"]).steps == 7
        assert max(map(len, recipe.read_text().splitlines())) <= 100
    demo = parse([])
    assert demo.rejected == "ema" and demo.loss == "orpo" and demo.buffer_size == 512
    assert len(read_rows(demo.data)) >= 4000


def test_there_is_a_recipe_for_every_trained_row():
    """Tables 1 to 5 of the paper, and the four main rows as the authors' code ran them."""
    assert set(EXPECTED) == set(RECIPES) - EMBEDDED


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_recipes_have_the_settings_of_paper_and_code(name):
    """Each recipe has what Section 5.1 and Appendix B say, or the code that its comments name."""
    s = parse([f"@{RECIPES[name]}"])
    vicuna = s.loss == "orpo" and MISTRAL in name
    common = {"max_len": 2048, "max_prompt_len": 1792, "eval_rows": 0, "shard": True, "seed": 42,
              "weight_decay": 0, "plan_rows": 9500 if s.loss == "sft" else 7563,
              "chat_template": "vicuna" if vicuna else "chatml"}
    expected = common | EXPECTED[name]
    assert {key: getattr(s, key) for key in expected} == expected
    assert ("mistral" in s.plan_config) == (MISTRAL in name) and located(s.plan_config).exists()
    assert ("sft" in s.model) == (s.loss == "dpo") and ("capybara" in s.data) == (s.loss != "sft")


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_no_setting_that_matters_comes_from_a_default(name):
    """A recipe names each setting that its method uses, once, and none that it does not use.

    Above every group of flags stands where the values come from.
    """
    s = parse([f"@{RECIPES[name]}"])
    words = with_flag_files([f"@{RECIPES[name]}"])
    flags = [re.sub("^--(no-)?", "", word) for word in words if word.startswith("--")]
    needed = ALWAYS | (WHERE_A_MODEL_WRITES if s.generates else set())
    needed |= {setting for setting, used in WHERE_USED.items() if used(s)}
    assert sorted(flags) == sorted(needed | ({"out"} if "out" in flags else set()))
    source = "Section|Appendix|Table|[Tt]he paper|[Aa]uthors'|own|Ours|guess|Where|Plain|reference"
    source += "|One response|For --dry_run"
    for comment in re.findall(r"\n((?:#.*\n)+)--", RECIPES[name].read_text().partition("\n\n")[2]):
        assert re.search(source, comment), comment


def test_every_setting_is_classified():
    """Each setting belongs to the recipes or not: a new one must be put into one of the sets."""
    sets = [NEED_NOT_BE_NAMED, ALWAYS, WHERE_A_MODEL_WRITES, set(WHERE_USED)]
    assert sum(map(len, sets)) == len(set.union(*sets))
    assert {f.name for f in dataclasses.fields(Settings)} <= set.union(*sets)


def tables():
    """The paper's tables in docs/paper-runs.md: number -> list of rows, as {heading: cell}."""
    found = {}
    for number, text in re.findall(r"\n### Table (\d).*?\n(.*?)(?=\n##|\Z)", PAGE.read_text(),
                                   re.DOTALL):
        lines = [line.strip("|").split("|") for line in text.splitlines() if line[:1] == "|"]
        cells = [[cell.strip() for cell in line] for line in lines]
        found[int(number)] = [list(zip(cells[0], row, strict=True)) for row in cells[2:]]
    return found


def recipe_of(row) -> str | None:
    linked = re.search(r"\(\.\./recipes/(.*)\.txt\)", dict(row)["recipe"])
    return linked and linked[1]


def numbers_of(text: str) -> list[str]:
    text = text.replace("AlpacaEval 2.0", "")
    return re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?!\w)", text)


def test_page_and_recipes_have_the_same_numbers():
    """The numbers in the header of each recipe are those of its row in docs/paper-runs.md.

    Every recipe but the authors' versions, which share a row, is linked from a table.
    """
    linked = set()
    for number, rows in tables().items():
        assert rows
        for row in rows:
            name = recipe_of(row)
            if name is None:
                assert "not trained here" in dict(row)["recipe"]
                continue
            linked.add(name)
            start = [heading for heading, _ in row].index("recipe") + 1
            cells = [numbers_of(cell)[0] for _, cell in row[start:]]
            names = [name, f"authors-{name}"] if f"authors-{name}" in RECIPES else [name]
            for recipe in names:
                header = RECIPES[recipe].read_text().partition("\n\n")[0].replace("\n#", "")
                paper = re.search(rf"Paper, Table {number}: (.*?)\.(?= Paper,| The |\s*$)", header)
                assert paper, f"{recipe} has no numbers of Table {number}"
                assert numbers_of(paper[1]) == cells, (recipe, number)
                assert "which of IFEval's four metrics" in header
    assert {1, 2, 3, 4, 5} == set(tables())
    assert linked == {name for name in EXPECTED if not name.startswith("authors-")}


def test_printed_averages():
    """Table 1's averages are those of its cells, but for the one that the page points out."""
    wrong = {}
    for row in tables()[1]:
        *cells, average = [float(numbers_of(cell)[0]) for _, cell in row[2:]]
        if abs(sum(cells) / len(cells) - average) > 0.006:
            wrong[dict(row)["model"]] = f"{sum(cells) / len(cells):.2f}"
    assert wrong == {"Meta-Llama-3-8B-SFT": "62.12"}
    assert "62.12" in PAGE.read_text() and "62.12" in RECIPES["sft-llama3-8b"].read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_recipe_fits_its_machine(name):
    """The dry run works for every recipe of the paper and finds that it fits 8 GPUs of 80 GB."""
    text = plan(parse([f"@{RECIPES[name]}", "--dry_run"]), 1)
    assert float(re.search(r"peak, at most +([0-9.]+) GiB", text)[1]) < 75
