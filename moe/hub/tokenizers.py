"""Tokenizers of Hugging Face folders: other people's come in, ours go out.

    tokenizer.json            normalizer, pre-tokenizer, vocabulary and merges, post-processor, decoder
    tokenizer_config.json     the names of the special tokens, the chat template, the class that transformers takes
    special_tokens_map.json, chat_template.jinja, generation_config.json      read where they are there

What comes in gives the ids that transformers 5's `AutoTokenizer` gives. There, tokenizer.json decides, and alone says
what is put before a text (`add_bos_token` does not count beside it); but a few classes keep no more of it than the
vocabulary, the merges and the post-processor, and make the rest anew. So do we (`CLASSES`), and keep the outcome.
"""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from moe.corpus.imported import BYTE_LETTERS, META_SPACE, HubTokenizer, build_core, checked_ids, rust
from moe.hub import folder
from moe.machine.files import write_whole
from moe.tokenizer import END_OF_TEXT, BytePairs, Tokenizer, TokenizerError

Json = dict[str, Any]
FAST = "PreTrainedTokenizerFast"  # the class which takes tokenizer.json as it is
NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_tokenizer(folder: Path) -> HubTokenizer | None:
    """The tokenizer of a Hugging Face folder; None where there is no tokenizer.json. Raises TokenizerError."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    document, model = read_object(path), read_object(folder / "config.json")
    config, special = (read_object(folder / f"{name}.json") for name in ("tokenizer_config", "special_tokens_map"))
    config = special | config if "added_tokens_decoder" in config else config | special
    if (template := folder / "chat_template.jinja").exists():
        config["chat_template"] = read_text(template)
    ends = [source.get("eos_token_id") for source in (model, read_object(folder / "generation_config.json"))]
    listed = chain.from_iterable(ids if isinstance(ids, list) else [ids] for ids in ends if ids is not None)
    try:
        build_core(document)  # from here on, its parts are what they should be
        made_by = CLASSES.get(class_of(document, config, model))
        if made_by and document["model"].get("type", "BPE") == "BPE":
            document, config = document | made_by.remake(document, config), made_by.defaults | config
        tokenizer = HubTokenizer(complete(document, config), config, checked_ids(list(listed)))
        return HubTokenizer.from_json(tokenizer.to_json())
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """The files that `AutoTokenizer.from_pretrained(folder)` opens, with the same ids, no code and no warning.

    context: the longest text in tokens, for those who ask. A HubTokenizer goes out as it came in, save that it names
    another class where its own would make something else of it.
    """
    if isinstance(tokenizer, BytePairs):
        document, config = document_of(tokenizer), config_of(context)
    elif isinstance(tokenizer, HubTokenizer):
        document, config = tokenizer.document, {"model_max_length": context} | tokenizer.config
        config = {name: value for name, value in config.items() if name != "auto_map"}
        made_by = CLASSES.get(str(config.setdefault("tokenizer_class", FAST)).removesuffix("Fast"))
        if made_by and document | made_by.remake(document, config) != document:
            config["tokenizer_class"] = FAST
    for name, content in (("tokenizer", document), ("tokenizer_config", config)):
        write_whole(folder / f"{name}.json", json.dumps(content, indent=1).encode())


# --- what comes in ---------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from None


def read_object(path: Path) -> Json:
    """A file's JSON object; an empty one where there is no file."""
    try:
        return folder.read_object(path) if path.exists() else {}
    except folder.HubError as error:
        raise TokenizerError(str(error)) from None


def llama(document: Json, config: Json) -> Json:
    space = config.get("add_prefix_space") in (None, True)
    scheme = ("always" if config.get("legacy") else "first") if space else "never"
    steps = [{"type": "Replace", "pattern": {"String": META_SPACE}, "content": " "}, {"type": "ByteFallback"}]
    steps += [{"type": "Fuse"}] + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * space
    return {
        "model": document["model"] | {"unk_token": None, "fuse_unk": True, "byte_fallback": True},
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": META_SPACE, "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": steps},
    }


def gpt2(document: Json, config: Json) -> Json:
    before = BYTE_LEVEL | {"add_prefix_space": bool(config.get("add_prefix_space"))}
    model = document["model"] | {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"model": model, "normalizer": None, "pre_tokenizer": before, "decoder": BYTE_LEVEL}


def gpt_neox(document: Json, config: Json) -> Json:
    return gpt2(document, config) | {"normalizer": {"type": "NFC"}, "post_processor": None}


def qwen2(document: Json, config: Json) -> Json:
    parts = gpt2(document, config)
    split = split_at(QWEN2_PATTERN)
    both = {"type": "Sequence", "pretokenizers": [split, parts["pre_tokenizer"] | {"use_regex": False}]}
    return parts | {"normalizer": {"type": "NFC"}, "pre_tokenizer": both}


def split_at(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


class MadeAnew(NamedTuple):
    """A class of transformers that goes by the file's vocabulary and merges only."""

    remake: Callable[[Json, Json], Json]  # from tokenizer.json and tokenizer_config.json: the parts it replaces
    defaults: Json  # of its configuration


END = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
CLASSES = {
    "LlamaTokenizer": MadeAnew(llama, {"bos_token": "<s>", "eos_token": "</s>"}),
    "GPT2Tokenizer": MadeAnew(gpt2, END),
    "GPTNeoXTokenizer": MadeAnew(gpt_neox, END),
    "Qwen2Tokenizer": MadeAnew(qwen2, {"eos_token": END_OF_TEXT}),
}
CLASS_OF = {  # where a folder names none
    "olmoe": "GPTNeoXTokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
}
BY_FILE = ("mixtral",)  # whose folders are known to name a wrong class: the file decides


def class_of(document: Json, config: Json, model: Json) -> str:
    """The class that AutoTokenizer takes (transformers 5.23, models/auto/tokenization_auto.py)."""
    family = str(model.get("model_type"))
    named = config.get("tokenizer_class") or model.get("tokenizer_class") or CLASS_OF.get(family, FAST)
    parts = [document.get(part) for part in ("pre_tokenizer", "post_processor", "decoder")]
    byte_level = '"ByteLevel"' in json.dumps(parts)  # LlamaTokenizer cannot make it, though DeepSeek and Llama 3 say so
    name = str(named).removesuffix("Fast")
    return FAST if family in BY_FILE or (byte_level and name == "LlamaTokenizer") else name


def complete(document: Json, config: Json) -> Json:
    """tokenizer.json with the added tokens that only its configuration knows, and with the special ones marked so."""
    core = build_core(document)
    from tokenizers import AddedToken

    before = repr(core.get_added_tokens_decoder())
    with rust("the added tokens of its tokenizer_config.json"):
        known = {repr(token) for token in core.get_added_tokens_decoder().values()}
        for _, fields in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
            token = AddedToken(**{name: value for name, value in fields.items() if name in FLAGS})
            if repr(token) not in known:
                core.add_tokens([token])
        special = {token.content for token in core.get_added_tokens_decoder().values() if token.special}
        for text in special_texts(config):
            if text not in special and core.token_to_id(text) is not None:
                core.add_special_tokens([text])
        return document if repr(core.get_added_tokens_decoder()) == before else json.loads(core.to_str())


def special_texts(config: Json) -> list[str]:
    """The texts of all special tokens that a configuration names."""
    tokens = [config.get(name) for name in NAMED]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(name) or []
        tokens += more.values() if isinstance(more, dict) else more
    texts = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    return [text for text in texts if isinstance(text, str)]


# --- what goes out ---------------------------------------------------------------------------------------------------


def config_of(context: int) -> Json:
    """Text that spells the end-of-text token stays text."""
    return {
        "tokenizer_class": FAST,
        **{f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "pad")},
        "model_max_length": context,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }


def document_of(tokenizer: BytePairs) -> Json:
    """A tokenizer.json with the same ids, in the form of byte-level BPE.

    Both engines join the neighbours of lowest rank first. tiktoken asks for the joined bytes, however they are split;
    a merge names its two halves, so each token becomes all its splits into two tokens.
    """
    end = {"id": END_OF_TEXT, "type_id": 0}
    special = {"content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    sequences = {name: {"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokenizer.end_of_text} | special | {"special": True}],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split_at(tokenizer.pattern), BYTE_LEVEL | {"use_regex": False}],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": end}, sequences["A"]],
            "pair": [{"SpecialToken": end}, sequences["A"], {"SpecialToken": end | {"type_id": 1}}, sequences["B"]],
            "special_tokens": {
                END_OF_TEXT: {"id": END_OF_TEXT, "ids": [tokenizer.end_of_text], "tokens": [END_OF_TEXT]}
            },
        },
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # like tiktoken: a piece of text that is a token needs no merges
            "vocab": {written(token): rank for rank, token in enumerate(tokenizer.ranks)},
            "merges": merges(tokenizer.ranks),
        },
    }


def merges(ranks: list[bytes]) -> list[list[str]]:
    known = set(ranks)
    splits = ((token[:cut], token[cut:]) for token in ranks for cut in range(1, len(token)))
    return [[written(left), written(right)] for left, right in splits if left in known and right in known]


def written(token: bytes) -> str:
    return "".join(BYTE_LETTERS[byte] for byte in token)
