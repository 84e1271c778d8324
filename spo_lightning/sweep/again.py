"""``sweep.resume=DIR`` on the command line becomes the command that DIR was begun with."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from spo_lightning.errors import UserError
from spo_lightning.records.directory import REMOVED, words_without_secrets
from spo_lightning.sweep import jobs

KEY = "sweep.resume="


def words(given: Sequence[str]) -> list[str]:
    """The words to run: ``given``, or those of the sweep to go on with, then the new ones.

    A sweep goes on in the directory where its command was given, as its words may name files.
    """
    named = [word for word in given if word.startswith(KEY)]
    if not named or named[-1] in (KEY, f"{KEY}null"):
        return list(given)
    directory = Path(named[-1].removeprefix(KEY).strip("'\"")).absolute()
    record = jobs.read(directory)
    keys = {word.partition("=")[0] for word in given}
    for word in record["command"]:
        if REMOVED in word and word.partition("=")[0] not in keys:
            raise UserError(f"{word}: it was a secret and is not kept; give it again")
    new = [word for word in given if word not in record["command"] and word not in named]
    place = quoted(directory)
    earlier = [word for word in record["command"] if not word.startswith("hydra.sweep.dir=")]
    earlier = [word for word in earlier if REMOVED not in word]
    said = shlex.join(words_without_secrets([*earlier, *new]))
    print(f"Going on with: {said}\nbegun in {record['cwd']}", flush=True)
    if Path(record["cwd"]).is_dir():
        os.chdir(record["cwd"])
    return [*earlier, *new, f"hydra.sweep.dir={place}", f"{KEY}{place}"]


def quoted(path: Path) -> str:
    """A path as a value of Hydra's grammar, whatever letters it has."""
    text = str(path)
    if re.fullmatch(r"[\w./-]+", text, re.ASCII):
        return text
    return "'" + text.replace("'", "\\'") + "'"
