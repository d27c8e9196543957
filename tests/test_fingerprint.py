"""Tests of support/fingerprint.py: what tells that a run's data or model changed."""
import os

import pytest

from support import fingerprint
from support.errors import UserError
from support.fingerprint import compare_fingerprints, fingerprint_model


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text(name)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 400)
    return folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json",
                                  "chat_template.jinja", "model.safetensors", "modeling.py"])
def test_fingerprint_sees_what_is_loaded(name, model):
    """Any change of a file that loading reads changes the fingerprint, also one that keeps size
    and time; so does another name."""
    before = fingerprint_model(model)
    path = model / name
    content = path.read_bytes() if path.exists() else b""
    path.write_bytes(content[:-1] + b"?")
    assert fingerprint_model(str(model)) != before
    path.rename(model / f"other-{name}")
    assert fingerprint_model(model) != before


def test_fingerprint_leaves_out_the_rest(model, tmp_path):
    """A README, an optimizer's state, times and the folder's own name do not count; nor do links
    to the files, which is how the hub's cache keeps them."""
    before = fingerprint_model(model)
    for name in ("README.md", "optimizer.pt", "trainer_state.json"):
        (model / name).write_text("new")
    os.utime(model / "config.json", (0, 0))
    assert fingerprint_model(model) == before
    (tmp_path / "cache").mkdir()
    for file in model.iterdir():
        (tmp_path / "cache" / file.name).symlink_to(file)
    assert fingerprint_model(tmp_path / "cache") == before
    assert fingerprint_model("hub/name") is None and fingerprint_model(None) is None


def test_fingerprint_of_large_files(model, monkeypatch):
    """Of a large file samples are read: a change at its start, at its end, or of a stretch of
    1/256 of it is seen, wherever that lies, and much less than the file is read."""
    monkeypatch.setattr(fingerprint, "WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "SAMPLE", 100)
    monkeypatch.setattr(fingerprint, "BLOCK", 8)
    path = model / "model.safetensors"
    content = path.read_bytes()
    assert len(content) > 100_000
    before = fingerprint_model(model)
    stretch = len(content) // fingerprint.BLOCKS
    for start in (0, 99, len(content) - 100, len(content) - 1, 12_345, 50_000, 77_777):
        changed = bytearray(content)
        length = 1 if not 100 <= start < len(content) - 100 else stretch
        changed[start:start + length] = bytes(255 - b for b in content[start:start + length])
        path.write_bytes(changed)
        assert fingerprint_model(model) != before, start
    path.write_bytes(content + b"\0")
    assert fingerprint_model(model) != before


@pytest.mark.parametrize("changed, words", [
    (["data"], "the training rows .--data. changed"),
    (["eval_data"], "the held-out rows .--eval_data. changed"),
    (["model"], "the model folder .--model. changed"),
    (["data", "model"], "the training rows .--data. and the model folder .--model. changed")])
def test_what_changed_is_named(changed, words):
    """compare_fingerprints says nothing of what is the same and names what is not."""
    saved = {"data": "a", "eval_data": None, "model": "b"}
    compare_fingerprints(saved, dict(saved))
    with pytest.raises(UserError, match=f"--resume: {words} since the run began"):
        compare_fingerprints(saved, saved | {name: "other" for name in changed})
    with pytest.raises(UserError, match=words):
        compare_fingerprints({}, {name: "other" for name in changed})
