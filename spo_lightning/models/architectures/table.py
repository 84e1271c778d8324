"""Verdicts in, ``docs/models.md`` out; and the architectures that there are."""

from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any

from spo_lightning.models.architectures.judge import (
    APART,
    PACKED,
    REFUSED,
    SHARED,
    UNBUILT,
    WRONG,
    Verdict,
    verdict,
)

ORDER = (PACKED, SHARED, APART, REFUSED, UNBUILT, WRONG)
PATIENCE = 120  # seconds, for one architecture
HEAD = """# Models

How this package reads every architecture that transformers {version} lists for causal language
models, and for images and text. `python -m spo_lightning.models.architectures --output
docs/models.md` builds each of them small, with random weights, reads a ragged batch as a run
would, and compares with plain forwards of the model: a row for each response, scored token by
token. A run decides the same way, on the model that it has; nothing is looked up here.

- **packed**: a batch is one row without padding, and every prompt stands once.
- **shared rows**: a row for each pair, in which the prompt stands once.
- **apart**: a forward for each side. As right, and slower.
- **refused**: one line and exit code 2, instead of wrong numbers.
- **not built**: not from a small config here, or it reads no text without something beside it.

Logits are a *matrix* on the last hidden states, where a number may scale them and another cap
them; both are measured before a run. Otherwise they come from the model's *own forward*, all at
once: as right, with more memory.

"""


def kinds() -> list[str]:
    """Every architecture of transformers that writes text."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    return sorted(
        {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    )


def verdicts(names: Iterable[str], jobs: int) -> Iterator[Verdict]:
    """Each from a process of its own: one that crashes stops nobody."""
    context, left = get_context("fork"), list(names)
    running: dict[Any, Any] = {}
    while left or running:
        while left and len(running) < jobs:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_judge, args=(left[0], theirs))
            process.start()
            theirs.close()
            running[ours] = (left.pop(0), process)
        ready = wait(list(running), PATIENCE)
        for pipe in ready or list(running):
            kind, process = running.pop(pipe)
            if not ready:
                process.kill()
            yield _received(kind, pipe, bool(ready))
            process.join()


def _judge(kind: str, pipe: Any) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    pipe.send(verdict(kind))


def _received(kind: str, pipe: Any, ready: bool) -> Verdict:
    try:
        return pipe.recv() if ready else Verdict(kind, "", UNBUILT, why="takes too long")
    except EOFError:
        return Verdict(kind, "", UNBUILT, why="its process died")


def page(found: list[Verdict]) -> str:
    """The whole of ``docs/models.md``."""
    import transformers

    counts = Counter(v.how for v in found)
    right = [v for v in found if v.right]
    worst = max((v.single or 0.0 for v in right), default=0.0)
    exact = [v for v in right if v.double is not None and v.double <= 1e-8]
    said = ", ".join(f"{counts[how]} {how}" for how in ORDER if counts[how])
    lines = [
        f"Of {len(found)}: {said}.",
        f"The largest difference of the {len(right)} that are read, in float32, is",
        f"{worst:.1g} nats in a token; in float64 {len(exact)} of them are right to 1e-8, and the "
        "others keep float32 inside.",
        "",
        "| architecture | class | read | logits | why not packed |",
        "|---|---|---|---|---|",
        *(row(v) for v in sorted(found, key=lambda v: v.kind)),
    ]
    return HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n"


def row(found: Verdict) -> str:
    """A row of the table; nothing in it differs from machine to machine."""
    cells = (f"`{found.kind}`", found.name, found.how, found.logits, found.why)
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
