"""The modules as copies in other projects: they work, and they leave their host as it was."""
import logging
import random
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from buffer import ReplayBuffer
from ema import EMA
from losses import orpo_loss
from sapo import (
    Pair,
    Shortcuts,
    check_generation,
    find_shortcuts,
    generate_segments,
    make_pairs,
    pair_logps,
)
from test_sapo import plain_logps, random_ids, some_pairs, tiny

HERE = Path(__file__).parent.parent
LEAVES = ["losses.py", "buffer.py", "ema.py", "sapo.py"]

# A host's program: iterations of SAPO on a tiny Llama, with the copied modules alone.
PROGRAM = """
import warnings
with warnings.catch_warnings():             # what other libraries warn of on import is theirs
    warnings.simplefilter("ignore")
    import numpy as np, torch
    from transformers import LlamaConfig, LlamaForCausalLM
from PACKAGEbuffer import ReplayBuffer
from PACKAGEema import EMA
from PACKAGElosses import dpo_loss, orpo_loss
from PACKAGEsapo import check_generation, find_shortcuts, make_pairs, pair_logps

torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16):
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4), attn_implementation=attention, dtype=dtype)
        assert model.dtype == dtype and model.config._attn_implementation == attention
        check_generation(model)
        shortcuts, rng = find_shortcuts(model), np.random.default_rng(0)
        assert shortcuts == (True, True)
        ema, buffer = EMA(model), ReplayBuffer(8)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        examples = [(rng.integers(3, 97, 5).tolist(), rng.integers(3, 97, 9).tolist())
                    for _ in range(4)]
        losses = []
        for step in range(3):
            for pair in make_pairs(ema.model, examples, 4, rng, eos_token_id=2):
                buffer.add(pair)
            logps = pair_logps(model, buffer.sample(4), average=True, shortcuts=shortcuts)
            loss = orpo_loss(*logps)[0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            losses.append(loss.item())
        assert losses[2] < losses[0], losses
print("done")
"""


def run_copy(folder: Path, program: str, *flags: str) -> None:
    """Run a program in this folder, in a process that finds nothing of this project elsewhere."""
    (folder / "program.py").write_text(program)
    done = subprocess.run([sys.executable, *flags, "program.py"], cwd=folder, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("package", ["", "copied"])
def test_leaves_work_in_another_project(package, tmp_path):
    """Copied into an empty folder or a package, the modules train a tiny Llama.

    They write segments and take three steps that lower the loss, in fp32 and bf16, with eager and
    sdpa attention. Under python -W error they meet no warning.
    """
    folder = tmp_path / package
    folder.mkdir(exist_ok=True)
    for leaf in LEAVES:
        shutil.copy(HERE / leaf, folder)
    if package:
        (folder / "__init__.py").touch()
    run_copy(tmp_path, PROGRAM.replace("PACKAGE", f"{package}." if package else ""), "-W", "error")


def test_three_modules_can_be_copied_alone(tmp_path):
    """losses.py, buffer.py and ema.py each work from a folder that has none of the others."""
    uses = {"losses": "dpo_loss(*[torch.zeros(1)] * 4)", "buffer": "ReplayBuffer(2).add(1)",
            "ema": "EMA(torch.nn.Linear(1, 1)).update(torch.nn.Linear(1, 1))"}
    program = "import sys, torch\n"
    for leaf, use in uses.items():
        (tmp_path / leaf).mkdir()
        shutil.copy(HERE / f"{leaf}.py", tmp_path / leaf)
        program += f"sys.path[0] = {str(tmp_path / leaf)!r}\nimport {leaf}\n{leaf}.{use}\n"
    run_copy(tmp_path, f"{program}print('done')")


def state_of_the_host(model) -> dict:
    """Everything outside the modules that a copy of them must not change."""
    return {
        "disable": logging.root.manager.disable, "level": logging.root.level,
        "loggers": {name: (logger.level, logger.disabled, logger.propagate)
                    for name, logger in logging.root.manager.loggerDict.items()
                    if isinstance(logger, logging.Logger)},
        "filters": list(warnings.filters), "python": random.getstate(),
        "numpy": str(np.random.get_state()), "torch": torch.get_rng_state().tolist(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": torch.is_grad_enabled(), "dtype": torch.get_default_dtype(),
        "config": model.config.to_dict(), "generation": model.generation_config.to_dict(),
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "attributes": [(sorted(vars(module)), len(module._forward_hooks))
                       for module in model.modules()],
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "weights": [parameter.tolist() for parameter in model.parameters()],
    }


@pytest.mark.parametrize("training", [False, True])
def test_the_host_stays_as_it_was(training, capfd):
    """No module touches logging, warnings, random states, threads, streams or the model.

    So it is for a model in training mode with some modules in eval mode, too. The model's own
    dropout draws numbers while pairs are scored in training mode; nothing else does.
    """
    model = tiny("gemma 3, sliding and full layers", attention_dropout=0.1).train(training)
    model.model.layers[1].eval()
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(0)
    logging.disable(logging.INFO)
    try:
        before = state_of_the_host(model)
        check_generation(model)
        shortcuts = find_shortcuts(model)
        ema, buffer = EMA(model, update_every=1), ReplayBuffer(9)
        for pair in make_pairs(ema.model, [([5, 6], [7, 8, 9, 2])] * 3, 2, rng, eos_token_id=2,
                               generator=generator):
            buffer.add(pair)
        pairs = buffer.sample(2)
        for choice in (None, shortcuts):
            with torch.random.fork_rng(enabled=training):
                logps = pair_logps(model, pairs, average=True, shortcuts=choice)
            orpo_loss(*logps)[0].mean().backward()
        generate_segments(model, [[5, 6], [7]], 4, eos_token_id=2, generator=generator)
        with pytest.raises(ValueError, match="at least one token"):
            generate_segments(model, [[]], 4, eos_token_id=2)
        assert ema.update(model)
        after = state_of_the_host(model)
    finally:
        logging.disable(logging.NOTSET)
    for name in before:
        assert before[name] == after[name], name
    assert capfd.readouterr() == ("", "")


def test_an_error_inside_generation_leaves_the_training_flags():
    """A model that raises in the middle of generating is back in training mode after."""
    model = tiny().train()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        generate_segments(model, [[5]], 3, eos_token_id=2)
    assert all(module.training for module in model.modules())


# ----------------------------------------------------------- a model that is not of transformers

class Attention(nn.Module):
    """One attention layer of a model of one's own, with learned positions and no cache at all."""

    def __init__(self, size: int, layer: int):
        super().__init__()
        self.layer, self.qkv = layer, nn.Linear(size, 3 * size)

    def forward(self, x, mask, cache):
        query, keys, values = self.qkv(x)[:, None].chunk(3, -1)         # (B, 1, T, D) each
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer)
        return x + nn.functional.scaled_dot_product_attention(query, keys, values, mask)[:, 0]


class Body(nn.Module):
    """Embeddings and layers: token ids to hidden states."""

    def __init__(self, vocab: int = 97, size: int = 32):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, size), nn.Embedding(160, size)
        self.layers = nn.ModuleList(Attention(size, layer) for layer in range(2))

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None,
                use_cache=False):
        length = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        if attention_mask is None or attention_mask.ndim == 2:          # padding on the right
            attention_mask = torch.full((length, length), -torch.inf).triu(1)
        x = self.tokens(input_ids) + self.positions(position_ids)
        for layer in self.layers:
            x = layer(x, attention_mask, cache if use_cache else None)
        return types.SimpleNamespace(last_hidden_state=x)


class OwnModel(nn.Module):
    """The adapter: what sapo.py's header asks of a model, on top of a body of one's own."""
    base_model_prefix = "body"

    def __init__(self):
        super().__init__()
        self.body, self.head = Body(), nn.Linear(32, 97, bias=False)
        self.base_model = self.body
        self.config = types.SimpleNamespace(vocab_size=97)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **kwargs):
        hidden = self.body(input_ids, **kwargs).last_hidden_state
        return types.SimpleNamespace(logits=self.head(hidden))


def own_model() -> OwnModel:
    """The model of one's own, with weights large enough that what a token sees matters."""
    torch.manual_seed(0)
    return OwnModel().eval()


def test_a_model_of_ones_own():
    """A model that offers the protocol of sapo.py's header generates, scores, shares prefixes."""
    model = own_model()
    check_generation(model)
    shortcuts = find_shortcuts(model)
    assert shortcuts.share_prefix
    expected = [[x.item() for x in plain_logps(model, pair)] for pair in some_pairs()]
    for choice in (None, shortcuts, Shortcuts(True, True)):
        found = torch.stack(pair_logps(model, some_pairs(), shortcuts=choice)[:2], 1)
        assert torch.allclose(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    rng = np.random.default_rng(0)
    prefixes = [random_ids(rng, n) for n in (1, 12, 7)]
    found = generate_segments(model, prefixes, 6, eos_token_id=None, temperature=0)
    for prefix, [written] in zip(prefixes, found, strict=True):
        logits = model(torch.tensor([[*prefix, *written]])).logits[0, len(prefix) - 1:-1]
        assert logits.argmax(-1).tolist() == written


def test_what_a_model_needs_for_scoring_alone():
    """Plain scoring needs logits and parameters alone: no configuration, no cache, no parts."""
    model = own_model()
    del model.config, model.base_model
    [pair] = some_pairs()[:1]
    found = pair_logps(model, [pair])
    assert torch.allclose(found.chosen_logps[0], plain_logps(model, pair)[0], rtol=1e-5)


@pytest.mark.parametrize("call", [
    lambda model: generate_segments(model, [[5, 6]], 3, eos_token_id=None),
    check_generation, find_shortcuts])
def test_a_model_without_windows_needs_no_configuration(call):
    """The header asks for model.config where layers have a window: others need none."""
    model = own_model()
    del model.config
    call(model)


def test_pairs_survive_a_file_when_ids_are_numpys(tmp_path):
    """Pairs made of numpy arrays hold lists of Python integers: a saved buffer loads again."""
    examples = [(np.array([5, 6]), np.array([7, 8, 9]))]
    [pair] = make_pairs(tiny(), examples, 2, np.random.default_rng(0), eos_token_id=2)
    buffer = ReplayBuffer(2)
    buffer.add(pair)
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    buffer.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True), item=Pair)
    assert buffer.items == [pair]
