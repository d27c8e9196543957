"""Small tokenizers of each kind, trained on a few lines, for the tests of tokenizing."""
import json

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

LINES = ["Hello, world (12)!", "def f(x):\n    return x + 3", "<|user|>\nHow are you?\n",
         "<|assistant|>\nI am well. 4 + 5 = 9", "Say it: a b c <s> </s> <unk>", "é ü <im_end>",
         "2 + 2 = 4; two  spaces and more words, many more words."] * 4
ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SPECIAL = ["<unk>", "<s>", "</s>"]
FIRST_SPACE = decoders.Strip(" ", 1, 0)         # the decoder's answer to the dummy prefix


def byte_level(prefix_space: bool = False):
    """As GPT-2's; with a prefix space as RoBERTa's. The end token is no part of its alphabet."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(LINES, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def sentencepiece_bpe(scheme: str, bos: str = "<s>"):
    """As Llama 2's and Mistral's. scheme: Metaspace's, or "legacy" for the older normalizer."""
    special = ["<unk>", bos, "</s>"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), *learned["vocab"]]
    backend = Tokenizer(models.BPE(
        vocab={token: i for i, token in enumerate(tokens)}, unk_token="<unk>", fuse_unk=True,
        merges=[tuple(merge) for merge in learned["merges"]], byte_fallback=True))
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        *([] if scheme == "never" else [FIRST_SPACE])])
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**ENDS, "bos_token": bos})


def unigram():
    """A Unigram model, in which the text "</s>" is the likeliest piece for itself."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.train_from_iterator(LINES, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ENDS)


def word_prefixes():
    """As T5's older files: words are split at spaces first, then each gets its own prefix."""
    tokenizer = unigram()
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ENDS)


def word_pieces():
    """WordPiece behind Metaspace: the rest of a word is written with "##"."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([
        decoders.Replace("##", ""), decoders.Replace("▁", " "), decoders.Fuse(), FIRST_SPACE])
    backend.train_from_iterator(LINES, trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=SPECIAL, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ENDS)


class WrittenInPython(PreTrainedTokenizer):
    """One token per character, with a dummy prefix, and no backend of the tokenizers library."""
    def __init__(self, **kwargs):
        self.characters = sorted(set("".join(LINES)) | {"▁"})
        self.ids = {char: i for i, char in enumerate([*SPECIAL, *self.characters])}
        super().__init__(**{**ENDS, "special_tokens_pattern": "bos", **kwargs})

    @property
    def vocab_size(self):
        return len(self.ids)

    def get_vocab(self):
        return {**self.ids, **self.added_tokens_encoder}

    def _tokenize(self, text):
        return list("▁" + text.replace(" ", "▁"))

    def _convert_token_to_id(self, token):
        return self.ids.get(token, 0)

    def _convert_id_to_token(self, index):
        return [*self.ids][index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens).replace("▁", " ").removeprefix(" ")


MADE = {
    "byte-level BPE": byte_level,
    "byte-level BPE, prefix space": lambda: byte_level(True),
    "SentencePiece BPE, first": lambda: sentencepiece_bpe("first"),
    "SentencePiece BPE, always": lambda: sentencepiece_bpe("always"),
    "SentencePiece BPE, never": lambda: sentencepiece_bpe("never"),
    "SentencePiece BPE, legacy": lambda: sentencepiece_bpe("legacy"),
    "Unigram": unigram,
    "WordPiece": word_pieces,
    "Python": WrittenInPython,
}
