"""The lenses of tuned-lens's collection on the Hugging Face hub: those that there are, and those that the hub's cache has on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from metalens.lenses.tuned_lens_folder import CONFIG, PARAMS, hub_repository
from metalens.utils.errors import MissingPackageError, UnavailableError


@dataclass(frozen=True, order=True)
class CachedLens:
    """A lens in the hub's cache.

    Attributes:
        lens_id: its id.
        commit: the snapshot of the repository that it belongs to.
        folder: folder with params.pt and config.json, which `TunedLens.load` reads.
        revisions: names of the snapshot, such as 'main', that a download without a network resolves to it.
    """

    lens_id: str
    commit: str
    folder: Path
    revisions: tuple[str, ...]


def available_lenses(repo_id: str | None = None, repo_type: str | None = None, revision: str = "main", subfolder: str = "lens") -> list[str]:
    """Return the ids of the lenses on the hub, in order. `TunedLens.load("hf:" + id)` reads one.

    Args:
        repo_id: repository on the hub. None = $TUNED_LENS_REPO_ID, or AlignmentResearch/tuned-lens.
        repo_type: type of the repository. None = $TUNED_LENS_REPO_TYPE, or 'space'.
        revision: revision of the repository.
        subfolder: folder of the repository that contains the lenses' folders.

    Raises:
        MissingPackageError: if huggingface_hub is not installed.
        UnavailableError: if the hub cannot be reached, or has no such repository.
    """
    repo_id, repo_type = hub_repository(repo_id, repo_type)
    try:
        from huggingface_hub import HfApi  # comes with mlx-lm; slow to import
    except ImportError as error:
        raise MissingPackageError("The hub is read with huggingface_hub: pip install huggingface_hub.") from error
    try:
        files = HfApi().list_repo_files(repo_id, repo_type=repo_type, revision=revision)
    except Exception as error:  # the network and the hub each raise types of their own
        reason = str(error).strip().partition("\n")[0]
        raise UnavailableError(
            f"The hub's {repo_type} {repo_id} could not be listed: {reason.rstrip('.')}. "
            "`cached_lenses` (`metalens lenses --cached`) lists what is on this machine."
        ) from error
    return _ids(files, subfolder)


def cached_lenses(
    repo_id: str | None = None, repo_type: str | None = None, subfolder: str = "lens", cache_dir: str | Path | None = None
) -> list[CachedLens]:
    """Return the lenses of every snapshot in the hub's cache, in order. This needs no network.

    Args:
        repo_id, repo_type, subfolder: as in `available_lenses`.
        cache_dir: folder of the cache; None = the hub's own.

    Raises:
        MissingPackageError: if huggingface_hub is not installed, and no cache_dir is given.
    """
    repo_id, repo_type = hub_repository(repo_id, repo_type)
    repository = _cache(cache_dir) / "--".join([f"{repo_type}s", *repo_id.split("/")])
    found = []
    for snapshot in _folders(repository / "snapshots"):
        names = [file.relative_to(repository / "refs").as_posix() for file in _files(repository / "refs") if _is_commit(file, snapshot.name)]
        files = [file.relative_to(snapshot).as_posix() for file in _files(snapshot)]
        found += [CachedLens(i, snapshot.name, snapshot / subfolder / i, tuple(sorted(names))) for i in _ids(files, subfolder)]
    return sorted(found)


def _cache(cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    try:
        from huggingface_hub import constants
    except ImportError as error:
        raise MissingPackageError("The hub's cache is found by huggingface_hub: pip install huggingface_hub, or give cache_dir.") from error
    return Path(constants.HF_HUB_CACHE)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _files(folder: Path) -> list[Path]:
    """Return the files in a folder and below; a link to a file that is gone is none."""
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def _is_commit(ref: Path, commit: str) -> bool:
    return ref.read_text(encoding="utf-8", errors="replace").strip() == commit


def _ids(files: Iterable[str], subfolder: str) -> list[str]:
    """Return the ids of lenses among the files of a repository: folders in the subfolder that have both files."""
    prefix, known = f"{subfolder}/".lstrip("/"), set(files)
    params = (name.removesuffix(f"/{PARAMS}") for name in known if name.startswith(prefix) and name.endswith(f"/{PARAMS}"))
    return sorted(folder.removeprefix(prefix) for folder in params if f"{folder}/{CONFIG}" in known)
