"""Text: the lower-casing BERT tokenizer, token ids of one text, and the masking for masked language modelling."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from vlmo.batch import IGNORE_INDEX
from vlmo.errors import VLMoError

VOCAB_FILES = ("vocab.txt", "tokenizer.json")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Tokenizer:
    """The lower-casing BERT WordPiece tokenizer: ids are those of `transformers.BertTokenizer(vocab=vocabulary)`.

    The library that does the work there does it here. Of the methods there are those that are needed, under the same
    names: importing transformers for them would take half as long as importing torch.

    Args:
        vocabulary: token -> id, the special tokens among them.
    """

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        self._tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(dict(vocabulary), unk_token="[UNK]"))
        self._tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)  # (and without accents)
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        self._tokenizer.add_special_tokens(list(SPECIAL_TOKENS))  # known within a text, as in "a [MASK] cat"
        self.all_special_ids: list[Any] = [self._tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
        self.pad_token_id, _, self.cls_token_id, self.sep_token_id, self.mask_token_id = self.all_special_ids

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def __call__(self, text: str, truncation: bool = False, max_length: int | None = None) -> dict[str, list[int]]:
        """Gives `input_ids`: [CLS], the text's tokens and [SEP]; with `truncation` at most `max_length` of them."""
        if not text.isascii():  # half surrogates, which UTF-8 cannot hold, become "?", as in converted tables
            text = text.encode("utf-8", "replace").decode()
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if truncation and max_length is not None:
            ids = ids[: max(max_length - 2, 0)]
        return {"input_ids": [self.cls_token_id, *ids, self.sep_token_id]}

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> Any:
        """Gives the token of an id, or the list of those of several."""
        if isinstance(ids, int):
            return self._tokenizer.id_to_token(ids)
        return [self._tokenizer.id_to_token(int(each)) for each in ids]


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Load a lower-casing BERT WordPiece tokenizer.

    From a vocabulary file (one token a line, or a `tokenizer.json`), a folder that holds `vocab.txt` or
    `tokenizer.json`, or a name on the Hugging Face hub (its cache is used first). Raises VLMoError if there is none,
    if it is no BERT vocabulary or a cased one, or if the hub cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        files = [path / name for name in VOCAB_FILES if (path / name).is_file()]
        if not files:
            raise VLMoError(f"tokenizer={path}: the folder holds neither {' nor '.join(VOCAB_FILES)}")
        path = files[0]
    elif not path.is_file():
        path = _from_hub(str(name_or_path))
    vocabulary = _read_vocab(path)
    _refuse_cased(path, vocabulary)
    return Tokenizer(vocabulary)


def _refuse_cased(path: Path, vocabulary: Iterable[str]) -> None:
    """Texts are lower-cased and lose their accents, as the released weights need it: with other words most are [UNK].

    Raises:
        VLMoError: if the tokenizer's own settings say otherwise, or its words have capitals.
    """
    settings = _read_json(path.with_name("tokenizer_config.json"))
    if path.suffix == ".json":
        normaliser = _read_json(path).get("normalizer") or {}
        settings = {"do_lower_case": normaliser.get("lowercase"), **normaliser, **settings}
    wrong = [name for name in ("do_lower_case", "strip_accents", "handle_chinese_chars") if settings.get(name) is False]
    words = [word for word in vocabulary if word[:1] != "["]
    cased = sum(word != word.lower() for word in words)
    if wrong or cased > len(words) / 100:
        what = (
            f"has {wrong[0]}=false" if wrong else f"has {cased:,} words with capitals, such as {_first_cased(words)!r}"
        )
        raise VLMoError(
            f"tokenizer={path}: {what}; give an uncased BERT vocabulary: texts are lower-cased, without accents"
        )


def _first_cased(words: Iterable[str]) -> str:
    return next(word for word in words if word != word.lower())


def _read_json(path: Path) -> dict[str, Any]:
    """An object; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def tokenizer_of(vocabulary: Sequence[str]) -> Tokenizer:
    """Makes the lower-casing BERT WordPiece tokenizer of these tokens, in the order of their ids."""
    return Tokenizer({token: index for index, token in enumerate(vocabulary)})


def vocabulary_of(tokenizer: Tokenizer) -> list[str]:
    """Lists the tokenizer's tokens in the order of their ids."""
    return list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))


def _from_hub(name: str) -> Path:
    """The vocabulary file of a hub repository, downloaded unless cached."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    remedy = "point tokenizer= to a local vocab.txt or to a folder that holds one"
    try:
        for file in VOCAB_FILES:
            cached = try_to_load_from_cache(name, file)
            if isinstance(cached, str):
                return Path(cached)
        for file in VOCAB_FILES:
            try:  # one question without retries, so that a machine without network fails at once
                get_hf_file_metadata(hf_hub_url(name, file), timeout=10)
            except EntryNotFoundError:
                continue
            return Path(hf_hub_download(name, file))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise VLMoError(
            f"tokenizer={name!r} is no file, no folder and not on the Hugging Face hub; {remedy}"
        ) from error
    except Exception as error:  # what the hub's HTTP library raises has changed with every major version
        reason = str(error).split("\n")[0] or type(error).__name__
        raise VLMoError(
            f"tokenizer={name!r} is no file or folder and not cached, and the hub does not answer ({reason}); {remedy}"
        ) from error
    raise VLMoError(f"tokenizer={name!r} on the Hugging Face hub has neither {' nor '.join(VOCAB_FILES)}; {remedy}")


def _read_vocab(path: Path) -> dict[str, int]:
    """Token -> id."""
    try:
        if path.suffix == ".json":
            model = json.loads(path.read_text(encoding="utf-8"))["model"]
            vocab = model["vocab"] if model.get("type") == "WordPiece" else {}
        else:
            with path.open(encoding="utf-8") as lines:
                vocab = {line.rstrip("\n"): index for index, line in enumerate(lines)}
        ids = set(vocab.values())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise VLMoError(f"tokenizer={path}: cannot be read as a BERT vocabulary ({error})") from error
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise VLMoError(f"tokenizer={path} is not a BERT WordPiece vocabulary: it lacks {', '.join(missing)}")
    if ids != set(range(len(vocab))):
        raise VLMoError(f"tokenizer={path}: a token is listed twice")
    return vocab


def tokenize(tokenizer: Tokenizer, text: str, max_text_len: int) -> list[int]:
    """Ids of [CLS], the text's tokens and [SEP], the text cut so that all are at most `max_text_len`."""
    return tokenizer(text, truncation=True, max_length=max_text_len)["input_ids"]


class TokenMasker:
    """Masks one text for masked language modelling; special tokens are never masked.

    With `whole_word`, words (a token and its ## continuations) are drawn until `mlm_prob` of the tokens are covered,
    at least one, passing over words that would exceed that as long as others are left. Without, each token is masked
    with probability `mlm_prob`. Of the masked tokens 80 % become [MASK], 10 % a random token and 10 % stay.
    """

    def __init__(self, tokenizer: Tokenizer, mlm_prob: float, whole_word: bool) -> None:
        self.mlm_prob = mlm_prob
        self.whole_word = whole_word
        self.mask_id = tokenizer.mask_token_id
        self.vocab_size = len(tokenizer)
        self.is_continuation = np.array([token.startswith("##") for token in vocabulary_of(tokenizer)])
        self.is_special = np.zeros(self.vocab_size, bool)
        self.is_special[tokenizer.all_special_ids] = True

    def __call__(self, ids: list[int] | np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Mask one text's ids (T,) with draws from `generator`.

        Returns the ids with the masked ones replaced, and the labels: the true id where masked, -100 elsewhere; both
        int64 (T,).
        """
        ids = np.asarray(ids, np.int64)
        candidates = np.flatnonzero(~self.is_special[ids])
        if self.whole_word:
            chosen = candidates[self._draw_words(ids[candidates], generator)]
        else:
            chosen = candidates[generator.random(len(candidates)) < self.mlm_prob]
        labels = np.full_like(ids, IGNORE_INDEX)
        labels[chosen] = ids[chosen]
        masked = ids.copy()
        fate = generator.random(len(chosen))
        masked[chosen[fate < 0.8]] = self.mask_id
        random = chosen[fate >= 0.9]
        masked[random] = generator.integers(self.vocab_size, size=len(random))
        return masked, labels

    def _draw_words(self, ids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Which of these tokens (T,) to mask, as bool (T,)."""
        starts = ~self.is_continuation[ids]
        starts[:1] = True  # a text may have been cut within a word
        word = starts.cumsum() - 1
        lengths = np.bincount(word)
        order = generator.permutation(len(lengths))
        missing = max(1, round(self.mlm_prob * len(ids)))
        drawn, passed_over = np.zeros(len(lengths), bool), []
        for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
            if length <= missing:
                drawn[index] = True
                missing -= length
                if not missing:
                    break
            else:
                passed_over.append(index)
        if missing:
            drawn[passed_over[:1]] = True
        return drawn[word]
