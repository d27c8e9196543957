"""What a run starts from: the model, its tokenizer, the rows, and what the model can do."""
import math
from typing import NamedTuple

from torch import nn

from sapo import Shortcuts, check_generation, find_shortcuts
from support.errors import UserError
from support.models import end_token_ids, load_model, load_reference
from support.plan import micro_batch_for
from support.tokenize_rows import Examples, RowTokenizer, load_data


class Loaded(NamedTuple):
    """reference: the model that DPO's reference starts as, which is `model` without --ref_model.

    steps: optimizer steps of the whole run. shortcuts, reference_shortcuts: of find_shortcuts.
    """
    model: nn.Module
    tokenizer: object
    reference: nn.Module
    examples: Examples
    eval_examples: Examples
    eos_ids: list[int]
    steps: int
    shortcuts: Shortcuts
    reference_shortcuts: Shortcuts


def load(s, world) -> Loaded:
    """Load and check everything that the settings name. Lowers s.micro_batch where logits of every
    position must be computed. All processes together. Raises UserError.
    """
    model, tokenizer = world.run_on_each(lambda: load_model(s, world))
    reference = (world.run_on_each(lambda: load_reference(s, world, model, tokenizer))
                 if s.ref_model else model)
    row_tokenizer = RowTokenizer.from_settings(s, tokenizer, model)
    examples, eval_examples = world.run_on_each(lambda: load_data(s, row_tokenizer, world.say))
    eos_ids = world.run_on_rank0(lambda: end_token_ids(model, tokenizer, row_tokenizer.turn_end))
    epoch_steps = math.ceil(s.epochs * len(examples) / s.batch_size)
    steps = s.steps or epoch_steps * s.iterations           # iterations: SPIN's rounds, else 1
    try:
        shortcuts = reference_shortcuts = world.run_on_rank0(lambda: find_shortcuts(model))
        world.run_on_rank0(lambda: check_generation(model))
    except ValueError as error:
        raise UserError(f"--model {s.model}: {error}") from None
    if s.ref_model:
        reference_shortcuts = world.run_on_rank0(lambda: find_shortcuts(reference))
    s.micro_batch = micro_batch_for(s, model.get_input_embeddings().num_embeddings,
                                    shortcuts.split_head and reference_shortcuts.split_head)
    return Loaded(model, tokenizer, reference, examples, eval_examples, eos_ids, steps,
                  shortcuts, reference_shortcuts)


def make_reference(s, world, loaded: Loaded) -> tuple[nn.Module | None, nn.Module | None]:
    """DPO's reference model, and what scores pairs with it; None where none is needed.

    The model starts as what training starts from, or as --ref_model. SPIN writes y- with it, too.
    """
    reference = reference_scorer = None
    if s.ref or (s.generates and s.rejected == "spin"):
        # A --ref_model is used by nothing else, so it needs no copy.
        reference = world.frozen_copy(loaded.reference, in_place=bool(s.ref_model))
    if s.loss == "dpo":
        reference_scorer = world.scorer(reference, loaded.reference_shortcuts)
    return reference, reference_scorer
