"""The configuration of a loop in; a run directory per round, its pairs, numbers and a page out.

Every step leaves a file or a directory that is whole or not there, and one that is there is not
done again: so a loop that was killed anywhere goes on, and ends as it would have ended.
"""

import gc
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf, open_dict

from spo_lightning import __version__
from spo_lightning.config.knobs import warm_start_steps
from spo_lightning.errors import UserError
from spo_lightning.records.directory import (
    CHOICES,
    finished_numbers,
    without_secrets,
    words_without_secrets,
    write_text,
)
from spo_lightning.records.lock import held
from spo_lightning.records.progress import Stages, Stop, quiet
from spo_lightning.records.resume import refuse_another
from spo_lightning.rounds import page
from spo_lightning.rounds.drawing import draw, draw_beside
from spo_lightning.rounds.look import look
from spo_lightning.rounds.lower import lower_texts
from spo_lightning.rounds.spin import UNJUDGED
from spo_lightning.run.record import Begun
from spo_lightning.sampling.record import record_of
from spo_lightning.sweep.again import LOOP
from spo_lightning.world import World

log = logging.getLogger(__name__)

OWN = ("loop", "prompts", "engine", "strategy", "resume")  # keys that a round's run has not
SEEDS = 1_000  # of a loop's rounds, from its own seed on
MAY_GROW = ("loop.rounds", "loop.betas")


@dataclass(frozen=True)
class Loop:
    """A loop and its directory."""

    cfg: Any
    place: Path
    choices: Mapping[str, str]
    stages: Stages
    record: dict[str, Any]  # what loop.json holds

    def model(self, number: int) -> str | None:
        """What a round has trained; of round 0 the start. None: as ``model`` of the config."""
        if number:
            return str(self.place / f"round-{number}" / "model")
        built = self.cfg.model.pretrained is None or warm_start_steps(self.cfg) > 0
        return str(self.place / "start") if built else None

    def begins(self, number: int) -> str | None:
        """What a round begins with."""
        if number > 1 and self.cfg.loop.alpha:
            return str(self.place / f"ahead-{number - 1}")
        return self.model(number - 1)

    def pairs(self, number: int) -> Path:
        return self.place / f"pairs-{number}.jsonl"

    def beside(self, number: int) -> Path:
        return self.place / f"beside-{number}.jsonl"

    def settings(self, name: str | None, **more: Any) -> Any:
        """The config with this model in the place of its own."""
        cfg = self.cfg.copy()
        with open_dict(cfg):
            for key, value in more.items():
                cfg[key] = value
            if name is not None:
                cfg.model.pretrained, cfg.model.config = name, {}
                cfg.model.base = cfg.model.revision = cfg.sft.max_steps = None
        return cfg

    def to_draw(self, number: int, *, beside: bool = False) -> Any:
        """What ``sample`` is asked for in a round; or before, of the start, unjudged."""
        loop, seed = self.cfg.loop, self.cfg.seed * SEEDS + number
        how = {"temperature": loop.temperature, "top_p": loop.top_p}
        if beside:
            name, output = self.model(0), self.beside(number)
            seed += SEEDS // 2  # else a start that has not moved answers as it did
            how |= {"samples": loop.beside, "seed": seed, "judge": UNJUDGED}
        else:
            name, output = self.begins(number), self.pairs(number)
            how |= {"samples": loop.answers, "seed": seed}
        return self.settings(name, output=str(output), **how)

    def to_train(self, number: int, lower: str | None) -> Any:
        """The run of a round."""
        loop, first = self.cfg.loop, max(1, number - self.cfg.loop.earlier)
        cfg = self.settings(self.begins(number))
        with open_dict(cfg):
            for key in OWN:
                cfg.pop(key)
            cfg.data.pairs = [str(self.pairs(n)) for n in range(first, number + 1)]
            cfg.data.max_rows = None  # the prompts were already so many
            cfg.data.sft = lower or cfg.data.get("sft")
            if loop.betas is not None:
                cfg.loss.beta = loop.betas[number - 1]
            if loop.reference == "start" and number > 1:
                cfg.model.reference = self.model(0) or self.cfg.model.pretrained
        return cfg


def iterate(
    cfg: Any, place: Path, choices: Mapping[str, str], command: Sequence[str], world: World
) -> dict[str, Any]:
    """Walk the rounds that are not done; what loop.json holds in the end."""
    quiet()
    how = f"Go on with: python -m spo_lightning.iterate resume={place}"
    stages = Stages(lambda *_: None, Stop(), how, world)
    with held(place):
        record = _begun(cfg, place, choices, command)
        loop = Loop(cfg, place, choices, stages, record)
        try:
            with stages.stop.listening():
                for number in range(1 + len(record["rounds"]), cfg.loop.rounds + 1):
                    _round(loop, number)
        except UserError:
            _withdraw(loop)
            raise
    log.info("\n%s\n\nLoop: %s", page.table(record["rounds"]), place / page.NAME)
    return record


def _begun(
    cfg: Any, place: Path, choices: Mapping[str, str], command: Sequence[str]
) -> dict[str, Any]:
    """The record to go on with; a loop of other settings is refused."""
    path, config = place / LOOP, place / "config.yaml"
    if config.exists():
        refuse_another(cfg, config, ("resume", *MAY_GROW))
    head = f"{CHOICES}{json.dumps(dict(choices))}\n"
    plain = without_secrets(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    write_text(config, head + OmegaConf.to_yaml(plain))
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        log.info("Going on with round %d of %s", len(record["rounds"]) + 1, place)
        return record
    words = words_without_secrets(command)
    record = {"version": __version__, "command": words, "cwd": str(Path.cwd()), "rounds": []}
    write_text(path, json.dumps(record, indent=1) + "\n")
    return record


def _withdraw(loop: Loop) -> None:
    """Bad input before the first answer leaves no loop of its settings."""
    if not any(record_of(path).exists() for path in (loop.pairs(1), loop.beside(1))):
        for name in (LOOP, "config.yaml"):
            (loop.place / name).unlink(missing_ok=True)
        shutil.rmtree(loop.place / "start", ignore_errors=True)


def _round(loop: Loop, number: int) -> None:
    """One round to its end: where it begins, its pairs, its run, its numbers and the page."""
    began, cfg = time.time(), loop.cfg
    log.info("Round %d of %d", number, cfg.loop.rounds)
    _weights(loop, number)
    if not loop.pairs(number).exists():
        _draw(loop, number)
    lower = lower_texts(cfg, loop.place, [loop.pairs(n) for n in range(1, number + 1)])
    trained = loop.place / f"round-{number}"
    numbers = finished_numbers(trained) or _train(loop, trained, loop.to_train(number, lower))
    found = look(loop.settings(loop.model(number)), loop.stages, loop.place, number, numbers)
    loop.record["rounds"].append({**found, "seconds": round(time.time() - began, 1)})
    write_text(loop.place / LOOP, json.dumps(loop.record, indent=1) + "\n")
    write_text(loop.place / page.NAME, page.whole(loop.record["rounds"]))
    gc.collect()  # a run's objects hold each other, and its model


def _draw(loop: Loop, number: int) -> None:
    """The round's pairs; first what the start answers, where that is judged with them."""
    mine, beside = loop.to_draw(number), None
    if loop.cfg.loop.beside:
        theirs = loop.to_draw(number, beside=True)
        beside = draw_beside(mine, theirs, loop.stages, number)
        gc.collect()  # the other policy
    draw(mine, loop.stages, number, beside)


def _weights(loop: Loop, number: int) -> None:
    """What the round begins with, where no run has left it."""
    from spo_lightning.rounds import weights

    world, begins = loop.stages.world, loop.begins(number)
    if begins is None or Path(begins).exists():
        return
    if number == 1:
        weights.start(Begun(loop.cfg, world, loop.stages, {}), Path(begins))
        return
    last, now, alpha = loop.model(number - 2), loop.model(number - 1), loop.cfg.loop.alpha
    policy = weights.ahead(loop.settings(last), loop.settings(now), alpha, world)
    weights.keep(policy, Path(begins), f"Round {number - 1}, {alpha} of its way ahead.\n", world)


def _train(loop: Loop, directory: Path, cfg: Any) -> dict[str, Any]:
    """The run of a round, from its beginning or where it stopped."""
    from spo_lightning.report.build import attempted
    from spo_lightning.run.training import train

    if (directory / "config.yaml").exists():
        cfg.ckpt_path = "last"
    choices = {key: one for key, one in loop.choices.items() if key not in OWN}
    how = loop.stages.how_to_go_on
    numbers = train(cfg, directory, choices, loop.stages.world, how)
    if cfg.report.enabled:
        log.info("%s", attempted(directory))
    return numbers
