"""Token ids of text that continues other text, and text in which no special token is live.

A tokenizer is made for whole texts. Many put a space before the first word (SentencePiece's dummy
prefix) or write the start of a word otherwise than its rest. A response is no whole text: it stands
behind a prompt whose ids are fixed, because the model has read them when it answers.
"""
import json
import re

from tokenizers import Tokenizer

from support.errors import UserError

# Tried in this order as the text that stands before, until one does not merge with the text.
STAND_INS = ("\n", ".", "a", "1", ")")


class Continuations:
    """Tokenizes text that stands behind other text, for one tokenizer.

    control_tokens: strings, such as "<|im_end|>", that must stay text where data spells them out.
    end_ids: ids that end a response, so that none may stand in one.
    """

    def __init__(self, tokenizer, control_tokens: set[str], end_ids: set[int]):
        self.tokenizer = tokenizer
        # A token of one character can't be split; where it is none that ends a response, let it be.
        tokens = sorted((t for t in control_tokens if len(t) > 1), key=len, reverse=True)
        self.control_pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        ids = {tokenizer.convert_tokens_to_ids(token) for token in tokens}
        self.control_ids = (ids - {tokenizer.unk_token_id, None}) | end_ids
        self.backend = continuing_backend(tokenizer)
        if self.backend and not self._backend_is_right():
            self.backend = None

    def ids(self, text: str, before: str = "", live: bool = False) -> list[int]:
        """Ids of `text` where it follows the text `before`: what decoding both together gives is
        `before` + `text`, if the tokenizer can write the text at all.

        live: special tokens that `text` spells out become those tokens. Otherwise the tokens that
        the tokenizer marks as special do not; `plain_ids` sees to all control tokens.
        """
        if not text:
            return []
        if self.backend:
            self.backend.encode_special_tokens = not live
            return self.backend.encode(text, add_special_tokens=False).ids
        found = self.ids_behind(text, before, live)
        return self.whole_ids(text, live) if found is None else found

    def whole_ids(self, text: str, live: bool = False) -> list[int]:
        """Ids of `text` as the tokenizer writes it where nothing stands before it."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=not live,
                              verbose=False)["input_ids"]

    def ids_behind(self, text: str, before: str = "", live: bool = False) -> list[int] | None:
        """Ids of `text` found by tokenizing it together with the end of `before`, or with a
        stand-in. None where the text merges with each of them."""
        end = re.search(r"\S*\s*$", before[-50:])[0]
        for anchor in (end, *STAND_INS):
            anchor_ids = self.whole_ids(anchor, live) if anchor else []
            ids = self.whole_ids(anchor + text, live) if anchor_ids else []
            if anchor_ids and ids[:len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids):]
        return None

    def plain_ids(self, text: str, where: str, before: str | None = "") -> list[int]:
        """Ids of text in which control tokens, where spelled out, are only text.

        before: the text that stands before (None: nothing, so `text` begins the sequence).
        Raises UserError where the tokenizer can't write the text without such a token.
        """
        def encode(part, before):
            return self.whole_ids(part) if before is None else self.ids(part, before)

        ids = encode(text, before)
        unk = self.tokenizer.unk_token
        if not self.control_ids.intersection(ids) and not (unk and unk in text):
            return ids
        ids = []
        for piece in self.split_spelled(text):
            ids += encode(piece, before)
            before = (before or "") + piece
        live = next((i for i in ids if i in self.control_ids), None)
        if live is not None:
            raise UserError(f"{where}: spells out {self.tokenizer.convert_ids_to_tokens(live)!r}, "
                            "which the tokenizer can't write as plain text")
        return ids

    def spells_control_token(self, text: str) -> bool:
        return self.control_pattern.search(text) is not None

    def split_spelled(self, text: str) -> list[str]:
        """`text` in pieces none of which holds a control token: cut inside each one spelled out."""
        cuts = [at + 1 for at in range(len(text)) if self.control_pattern.match(text, at)]
        return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, None], strict=True)]

    def _backend_is_right(self) -> bool:
        """Does the changed backend give what the tokenizer itself gives behind a stand-in?

        It does not where the start of a word is written otherwise than its rest (WordPiece), or
        where each word gets its own prefix.
        """
        for text in ("Hello, world (12)", " two words", "def f(x):\n    return x", "zq", "3 + 4"):
            expected = self.ids_behind(text)
            self.backend.encode_special_tokens = True
            found = self.backend.encode(text, add_special_tokens=False).ids
            if expected is not None and expected != found:
                return False
        return True


def continuing_backend(tokenizer) -> Tokenizer | None:
    """A copy of a tokenizer's backend that puts nothing before text, or None where there is none.

    "Metaspace", "Prepend" and "add_prefix_space" are the ways in which the tokenizers library
    writes SentencePiece's dummy prefix.
    """
    try:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception:           # written in Python, or with parts that can't be saved
        return None

    def changed(part):
        if isinstance(part, list):
            return [changed(inner) for inner in part]
        if not isinstance(part, dict):
            return part
        part = {name: changed(inner) for name, inner in part.items()}
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
        if "add_prefix_space" in part:
            part["add_prefix_space"] = False
        if part.get("type") == "Prepend":
            return {"type": "Sequence", "normalizers": []}
        if part.get("type") == "Strip" and "strip_left" in part:
            part["strip_left"] = False
        return part

    for name in ("normalizer", "pre_tokenizer"):
        parts[name] = changed(parts[name])
    parts["truncation"] = parts["padding"] = None
    return Tokenizer.from_str(json.dumps(parts))
