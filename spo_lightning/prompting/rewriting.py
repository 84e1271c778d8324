"""A line of prompts and how they did in, new prompts out: what the optimizer is asked, and read.

The bank's answers are rewritten in the same way: ``revision``.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from spo_lightning.data.chat import shown
from spo_lightning.judges.dynamic import Verdict, filled
from spo_lightning.models.engines import Speaker
from spo_lightning.models.generate import Decoding
from spo_lightning.prompting.beam import Case, Node
from spo_lightning.records.progress import Stages

log = logging.getLogger(__name__)

SEEN = 1_500  # letters of a question or an answer that the optimizer is shown
SEEDS = 1_000  # of a node's proposals, from the search's own seed on


@dataclass(frozen=True)
class Rewriter:
    """``last``: how many of a line's last prompts the optimizer sees. ``again``: how often one
    whose reply holds no new prompt is asked anew."""

    speaker: Speaker
    how: Decoding
    stages: Stages
    text: str
    revise: str
    actions: int
    last: int
    seed: int
    again: int

    def __call__(self, lines: Sequence[tuple[Node, ...]]) -> list[list[str]]:
        """Up to ``actions`` new prompts for the last node of each line, none of them twice."""
        asked = [self._asked(line) for line in lines for _ in range(self.actions)]
        found = self._read(asked, [*range(self.actions)] * len(lines))
        proposals = []
        for place, line in enumerate(lines):
            some = found[place * self.actions : (place + 1) * self.actions]
            told = dict.fromkeys(one for one in some if one and one != line[-1].prompt)
            proposals.append([*told])
        return proposals

    def revision(self, rows: Sequence[dict], verdicts: Sequence[Verdict]) -> list[str | None]:
        """A better answer to each row's prompt than its ``completion``; None: none is read."""
        asked = []
        for row, verdict in zip(rows, verdicts):
            case = Case(shown(row["prompt"]), shown(row["completion"]), verdict)
            asked.append(filled(self.revise, cases=_case(case)))
        return self._read(asked, [0] * len(asked))

    def _asked(self, line: Sequence[Node]) -> str:
        history = [f"{node.reward:.2f}: {node.prompt}" for node in line[-self.last :]]
        # worst first: what is cut by a short context is what did well
        cases = sorted(line[-1].cases, key=lambda case: case.verdict.score or 0)
        return filled(
            self.text,
            history="\n\n".join(history),
            cases="\n\n".join(map(_case, cases)),
        )

    def _read(self, asked: Sequence[str], numbers: Sequence[int]) -> list[str | None]:
        found: list[str | None] = [None] * len(asked)
        for tried in range(self.again + 1):
            left = [place for place, one in enumerate(found) if one is None]
            if not left:
                break
            rows = [
                {
                    "prompt": [{"role": "user", "content": asked[place]}],
                    "seed": self.seed * SEEDS + tried * SEEDS // 10 + numbers[place],
                }
                for place in left
            ]
            replies = self.speaker.say(rows, self.how, self.stages, "rewriting")
            for place, reply in zip(left, replies):
                found[place] = between(reply.text)
        lost = found.count(None)
        if lost:
            log.warning("%d of %d replies of the optimizer hold no text", lost, len(found))
        return found


def _case(case: Case) -> str:
    said = [
        f"{name} {score:g}" + (f" ({reason})" if reason else "")
        for name, score in case.verdict.aspects.items()
        for reason in [case.verdict.reasons.get(name)]
    ]
    score = case.verdict.score
    judged = "; ".join(said) or ("no score" if score is None else f"score {score:g}")
    return f"Question: {case.prompt[:SEEN]}\nAnswer: {case.answer[:SEEN]}\nJudged: {judged}"


def between(text: str) -> str | None:
    """What stands between <text> and </text>; the end mark may have been cut off."""
    found = re.search(r"<text>(.*?)(?:</text>|\Z)", text, re.DOTALL)
    return (found[1].strip() or None) if found else None
