"""What is asked of models in, replies out; every call on the disk, and none of them twice.

The file is the log, the record that a search goes on from, and what the budget is counted on.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.models.engines import Said, Speaker
from spo_lightning.models.generate import Decoding
from spo_lightning.records.disk import writing
from spo_lightning.records.progress import Stages, Within
from spo_lightning.world import ALONE


class Spent(Exception):
    """The budget allows no further call; the message names the key."""


@dataclass
class Calls:
    """``most``, ``dollars``: the budget, over all roles; None: no limit. ``part``: calls that are
    made together; what they cost is known after them."""

    path: Path
    most: int | None
    dollars: float | None
    part: int
    known: dict[str, Said] = field(default_factory=dict, init=False)
    by_role: dict[str, list[float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Read what was asked before; a line that a kill left unfinished is cut off."""
        end = 0
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                self._note(*_read(line, f"{self.path}, line {number}"))
                end += len(line)
            os.truncate(self.path, end)

    @property
    def count(self) -> int:
        return len(self.known)

    @property
    def cost(self) -> float:
        return sum(one.dollars for one in self.known.values())

    def metered(self, role: str, speaker: Speaker) -> "Metered":
        """The same speaker, whose calls are counted and kept."""
        return Metered(self, role, speaker)

    def say(
        self, role: str, speaker: Speaker, rows: Sequence[dict], how: Decoding, stages: Stages
    ) -> list[Said]:
        names = [name_of(role, row, how) for row in rows]
        new = {name: row for name, row in zip(names, rows) if name not in self.known}
        left = [*new]
        with stages.stage(role, len(rows), done=len(rows) - len(left)) as advance:
            while left:
                part = left[: self._allowed()]
                asked = [new[name] for name in part]
                began = time.monotonic()
                told = speaker.say(asked, how, Within(stages, ALONE), role)
                self._keep(role, part, asked, told, how, time.monotonic() - began)
                left = left[len(part) :]
                advance(len(part), f"{self.count} calls, ${self.cost:.4f}")
        return [self.known[name] for name in names]

    def _allowed(self) -> int:
        """How many calls may be made now."""
        if self.most is not None and self.count >= self.most:
            raise Spent(f"budget.calls={self.most}")
        if self.dollars is not None and self.cost >= self.dollars:
            raise Spent(f"budget.dollars={self.dollars}")
        return self.part if self.most is None else min(self.part, self.most - self.count)

    def _keep(
        self,
        role: str,
        names: Sequence[str],
        rows: Sequence[dict],
        told: Sequence[Said],
        how: Decoding,
        seconds: float,
    ) -> None:
        """In one write, so that what was drawn together is there together."""
        lines = []
        for name, row, said in zip(names, rows, told):
            one: dict[str, Any] = {"role": role, "name": name, "asked": row["prompt"]}
            one |= {"seed": row["seed"], "temperature": how.temperature, "said": said.text}
            one |= {"read": said.read, "written": said.written, "dollars": said.dollars}
            lines.append(one | {"seconds": round(seconds / len(rows), 3)})
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with writing(self.path), self.path.open("ab", buffering=0) as file:
            file.write(text.encode())
            os.fsync(file.fileno())
        for name, said in zip(names, told):
            self._note(role, name, said)

    def _note(self, role: str, name: str, said: Said) -> None:
        self.known[name] = said
        of = self.by_role.setdefault(role, [0, 0, 0, 0.0])
        for place, value in enumerate((1, said.read, said.written, said.dollars)):
            of[place] += value


@dataclass(frozen=True)
class Metered:
    """A speaker of one role."""

    calls: Calls
    role: str
    speaker: Speaker

    def say(self, rows: Sequence[dict], how: Decoding, stages: Stages, title: str) -> list[Said]:
        return self.calls.say(self.role, self.speaker, rows, how, stages)


def _read(line: bytes, where: str) -> tuple[str, str, Said]:
    """Of a line of the log: role, name, reply."""
    try:
        one = json.loads(line)
        said = Said(one["said"], one["read"], one["written"], float(one["dollars"]))
        return one["role"], one["name"], said
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: no call of a search: take the line out") from error


def name_of(role: str, row: dict, how: Decoding) -> str:
    """One for all calls that would ask the same."""
    drawn = [how.temperature, how.top_p, how.max_new_tokens, row["seed"]]
    asked = json.dumps([role, row["prompt"], drawn, row.get("tools")], sort_keys=True)
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:32]
