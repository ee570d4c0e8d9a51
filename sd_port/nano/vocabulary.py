"""CLIP's kind of tokenizer, trained on captions: byte pairs of lower-cased words, in CLIP's files."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from sd_port.tokenizer import BOS, EOS, WORDS


def train_tokenizer(texts: Iterable[str], folder: str | Path, *, size: int, length: int) -> None:
    """Writes vocab.json, merges.txt and the two files on special tokens, as a `tokenizer` folder has them.

    The vocabulary has at most `size` tokens, in CLIP's order: 256 bytes, the same at the end of a word, merged pairs,
    and the marks of begin and end. `length` is the number of positions of the text encoder. Raises ValueError where
    size has no room for the bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    single = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    if size < len(single) + 2:
        raise ValueError(f"vocabulary of {size} tokens: bytes and marks alone are {len(single) + 2}")
    pairs = Tokenizer(BPE(end_of_word_suffix="</w>"))
    pairs.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    pairs.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    # The trainer's alphabet is that of the texts; all bytes are put in below, so its size may be `size` already.
    trainer = trainers.BpeTrainer(vocab_size=size, end_of_word_suffix="</w>", show_progress=False)
    pairs.train_from_iterator(texts, trainer)
    room = size - len(single) - 2
    merges = [tuple(merge) for merge in json.loads(pairs.to_str())["model"]["merges"]][:room]
    tokens = [*single, *("".join(merge) for merge in merges), BOS, EOS]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    _write_json(folder / "special_tokens_map.json", special)
    config = {"do_lower_case": True, "model_max_length": length, "tokenizer_class": "CLIPTokenizer"}
    _write_json(folder / "tokenizer_config.json", config | special)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
