"""Fingerprints: has what a run started from changed since?"""
import hashlib
import zlib
from pathlib import Path

from support.errors import UserError

# What transformers reads of a model folder. A README or an optimizer's state beside it may change.
MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer*",
               "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*",
               "merges.txt", "*.model", "*.tiktoken", "*.py", "*.safetensors",
               "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
WHOLE = 2 ** 25         # bytes; a file up to this size is read whole
SAMPLE = 2 ** 20        # bytes read of a larger file's start, and of its end
BLOCKS, BLOCK = 256, 2 ** 14        # between these: so many blocks, evenly spaced, of so many bytes


def fingerprint_model(path: str | Path | None, flag: str = "--model") -> str | None:
    """SHA-256 over the files of a model folder that transformers reads, or None for a hub name.

    Names, sizes and content count; times and other files do not, so a copied folder is the same.
    Files up to 32 MiB (configuration, tokenizer, code, small weights) are hashed whole. Of larger
    ones we hash 6 MiB: the start, the end and 256 blocks between them. Reading 140 GB takes
    minutes at every start; any training changes nearly all of a weight, so blocks that are
    spread evenly meet each tensor of more than 1/256 of a file. A change of a smaller tensor
    alone can be missed.

    A hub name is not followed: what it stands for is fixed by a revision, not by this function.
    flag: named in errors. Raises UserError where a file can't be read.
    """
    if path is None or not Path(path).is_dir():
        return None
    folder = Path(path)
    files = {file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    digest = hashlib.sha256()
    for file in sorted(files):
        try:
            digest.update(f"{file.name}\0{file.stat().st_size}\0{sampled_sha256(file)}\n".encode())
        except OSError as error:
            raise UserError(f"{flag} {path}: {file.name}: {error.strerror}") from None
    return digest.hexdigest()


def fingerprint_examples(examples: list) -> int:
    """A number that changes when any of these tokenized examples does."""
    fields = [(e.prompt, e.chosen, e.rejected, e.check) for e in examples]
    return zlib.crc32(repr(fields).encode())


def sampled_sha256(file: Path) -> str:
    """SHA-256 of a file's content, or of samples of it where it is larger than WHOLE bytes."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        if size <= WHOLE:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        digest = hashlib.sha256(opened.read(SAMPLE))
        for i in range(BLOCKS):
            opened.seek(SAMPLE + i * (size - 2 * SAMPLE) // BLOCKS)
            digest.update(opened.read(BLOCK))
        opened.seek(size - SAMPLE)
        digest.update(opened.read(SAMPLE))
    return digest.hexdigest()


def compare_fingerprints(saved: dict, now: dict) -> None:
    """Raise UserError, naming what changed, unless both fingerprints are the same.

    Both hold a fingerprint, or None, for "data", "eval_data", "model" and "ref_model"
    (runs that began before there was --ref_model have none).
    """
    flags = {"data": "the training rows (--data)", "eval_data": "the held-out rows (--eval_data)",
             "model": "the model folder (--model)",
             "ref_model": "the reference model's folder (--ref_model)"}
    differing = [words for name, words in flags.items() if saved.get(name) != now.get(name)]
    if differing:
        raise UserError(f"--resume: {' and '.join(differing)} changed since the run began; "
                        "put back what was there, or start a new run")
