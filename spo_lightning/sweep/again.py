"""``sweep.resume=DIR`` on the command line becomes the command that DIR was begun with; so does
``resume=DIR`` of a loop or of a search for prompts."""

import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.records.directory import REMOVED, words_without_secrets
from spo_lightning.sweep import jobs

LOOP, TREE = "loop.json", "tree.json"  # of a loop; of a search for prompts


def _begun(directory: Path) -> dict[str, Any]:
    path = directory / (TREE if (directory / TREE).exists() else LOOP)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: found[key] for key in ("command", "cwd")}
    except OSError as error:
        raise UserError(
            f"{path}: no loop to go on with, nor a search ({error.strerror})"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no record of how it was begun ({error})") from error


# the key, what it goes on with, where Hydra is told that this stands
KINDS = (("sweep.resume=", jobs.read, "hydra.sweep.dir="), ("resume=", _begun, "hydra.run.dir="))


def words(given: Sequence[str]) -> list[str]:
    """The words to run: ``given``, or those of what is gone on with, then the new ones.

    It goes on in the directory where its command was given, as its words may name files.
    """
    for key, read, stands in KINDS:
        named = [word for word in given if word.startswith(key)]
        if named and named[-1] not in (key, f"{key}null"):
            directory = Path(named[-1].removeprefix(key).strip("'\"")).absolute()
            return _going_on(given, named, read(directory), stands, f"{key}{quoted(directory)}")
    return list(given)


def _going_on(
    given: Sequence[str], named: Sequence[str], record: dict[str, Any], stands: str, last: str
) -> list[str]:
    keys = {word.partition("=")[0] for word in given}
    for word in record["command"]:
        if REMOVED in word and word.partition("=")[0] not in keys:
            raise UserError(f"{word}: it was a secret and is not kept; give it again")
    new = [word for word in given if word not in record["command"] and word not in named]
    earlier = [word for word in record["command"] if not word.startswith(stands)]
    earlier = [word for word in earlier if REMOVED not in word]
    said = shlex.join(words_without_secrets([*earlier, *new]))
    print(f"Going on with: {said}\nbegun in {record['cwd']}", flush=True)
    if Path(record["cwd"]).is_dir():
        os.chdir(record["cwd"])
    return [*earlier, *new, f"{stands}{last.partition('=')[2]}", last]


def quoted(path: Path) -> str:
    """A path as a value of Hydra's grammar, whatever letters it has."""
    text = str(path)
    if re.fullmatch(r"[\w./-]+", text, re.ASCII):
        return text
    return "'" + text.replace("'", "\\'") + "'"
