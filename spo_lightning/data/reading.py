"""What a data key names in, its rows out: of files, directories, globs, urls, saved datasets and
hub ids, whole or in parts.

Finding and reading is fsspec's, arrow's and datasets' work; what they refuse becomes one line
here, which names the file and how far it could be read.
"""

import glob
import logging
import lzma
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from spo_lightning.data import formats
from spo_lightning.data.formats import AT_ONCE, TAKEN, Block, is_read
from spo_lightning.data.rows import Found, Row, Rows
from spo_lightning.errors import UserError

log = logging.getLogger(__name__)

SAVED = ("state.json", "dataset_dict.json")  # datasets writes one of them beside what it saves
WEB = ("http://", "https://")  # has files and no directories
FORMS = "a file, directory, glob, url or hub id"

Source = tuple[str, Iterator[Block]]  # a file or dataset by its name


@dataclass(frozen=True)
class Place:
    """What the key ``where`` names: one of ``FORMS``, or a list of them."""

    path: str | list[str]
    where: str
    split: str = "train"  # of a directory, a saved dataset or a hub id
    name: str | None = None  # of a hub id: its configuration
    revision: str | None = None  # of a hub id: a branch, tag or commit

    @property
    def title(self) -> str:
        """As messages call it."""
        return ", ".join(self.path) if isinstance(self.path, list) else self.path

    def rows(self) -> Rows:
        """All of them."""
        rows = Rows(self._found(0, sys.maxsize, whole=True))
        if not rows:
            raise UserError(f"{self.title}: no rows: point {self.where} at data that has some")
        return rows

    def parts(self, size: int, start: int, every: int = 1) -> Iterator[Rows]:
        """``size`` rows at a time, from part ``start`` on, in constant memory.

        ``every``: of so many parts the first; rows of the others are counted, not parsed.
        """
        found = self._found(start * size, size, every, whole=False)
        while part := Rows(islice(found, size)):
            yield part

    def _found(self, start: int, size: int, every: int = 1, *, whole: bool) -> Iterator[Found]:
        """Rows from ``start`` on, of every ``every * size`` of them the first ``size``."""
        paths = self.path if isinstance(self.path, list) and self.path else [self.path]
        skipped, left = start, size
        # all are found before the first is read
        for title, blocks in [source for path in paths for source in self._sources(path, whole)]:
            passed = 0  # rows of this source
            try:
                for count, give in blocks:
                    at, rows = 0, iter(give()) if skipped < count else iter(())
                    while skipped < count - at:
                        until = min(skipped + left, count - at)
                        first = passed + at + skipped + 1
                        for number, row in enumerate(islice(rows, skipped, until), first):
                            yield title, number, row
                        at, left, skipped = at + until, left - until + skipped, 0
                        if not left:
                            skipped, left = (every - 1) * size, size
                    passed, skipped = passed + count, skipped - count + at
            except Exception as error:
                _tell(error, title, passed, self.where)
                raise

    def _sources(self, path: Any, whole: bool) -> list[Source]:
        if not isinstance(path, str) or not path:
            raise UserError(f"{self.where}={self.path}: name {FORMS}, or a list of them")
        try:
            found = files(path, self.split, self.where)
            if found is None and is_saved(path):
                return [(path, _tables(_saved(path, self.split)))]
        except Exception as error:
            _tell(error, path, 0, self.where)
            raise
        if found is None:
            return [(path, _tables(self._hub(path)))]
        return [(name, formats.blocks(name, whole=whole)) for name in found]

    def _hub(self, path: str) -> Any:
        """The dataset of a hub id, downloaded and mapped into memory."""
        import datasets

        try:
            return datasets.load_dataset(path, self.name, split=self.split, revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:
            told = f"{path}: no such file, and not loaded from the hub ({_reason(error)})"
            fix = f"check {self.where}, data.split={self.split} and the network"
            raise UserError(f"{told}: {fix}") from None


def read(path: str | list[str], *, split: str, where: str) -> Rows:
    """All rows of what ``where`` names."""
    return Place(path, where, split).rows()


def check_idle(paths: Sequence[Any], split: str, **of_hub: str | None) -> None:
    """Refuse a split of files that are named one by one, and keys of a hub id where there is none.

    ``of_hub``: what the keys ``data.name`` and ``data.revision`` say.
    """
    named = [path for path in paths if isinstance(path, str)]
    whole = [path for path in named if not is_read(path) and not glob.has_magic(path)]
    hub = [p for p in whole if "://" not in p and not Path(p).expanduser().exists()]
    if split != "train" and not whole:
        told = f"data.split={split} has no effect: {', '.join(named)} is read whole"
        raise UserError(f"{told}; leave it out, or name a directory or hub id")
    for key, value in of_hub.items():
        if value is not None and not hub:
            told = f"data.{key}={value} has no effect: {', '.join(named)} is no hub id"
            raise UserError(f"{told}; leave it out")


def text(path: str, where: str) -> str:
    """The text of a file, which may be packed, or a url."""
    try:
        return "".join(formats.lines(path))
    except Exception as error:
        _tell(error, path, 0, where)
        raise


def files(path: str, split: str, where: str) -> list[str] | None:
    """The files that are meant; None where it is a saved dataset or a hub id."""
    remote, place = "://" in path, Path(path).expanduser()
    if glob.has_magic(path) and not place.exists():
        return _matching(path, where)
    if is_read(path) and (remote or place.is_file()):
        return [path]
    if remote or place.is_dir():
        return None if is_saved(path) else _inside(path, split, where)
    if is_read(path):
        raise UserError(f"{path}: no such file: check {where}")
    if path.startswith((".", "/", "~")) or place.exists():
        raise UserError(f"{path}: no such file, or its suffix is not {TAKEN}: check {where}")
    return None


def _matching(path: str, where: str) -> list[str]:
    import fsspec.core

    if "://" in path:
        system, inside = fsspec.core.url_to_fs(path)
        found = [system.unstrip_protocol(name) for name in sorted(system.glob(inside))]
    else:
        found = sorted(glob.glob(str(Path(path).expanduser()), recursive=True))
    if not found:
        raise UserError(f"{path}: no file matches: check {where}")
    for name in found:
        if not is_read(name):
            raise UserError(f"{name}: its suffix is not {TAKEN}: name the others in {where}")
    return found


def _inside(folder: str, split: str, where: str) -> list[str]:
    """The files of a directory that are of a split, by their names, as datasets has it."""
    from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns

    remote = "://" in folder
    base = folder if remote else str(Path(folder).expanduser().absolute())
    try:
        if folder.startswith(WEB):
            raise FileNotFoundError
        splits = {str(name): names for name, names in get_data_patterns(base).items()}
    except (EmptyDatasetError, FileNotFoundError):
        told = f"{folder}: no such file, or no file in it, or its suffix is not {TAKEN}"
        raise UserError(f"{told}: check {where}") from None
    if split not in splits:
        told = f"{folder}: its files are named for the splits {', '.join(splits)}"
        raise UserError(f"{told}: set data.split to one of them, or name the files")
    found = list(DataFilesList.from_patterns(splits[split], base))
    if not remote:
        found = [str(Path(folder) / Path(name).relative_to(base)) for name in found]
    known = [name for name in found if is_read(name)]
    if not known:
        raise UserError(f"{folder}: no file in it has a suffix of {TAKEN}: check {where}")
    log.info("%s: %d files of the split %s", folder, len(known), split)
    return known


def is_saved(path: str) -> bool:
    """Whether it is a directory that datasets saved."""
    if "://" not in path:
        return any((Path(path).expanduser() / name).is_file() for name in SAVED)
    if path.startswith(WEB):
        return False
    import fsspec.core

    system, inside = fsspec.core.url_to_fs(path)
    return any(system.exists(f"{inside.rstrip('/')}/{name}") for name in SAVED)


def _saved(path: str, split: str) -> Any:
    """The dataset in a directory, mapped into memory."""
    import datasets

    try:
        data = datasets.load_from_disk(path if "://" in path else str(Path(path).expanduser()))
    except (OSError, ValueError, KeyError) as error:
        told = f"{path}: not whole as datasets saved it ({_reason(error)})"
        raise UserError(f"{told}: save it again") from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"{path}: no split {split!r}: set data.split to one of {list(data)}")
        data = data[split]
    return data


def _tables(data: Any) -> Iterator[Block]:
    for start in range(0, len(data), AT_ONCE):
        places = range(start, min(start + AT_ONCE, len(data)))
        yield len(places), partial(_selected, data, places)


def _selected(data: Any, places: range) -> list[Row]:
    return data.select(places).to_list()


def _tell(error: Exception, title: str, passed: int, where: str) -> None:
    """Raise what a library raised as one line; what is no fault of the place stays what it is."""
    import pyarrow

    remote, cause = "://" in title, error.__cause__
    broken = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
    if isinstance(error, (UserError, MemoryError)) or not (remote or isinstance(error, broken)):
        return
    suffix = "".join(formats.suffixes(title)).removeprefix(".")
    if isinstance(error, ImportError) and isinstance(cause, ModuleNotFoundError):
        told = f"{title.partition('://')[0]}:// is read by {cause.name}: pip install {cause.name}"
    elif isinstance(error, FileNotFoundError):
        told = f"no such file{f' ({_reason(cause)})' if cause else ''}: check {where}"
    elif passed:
        told = f"broken or cut off after row {passed} ({_reason(error)}): write it again"
    elif getattr(error, "errno", None):  # a right that is missing, a name that is too long
        told = f"{getattr(error, 'strerror', None) or _reason(error)}: check {where}"
    elif isinstance(error, broken) and not isinstance(error, ConnectionError):
        article = "an" if suffix == "arrow" else "a"
        told = f"not {article} {suffix} file ({_reason(error)}): write it again"
    else:
        told = f"{_reason(error)}: check {where}"
    raise UserError(f"{title}: {told}") from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
