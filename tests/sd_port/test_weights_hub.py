"""What is fetched from the Hub, and what is said when it cannot be. Nothing here reaches the network."""

import json
import logging
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from sd_port.weights import hub
from sd_port.weights.folder import choose

SD15 = [
    "README.md",
    "v1-5-pruned.safetensors",
    "v1-5-pruned-emaonly.ckpt",
    "model_index.json",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    *(f"{folder}/config.json" for folder in ("unet", "vae", "text_encoder")),
    *(
        f"{folder}/diffusion_pytorch_model{end}"
        for folder in ("unet", "vae")
        for end in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
    ),
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    *(f"text_encoder/{name}" for name in ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")),
]
TEXTS = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    *(f"{folder}/config.json" for folder in ("unet", "vae", "text_encoder")),
}


def weights(names):
    return {name for name in names if name not in TEXTS}


@pytest.mark.parametrize(("variant", "end"), [(None, ".safetensors"), ("fp16", ".fp16.safetensors")])
def test_only_what_is_needed(variant, end):
    names = hub.needed(SD15, variant)
    assert len(names) == len(set(names)) and set(names) >= TEXTS
    models = {f"{folder}/diffusion_pytorch_model{end}" for folder in ("unet", "vae")}
    assert weights(names) == models | {f"text_encoder/model{end}"}


def test_torch_files_where_there_are_no_others():
    names = hub.needed([name for name in SD15 if not name.endswith(".safetensors")], None)
    models = {f"{folder}/diffusion_pytorch_model.bin" for folder in ("unet", "vae")}
    assert weights(names) == models | {"text_encoder/pytorch_model.bin"}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(variant):
    """Both ways in which the Hub's files name the shards of a variant."""
    plain = {f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    half = {"unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
            "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors"}  # fmt: skip
    index = {None: "unet/diffusion_pytorch_model.safetensors.index.json",
             "fp16": "unet/diffusion_pytorch_model.safetensors.index.fp16.json"}  # fmt: skip
    names = hub.needed(["unet/config.json", *plain, *half, *index.values()], variant)
    assert set(names) == {"unet/config.json", index[variant]} | (half if variant else plain)


def test_a_vae_alone():
    names = ["config.json", "README.md", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"]
    assert hub.needed(names, None) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_other_repositories_are_refused():
    with pytest.raises(ValueError, match="not a repository in diffusers' layout"):
        hub.needed(["README.md", "model.safetensors"], None)


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], None, "model.safetensors"),
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], "fp16", "model.fp16.safetensors"),
        (["model.safetensors", "pytorch_model.fp16.bin"], "fp16", "model.safetensors"),
        (["pytorch_model.fp16.bin", "pytorch_model.bin"], "fp16", "pytorch_model.fp16.bin"),
        (["model.safetensors.index.json", "pytorch_model.bin"], None, "model.safetensors.index.json"),
        (["model.safetensors.index.fp16.json", "model.safetensors"], "fp16", "model.safetensors.index.fp16.json"),
        (["pytorch_model.bin.index.json"], "fp16", "pytorch_model.bin.index.json"),
    ],
)
def test_which_file_is_chosen(names, variant, chosen):
    assert choose(names, "text_encoder", variant) == chosen


def test_no_file_to_choose():
    with pytest.raises(ValueError, match=r"give variant=\.\.\., there is model\.fp16\.safetensors"):
        choose(["model.fp16.safetensors"], "text_encoder", None)
    with pytest.raises(ValueError, match=r"text_encoder: no weights, neither model\.safetensors nor"):
        choose(["config.json"], "text_encoder", None)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A Hub that has one repository, SD15 under its living name; what it is asked for."""
    asked = []

    def list_repo_files(self, repo):
        asked.append(repo)
        if repo != "stable-diffusion-v1-5/stable-diffusion-v1-5":
            raise OSError("404 Client Error.\nRepository Not Found")
        return SD15

    def snapshot_download(repo, *, allow_patterns, local_files_only=False):
        asked.append((sorted(allow_patterns), local_files_only))
        if local_files_only:
            raise FileNotFoundError("not cached")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return asked


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_path_is_itself(tmp_path, asked, as_type):
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert hub.resolve(as_type(tmp_path)) == tmp_path
    assert hub.resolve(as_type(tmp_path / "a.safetensors")) == tmp_path / "a.safetensors"
    assert not asked


def test_a_folder_named_like_an_id_goes_first(tmp_path, asked, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stable-diffusion-v1-5/stable-diffusion-v1-5").mkdir(parents=True)
    assert hub.resolve("stable-diffusion-v1-5/stable-diffusion-v1-5").is_dir() and not asked


def test_an_id_is_fetched(tmp_path, asked):
    assert hub.resolve("stable-diffusion-v1-5/stable-diffusion-v1-5", variant="fp16") == tmp_path / "snapshot"
    assert asked[1] == (sorted(hub.needed(SD15, "fp16")), False)


def test_a_deleted_id_goes_to_its_living_name(tmp_path, asked, caplog):
    with caplog.at_level(logging.WARNING):
        assert hub.resolve("runwayml/stable-diffusion-v1-5") == tmp_path / "snapshot"
    assert "runwayml/stable-diffusion-v1-5 was deleted" in caplog.text
    assert asked[0] == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_living_names_are_known():
    assert set(hub.MOVED.values()) <= set(hub.KNOWN) and not set(hub.MOVED) & set(hub.KNOWN)


@pytest.mark.parametrize("name", ["/no/such/folder", "a.safetensors", "models/a.ckpt", "word", "a/b/c", "../x", ""])
def test_what_is_neither_path_nor_id(name, asked):
    with pytest.raises(ValueError, match=r"no such file or folder, and not a Hub id") as caught:
        hub.resolve(name) if name else hub.resolve("not there")
    assert "\n" not in str(caught.value) and not asked


def test_an_id_that_cannot_be_had(asked):
    with pytest.raises(OSError, match=r"owner/absent: .*OSError: 404 Client Error\.") as caught:
        hub.resolve("owner/absent")
    assert "\n" not in str(caught.value)


def test_a_download_that_fails(asked, monkeypatch):
    def fail(repo, **_):
        raise ConnectionError("reset\nby peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="the download failed: ConnectionError: reset") as caught:
        hub.resolve("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert "\n" not in str(caught.value)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The Hub's cache as its library makes it, with the few files of a pipeline that were needed."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, files in {"models--owner--sd": TEXTS, "models--owner--bert": {"config.json"}}.items():
        for file in files:
            path = tmp_path / name / "snapshots" / COMMIT / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        (tmp_path / name / "refs").mkdir()
        (tmp_path / name / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_offline_the_cache_is_enough(cache, monkeypatch):
    """Also where the library knows that the repository has more files than were fetched."""
    expected = cache / "models--owner--sd" / "snapshots" / COMMIT
    assert hub.resolve("owner/sd") == expected
    whole = dict.fromkeys(SD15)
    monkeypatch.setattr("huggingface_hub._snapshot_download.read_tree_cache", lambda *_: whole)
    with pytest.raises(huggingface_hub.errors.IncompleteSnapshotError):  # why resolve says what it asks for
        huggingface_hub.snapshot_download("owner/sd", local_files_only=True)
    assert hub.resolve("owner/sd") == expected


def test_offline_and_not_in_the_cache(cache):
    with pytest.raises(OSError, match=r"owner/other: .*not in the Hub's cache.*HF_HUB_OFFLINE is set"):
        hub.resolve("owner/other")


def test_cached_models(cache):
    """Pipelines are listed, other models are not."""
    (found,) = hub.cached()
    assert found.id == "owner/sd" and found.path == cache / "models--owner--sd" / "snapshots" / COMMIT
    assert found.size == sum(len(json.dumps({})) for _ in TEXTS)


def test_no_cache_at_all(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "absent"))
    assert hub.cached() == []
