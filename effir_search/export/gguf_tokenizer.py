"""A tokenizer as GGUF holds it: tokens, merges or scores, special tokens, and a name for the way texts are split.

llama.cpp has an implementation of its own for each kind, so that a file only names one of them. What none of them does
is refused here: the file would load, and give other tokens.

Source: github.com/ggml-org/llama.cpp, src/llama-vocab.cpp, conversion/base.py and conversion/bert.py.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from effir_search.errors import UserError

# Stands for a space in vocabularies of sentencepiece, and in GGUF for the beginning of a word in those of BERT.
SPACE = "\u2581"
# Kinds of tokens, by GGUF's numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# How a text is split before bytes are merged, by the regular expressions that tokenizer.json has.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + OTHERS
QWEN_2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + OTHERS
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names for these steps, and whether a piece that is a token as a whole is taken without merging.
SPLITS = {
    (("ByteLevel", True),): {False: "gpt-2"},
    (("Digits", True), ("ByteLevel", True)): {False: "smollm"},
    (("Split", LLAMA_3), ("ByteLevel", False)): {False: "smaug-bpe", True: "llama-bpe"},
    (("Split", QWEN_2), ("ByteLevel", False)): {False: "qwen2"},
    (("Split", TEKKEN), ("ByteLevel", False)): {True: "tekken"},
}


class Vocabulary(NamedTuple):
    """A tokenizer in GGUF's words.

    Attributes:
        model: "bert" (WordPiece), "gpt2" (merges of bytes) or "llama" (sentencepiece's merges).
        pre: The name of the way texts are split.
        tokens: By their ids, as many as the model has embeddings.
        kinds: The kind of each token, see the numbers above.
        merges: Pairs with a space between, the first to be merged first; None where scores say it.
        scores: The token with the highest is merged first; None where merges say it.
        ids: Special tokens by their names in GGUF (bos, eos, unk, ...).
        flags: Settings that are true or false, by their keys.
        normalises: What the tokenizer does to a text first and llama.cpp does not, in words; "" = nothing.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str] | None
    scores: list[float] | None
    ids: dict[str, int]
    flags: dict[str, bool]
    normalises: str = ""


def vocabulary(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> Vocabulary:
    """Return a tokenizer in GGUF's words; ids without a token get unused ones.

    Args:
        tokenizer: A fast one.
        num_embeddings: Rows of the model's token embeddings.

    Raises:
        ValueError: A step of the tokenizer that llama.cpp does not have, named, or more tokens than embeddings.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    build = _kind(state)
    found = {index: token for token, index in tokenizer.get_vocab().items()}
    if (largest := max(found)) >= num_embeddings:
        raise UserError(f"the tokenizer has an id {largest:,}, and the model {num_embeddings:,} embeddings")
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in state["added_tokens"]}
    tokens = [found.get(index, f"[PAD{index}]") for index in range(num_embeddings)]
    kinds = [added.get(index, NORMAL) if index in found else UNUSED for index in range(num_embeddings)]
    result = build(state, tokens, kinds)
    ids, ends = _special_ids(tokenizer, wordpiece=result.model == "bert")
    result = result._replace(ids=ids, flags=result.flags | ends)
    if len(set(result.tokens)) < len(tokens):
        twice = next(token for index, token in enumerate(result.tokens) if token in result.tokens[:index])
        raise UserError(f"the tokenizer has two tokens that GGUF calls alike: {twice!r}")
    return result


def _kind(state: dict) -> Callable[[dict, list[str], list[int]], Vocabulary]:
    model = state["model"]
    if model["type"] == "WordPiece":
        return _wordpiece
    if model["type"] == "BPE" and not model["dropout"]:
        return _sentencepiece if model["byte_fallback"] else _byte_level
    raise UserError(f"a tokenizer of kind {model['type']} cannot be written; only WordPiece and BPE can")


def _special_ids(tokenizer: PreTrainedTokenizerBase, *, wordpiece: bool) -> tuple[dict[str, int], dict[str, bool]]:
    """Return the ids of special tokens, and whether each text gets one before it and one behind it."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    places = (place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    before = next(places, len(whole))
    start, end = whole[:before], whole[before + len(bare) :]
    if len(start) > 1 or len(end) > 1 or (wordpiece and not (start and end)):
        shown = " ".join([*tokenizer.convert_ids_to_tokens(start), "TEXT", *tokenizer.convert_ids_to_tokens(end)])
        wanted = "exactly one token" if wordpiece else "at most one token"
        raise UserError(f"the tokenizer makes of a text {shown}; llama.cpp puts {wanted} before and behind it")
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    # What llama.cpp puts around a text are the tokens of these names, and "sep" behind one that is split by WordPiece.
    if end and ids["eos"] not in (None, end[0]):
        ids["eot"] = ids["eos"]
    ids |= {"bos": start[0]} if start else {}
    ids |= {"eos": end[0]} if end else {}
    ids |= {"sep": end[0]} if wordpiece else {}
    ids = {name: index for name, index in ids.items() if index is not None}
    return ids, {"add_bos_token": bool(start), "add_eos_token": bool(end)}


def _wordpiece(state: dict, tokens: list[str], kinds: list[int]) -> Vocabulary:
    model, normalizer, pre = state["model"], state["normalizer"], state["pre_tokenizer"]
    if model["continuing_subword_prefix"] != "##" or (pre or {}).get("type") != "BertPreTokenizer":
        raise UserError("its WordPiece tokenizer does not split as BERT's, which is the one that llama.cpp has")
    lower, strip = False, False
    for step in _steps(normalizer, "normalizers"):
        if step["type"] == "BertNormalizer" and step["clean_text"] and step["handle_chinese_chars"]:
            accents = step["strip_accents"]
            lower, strip = lower or step["lowercase"], step["lowercase"] if accents is None else accents
        elif step["type"] == "Lowercase":
            lower = True
        else:
            raise UserError(f"its tokenizer normalises texts in a way that llama.cpp does not have: {step}")
    spelled = [
        token if kind in (CONTROL, UNUSED) else token[2:] if token.startswith("##") else SPACE + token
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    flags = {"normalizer.lowercase": lower, "normalizer.strip_accents": strip}
    return Vocabulary("bert", "default", spelled, kinds, None, None, {}, flags)


def _byte_level(state: dict, tokens: list[str], kinds: list[int]) -> Vocabulary:
    model, normalizer = state["model"], _steps(state["normalizer"], "normalizers")
    steps = tuple(map(_signature, _steps(state["pre_tokenizer"], "pretokenizers")))
    pre = SPLITS.get(steps, {}).get(model["ignore_merges"])
    if pre is None or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise UserError(
            f"its tokenizer splits texts in a way that is not known to be one of llama.cpp's: {str(steps)[:200]}"
        )
    if normalizer and [step["type"] for step in normalizer] != ["NFC"]:
        raise UserError(f"its tokenizer normalises texts, which llama.cpp does not: {normalizer[0]['type']}")
    merges = [" ".join(pair) for pair in model["merges"]]
    if any(merge.count(" ") != 1 for merge in merges):
        raise UserError("its tokenizer merges pieces with spaces in them, which GGUF cannot hold")
    return Vocabulary("gpt2", pre, tokens, kinds, merges, None, {}, {}, "NFC" if normalizer else "")


def _signature(step: dict) -> tuple:
    """Return what matters of a step that splits texts; of one that is not known, all of it."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": uses}:
            return "ByteLevel", uses
        case {"type": "Digits", "individual_digits": individual}:
            return "Digits", individual
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return "Split", regex
    return (json.dumps(step),)


def _sentencepiece(state: dict, tokens: list[str], kinds: list[int]) -> Vocabulary:
    model = state["model"]
    spaces = _space_before(_steps(state["normalizer"], "normalizers"), _steps(state["pre_tokenizer"], "pretokenizers"))
    for index, token in enumerate(tokens):
        if token == model["unk_token"]:
            kinds[index] = UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and kinds[index] == NORMAL:
            kinds[index] = BYTE
    if kinds.count(BYTE) != 256:
        raise UserError(f"its tokenizer has {kinds.count(BYTE)} tokens for single bytes, and llama.cpp needs 256")
    scores = _scores(tokens, kinds, [tuple(pair) for pair in model["merges"]])
    return Vocabulary("llama", "default", tokens, kinds, None, scores, {}, {"add_space_prefix": spaces})


def _space_before(normalizer: list[dict], pre_tokenizer: list[dict]) -> bool:
    """Return whether a tokenizer of sentencepiece's kind puts a space before a text."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if not pre_tokenizer and normalizer in ([replace], [prepend, replace]):
        return normalizer[0] == prepend
    if not normalizer and len(pre_tokenizer) == 1:
        match pre_tokenizer[0]:
            case {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}:
                return scheme != "never"
    raise UserError("its tokenizer of sentencepiece's kind has steps before merging that llama.cpp does not have")


def _scores(tokens: list[str], kinds: list[int], merges: list[tuple[str, str]]) -> list[float]:
    """Return scores by which llama.cpp merges in the order of these merges.

    It merges whatever two pieces make a token, the token with the highest score first. So a token's merges must stand
    together, and none may be missing.
    """
    ranks: dict[str, int] = {}
    for left, right in merges:
        token = left + right
        if token in ranks and next(reversed(ranks)) != token:
            raise UserError(f"its tokenizer's merges are in an order that scores of tokens cannot say: {token!r}")
        ranks.setdefault(token, len(ranks))
    known, given = set(tokens), set(merges)
    for token, kind in zip(tokens, kinds, strict=True):
        pairs = [(token[:place], token[place:]) for place in range(1, len(token))] if kind == NORMAL else []
        if lost := [pair for pair in pairs if known.issuperset(pair) and pair not in given]:
            raise UserError(f"its tokenizer does not merge {lost[0][0]!r} and {lost[0][1]!r}, which llama.cpp would")
    return [-float(ranks.get(token, 0)) for token in tokens]


def _steps(step: dict | None, name: str) -> list[dict]:
    """Return the steps of a part of a tokenizer, one after the other."""
    if step is None:
        return []
    return [one for part in step[name] for one in _steps(part, name)] if step["type"] == "Sequence" else [step]
