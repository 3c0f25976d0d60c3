import json
import pickle
import socket
import time

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from vlmo.errors import VLMoError
from vlmo.text import TokenMasker, load_tokenizer, tokenize, tokenizer_of, vocabulary_of

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = ["a", "cafe", "the", "cat", "un", "##believ", "##able", "##s", ",", "'", "x", "##x"]
FILLERS = [f"word{i}" for i in range(300)] + [f"##piece{i}" for i in range(150)]
VOCAB = SPECIAL + PIECES + FILLERS
VOCAB_IDS = {token: index for index, token in enumerate(VOCAB)}


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(vocab_file):
    return load_tokenizer(vocab_file)


def tokens(tokenizer, text, max_text_len=40):
    return " ".join(tokenizer.convert_ids_to_tokens(tokenize(tokenizer, text, max_text_len)))


def test_word_pieces_lower_case_without_accents(tokenizer):
    assert tokens(tokenizer, "The CAFÉ, a cat's UNbelievables  zebra") == (
        "[CLS] the cafe , a cat ' [UNK] un ##believ ##able ##s [UNK] [SEP]"
    )
    assert tokenize(tokenizer, "", 40) == [2, 3]


def test_half_surrogates_are_read_as_a_converter_writes_them(tokenizer):
    assert tokens(tokenizer, "the \ud83d cat") == tokens(tokenizer, "the ? cat")


def test_text_is_cut_with_its_ends_kept(tokenizer):
    assert tokens(tokenizer, "the cat the cat the cat", 5) == "[CLS] the cat the [SEP]"
    assert tokens(tokenizer, "the cat the cat the cat", 8) == "[CLS] the cat the cat the cat [SEP]"


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PUBLISHED = [*VOCAB, *(each for each in LETTERS if each not in VOCAB), *(f"##{each}" for each in LETTERS[:-1])]
PUBLISHED = [*dict.fromkeys(PUBLISHED), *"中日ßı한й🙂¿-[]", "##ß", "##ᆫ", "[unused0]"]
SPACES = ["", " ", "\t\r\n\x0b\xa0\u3000", "\0\x01\x7f\x85", "a\ufeff\ufffdb", "a\u200bcat a\u200dcat", "a\xadb\u2028c"]
ACCENTS = ["CAFÉ", "cafe\u0301", "\u0301", "ÀÉÎÕÜ", "İı", "ß ẞ", "ﬁ ǅ", "Ａｂｃ", "Й", "Å \u212b", "ﾊﾟ", "x²", "١٢"]
SCRIPTS = ["中cat日\U00020000", "日本語 한국어", "ภาษาไทย שלום", "🙂👨\u200d👩\u200d👧", "\U000e0041\U0010ffff"]
SIGNS = ["don't", "e-mail...", "a_b #1 ##s ##", "¿que?", "1,000.50", "«a»", "$^`|~+=<>"]
MARKS = ["[MASK]", "a[MASK]cat", "[mask]", "[ MASK ]", "[CLS][SEP] [PAD] [UNK]", "[MASK", "[unused0]", "[Mask]s"]
LONG = ["a" * 100, "a" * 101, "x" * 5000, "the cat " * 300, "unbelievables" * 8]
PARTS = [*PUBLISHED, *SPACES, *ACCENTS, *SCRIPTS, *SIGNS, *MARKS]
any_text = st.text() | st.lists(st.sampled_from(PARTS) | st.text(max_size=5)).map("".join)


@pytest.fixture(scope="module")
def both():
    """The tokenizer and its oracle."""
    ids = {token: index for index, token in enumerate(PUBLISHED)}
    return tokenizer_of(PUBLISHED), BertTokenizer(vocab=ids, do_lower_case=True)


@pytest.mark.parametrize("text", [*SPACES, *ACCENTS, *SCRIPTS, *SIGNS, *MARKS, *LONG], ids=ascii)
def test_odd_texts_have_the_ids_of_transformers(both, text):
    own, published = both
    assert own(text)["input_ids"] == published(text)["input_ids"]


@settings(max_examples=200)
@given(any_text, st.integers(2, 40))
def test_any_text_has_the_ids_of_transformers(both, text, longest):
    own, published = both
    assert own(text)["input_ids"] == published(text)["input_ids"]
    cut = {"truncation": True, "max_length": longest}
    assert own(text, **cut)["input_ids"] == published(text, **cut)["input_ids"]


def test_what_else_is_that_of_transformers(both):
    own, published = both
    ids = list(range(len(PUBLISHED)))
    assert len(own) == len(published) == len(ids)
    assert own.convert_ids_to_tokens(ids) == published.convert_ids_to_tokens(ids) == vocabulary_of(own)
    assert own.convert_ids_to_tokens(7) == published.convert_ids_to_tokens(7)
    assert sorted(own.all_special_ids) == sorted(published.all_special_ids)
    for name in ("pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id"):
        assert getattr(own, name) == getattr(published, name)


def test_folder_with_vocab_or_with_tokenizer_json(vocab_file, tokenizer, tmp_path):
    text = "The unbelievable CAFÉ"
    expected = tokenize(tokenizer, text, 40)
    assert tokenize(load_tokenizer(str(vocab_file.parent)), text, 40) == expected
    # (transformers 5 writes tokenizer.json and no vocab.txt; 5.0 keeps cases unless told otherwise)
    BertTokenizer(vocab=VOCAB_IDS, do_lower_case=True).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.txt").exists()
    assert tokenize(load_tokenizer(tmp_path), text, 40) == expected
    assert tokenize(load_tokenizer(tmp_path / "tokenizer.json"), text, 40) == expected


def test_tokenizer_travels_to_worker_processes(tokenizer):
    copy, masker = pickle.loads(pickle.dumps((tokenizer, TokenMasker(tokenizer, 0.15, True))))
    assert tokenize(copy, "the cat", 40) == tokenize(tokenizer, "the cat", 40)
    assert masker.mask_id == 4


def test_hub_name_from_the_cache(vocab_file, tmp_path, monkeypatch):
    repository = tmp_path / "models--some--bert"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "vocab.txt").write_bytes(vocab_file.read_bytes())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert len(load_tokenizer("some/bert")) == len(VOCAB)


def test_no_network_fails_soon_with_the_remedy(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    start = time.monotonic()
    with pytest.raises(VLMoError, match="'bert-base-uncased'.*does not answer.*tokenizer= to a local vocab.txt"):
        load_tokenizer("bert-base-uncased")
    assert time.monotonic() - start < 20


def test_offline_mode(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(VLMoError, match="offline mode.*tokenizer= to a local vocab.txt"):
        load_tokenizer("bert-base-uncased")


def test_missing_path():
    with pytest.raises(VLMoError, match="no file, no folder.*vocab.txt"):
        load_tokenizer("/no/such/folder")


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(VLMoError, match="neither vocab.txt nor tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", b"the\ncat\n", r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]"),
        ("vocab.txt", "\n".join([*SPECIAL, "cat", "cat"]).encode(), "listed twice"),
        ("vocab.bin", b"\xff\xfe\x00\x81", "cannot be read"),
        ("tokenizer.json", b"{", "cannot be read"),
        ("tokenizer.json", b"[]", "cannot be read"),
        ("tokenizer.json", b"{}", "cannot be read"),
        ("tokenizer.json", json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}}}).encode(), "lacks"),
    ],
)
def test_no_bert_vocabulary(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VLMoError, match=message):
        load_tokenizer(tmp_path / name)


text_ids = st.lists(st.integers(0, len(VOCAB) - 1), max_size=60).map(lambda ids: [2, *ids, 3, 0, 0])


def words_of(ids):
    """Positions of each word's tokens; special tokens belong to none."""
    words = []
    for position, token in enumerate(ids):
        if token < len(SPECIAL):
            continue
        if VOCAB[token].startswith("##") and words:
            words[-1].append(position)
        else:
            words.append([position])
    return words


@settings(max_examples=300)
@given(text_ids, st.integers(0, 2**32), st.sampled_from([0.05, 0.15, 0.5]), st.booleans())
def test_masking_properties(tokenizer, ids, seed, mlm_prob, whole_word):
    masker = TokenMasker(tokenizer, mlm_prob, whole_word)
    masked, labels = masker(ids, np.random.default_rng(seed))
    again = masker(np.array(ids), np.random.default_rng(seed))
    assert masked.dtype == labels.dtype == np.int64 and masked.shape == labels.shape == (len(ids),)
    assert (masked == again[0]).all() and (labels == again[1]).all()
    chosen = labels != -100
    assert (labels[chosen] == np.array(ids)[chosen]).all()
    assert (masked[~chosen] == np.array(ids)[~chosen]).all()
    assert not (chosen & (np.array(ids) < len(SPECIAL))).any()
    assert ((masked >= 0) & (masked < len(VOCAB))).all()
    if not whole_word:
        return
    words = words_of(ids)
    assert all(chosen[word].all() or not chosen[word].any() for word in words)
    tokens = sum(map(len, words))
    if tokens:
        target = max(1, round(mlm_prob * tokens))
        longest = max(map(len, words))
        assert target <= chosen.sum() < target + longest
        if longest == 1:
            assert chosen.sum() == target


@pytest.mark.parametrize("whole_word", [True, False])
def test_masking_rates(tokenizer, whole_word):
    generator = np.random.default_rng(0)
    masker = TokenMasker(tokenizer, 0.15, whole_word)
    total = chosen = replaced = kept = 0
    random_tokens = []
    for _ in range(2000):
        ids = np.array([2, *generator.integers(len(SPECIAL), len(VOCAB), 100), 3])
        masked, labels = masker(ids, generator)
        where = labels != -100
        total += 100
        chosen += where.sum()
        replaced += (masked[where] == 4).sum()
        kept += (masked[where] == ids[where]).sum()
        random_tokens.extend(masked[where & (masked != ids) & (masked != 4)])
    assert chosen / total == pytest.approx(0.15, abs=0.005)
    assert replaced / chosen == pytest.approx(0.8, abs=0.01)
    assert kept / chosen == pytest.approx(0.1, abs=0.01)
    assert len(random_tokens) / chosen == pytest.approx(0.1, abs=0.01)
    assert len(set(random_tokens)) > 0.95 * len(VOCAB)  # from the whole vocabulary


def test_every_position_is_drawn_alike(tokenizer):
    """Single-token words: none is preferred."""
    ids = [2, *range(17, 37), 3]
    masker, generator = TokenMasker(tokenizer, 0.15, True), np.random.default_rng(0)
    counts = sum((masker(ids, generator)[1] != -100).astype(int) for _ in range(4000))
    assert counts[0] == counts[-1] == 0
    np.testing.assert_allclose(counts[1:-1] / 4000, 0.15, atol=0.03)


def test_whole_words_decide_per_token(tokenizer):
    """The pieces of one masked word may meet different fates."""
    ids = [2, VOCAB.index("un"), VOCAB.index("##believ"), VOCAB.index("##able"), 3]
    masker, generator = TokenMasker(tokenizer, 0.15, True), np.random.default_rng(0)
    counts = {int((masker(ids, generator)[0] == 4).sum()) for _ in range(200)}
    assert {1, 2, 3} <= counts


def test_text_without_tokens(tokenizer):
    for whole_word in (True, False):
        masked, labels = TokenMasker(tokenizer, 0.15, whole_word)([2, 3], np.random.default_rng(0))
        assert masked.tolist() == [2, 3] and labels.tolist() == [-100, -100]


def test_cased_vocabularies_are_refused(tmp_path):
    cased, uncased = SPECIAL + ["Ein", "Hund", "in"], SPECIAL + ["ein", "hund", "in"]
    (tmp_path / "vocab.txt").write_text("\n".join(cased) + "\n")
    for path in (tmp_path, tmp_path / "vocab.txt"):
        with pytest.raises(VLMoError, match="2 words with capitals, such as 'Ein'"):
            load_tokenizer(path)
    (tmp_path / "vocab.txt").write_text("\n".join(uncased) + "\n")
    load_tokenizer(tmp_path)
    for name in ("do_lower_case", "strip_accents"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({name: False}))
        with pytest.raises(VLMoError, match=f"{name}=false"):
            load_tokenizer(tmp_path)


def test_a_normaliser_that_keeps_capitals_is_refused(tmp_path):
    vocabulary = {word: number for number, word in enumerate(VOCAB)}
    content = {"model": {"type": "WordPiece", "vocab": vocabulary}, "normalizer": {"lowercase": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"normalizer": {"lowercase": False}}))
    with pytest.raises(VLMoError, match="do_lower_case=false"):
        load_tokenizer(tmp_path)
