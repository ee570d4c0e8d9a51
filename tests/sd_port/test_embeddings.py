"""Textual inversion against diffusers: the same tokens, and the same texts for the UNet, of any number of vectors."""

import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sd_port.__main__ import main
from sd_port.images import read_image, read_record
from sd_port.pipeline import StableDiffusion
from sd_port.weights.embeddings import read_embedding
from tests.sd_port import pipelines, tiny
from tests.sd_port.pipelines import theirs
from tests.sd_port.torch_models import SMALL_TEXT, distance

pytestmark = pytest.mark.hasty

WIDTH = SMALL_TEXT["hidden_size"]
TEXTS = ["a <toy> boat", "<toy>", "<toy> and <toy>.", "a boat"]


def saved(path, name: str = "<toy>", vectors: int = 3):
    tensor = torch.randn(vectors, WIDTH) if vectors > 1 else torch.randn(WIDTH)
    save_file({name: tensor}, path) if path.suffix == ".safetensors" else torch.save({name: tensor}, path)
    return path


@pytest.fixture
def pipe() -> StableDiffusion:
    return StableDiffusion.load(pipelines.folder())


@pytest.mark.parametrize(("end", "vectors"), [("safetensors", 1), ("bin", 1), ("safetensors", 3), ("bin", 75)])
def test_texts_are_those_of_diffusers(pipe, tmp_path, end, vectors):
    path = saved(tmp_path / f"a.{end}", vectors=vectors)
    plain = pipe.embed(TEXTS)
    assert pipe.load_embedding(path) == "<toy>"
    texts = TEXTS if vectors < 75 else TEXTS[1:2]
    other = theirs().from_pretrained(pipelines.folder())
    other.load_textual_inversion(str(path))
    spelled = other.maybe_convert_prompt(texts, other.tokenizer)
    tokens = other.tokenizer(spelled, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    np.testing.assert_array_equal(pipe.tokenizer(texts), tokens.input_ids.numpy())
    with torch.no_grad():
        expected = other.text_encoder(tokens.input_ids).last_hidden_state.numpy()
    found = pipe.embed(texts)
    assert distance(found, expected) < 1e-5
    assert distance(found[:1], plain[: len(texts)][:1]) > 0.01  # control
    if vectors < 75:
        np.testing.assert_array_equal(found[-1], plain[-1])  # where the token is not, nothing changes


def test_webui_s_files_have_the_token_of_their_name(pipe, tmp_path):
    assert pipe.load_embedding(saved(tmp_path / "sketchy.safetensors", "emb_params", 2)) == "sketchy"
    assert pipe.load_embedding(saved(tmp_path / "b.safetensors", "<toy>", 3)) == "<toy>"
    row = pipe.tokenizer(["sketchy <toy>"])[0]
    first = row[1]
    assert row[1:6].tolist() == list(range(first, first + 5))  # one after the other


def test_what_does_not_fit_is_refused(pipe, tmp_path):
    """In one line with the file; the model is as before."""
    before = pipe.embed(TEXTS)
    cases = {
        "another model": ({"<toy>": torch.ones(WIDTH + 1)}, f"have {WIDTH + 1} features, this model's have {WIDTH}"),
        "known": ({"<|endoftext|>": torch.ones(WIDTH)}, "is in the vocabulary already"),
        "nan": ({"<toy>": torch.full((WIDTH,), torch.nan)}, "not finite"),
        "two": ({"<toy>": torch.ones(WIDTH), "b": torch.ones(WIDTH)}, "has 2 tensors"),
        "shape": ({"<toy>": torch.ones(1, 1, WIDTH)}, r"has the shape \(1, 1"),
        "no name": ({" ": torch.ones(WIDTH)}, "' ' has the shape"),
        "nothing": ({"<toy>": torch.ones(0, WIDTH)}, r"has the shape \(0,"),
    }
    for name, (tensors, said) in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=said) as caught:
            pipe.load_embedding(tmp_path / f"{name}.safetensors")
        assert str(caught.value).startswith(f"{tmp_path / name}.safetensors: ") and "\n" not in str(caught.value)
    np.testing.assert_array_equal(pipe.embed(TEXTS), before)
    assert read_embedding(saved(tmp_path / "good.bin")).vectors.shape == (3, WIDTH)


def test_tokens_that_a_lora_bundles(pipe, tmp_path):
    """As OneTrainer writes them; for another text encoder they are refused, by name."""
    key, vectors = "unet.down_blocks.0.attentions.0.proj_in.lora", torch.randn(2, WIDTH)
    width = pipe.unet.config.block_out_channels[0]
    adapters = {f"{key}.down.weight": torch.randn(4, width), f"{key}.up.weight": torch.zeros(width, 4)}
    save_file(adapters | {"bundle_emb.<toy>.string_to_param.*": vectors}, tmp_path / "a.safetensors")
    save_file({"<toy>": vectors}, tmp_path / "alone.safetensors")
    other = StableDiffusion.load(pipelines.folder())
    other.load_embedding(tmp_path / "alone.safetensors")
    pipe.load_lora(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(pipe.embed(TEXTS), other.embed(TEXTS))
    save_file(adapters | {"bundle_emb.<toy>.clip_g": vectors}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"'bundle_emb\.<toy>\.clip_g' is no learned token"):
        pipe.load_lora(tmp_path / "b.safetensors")


def test_case_does_not_count(pipe, tmp_path):
    """Nor for one vector in diffusers; of several it then takes the first alone, which helps nobody."""
    pipe.load_embedding(saved(tmp_path / "a.bin"))
    rows = pipe.tokenizer(["a <TOY> boat", "a <toy> boat"])
    np.testing.assert_array_equal(*rows)


def test_as_an_option(tmp_path, monkeypatch, capsys):
    """An edit with a learned token is another picture, and is made again from its file alone, while nothing changed."""
    tiny.instead_of_nano(monkeypatch)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16), "red").save("sea.png")
    save_file({"<toy>": torch.randn(2, tiny.TEXT["hidden_size"])}, "toy.safetensors")
    edit = ["sdedit", "sea.png", "--prompt", "a <toy>", "--steps", "2"]
    main([*edit, "--out", "plain.png"])
    main([*edit, "--embedding", "toy.safetensors", "--out", "learned.png"])
    main(["replay", "learned.json", "--out", "again.png"])
    assert np.array_equal(read_image("again.png"), read_image("learned.png"))
    assert not np.array_equal(read_image("plain.png"), read_image("learned.png"))
    save_file({"<toy>": torch.randn(2, tiny.TEXT["hidden_size"])}, "toy.safetensors")
    with pytest.raises(SystemExit):
        main(["replay", "learned.json", "--out", "more.png"])
    assert "toy.safetensors has changed since" in capsys.readouterr().err
    main(["generate", "a <toy>", "--steps", "1", "--height", "16", "--width", "16", "--embedding", "toy.safetensors"])
    assert read_record("generated.png")["embedding_sha256"]


def test_a_model_with_learned_tokens_is_not_written(pipe, tmp_path):
    pipe.load_embedding(saved(tmp_path / "a.bin"))
    with pytest.raises(ValueError, match="a model with learned tokens is not written"):
        pipe.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
