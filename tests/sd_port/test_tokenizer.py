"""Token for token equal to transformers' CLIPTokenizer, on a vocabulary trained here in the format of CLIP's files.

CLIP's own vocabulary cannot be had without a download. The one trained here has the same make (256 bytes, 256 bytes
that end a word, merges, two special tokens; "!" is number 0), so every step but the list of merges is the same.
"""

import email
import json
import random
import re
import shutil
import string
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from sd_port.pipeline import StableDiffusion
from sd_port.tokenizer import BOS, EOS, ClipTokenizer
from tests.sd_port import tiny

SPECIAL_1 = {  # Stable Diffusion 1
    name: {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    for name, text in (("bos_token", BOS), ("eos_token", EOS), ("unk_token", EOS))
} | {"pad_token": EOS}
SPECIAL_2 = SPECIAL_1 | {"pad_token": "!"}  # Stable Diffusion 2
CONFIG = {
    "add_prefix_space": False,
    "do_lower_case": True,
    "model_max_length": 77,
    "tokenizer_class": "CLIPTokenizer",
    **{name: {"__type": "AddedToken", **SPECIAL_1[name]} for name in ("bos_token", "eos_token", "unk_token")},
    "pad_token": EOS,
}


@pytest.fixture(scope="module")
def vocabulary() -> tuple[dict[str, int], list[list[str]]]:
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    texts = [path.read_text() for path in sorted(Path(email.__file__).parent.glob("*.py"))]
    texts += [" ".join(unicodedata.name(chr(i), "") for i in range(0x20, 0x3000))]
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=3000, end_of_word_suffix="</w>", show_progress=False)
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [merge for merge in json.loads(trained.to_str())["model"]["merges"] if set("".join(merge)) - set("</w>")]
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges), BOS, EOS]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def write_folder(folder: Path, vocabulary, special=SPECIAL_1, config=CONFIG) -> Path:
    vocab, merges = vocabulary
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(vocabulary, tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("sd1") / "tokenizer", vocabulary)


@pytest.fixture(scope="module")
def folder_2(vocabulary, tmp_path_factory) -> Path:
    config = CONFIG | {"pad_token": "!"}
    return write_folder(tmp_path_factory.mktemp("sd2") / "tokenizer", vocabulary, SPECIAL_2, config)


def any_character(rng: random.Random) -> str:
    while True:
        character = chr(rng.randrange(sys.maxunicode + 1))
        if not 0xD800 <= ord(character) < 0xE000:  # half of a surrogate pair is no text
            return character


PIECES = [
    *("a photograph of an astronaut", "riding a horse", "Don't", "it's WE'LL they've I'm he'd you're", "’s", "''s"),
    *(
        "3.14159",
        "1234567890",
        "２０２６",
        "½ ² Ⅷ",
        "x86_64",
        "state-of-the-art",
        "(masterpiece:1.2)",
        "!!!",
        "hi!",
        "?!",
    ),
    *(EOS, BOS, EOS.upper(), "<|endoftext", EOS + EOS, "a" + EOS + "b", " " + EOS + " ", "</w>", "<pad>"),
    *("   ", "\t", "\n\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u200b", "\ufeff", "\x00", "\x07", "\x1f", "\x85"),
    *(
        "e\u0301",
        "n\u0303o",
        "A\u030a",
        "\u1e9b\u0323",
        "q\u0307\u0323",
        "각",
        "가",
        "I\u0307",
        "İstanbul",
        "ΟΔΟΣ",
        "ß",
    ),
    *("😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷", "日本語のテキスト", "العربية", "हिन्दी", "ไทย", "ﬁ ﬂ", "𝕬", "\U0010ffff"),
    *(
        "&amp;",
        "&lt;",
        "https://example.org/a?b=c#d",
        "supercalifragilisticexpialidocious",
        "aaaaaaaaaaaaaaaaaaaaa",
        "_",
        "--",
    ),
]


def strings(count: int) -> list[str]:
    rng = random.Random(0)
    kinds = [
        lambda: "".join(any_character(rng) for _ in range(rng.randrange(40))),
        lambda: rng.choice(["", " ", "  "]).join(rng.choice(PIECES) for _ in range(rng.randrange(1, 8))),
        lambda: "".join(rng.choice(string.printable) for _ in range(rng.randrange(100))),
        lambda: "".join(chr(rng.randrange(1, 0x700)) for _ in range(rng.randrange(30))),
        lambda: " ".join(rng.choice(PIECES) for _ in range(rng.randrange(10, 60))),
    ]
    return ["", " ", "\n", *PIECES, *(rng.choice(kinds)() for _ in range(count - 3 - len(PIECES)))]


def quiet(tokenizer: ClipTokenizer, texts: list[str]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the text has", UserWarning)
        return tokenizer(texts)


def reference(folder: Path, texts: list[str]) -> np.ndarray:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder))
    return tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="np")["input_ids"]


@pytest.mark.parametrize("version", ["folder", "folder_2"])
def test_equals_transformers(version, request):
    path = request.getfixturevalue(version)
    texts = strings(2000)
    tokens, expected = quiet(ClipTokenizer.from_folder(path), texts), reference(path, texts)
    assert tokens.dtype == np.int32 and tokens.shape == (2000, 77)
    different = [text for text, row, wanted in zip(texts, tokens, expected, strict=True) if (row != wanted).any()]
    assert not different
    ends = (tokens == json.loads((path / "vocab.json").read_text())[EOS]).argmax(1)
    assert (ends == 76).sum() > 100 and (ends < 20).sum() > 100, "both cut and padded texts are among them"


def test_pad_tokens_differ(folder, folder_2):
    """The negative control of the two folders: only the padding and a "!" inside a text tell them apart."""
    first, second = ClipTokenizer.from_folder(folder), ClipTokenizer.from_folder(folder_2)
    vocab = json.loads((folder / "vocab.json").read_text())
    assert (first.pad_id, second.pad_id) == (vocab[EOS], 0)
    assert vocab["!</w>"] in first(["hi!"])[0]
    assert vocab["!</w>"] not in second(["hi!"])[0]


@pytest.mark.parametrize("settings", ["no special_tokens_map", "added_tokens_decoder", "no files"])
def test_equals_transformers_with_other_settings(vocabulary, tmp_path, settings):
    vocab, _ = vocabulary
    added = {
        str(vocab[text]): {"content": text, "lstrip": False, "normalized": False, "rstrip": True, "single_word": False}
        | {"special": True}
        for text in (EOS, BOS)
    }
    config = CONFIG | {"added_tokens_decoder": added} if settings == "added_tokens_decoder" else CONFIG
    path = write_folder(tmp_path / "tokenizer", vocabulary, config=config)
    if settings != "added_tokens_decoder":
        (path / "special_tokens_map.json").unlink()
    if settings == "no files":
        (path / "tokenizer_config.json").unlink()
    texts = strings(300)
    assert (quiet(ClipTokenizer.from_folder(path), texts) == reference(path, texts)).all()


@pytest.mark.parametrize("version", ["folder", "folder_2"])
def test_reads_what_transformers_writes(version, request, tmp_path):
    transformers.CLIPTokenizer.from_pretrained(str(request.getfixturevalue(version))).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists(), "transformers 5 writes tokenizer.json alone"
    texts = strings(300)
    expected = quiet(ClipTokenizer.from_folder(request.getfixturevalue(version)), texts)
    assert (quiet(ClipTokenizer.from_folder(tmp_path), texts) == expected).all()
    assert (reference(tmp_path, texts) == expected).all()


def test_saves_again(folder_2, tmp_path):
    tokenizer = ClipTokenizer.from_folder(folder_2)
    tokenizer.save(tmp_path / "deep" / "tokenizer")
    assert {p.name: p.read_bytes() for p in (tmp_path / "deep" / "tokenizer").iterdir()} == tokenizer.files
    again = ClipTokenizer.from_folder(tmp_path / "deep" / "tokenizer")
    assert (again(["hi! there"]) == tokenizer(["hi! there"])).all()


def test_warns_of_the_text_it_cuts(folder):
    tokenizer = ClipTokenizer.from_folder(folder)
    fits, lost = "1 " * 75, "2 3 Été  😀"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer([fits])
    with pytest.warns(UserWarning, match=re.escape(f"reads 75: cut off {lost!r}")):
        tokens = tokenizer(["short", fits + lost])
    assert (tokens[1] == tokenizer([fits])[0]).all()


def test_one_string_is_refused(folder):
    with pytest.raises(TypeError, match="give a list"):
        ClipTokenizer.from_folder(folder)("a cat")
    assert ClipTokenizer.from_folder(folder)([]).shape == (0, 77)


@pytest.mark.parametrize("length, expected", [(16, 16), (int(1e30), 77), (None, 77)])
def test_model_max_length(vocabulary, tmp_path, length, expected):
    config = {k: v for k, v in (CONFIG | {"model_max_length": length}).items() if v is not None}
    tokenizer = ClipTokenizer.from_folder(write_folder(tmp_path / "tokenizer", vocabulary, config=config))
    assert tokenizer(["a cat"]).shape == (1, expected)


def drop(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (drop("vocab.json"), r"vocab\.json is missing"),
        (drop("merges.txt"), r"merges\.txt is missing"),
        (write("vocab.json", "{"), r"vocab\.json: not JSON"),
        (write("vocab.json", "[]"), r"vocab\.json: must be an object"),
        (write("vocab.json", '{"a": 0}'), "lacks the token"),
        (write("merges.txt", "#version: 0.2\na b c d\n"), r"merges\.txt cannot be read"),
        (write("merges.txt", "#version: 0.2\n日 本\n"), "vocabulary and merges do not fit"),
        (write("tokenizer_config.json", "nonsense"), r"tokenizer_config\.json: not JSON"),
        (write("tokenizer_config.json", '{"model_max_length": "77"}'), "model_max_length is '77'"),
        (write("added_tokens.json", "["), r"added_tokens\.json: not JSON"),
        (write("added_tokens.json", '{"<new>": 9}'), "lacks the token '<new>', and 9 is not the next number"),
        (write("added_tokens.json", '{"<new>": "one"}'), "added tokens cannot be read"),
        (write("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'), "added tokens cannot be read"),
        (
            write("tokenizer_config.json", '{"added_tokens_decoder": {"9": {"content": "<new>"}}}'),
            "lacks the token '<new>'",
        ),
    ],
)
def test_bad_folders(vocabulary, tmp_path, spoil, message):
    path = write_folder(tmp_path / "tokenizer", vocabulary)
    spoil(path)
    with pytest.raises(ValueError, match=message) as error:
        ClipTokenizer.from_folder(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("content, message", [("[", "not JSON"), ('{"model": {"type": "WordPiece"}}', "is not CLIP's")])
def test_bad_tokenizer_json(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ClipTokenizer.from_folder(tmp_path)


LEARNED = ["<cat-toy>", "<Big Dog>", "sks", "naïve"]


def with_learned(folder: Path, alone: bool, target: Path) -> Path:
    """As transformers saves a tokenizer that has learned tokens, alone or over the folder that it was read from."""
    if not alone:
        shutil.copytree(folder, target)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder))
    tokenizer.add_tokens([LEARNED[0], AddedToken(LEARNED[1], normalized=False), *LEARNED[2:]])
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("version", ["folder", "folder_2"])
def test_learned_tokens(version, alone, request, tmp_path):
    """Textual inversion: every token has its number, also where an old vocab.json lies beside the new file."""
    path = with_learned(request.getfixturevalue(version), alone, tmp_path / "tokenizer")
    assert (path / "vocab.json").is_file() != alone
    rng = random.Random(1)
    texts = [" ".join(rng.choices([*LEARNED, "<CAT-TOY>", "<big dog>", "sksy", *PIECES], k=9)) for _ in range(300)]
    tokens = quiet(ClipTokenizer.from_folder(path), [*LEARNED, *texts])
    assert (tokens == reference(path, [*LEARNED, *texts])).all()
    first = len(json.loads((request.getfixturevalue(version) / "vocab.json").read_text()))
    assert tokens[: len(LEARNED), 1].tolist() == list(range(first, first + len(LEARNED)))


@pytest.mark.parametrize("how", ["added_tokens.json", "added_tokens_decoder"])
def test_learned_tokens_as_they_were_saved_before(vocabulary, tmp_path, how):
    """transformers 4 wrote them beside vocab.json: by their texts, or in the configuration."""
    number = len(vocabulary[0])
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
    listed = {str(number): {"content": "<cat-toy>", **plain}}
    config = CONFIG | ({"added_tokens_decoder": listed} if how == "added_tokens_decoder" else {})
    path = write_folder(tmp_path / "tokenizer", vocabulary, config=config)
    if how == "added_tokens.json":
        (path / how).write_text(json.dumps({"<cat-toy>": number}))
    texts = ["a <cat-toy> boat", "<Cat-Toy>", "a cat"]
    tokens = ClipTokenizer.from_folder(path)(texts)
    assert (tokens == reference(path, texts)).all() and number in tokens[0] and number not in tokens[2]
    ClipTokenizer.from_folder(path).save(tmp_path / "again")
    assert (ClipTokenizer.from_folder(tmp_path / "again")(texts) == tokens).all()


def test_tokens_that_the_text_encoder_does_not_know(tmp_path, monkeypatch):
    """A tokenizer with a learned token beside a text encoder without it."""
    tiny.shapes_once(monkeypatch)
    shutil.copytree(tiny.folder(), tmp_path / "model")
    assert StableDiffusion.load(tmp_path / "model").tokenizer.backend.get_vocab_size() == 689
    (tmp_path / "model" / "tokenizer" / "added_tokens.json").write_text('{"<new>": 689}')
    with pytest.raises(ValueError, match=r"tokenizer: has 690 tokens, and the text encoder embeds 689"):
        StableDiffusion.load(tmp_path / "model")
