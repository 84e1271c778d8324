"""What a source of pairs of images gives: rows, and how an image is judged. Pixels are numpy's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spo_lightning.errors import UserError

ELSEWHERE = ("images", "unpaired", "sft_steps")  # keys that others read
Image = Any  # [H, W, 3] uint8, a numpy array


@dataclass(frozen=True)
class PictureRow:
    """A prompt, and two images of it; None where the policy draws them, or a row has but one."""

    prompt: str
    chosen: Image | None = None
    rejected: Image | None = None


@dataclass(frozen=True)
class Pictures:
    """What a source gives. ``texts``: prompts with an image, which a model built here learns."""

    train: Sequence[PictureRow]
    held_out: Sequence[PictureRow]
    texts: Sequence[PictureRow] = ()
    words: Sequence[str] = ()  # all that prompts are made of, where a model is built for them
    samples: int = 0  # images drawn per prompt, of which a pair is made; 0: rows have theirs
    seen: Callable[[Image], str] | None = None  # what an image shows, in words
    right: Callable[[str, Image], bool] | None = None  # whether it is what the prompt asks for
    judge: Callable[[Image], float] | None = None  # how well the judge likes it
    notes: Sequence[str] = ()


def apart(rows: Sequence[PictureRow]) -> list[PictureRow]:
    """Every image a row of its own, good or bad."""
    found = []
    for row in rows:
        found += [replace(row, rejected=None)] if row.chosen is not None else []
        found += [replace(row, chosen=None)] if row.rejected is not None else []
    return found


def load(node: Any) -> Pictures:
    """Call the source that ``_target_`` names; a key that it lacks is refused."""
    import hydra.utils
    from hydra.errors import InstantiationException
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(node, resolve=True)
    plain = {key: it for key, it in plain.items() if key not in ELSEWHERE}
    try:
        return hydra.utils.instantiate(plain, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError | TypeError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise UserError(f"data: {' '.join(str(cause).split())}".removeprefix("data: ")) from None
