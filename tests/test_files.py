"""Tests of support/files.py: files that are replaced whole. What it refuses to read is tested where
the files are read, in test_checkpoint.py and test_run_folder.py."""
import pytest

from support import files
from support.files import read_json, write_json, write_whole


def test_write_whole(tmp_path, monkeypatch):
    """A file is replaced whole, a link in its place too; where the disk is full the old content
    stays, and nothing is left beside it."""
    path, target = tmp_path / "a.json", tmp_path / "target"
    target.write_text("theirs")
    path.symlink_to(target)
    (tmp_path / "a.json.partial").symlink_to(target)
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1} and target.read_text() == "theirs"

    def fail(file):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(files, "flush", fail)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, [b"new"])
    assert read_json(path) == {"a": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "target"]
