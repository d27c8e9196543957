"""Files: writing that leaves the old content or the new one, and reading that trusts no file."""
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

LARGEST_JSON = 2 ** 20      # bytes; a manifest of 8,000 processes and any settings.json are smaller


def write_json(path: Path, content: dict) -> None:
    """Replace a file by `content` as JSON. Raises OSError; the file is then as it was before."""
    write_whole(path, [(json.dumps(content, indent=2) + "\n").encode()])


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Replace a file so that a crash at any moment leaves the old content or the new content.

    parts: the new content, in pieces. On return it is on the disk. Raises OSError; the file is then
    as it was before.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)         # never write through a link of that name
        with open(partial, "xb") as file:
            file.writelines(parts)
            flush(file)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush(file) -> None:
    """Return once what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Return once the names in a folder (files made, renamed, removed) are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Return once all files of a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    flush_folder(folder)


def open_regular(path: Path):
    """Open a file for reading, in binary. Raises ValueError for a link, a device, a pipe or a
    folder, which could lead elsewhere or never end, and OSError where the file can't be opened."""
    if path.is_symlink():
        raise ValueError("is a symbolic link")
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("is not a regular file")
    return open(descriptor, "rb")


def read_json(path: Path, largest: int = LARGEST_JSON) -> dict:
    """A JSON object from a file. Raises ValueError with the reason where the file is not regular,
    is larger than `largest` bytes or holds no JSON object, and OSError where it can't be read."""
    with open_regular(path) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"is larger than {largest} bytes")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):        # RecursionError: thousands of nested brackets
        raise ValueError("is not JSON") from None
    if not isinstance(found, dict):
        raise ValueError("holds no JSON object")
    return found


def sha256(path: Path) -> str:
    """SHA-256 of a regular file, as 64 hexadecimal digits. Raises as open_regular does."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_tree(path: Path) -> None:
    """Remove a file or a folder, where there is one; of a symbolic link the link alone.

    Raises OSError where something could not be removed.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)         # follows no link inside
