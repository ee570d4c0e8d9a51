"""A tokenizer trained on captions is CLIP's to transformers too."""

import json

import jax.random as jr
import numpy as np
import pytest
from transformers import CLIPTokenizer

from sd_port.nano.captions import captions
from sd_port.nano.vocabulary import train_tokenizer
from sd_port.tokenizer import ClipTokenizer
from tests.sd_port.seascapes import drawn

pytestmark = pytest.mark.hasty


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [caption.text for caption in captions(drawn(0, 512), jr.key(1))]


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    train_tokenizer(texts, folder, size=1024, length=40)
    return folder


def test_transformers_reads_it_alike(folder, texts):
    """Captions, words no caption has, and characters of other scripts."""
    ours, theirs = ClipTokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder)
    strange = ["", "a Purple zeppelin!", "naïve 日本語 🙂", "wwww w", "BOAT,boat"]
    expected = theirs(texts[:100] + strange, padding="max_length", max_length=40, truncation=True).input_ids
    np.testing.assert_array_equal(ours(texts[:100] + strange), expected)


def test_words_of_captions_are_single_tokens(folder):
    tokens = ClipTokenizer.from_folder(folder)(["a small red boat with white sails"])[0]
    assert len(set(tokens.tolist())) == 7 + 2


def test_size(folder, texts, tmp_path):
    """At most what was asked for, and never less than the bytes."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert 514 < len(vocabulary) <= 1024 and sorted(vocabulary.values()) == list(range(len(vocabulary)))
    train_tokenizer(texts, tmp_path / "few", size=520, length=40)
    assert len(json.loads((tmp_path / "few" / "vocab.json").read_text())) == 520
    with pytest.raises(ValueError, match="514"):
        train_tokenizer(texts, tmp_path / "none", size=513, length=40)
