"""Other people's tokenizers give the ids that transformers gives, and ours give their own ids there."""

import json
import logging
import pickle
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Core
from transformers import AutoTokenizer

import moe
from moe.checkpoint import Run
from moe.config import DataConfig, RunConfig, SampleConfig
from moe.corpus import prepare
from moe.corpus.bpe import train_bpe
from moe.corpus.imported import HubTokenizer
from moe.hub.tokenizers import read_tokenizer, write_tokenizer
from moe.lab.score import prices_of
from moe.sampling import prompt_tokens, sample
from moe.tokenizer import END_OF_TEXT, GPT2_PATTERN, SINGLE_BYTES, BytePairs, Tokenizer, TokenizerError, bytes_tokenizer

TEXT = "the cat sat on the mat, the rat sat on the hat.\nThe end is 1234567, ça va? 日本語日本語 it's IT'S\n\n" * 3
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
NAMES = {"bos_token": BOS, "eos_token": EOS}
TEXTS = [TEXT, "", "x", " ", "  two  ", "\n", " Hello  e\u0301 12345 world\n\n café", "▁ ▁▁x <0x41>", "🙂\u00a0\u3000"]


def after_bos(core, *steps):
    template = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))])
    core.post_processor = processors.Sequence([*steps, template]) if steps else template
    return core


def byte_level(normalizer=None, split=None, specials=(BOS, EOS, PAD)):
    """In the manner of GPT-NeoX; with a split, of Llama 3, Qwen and DeepSeek."""
    core = Core(models.BPE())
    core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(split), "isolated"), core.pre_tokenizer]
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=[*specials], initial_alphabet=alphabet)
    )
    core.add_tokens(["  ", "café"])  # not special: found in any text
    core.decoder = decoders.ByteLevel()
    return core


def sentence_piece(metaspace=False):
    """In the manner of Llama 2 and Mixtral: spaces as ▁, one before the text, bytes for what has no token."""
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_and_specials = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(
        [TEXT.replace("日", "").replace("ç", "")],
        trainers.BpeTrainer(vocab_size=310, special_tokens=bytes_and_specials),
    )
    document = json.loads(core.to_str())
    document["added_tokens"] = document["added_tokens"][:3]
    document["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    core = Core.from_str(json.dumps(document))
    core.normalizer = (
        None if metaspace else normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False) if metaspace else None
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return after_bos(core)


LLAMA3 = after_bos(byte_level(split=r"\p{N}{1,3}|[^\p{N}]+"), processors.ByteLevel(trim_offsets=False))
CORES = {
    "llama 3": (LLAMA3, "PreTrainedTokenizerFast", "llama"),
    "deepseek": (after_bos(byte_level(split=r"\p{N}{1,3}")), "LlamaTokenizerFast", "deepseek_v3"),
    "qwen": (byte_level(normalizers.NFC(), specials=[END_OF_TEXT, EOS, BOS]), "Qwen2Tokenizer", "qwen2_moe"),
    "olmoe": (after_bos(byte_level(normalizers.NFC())), "GPTNeoXTokenizerFast", "olmoe"),
    "gpt 2": (byte_level(), "GPT2Tokenizer", "gpt2"),
    "mixtral": (sentence_piece(), "LlamaTokenizer", "mixtral"),
    "llama 2": (sentence_piece(), "LlamaTokenizerFast", "llama"),
    "metaspace": (sentence_piece(metaspace=True), "LlamaTokenizer", None),
    "no class": (byte_level(), None, None),
}


def make_folder(folder, core, names=NAMES, **files):
    folder.mkdir(exist_ok=True)
    files = {"tokenizer": json.loads(core.to_str()), "tokenizer_config": names} | files
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def family_folder(folder, name):
    core, kind, family = CORES[name]
    config = NAMES | ({"tokenizer_class": kind} if kind else {}) | {"add_bos_token": True}
    return make_folder(folder, core, config, **({"config": {"model_type": family}} if family else {}))


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {name: read_tokenizer(family_folder(folder / name, name)) for name in CORES}


@pytest.fixture
def warnings_of_transformers(caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog.records
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("name", CORES)
def test_a_prompt_is_what_transformers_makes_of_it_before_and_after_a_round_trip(name, tmp_path):
    theirs = AutoTokenizer.from_pretrained(family_folder(tmp_path / "in", name))
    tokenizer = read_tokenizer(tmp_path / "in")
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out", context=64)
    (tmp_path / "out/config.json").write_text('{"model_type": "deepseek_v3"}')
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert tokenizer.prompt(text.encode()) == (ids or [tokenizer.start])
        assert again(text).input_ids == ids
    assert read_tokenizer(tmp_path / "out").hash == tokenizer.hash


@pytest.mark.parametrize("name", ["llama 3", "mixtral", "llama 2", "metaspace"])
@settings(max_examples=100, deadline=None)
@given(data=st.one_of(st.binary(max_size=40), st.text(max_size=30).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_bytes_come_back(read, name, data):
    if name in ("llama 2", "metaspace"):  # they take the text's own first space for the one they put there
        data = data.lstrip(b" ")
    ids = read[name].encode_bytes(data).tolist()
    assert read[name].decode_bytes(ids) == data


def test_bytes_without_a_token_become_replacement_characters():
    core = Core(models.BPE(vocab={"a": 0, "\ufffd": 1, EOS: 2}, merges=[]))
    core.add_special_tokens([EOS])
    tokenizer = HubTokenizer(json.loads(core.to_str()), NAMES)
    assert tokenizer.encode_bytes(b"a\xffa").tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", CORES)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_streamed_pieces_are_the_decoded_text(read, name, data):
    tokenizer = read[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=20))
    continuing = data.draw(st.booleans())
    stream = tokenizer.stream(continuing)
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids, continuing)


@pytest.mark.parametrize("name", ["llama 3", "mixtral"])
def test_a_character_of_several_tokens_appears_once_and_whole(read, name):
    stream = read[name].stream()
    pieces = [stream.push(token) for token in read[name].encode("🙂").tolist()]
    assert len(pieces) > 1
    assert [piece for piece in pieces if piece] == ["🙂"]


@pytest.mark.parametrize("name", CORES)
def test_text_that_spells_a_special_token_stays_text(read, name):
    tokenizer = read[name]
    ids = tokenizer.encode(f"a{EOS}{BOS}b").tolist()
    assert not {tokenizer.end_of_text, tokenizer.start} & set(ids)
    assert tokenizer.decode(ids) == f"a{EOS}{BOS}b"
    assert tokenizer.decode([tokenizer.start, *ids, tokenizer.end_of_text, 10**6, -1]) == f"a{EOS}{BOS}b"


def test_what_goes_on_from_a_prompt_keeps_its_first_space(read):
    tokenizer = read["mixtral"]
    ids = tokenizer.encode("the cat").tolist()
    assert tokenizer.decode(ids) == "the cat"
    assert tokenizer.decode(ids, continuing=True) == " the cat"


def test_documents_are_each_encoded_by_itself_with_an_end_of_text_between_them(read):
    tokenizer, texts = read["llama 3"], ["the cat", "", "日本", EOS]
    expected = [token for text in texts for token in (tokenizer.end_of_text, *tokenizer.encode(text).tolist())]
    assert tokenizer.encode_documents(texts).tolist() == expected[1:]
    assert tokenizer.encode_documents([]).tolist() == []


def test_start_and_stops_come_from_the_folder(tmp_path):
    ends = {"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": [1, 7]}}
    tokenizer = read_tokenizer(make_folder(tmp_path / "a", LLAMA3, NAMES, **ends))
    bos, eos = LLAMA3.token_to_id(BOS), LLAMA3.token_to_id(EOS)
    assert (tokenizer.start, tokenizer.end_of_text, tokenizer.stops) == (bos, eos, {1, 7, eos})
    assert tokenizer.prompt(b"") == [bos]
    without = read_tokenizer(make_folder(tmp_path / "b", byte_level()))  # puts nothing before a text
    assert (without.start, without.prompt(b""), without.stops) == (eos, [eos], {eos})
    assert without.vocab_size == byte_level().get_vocab_size()


def test_special_tokens_may_be_objects_in_a_map_of_their_own(tmp_path):
    names = {name: {"content": content, "lstrip": False} for name, content in NAMES.items()}
    folder = make_folder(tmp_path, LLAMA3, {}, special_tokens_map=names)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = read_tokenizer(folder)
    assert tokenizer.end_of_text == LLAMA3.token_to_id(EOS)
    assert tokenizer.config["chat_template"] == "{{ messages }}"


def test_a_special_token_that_only_the_configuration_knows_is_special(tmp_path):
    document = json.loads(LLAMA3.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] != PAD]
    listed = {str(len(document["model"]["vocab"]) + 2): {"content": "<more>", "special": True}}
    config = NAMES | {"pad_token": PAD, "added_tokens_decoder": listed}
    tokenizer = read_tokenizer(make_folder(tmp_path, Core.from_str(json.dumps(document)), config))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode([LLAMA3.token_to_id(PAD), *map(int, listed)]) == ""
    assert tokenizer.vocab_size == len(theirs)


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert read_tokenizer(tmp_path) is None


def test_a_runs_file_and_a_worker_process_get_the_same_tokenizer(read, tmp_path):
    for tokenizer in read.values():
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.to_json()))
        for copy in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
            assert copy == tokenizer
            assert copy.hash == tokenizer.hash
            assert copy.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


def damaged(**changes):
    return lambda document, config: (document | changes, config)


@pytest.mark.parametrize(
    "damage",
    [
        damaged(model=None),
        damaged(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
        damaged(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "\n"]]}),
        damaged(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        damaged(added_tokens=7),
        damaged(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
        damaged(normalizer="\ud800"),
        damaged(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]),
        lambda document, config: (document, {}),
        lambda document, config: (document, {"eos_token": "unheard of"}),
        lambda document, config: (document, {"eos_token": "\ud800"}),
        lambda document, config: (document, config | {"added_tokens_decoder": [1]}),
        lambda document, config: (document, config | {"added_tokens_decoder": {"x": {"content": 5}}}),
        lambda document, config: (document, config | {"additional_special_tokens": 5}),
        lambda document, config: ([document], config),
        lambda document, config: (document, [config]),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, damage):
    document, config = damage(json.loads(LLAMA3.to_str()), NAMES)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match=r"tokenizer.*\.json") as error:
        read_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_panic_inside_the_library_is_an_error_in_one_line(tmp_path, monkeypatch):
    panic = type("PanicException", (BaseException,), {})
    monkeypatch.setattr("tokenizers.Tokenizer", type("Broken", (), {"from_str": lambda _: _raise(panic("a\nb"))}))
    with pytest.raises(TokenizerError, match=r"PanicException: a$"):
        read_tokenizer(make_folder(tmp_path, LLAMA3))


def _raise(error):
    raise error


@pytest.mark.parametrize(
    "damage", [{"hash": "0"}, {"tokenizer": 5}, {"config": 5}, {"stops": 5}, {"stops": [True]}, {"stops": [-1]}]
)
def test_a_damaged_file_of_a_run_is_refused_by_name(read, tmp_path, damage):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(read["llama 3"].to_json() | damage))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match="pip install tokenizers"):
        read_tokenizer(make_folder(tmp_path, LLAMA3))


OURS = {
    "bpe": train_bpe([TEXT], 290),
    "bytes": bytes_tokenizer(),
    "gpt 2's pattern": BytePairs(train_bpe([TEXT.replace("sat", "'s sat")], 300).ranks, GPT2_PATTERN),
    "ranks that no training made": BytePairs(
        [*SINGLE_BYTES, b"aba", b"ab", b"ba", b"aa", b" a", b"baab"], GPT2_PATTERN
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp("ours") for name in OURS}
    for name, folder in folders.items():
        write_tokenizer(OURS[name], folder, context=64)
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


LETTERS = st.sampled_from(
    [*"ab \n\r\t1'sS.é日", "the ", "\u0085", "\u180e", "\u2028", "\u3000", "e\u0301", END_OF_TEXT]
)


@pytest.mark.parametrize("name", OURS)
@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(max_size=40), st.lists(LETTERS, max_size=60).map("".join), st.text("ab", max_size=60)))
def test_our_ids_are_the_same_in_transformers(written, name, text):
    assert written[name](text).input_ids == OURS[name].prompt(text.encode())


@pytest.mark.parametrize("surroundings", ["{}", "a{}b", " {} ", "1{}\n"])
def test_every_character_has_the_same_ids_in_transformers(written, surroundings):
    characters = [chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000]
    text = "\0".join(surroundings.format(character) for character in characters)
    assert written["bpe"](text).input_ids == OURS["bpe"].prompt(text.encode())


def test_what_we_write_opens_without_a_warning_and_knows_its_tokens(written, tmp_path, warnings_of_transformers):
    write_tokenizer(OURS["bpe"], tmp_path, context=64)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), OURS["bpe"]
    assert warnings_of_transformers == []
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.end_of_text,) * 3
    assert (len(theirs), theirs.model_max_length) == (ours.vocab_size, 64)
    assert theirs.decode(theirs(TEXT).input_ids, skip_special_tokens=True) == TEXT
    back = read_tokenizer(tmp_path)
    assert (back.start, back.end_of_text, back.stops) == (ours.start, ours.end_of_text, ours.stops)
    assert back.prompt(TEXT.encode()) == ours.prompt(TEXT.encode())


def test_what_came_in_goes_out_without_code_or_warning(tmp_path, warnings_of_transformers):
    core, kind, _ = CORES["deepseek"]
    config = NAMES | {"tokenizer_class": kind, "auto_map": {"AutoTokenizer": ["a.B", None]}, "chat_template": "{{ 1 }}"}
    tokenizer = read_tokenizer(make_folder(tmp_path, core, config))
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out", context=64)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert warnings_of_transformers == []
    assert (theirs.chat_template, theirs.eos_token) == ("{{ 1 }}", EOS)
    assert theirs(TEXT).input_ids == core.encode(TEXT).ids


@pytest.fixture
def run(read, tmp_path):
    config = moe.ModelConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1, first_k_dense_replace=1)
    return Run(moe.Transformer(config), read["mixtral"], RunConfig(), tmp_path)


def test_sampling_and_scoring_begin_as_the_tokenizer_does(run):
    tokenizer = run.tokenizer
    assert prompt_tokens(run, "the cat", 2).tolist() == [tokenizer.prompt(b"the cat")] * 2
    assert len(prices_of(run, b"the cat")) == len(tokenizer.encode("the cat"))


def test_a_sample_ends_at_any_stop(run, tmp_path):
    anything = HubTokenizer(run.tokenizer.document, NAMES, frozenset(range(run.tokenizer.vocab_size)))
    stopped = Run(run.model, anything, run.config, tmp_path)
    assert list(sample(stopped, "the", SampleConfig(), max_new_tokens=5, seed=1)) == []
    assert torch.is_tensor(prompt_tokens(stopped, ""))


def test_a_corpus_can_be_prepared_with_it(read, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 20)
    for name in ("llama 3", "mixtral"):
        corpus = prepare(DataConfig(str(tmp_path / "text.txt")), tmp_path / name, tokenizer=read[name])
        assert corpus.tokenizer == read[name]
        assert corpus.tokens("train") > 100


def test_a_prefix_that_would_abort_the_process_is_refused(tmp_path):
    folder = make_folder(tmp_path / "a", LLAMA3, NAMES)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["continuing_subword_prefix"] = "##"
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match="continuing_subword_prefix is not known"):
        read_tokenizer(folder)
