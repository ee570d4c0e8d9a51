"""CLIP's tokenizer: text to the integers that the text encoder embeds.

Byte-pair encoding of lower-cased words (Radford et al. 2021, arXiv 2103.00020, Sec. 2.4). It is built here from the
files of a `tokenizer` folder, as transformers 5 builds its CLIPTokenizer, so transformers itself is not needed.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from theory.reading import Json, from_json, read_bytes

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
POSITIONS = 77  # of every CLIP text encoder that Stable Diffusion uses
UNSET_LENGTH = int(1e30)  # what transformers writes where no length is known
NAMED = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "tokenizer_config.json"),
)

Added = dict[int, AddedToken]  # tokens that are matched before any are merged, by their numbers


@dataclass(frozen=True)
class ClipTokenizer:
    """texts -> int32 (n, model_max_length): begin, the tokens of the text, end, then padding.

    `files` holds the folder's files by name, so that a model can be saved again wherever its folder has gone.
    """

    backend: Tokenizer
    model_max_length: int
    pad_id: int
    files: dict[str, bytes]
    learned: Mapping[int, int] = field(default_factory=dict)  # numbers of learned tokens: how many vectors each has

    @classmethod
    def from_folder(cls, path: str | Path) -> "ClipTokenizer":
        """Reads tokenizer.json, or else vocab.json and merges.txt, and the files on added and special tokens if any.

        transformers reads them in this order too: next to a tokenizer.json that has learned tokens, vocab.json is old.
        Raises ValueError, in one line with the file and what to do, where the folder does not hold CLIP's tokenizer.
        """
        folder = Path(path)
        files = {name: read_bytes(folder / name) for name in FILES if (folder / name).is_file()}
        if not (files.keys() >= {"vocab.json", "merges.txt"} or "tokenizer.json" in files):
            missing = "merges.txt" if "vocab.json" in files else "vocab.json"
            raise ValueError(f"{folder / missing} is missing: give the tokenizer folder of a Stable Diffusion model")
        vocab, merges = _vocabulary(folder, files)
        config, added = _json(folder, files, "tokenizer_config.json"), _added(folder, files)
        special = _special_tokens(folder, files, config, list(added.values()))
        for token in special.values():
            if token.content not in vocab.keys() | {one.content for one in added.values()}:
                raise ValueError(f"{folder}: the vocabulary lacks the token {token.content!r}; get the folder anew")
        length = config.get("model_max_length", POSITIONS)
        if not (isinstance(length, (int, float)) and length > 2):
            raise ValueError(
                f"{folder / 'tokenizer_config.json'}: model_max_length is {length!r}, not a number above 2"
            )
        length = POSITIONS if length >= UNSET_LENGTH else int(length)
        try:
            backend = _backend(vocab, merges, list(added.values()), special)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(f"{folder}: vocabulary and merges do not fit ({error}); get both files anew") from error
        for number, token in added.items():  # a new one gets the next number, whatever its own is
            if backend.token_to_id(token.content) != number:
                raise ValueError(
                    f"{folder}: the vocabulary lacks the token {token.content!r}, and {number} is not the next number; "
                    "get the folder anew"
                )
        return cls(backend, length, cast(int, backend.token_to_id(special["pad_token"].content)), files)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int32 (n, model_max_length). Warns of text beyond the last position, naming it, and cuts it off."""
        if isinstance(texts, str):
            raise TypeError("texts is one string: give a list of strings")
        tokens = np.full((len(texts), self.model_max_length), self.pad_id, np.int32)
        for row, text, encoding in zip(tokens, texts, self.backend.encode_batch(list(texts)), strict=True):
            spread = [
                (number, start)
                for first, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)
                for number in range(first, first + self.learned.get(first, 1))
            ]
            ids = [number for number, _ in spread]
            if len(ids) > self.model_max_length:
                lost = text[spread[self.model_max_length - 1][1] :]
                room = self.model_max_length - 2
                message = f"the text has {len(ids) - 2} tokens, the model reads {room}: cut off {lost!r}"
                warnings.warn(message, UserWarning, stacklevel=2)
                ids = ids[: self.model_max_length - 1] + ids[-1:]
            row[: len(ids)] = ids
        return tokens

    def with_learned(self, token: str, vectors: int) -> "ClipTokenizer":
        """The same with a new token that stands for so many numbers, the next ones, as diffusers gives them.

        Raises ValueError for a token that is there already.
        """
        names = [token, *(f"{token}_{i}" for i in range(1, vectors))]
        backend = Tokenizer.from_str(self.backend.to_str())
        if known := [name for name in names if backend.token_to_id(name) is not None]:
            raise ValueError(f"the token {known[0]!r} is in the vocabulary already")
        first = backend.get_vocab_size()
        backend.add_tokens(names)
        return replace(self, backend=backend, learned={**self.learned, first: vectors})

    def save(self, path: str | Path) -> None:
        """Writes the files it was read from into the folder `path`, which is made if need be."""
        Path(path).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(path) / name).write_bytes(content)


def _json(folder: Path, files: dict[str, bytes], name: str) -> Json:
    return from_json(files.get(name, b"{}"), Json, str(folder / name))


def _vocabulary(folder: Path, files: dict[str, bytes]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary, and the merges in order."""
    if "tokenizer.json" not in files:
        _json(folder, files, "vocab.json")
        try:
            return BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise ValueError(f"{folder / 'merges.txt'} cannot be read ({error}): get the file anew") from error
    model = _json(folder, files, "tokenizer.json").get("model", {})
    if not (model.get("end_of_word_suffix") == "</w>" and model.keys() >= {"vocab", "merges"}):
        raise ValueError(f"{folder / 'tokenizer.json'} is not CLIP's: give the tokenizer of a Stable Diffusion model")
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return model["vocab"], [(left, right) for left, right in pairs]


def _added(folder: Path, files: dict[str, bytes]) -> Added:
    """By number: those of added_tokens.json, tokenizer_config.json and tokenizer.json, which has the last word."""

    def token(entry: dict[str, Any]) -> AddedToken:
        return AddedToken(**{name: value for name, value in entry.items() if name not in ("id", "__type")})

    texts = _json(folder, files, "added_tokens.json")
    decoder = _json(folder, files, "tokenizer_config.json").get("added_tokens_decoder", {})
    entries = _json(folder, files, "tokenizer.json").get("added_tokens", [])
    try:
        found = {int(number): AddedToken(text) for text, number in texts.items()}
        found |= {int(number): token(entry) for number, entry in decoder.items()}
        found |= {int(entry["id"]): token(entry) for entry in entries}
        return dict(sorted(found.items()))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder}: its added tokens cannot be read ({error}); get the folder anew") from None


def _special_tokens(
    folder: Path, files: dict[str, bytes], config: dict[str, Any], added: list[AddedToken]
) -> dict[str, AddedToken]:
    """The four named tokens.

    special_tokens_map.json has the last word, except with an added_tokens_decoder (transformers does the same).
    """
    named = {name: config.get(name) or default for name, default in NAMED.items()}
    if "added_tokens_decoder" not in config:
        named |= {k: v for k, v in _json(folder, files, "special_tokens_map.json").items() if k in named}
    listed = {token.content: token for token in added}

    def token(value: str | dict[str, Any]) -> AddedToken:
        if isinstance(value, str):
            return listed.get(value) or AddedToken(value, special=True)
        fields = {name: field for name, field in value.items() if name not in ("special", "__type")}
        return listed.get(value["content"]) or AddedToken(**fields, special=True)

    return {name: token(value) for name, value in named.items()}


def _backend(
    vocab: dict[str, int], merges: list[tuple[str, str]], added: list[AddedToken], special: dict[str, AddedToken]
) -> Tokenizer:
    """The steps of CLIPTokenizer in transformers 5.23, models/clip/tokenization_clip.py."""
    bpe = BPE(
        vocab=vocab,
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
        unk_token=special["unk_token"].content,
    )
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    eos, bos = (special[name].content for name in ("eos_token", "bos_token"))
    backend.post_processor = processors.RobertaProcessing((eos, vocab[eos]), (bos, vocab[bos]), False, False)
    for token in special.values():
        token.special = True
    # Of tokens with equal text the first counts. SD2's pad token "!" is one: "hi!" ends with it, not with "!</w>".
    backend.add_tokens([*added, *special.values()])
    backend.no_truncation()
    backend.no_padding()
    return backend
