"""Nodes of the configuration to what they describe; what is refused, as one line."""

from typing import Any

from spo_lightning.errors import UserError, chain


def built(node: Any) -> Any:
    """What the node describes; what a constructor refuses is the user's error, in one line."""
    import hydra.utils
    from hydra.errors import InstantiationException

    try:
        return hydra.utils.instantiate(node)
    except InstantiationException as error:
        *_, cause = chain(error)
        if isinstance(cause, ModuleNotFoundError):
            missing = f"{node['_target_']} needs {cause.name}: pip install {cause.name}"
            raise UserError(missing) from error
        raise UserError(str(cause).splitlines()[0]) from error


def one_line(error: BaseException) -> str:
    """A Hydra refusal as one line: what it says first, then its cause."""
    lines = [part.strip() for part in str(error).splitlines() if part.strip()]
    noise = ("full_key:", "object_type=", "Set the env", "See https://hydra.cc")
    kept = [x for x in lines if not x.startswith(noise)]
    where = [x for x in lines if x.startswith("full_key:")]
    options = getattr(error, "options", None)  # of a group, each on a line of its own
    if options:
        kept = [x for x in kept[:6] if x not in options] + [", ".join(options)]
    text = " ".join(kept[:6] + where)
    override = getattr(error, "override", None)  # of Hydra's parser, which names it in some cases
    if override and override not in text:
        text = f"{override}: {text}"
    cause = error.__cause__
    if cause is not None and str(cause) and str(cause).splitlines()[0] not in text:
        text += f": {one_line(cause)}"
    return text
