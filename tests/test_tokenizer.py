"""The byte tokenizer, stop ids and bos of Hugging Face folders, saving, and the check that two tokenizers mean the same."""

import json
import shutil

import pytest
import tokenizers
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opd_jax.data import tokenizer as lib
from opd_jax.models import families
from opd_jax.types import UserError


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_bytes_are_utf8_and_come_back(text):
    assume(not any(special in text for special in ("<bos>", "<eos>", "<pad>")))
    ids = lib.byte().encode(text)
    assert ids == list(text.encode("utf-8"))
    assert lib.byte().decode(ids) == text


def test_special_ids_of_the_byte_tokenizer():
    byte = lib.byte()
    assert (byte.vocab_size, byte.bos_id, byte.eos_ids, byte.pad_id, byte.adds_bos) == (259, 256, (257,), 258, False)
    assert byte.decode([104, 105, 257, 258]) == "hi"
    assert byte.decode([0xE6, 0x9D]) == "\ufffd"  # half a character
    assert byte.encode("a<eos>") == [97, 257]  # written out, a special token is itself, as in any Hugging Face tokenizer


def words(folder, vocabulary=("<s>", "</s>", "<pad>", "a", "b", "c"), *, generation=None, config=None, settings=None):
    """A word-level tokenizer folder."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="a"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(
        folder
    )
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if settings is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_stop_ids_come_from_all_files_without_repeats(tmp_path):
    tokenizer = lib.load(str(words(tmp_path, generation={"eos_token_id": [5, 1]}, config={"eos_token_id": 4})))
    assert tokenizer.eos_ids == (5, 1, 4)


def test_bos_is_put_before_prompts_where_the_folder_says_so(tmp_path):
    plain = lib.load(str(words(tmp_path / "plain")))
    with_bos = lib.load(str(words(tmp_path / "bos", settings={"add_bos_token": True})))
    assert plain.encode_prompt("a b") == [3, 4]
    assert with_bos.encode_prompt("a b") == [0, 3, 4]
    assert with_bos.encode("a b") == [3, 4]


@pytest.mark.parametrize("which", ["byte", "words"])
def test_saved_tokenizers_come_back_here_and_in_transformers(which, tmp_path):
    source = (
        lib.byte()
        if which == "byte"
        else lib.load(str(words(tmp_path / "in", generation={"eos_token_id": [1, 5]}, settings={"add_bos_token": True})))
    )
    source.save(tmp_path / "out")
    again = lib.load(str(tmp_path / "out"))
    assert again.fingerprint() == source.fingerprint()
    assert (again.eos_ids, again.pad_id, again.adds_bos, again.vocab_size) == (
        source.eos_ids,
        source.pad_id,
        source.adds_bos,
        source.vocab_size,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.encode("a b c", add_special_tokens=False) == source.encode("a b c")


def test_a_tokenizer_without_padding_pads_with_its_stop_token(tmp_path):
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0, "</s>": 1}, unk_token="x"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert lib.Tokenizer(fast, eos_ids=[1], adds_bos=False).pad_id == 1


def test_stop_id_0_is_saved(tmp_path):
    zero = lib.Tokenizer(lib.byte()._fast, eos_ids=[0], adds_bos=False)
    zero.save(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 0
    assert 0 in lib.load(str(tmp_path)).eos_ids


def test_add_bos_token_null_is_as_good_as_absent(tmp_path):
    assert not lib.load(str(words(tmp_path, settings={"add_bos_token": None}))).adds_bos


def test_a_hub_id_reads_the_files_of_its_snapshot(tmp_path, monkeypatch):
    """What downloads is one function; here it is given a folder, and stop ids and bos come from that folder's files."""
    folder = words(tmp_path, generation={"eos_token_id": [1, 5]}, settings={"add_bos_token": True})
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, allow_patterns: folder)
    tokenizer = lib.load("owner/name")
    assert tokenizer.eos_ids == (1, 5) and tokenizer.adds_bos


@pytest.mark.parametrize("family", families.FAMILIES)
def test_tokenizer_json_alone_decides_whatever_the_model_beside_it(family, tmp_path, request):
    """transformers takes another class, with rules of its own, where config.json names a model_type that has one."""
    lib.byte().save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    ours, core = lib.load(str(tmp_path)), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.vocab_size == lib.byte().vocab_size
    for text in ("1234567", "e\u0301", "a\n\n b", *lib.PROBES):
        assert ours.encode(text) == core.encode(text, add_special_tokens=False).ids


@pytest.mark.shared
def test_a_real_tokenizer_beside_a_qwen_is_still_itself(shared_data, tmp_path):
    """The layout of DeepSeek-R1-Distill-Qwen."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared_data / "tokenizers" / "deepseek_r1" / name, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    ours, core = lib.load(str(tmp_path)), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("1234567", "e\u0301", *lib.PROBES):
        assert ours.encode(text) == core.encode(text, add_special_tokens=False).ids
    ours.save(tmp_path / "again")
    assert lib.load(str(tmp_path / "again")).fingerprint() == ours.fingerprint()


def test_compatible_tokenizers_pass_and_padded_vocabularies_are_not_compared(tmp_path):
    lib.check_compatible(lib.byte(), lib.byte())
    longer = words(tmp_path / "longer", ("<s>", "</s>", "<pad>", "a", "b", "c", "d"))
    lib.check_compatible(lib.load(str(words(tmp_path / "short"))), lib.load(str(longer)))


def test_what_makes_tokenizers_differ_is_named(tmp_path):
    student = lib.load(str(words(tmp_path / "student")))
    swapped = lib.load(str(words(tmp_path / "swapped", ("<s>", "</s>", "<pad>", "a", "c", "b"))))
    with pytest.raises(UserError, match=r"gives token 'c' the id 4, the student's gives 5|gives token 'b' the id 5, the student's gives 4"):
        lib.check_compatible(student, swapped)
    other = lib.load(str(words(tmp_path / "other", ("<s>", "</s>", "<pad>", "a", "b", "c", "fox"))))
    with pytest.raises(UserError, match="splits 'The quick brown fox.*differently from token 3"):
        lib.check_compatible(student, other)
    begins = lib.load(str(words(tmp_path / "begins", settings={"add_bos_token": True})))
    with pytest.raises(UserError, match=r"its prompts begin with \[0, 3\], the student's with \[3\]; make add_bos_token agree"):
        lib.check_compatible(student, begins)
    stops = lib.load(str(words(tmp_path / "stops", generation={"eos_token_id": 3})))
    stops.eos_ids = (3,)
    with pytest.raises(UserError, match=r"its stop ids \[3\] are not the student's \[1\].*set rollout.stop=union"):
        lib.check_compatible(student, stops)


@pytest.mark.parametrize("make", ["missing", "file", "empty", "broken"])
def test_folders_that_cannot_be_read_are_named(make, tmp_path):
    path = tmp_path / make
    if make == "file":
        path.write_text("x")
    elif make == "empty":
        path.mkdir()
    elif make == "broken":
        words(path)
        (path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=str(path)):
        lib.load(str(path))


@pytest.mark.shared
def test_the_real_tokenizer_equals_transformers(shared_data):
    folder = shared_data / "models" / "stories260K"
    ours, theirs = lib.load(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    text = "Once upon a time, there was a naïve cat."
    assert ours.encode_prompt(text) == [ours.bos_id, *theirs.encode(text, add_special_tokens=False)]
    head, tail = "Once upon a time", ", there was a cat."  # in the middle of a sequence no space is added
    assert ours.encode_prompt(head) + ours.encode(tail) == ours.encode_prompt(head + tail)
    assert ours.encode_prompt("")[:1] == [ours.bos_id]
    assert ours.decode(ours.encode_prompt(text)).strip() == text


def whole(tokenizer, ids):
    return tokenizer._fast.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@given(st.one_of(st.lists(st.integers(0, 258), max_size=12), st.text(max_size=8).map(lambda text: list(text.encode()))))
@settings(max_examples=400, deadline=None)
def test_pieces_are_the_text_each_character_once(ids):
    """Also of bytes that are no UTF-8, and with special tokens among them."""
    pieces = lib.byte().pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == whole(lib.byte(), ids)
    for i, piece in zip(ids, pieces, strict=True):
        assert (i in lib.byte().special_ids) == (piece in ("<bos>", "<eos>", "<pad>"))


def test_a_character_of_several_tokens_stands_at_the_one_that_completes_it():
    byte = lib.byte()
    assert byte.pieces([*"a東".encode(), 257]) == ["a", "", "", "東", "<eos>"]
    assert byte.pieces([0xE6, 0x9D]) == ["", "\ufffd"]  # half a character, at the end
    assert byte.pieces([0xE6, 257, 0x61]) == ["\ufffd", "<eos>", "a"]
    assert byte.pieces([0xFF, 0x61]) == ["", "\ufffda"]
    # Four tokens at most are held back: the oldest of more is no beginning of a character.
    assert byte.pieces([0xFF] * 5 + [0x61]) == ["\ufffd", "\ufffd", "", "", "", "\ufffd\ufffd\ufffda"]
    assert byte.pieces([], before=[0x61]) == []


def test_a_token_by_itself_shows_bytes_that_are_no_character():
    byte = lib.byte()
    assert [byte.piece(i) for i in (0x61, 0x20, 0xE6, 257)] == ["a", " ", "<0xE6>", "<eos>"]


def test_pieces_keep_the_spaces_that_a_decoder_strips_at_the_beginning(tmp_path):
    """SentencePiece writes a space into the first token of a word, and its decoder drops the one at the beginning of a text."""
    vocabulary = {"<unk>": 0, "</s>": 1, "▁Once": 2, "▁upon": 3, "▁": 4, "<0xE6>": 5, "<0x9D>": 6, "<0xB1>": 7, "a": 8}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    parts = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    core.decoder = tokenizers.decoders.Sequence([*parts, tokenizers.decoders.Strip(" ", 1, 0)])
    core.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    tokenizer = lib.Tokenizer(fast, eos_ids=[1], adds_bos=False)
    assert tokenizer.pieces([2, 3, 4, 5, 6, 7, 1]) == ["Once", " upon", " ", "", "", "東", "</s>"]
    assert tokenizer.pieces([3, 1], before=[2]) == [" upon", "</s>"]
    assert tokenizer.decode([3]) == "upon"
    assert (tokenizer.piece(3), tokenizer.piece(5), tokenizer.piece(1)) == (" upon", "<0xE6>", "</s>")
