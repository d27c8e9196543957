"""The study as data: each question, the runs that answer it, and what is tuned for each method.

Nothing here runs anything. study/plan.py turns rows into runs, study/run.py runs them, and
study/tables.py prints the tables. To add a run, add a row.

A run's flags are, each over the one before:
    1. study/TESTBED.txt    model, rows, lengths, batch size, steps: what all methods share
    2. Method.flags         what makes it that method
    3. one of Method.tried  the settings that did best on other held-out rows (TUNE)
    4. Row.change           what this row asks about
"""
from typing import NamedTuple

TESTBEDS = ("habits", "same-rows", "new-rows", "free-wording", "no-habit")
# Tables report the held-out rows that the testbed's file names. Tuning runs are judged on others.
REPORT = {"eval_rows": 1000}
TUNE = {"eval_data": "study/data/tune.jsonl", "eval_rows": 1000}
# Testbeds whose wording is free are tuned on rows of free wording.
TUNE_DATA = dict.fromkeys(("free-wording", "no-habit"), "study/data/free-tune.jsonl")
TUNING_SEED = 100
# Flags that measure more and change nothing of what is learned.
WATCHING = ("eval_every", "save_pairs")


class Share(NamedTuple):
    """A value given as a share of the testbed's steps: Share(1 / 4) of 96 steps is 24."""
    of_steps: float


class Method(NamedTuple):
    """title: as in the tables. flags: of train.py. tried: the settings to choose from.

    Every method has six of them.
    """
    title: str
    flags: dict
    tried: list[dict]


class Row(NamedTuple):
    """A line of a table: a method with its tuned settings, and what is changed.

    method: a name of METHODS. With "{loss}" in the name, the loss is the one with which SAPO did
    better in the tuning on the table's testbed.
    tried: settings to choose from once more, with `change` in place.
    cost_of: take as many steps as cost the CPU seconds of this method at the testbed's steps.
    control: title of the row that this one is compared with (none: the table's).
    """
    title: str
    method: str
    change: dict = {}       # noqa: RUF012  (a NamedTuple's default, never written to)
    tried: tuple[dict, ...] = ()
    cost_of: str | None = None
    control: str | None = None


class Table(NamedTuple):
    """A question, on one testbed. control: the row that the others are compared with, per seed.

    watch: flags of WATCHING for all rows. evaluate: how many held-out rows.
    """
    question: str
    testbed: str
    rows: list[Row]
    seeds: range
    control: str | None = None
    watch: dict = {}        # noqa: RUF012
    evaluate: dict = REPORT


# ----------------------------------------------------------------------------------------- methods

# Four learning rates with the one beta or lam, the middle two with the other one as well.
SFT_TRIED = [{"lr": lr} for lr in (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)]
DPO_TRIED = [{"lr": lr, "beta": beta} for lr, beta in (
    (1e-5, 0.5), (3e-5, 0.1), (3e-5, 0.5), (1e-4, 0.1), (1e-4, 0.5), (3e-4, 0.5))]
ORPO_TRIED = [{"lr": lr, "lam": lam} for lr, lam in (
    (1e-5, 0.05), (3e-5, 0.05), (3e-5, 0.5), (1e-4, 0.05), (1e-4, 0.5), (3e-4, 0.05))]

# The paper refreshes DPO's reference every 108 of about 470 steps.
EMA_REF = {"ref": "ema", "ref_every": Share(1 / 4)}
DPO, ORPO = {"loss": "dpo"}, {"loss": "orpo"}
NO_BUFFER = {"buffer_size": 0}
SPIN = {"rejected": "spin", "iterations": 3, "segment_len": 0} | NO_BUFFER
SAPO, ON_POLICY, COLUMN = {"rejected": "ema"}, {"rejected": "policy"}, {"rejected": "data"}
WHOLE = {"segment_len": 0}

METHODS = {
    "sft": Method("SFT", {"loss": "sft"} | NO_BUFFER, SFT_TRIED),
    "dpo": Method("DPO, the data's pairs", DPO | COLUMN | NO_BUFFER, DPO_TRIED),
    "orpo": Method("ORPO, the data's pairs", ORPO | COLUMN | NO_BUFFER, ORPO_TRIED),
    "spin-dpo": Method("SPIN-DPO, 3 rounds", DPO | SPIN, DPO_TRIED),
    "spin-orpo": Method("SPIN-ORPO, 3 rounds", ORPO | SPIN, ORPO_TRIED),
    "sapo-dpo": Method("SAPO-DPO", DPO | SAPO | EMA_REF, DPO_TRIED),
    "sapo-orpo": Method("SAPO-ORPO", ORPO | SAPO, ORPO_TRIED),
    # Parts of SAPO taken away, each tuned by itself. The reference stays the EMA model.
    "ema-only-dpo": Method("EMA model, no buffer", DPO | SAPO | NO_BUFFER | EMA_REF, DPO_TRIED),
    "ema-only-orpo": Method("EMA model, no buffer", ORPO | SAPO | NO_BUFFER, ORPO_TRIED),
    "buffer-only-dpo": Method("policy, buffer", DPO | ON_POLICY | EMA_REF, DPO_TRIED),
    "buffer-only-orpo": Method("policy, buffer", ORPO | ON_POLICY, ORPO_TRIED),
    "on-policy-dpo": Method("policy, no buffer (on-policy)",
                            DPO | ON_POLICY | NO_BUFFER | EMA_REF, DPO_TRIED),
    "on-policy-orpo": Method("policy, no buffer (on-policy)",
                             ORPO | ON_POLICY | NO_BUFFER, ORPO_TRIED),
    "whole-dpo": Method("no segment: the whole response", DPO | SAPO | EMA_REF | WHOLE, DPO_TRIED),
    "whole-orpo": Method("no segment: the whole response", ORPO | SAPO | WHOLE, ORPO_TRIED)}


def as_tuned(*names: str) -> list[Row]:
    """A row per method, with nothing changed."""
    return [Row(METHODS[name.replace("{loss}", "dpo")].title, name) for name in names]


# ------------------------------------------------------------------------------------------ tables

# With a few rows a run may also be short: SFT on few rows gets worse again after some steps.
FEW_ROWS_TRIED = {name: [{"lr": lr} for lr in (1e-5, 3e-5, 1e-4)]
                  for name in ("sft", "sapo-dpo", "sapo-orpo")}
FEW_ROWS_STEPS = [{"steps": Share(1 / 4)}, {"steps": Share(1)}]
FEW_ROWS = (8, 16, 48, 128, 512)

SAME_COST = [Row("SFT, as long as SAPO-DPO takes", "sft", cost_of="sapo-dpo"),
             Row("SFT, as long as SAPO-ORPO takes", "sft", cost_of="sapo-orpo")]
MAIN = [
    *as_tuned("sft", "sapo-dpo", "sapo-orpo"), *SAME_COST,
    *as_tuned("dpo", "orpo", "spin-dpo", "spin-orpo")]
FIVE, THREE = range(5), range(3)
IS_SAPO = as_tuned("sapo-{loss}")[0]._replace(title="SAPO")


def main_table(testbed: str) -> Table:
    return Table(f"How do the methods compare on *{testbed}*?", testbed, MAIN, FIVE, control="SFT")


def worse_table(testbed: str, rows: list[Row]) -> Table:
    return Table(f"Is y- worse on *{testbed}*?", testbed, rows, THREE, watch={"save_pairs": True})


SAPO_PARTS = "EMA model, buffer (SAPO)"


def parts_at_sapos_settings(loss: str) -> list[Row]:
    """SAPO with one part taken away, or two, and nothing tuned again."""
    return [Row(f"{title}, SAPO's settings", f"sapo-{loss}", change) for title, change in (
        ("EMA model, no buffer", NO_BUFFER),
        ("policy, buffer", ON_POLICY),
        ("policy, no buffer", ON_POLICY | NO_BUFFER),
        ("whole response", WHOLE))]


def tails(name: str, *others: str) -> list[Row]:
    """A method with --tail keep and with other values of --tail, and nothing tuned again."""
    title = METHODS[name].title
    return [Row(f"{title}, keep", name),
            *[Row(f"{title}, {tail}", name, {"tail": tail}, control=f"{title}, keep")
              for tail in others]]


NO_HABIT = [*tails("sapo-dpo", "rewrite"), *tails("sapo-orpo", "rewrite")]

# name -> table, in the order in which study/run.py runs them
TABLES = {
    "main-habits": main_table("habits"),
    "few-rows": Table(
        "Do few curated rows favour SAPO?", "habits",
        [Row(f"{METHODS[name].title}, {rows} rows", name, {"rows": f":{rows}"},
             tuple(tried | steps for tried in FEW_ROWS_TRIED[name] for steps in FEW_ROWS_STEPS),
             control=f"SFT, {rows} rows")
         for rows in FEW_ROWS for name in FEW_ROWS_TRIED], THREE),
    "parts": Table(
        "What do the EMA model, the buffer and the segment each do?", "habits",
        [Row(SAPO_PARTS, "sapo-{loss}"),
         *as_tuned("ema-only-{loss}", "buffer-only-{loss}", "on-policy-{loss}", "whole-{loss}"),
         *parts_at_sapos_settings("{loss}")],
        THREE, control=SAPO_PARTS),
    "tail": Table(
        "What does the seam between B' and C cost?", "habits",
        [Row("keep: A B' C (SAPO)", "sapo-{loss}"),
         Row("drop: A B'", "sapo-{loss}", {"tail": "drop"}),
         Row("rewrite: A and all after it rewritten", "sapo-{loss}", {"tail": "rewrite"})],
        THREE, control="keep: A B' C (SAPO)"),
    "worse": Table(
        "Is y- worse, and do pairs get harder?", "habits",
        [*as_tuned("sapo-dpo", "sapo-orpo"),
         *[row._replace(title=f"{row.title}, --skip_identical", change={"skip_identical": True},
                        control=row.title)
           for row in as_tuned("sapo-dpo", "sapo-orpo")]],
        THREE, watch={"save_pairs": True}),
    "main-same-rows": main_table("same-rows"),
    "worse-same-rows": worse_table("same-rows", as_tuned("sapo-dpo", "sapo-orpo")),
    "main-new-rows": main_table("new-rows"),
    "worse-new-rows": worse_table("new-rows", as_tuned("sapo-dpo", "sapo-orpo")),
    "main-free-wording": main_table("free-wording"),
    # A B' that uses other words gets less far with the same number of tokens, or further. Then C
    # repeats something, or leaves something out.
    "tail-free-wording": Table(
        "Is y- worse on *free-wording*, and what does the seam cost there?", "free-wording",
        [*tails("sapo-dpo", "drop", "rewrite"), *tails("sapo-orpo", "drop", "rewrite")], THREE,
        watch={"save_pairs": True}),
    # Before the next table, whose runs these are: SFT, which is in that one, has no pairs to save.
    "worse-no-habit": worse_table("no-habit", NO_HABIT),
    "no-habit": Table(
        "What does SAPO do where many rewrites are as good as the original?", "no-habit",
        [*as_tuned("sft"), *NO_HABIT], THREE, control="SFT"),
    # ORPO's supervised term alone does as well as SAPO-ORPO on *habits*. With DPO pairs are all
    # there is.
    "parts-dpo": Table(
        "What do the parts do where pairs are the only signal?", "habits",
        [Row(SAPO_PARTS, "sapo-dpo"), *parts_at_sapos_settings("dpo")], THREE, control=SAPO_PARTS),
    "tail-dpo": Table(
        "What does the seam cost where pairs are the only signal?", "habits",
        tails("sapo-dpo", "drop", "rewrite"), THREE),
    "reference": Table(
        "Which reference does SAPO-DPO need?", "habits",
        [Row("EMA model, every 1/4 of the run (SAPO-DPO)", "sapo-dpo"),
         Row("EMA model, every 1/16 of the run", "sapo-dpo", {"ref_every": Share(1 / 16)}),
         Row("policy, every 1/4 of the run", "sapo-dpo", {"ref": "policy"}),
         Row("policy, every 1/16 of the run", "sapo-dpo",
             {"ref": "policy", "ref_every": Share(1 / 16)}),
         Row("fixed", "sapo-dpo", {"ref": "fixed"})],
        THREE, control="EMA model, every 1/4 of the run (SAPO-DPO)"),
    "segments": Table(
        "How many rewrites per response, and how long?", "habits",
        [IS_SAPO,
         Row("4 rewrites", "sapo-{loss}", {"num_rejected": 4}),
         Row("8 rewrites", "sapo-{loss}", {"num_rejected": 8}),
         # Responses have about 45 tokens.
         Row("segment of 6 tokens, about 1/8", "sapo-{loss}", {"segment_len": 6}),
         Row("segment of 11 tokens, about 1/4", "sapo-{loss}", {"segment_len": 11}),
         Row("segment of 22 tokens, about 1/2", "sapo-{loss}", {"segment_len": 22}),
         Row("the whole response", "sapo-{loss}", {"segment_len": 0})],
        THREE, control="SAPO"),
    "ema-buffer": Table(
        "EMA decay, EMA interval, size of the buffer?", "habits",
        [Row("SAPO: decay 0.5, every 2 steps, 512 pairs", "sapo-{loss}"),
         *[Row(f"decay {decay}", "sapo-{loss}", {"ema_decay": decay})
           for decay in (0.0, 0.9, 0.99)],
         Row("EMA every step", "sapo-{loss}", {"ema_every": 1}),
         Row("EMA every 8 steps", "sapo-{loss}", {"ema_every": 8}),
         *[Row(f"buffer of {size} pairs", "sapo-{loss}", {"buffer_size": size})
           for size in (128, 2000)],
         # 2.1 epochs of 512 rows: the authors' 16,000 pairs for 7,600 rows.
         Row("buffer of 1075 pairs, 2.1 epochs", "sapo-{loss}", {"buffer_size": 1075})],
        THREE, control="SAPO: decay 0.5, every 2 steps, 512 pairs"),
    "epochs": Table(
        "What do more epochs do?", "habits",
        [Row("SAPO", "sapo-{loss}", {"steps": Share(3)}),
         Row("SPIN, 9 rounds", "spin-{loss}", {"steps": Share(3), "iterations": 9}),
         Row("SFT", "sft", {"steps": Share(3)})],
        THREE, watch={"eval_every": Share(1 / 6)}),
    "cost": Table(
        "What does a given exact match cost?", "habits",
        [IS_SAPO, Row("SPIN", "spin-{loss}"), Row("on-policy", "on-policy-{loss}"),
         Row("SAPO, the whole response", "whole-{loss}"), *as_tuned("sft")],
        THREE, watch={"eval_every": Share(1 / 24)}, evaluate={"eval_rows": 500})}
