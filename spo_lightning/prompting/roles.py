"""A configuration in, who answers, judges and rewrites out, each counted by the same calls.

A model of this machine that plays several roles is loaded once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from spo_lightning.capability.prompted import Bank, bank_of, under
from spo_lightning.data.chat import shown
from spo_lightning.data.rows import Row
from spo_lightning.errors import UserError
from spo_lightning.judges.dynamic import Dynamic, Verdict, by_score
from spo_lightning.models.engines import Another, Place, Speaker, speaker
from spo_lightning.models.generate import Decoding
from spo_lightning.models.policy import Policy
from spo_lightning.prompting.beam import Case
from spo_lightning.prompting.calls import Calls, Metered
from spo_lightning.prompting.rewriting import Rewriter
from spo_lightning.records.progress import Stages
from spo_lightning.run.judging import Unopened, called, check_judge, judge_of
from spo_lightning.run.record import Begun, Opened, Read, grown


@dataclass
class Roles:
    """``rows`` are the questions of the search, ``apart`` those of the comparison after it."""

    start: str
    rows: Sequence[Row]
    apart: Sequence[Row]
    base: Speaker
    how: Decoding
    turns: bool
    seed: int
    stages: Stages
    verdicts: Callable[[Sequence[Row], Sequence[str]], list[Verdict]]
    rewriter: Rewriter
    bank: Bank | None

    def take(self, rows: Sequence[Row]) -> None:
        """Examples that have been rewritten in the place of the bank's."""
        assert self.bank is not None
        self.bank = replace(self.bank, rows=rows)

    def judged(self, prompts: Sequence[str], rows: Sequence[Row]) -> list[tuple[Case, ...]]:
        """The answers to all rows under each prompt, with what the judge says of them; answers to
        one question stand together, for judges that compare."""
        both = [(prompt, row) for row in rows for prompt in prompts]
        shots = {id(row): self.bank.nearest(row["prompt"]) if self.bank else () for row in rows}
        asked = [
            under(row, prompt, shots[id(row)], turns=self.turns) | {"seed": self.seed}
            for prompt, row in both
        ]
        said = [one.text for one in self.base.say(asked, self.how, self.stages, "answers")]
        verdicts = self.verdicts([row for _, row in both], said)
        cases = [
            Case(shown(row["prompt"]), text, verdict)
            for (_, row), text, verdict in zip(both, said, verdicts)
        ]
        return [tuple(cases[place :: len(prompts)]) for place in range(len(prompts))]


def roles_of(cfg: Any, calls: Calls, stages: Stages) -> Roles:
    """Bad input ends here before a model is loaded, where its keys show it."""
    from spo_lightning.cache.shards import cache_of
    from spo_lightning.models.device import set_threads
    from spo_lightning.run import stages as shared
    from spo_lightning.sampling import draw

    at = shared.data(Begun(cfg, stages.world, stages, {}))
    rows = draw.prompts(cfg, at.task)
    count = len(rows) - cfg.check.rows
    if count < 1:
        raise UserError(f"check.rows={cfg.check.rows} leaves no prompt to search with: lower it")
    rows, apart = rows[:count], rows[count:]
    if not check_judge(cfg, at.task, Unopened()):
        raise UserError("judge=task: this data has none: choose dynamic, answer or instructions")
    bank, start = bank_of(cfg), start_of(cfg)
    set_threads(cfg.hardware)
    opening = {key: cfg[key] for key in ("dtype", "attention", "trust_remote_code")}
    opened = cache(partial(_opened, OmegaConf.create(opening), stages.world.device))
    kept = cache_of(cfg)

    def role(name: str, *, turns: bool = True) -> Metered:
        where = Place(kept and kept / "answers", 1, f"roles.{name}", opened)
        who = speaker(called(cfg.roles[name], "engine"), where, turns=turns)
        return calls.metered(name, who)

    base, optimizer = role("base", turns=cfg.system_turn), role("optimizer")
    search, limit = cfg.search, cfg.batch_size
    drawn = {"temperature": search.temperature, "top_p": search.top_p}
    rewriter = Rewriter(
        optimizer,
        Decoding(search.max_tokens, limit, (), **drawn),
        stages,
        cfg.rewrite,
        cfg.revise,
        *(search.actions, search.shown, cfg.seed, search.again),
    )
    return Roles(
        start,
        rows,
        apart,
        base,
        Decoding(cfg.eval.max_new_tokens, limit, tuple(cfg.eval.stop), **drawn),
        cfg.system_turn,
        cfg.seed,
        stages,
        _verdicts(at, base, opened, calls),
        rewriter,
        bank,
    )


def start_of(cfg: Any) -> str:
    """The first prompt: a text, or what stands in the file of that name."""
    text = str(cfg.start)
    file = Path(text)
    if "\n" not in text and len(text) < 1_000 and file.is_file():
        text = file.read_text(encoding="utf-8")
    if not text.strip():
        raise UserError(f"start={cfg.start!r} is empty: give a prompt, or a file of one")
    return text.strip()


def _opened(settings: Any, device: Any, model: str, *, rewards: bool = False) -> Policy:
    from spo_lightning.models.policy import opened

    return opened(model, settings, device, rewards=rewards)


def _verdicts(
    at: Read, base: Metered, opened: Callable[..., Policy], calls: Calls
) -> Callable[[Sequence[Row], Sequence[str]], list[Verdict]]:
    """What the judge says; of one that gives a score alone, that."""
    from spo_lightning.models.device import precision_of

    policy = base.speaker.policy if isinstance(base.speaker, Another) else None
    precision = precision_of(at.cfg.hardware, at.world.device)
    asked = grown(Opened, at, policy=policy, precision=precision)
    judge = judge_of(asked, None, metered=calls.metered, opened=opened)
    assert judge is not None
    if isinstance(judge, Dynamic):
        return judge.verdicts
    return lambda rows, texts: [by_score(score) for score in judge(rows, texts)]
