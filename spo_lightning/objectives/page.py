"""What was found of every loss in, the page of all objectives out: markdown and its pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spo_lightning.objectives.found import Objective
from spo_lightning.objectives.picture import RANGE, Pushes, pushes, svg

HEAD = r"""# All objectives

Written by `python -m spo_lightning.objectives --output docs`, from the yamls in `conf/loss` and
the functions that they name. [How far each agrees with its sources](objectives-checked.md).

$\ell_w$, $\ell_l$ are the log-probabilities of the chosen and the rejected answer under the
policy, summed over their $n_w$, $n_l$ tokens; $s_w$, $s_l$ the same less the reference's
(log-ratios); $h = s_w - s_l$ the margin; $z = \ell_w - \ell_l$ the gap. A bar is a mean per token:
$\bar h = s_w/n_w - s_l/n_l$. $\sigma$ is the sigmoid.

Any loss can be trained with any solver: `loss=X solver=Y`; a [reward model](reward-models.md) has
none. Of a [ranker](reward-models.md#rankers) the answers are the names of two answers in its
prompt. What can stand around it:

- `loss/divergence=forward_kl`, `js` or `alpha` (2309.16240): log-ratios $s$ become $f'(e^s)$, and
  0 stays 0. Only losses of the margin have it: those that hold each log-ratio to a target ask for
  values that $f'$ may never reach.
- `loss.ld_alpha=0.5` (LD-DPO, 2409.06411): tokens past the shorter answer's length count half. Of
  losses on sums.
- `loss.wpo=true` (WPO, 2406.11827): pairs weigh as much as their answers are the policy's own. Of
  all on pairs but AOT.
- `loss=mixture loss.parts.dpo.weight=1 loss.parts.sft.weight=0.1`: a sum, each part with its own
  keys. Of losses on pairs that judge each by itself.

`solver=penalty` adds for every pair, at weight 1, a hinge on what its chosen answer lost:
$\beta\max(0, -s_w)$ for losses on sums (unit sequence), $\max(0, -\bar s_w)$ for losses on means
(unit token).

In the pictures a step's push on $\ell_w$ (blue) and on $\ell_l$ (red, dashed) stands over the
margin, from -40 to 40 nats: above the grey line an answer becomes more likely. Policy and
reference differ by half the margin on either side, answers have 20 tokens of 2 nats under the
reference, settings are the defaults, and every picture has a scale of its own. TDPO's divergences
are 0 in them and stay so; ASPO's answers are one sentence. Of losses on single answers it shows
both labels: a good one whose log-ratio is half the margin, and a bad one whose log-ratio is minus
that; $K$ and $\mu$ are 0.
"""
WHOLE = (
    "Needs all pairs of an outer step in one forward of one process; a held-out value is that of "
    "the batches it is computed in."
)
UNPAIRED = (
    "Its rows have one answer and a label, good or bad; of pairs every answer is a row to train "
    "on. G is of the good ones."
)


def page(found: Sequence[Objective]) -> str:
    rows = [
        "| loss | paper | reference | unit | reads besides | divergences |",
        "|---|" + "---|" * 5,
    ]
    rows += [_row(one) for one in found]
    return "\n".join([HEAD, *rows, "", *(section(one, _seen(one)) for one in found)])


def _row(one: Objective) -> str:
    reference = (
        "its parts'" if "beside" in one.asks else "yes" if "reference" in one.asks else "no"
    )
    besides = {"moments": "earlier batches", "margins": "scores of the data"}
    besides |= {"divergences": "the reference's distributions", "step": "a draw"}
    besides |= {"sentences": "sentences of the answers"}
    besides |= {"reference_sides": "whose answer is the reference's"}
    besides |= {"kl": "prompts with others' answers"}
    read = [told for name, told in besides.items() if name in one.asks]
    read += ["the whole batch"] if one.node.get("whole_batch") else []
    read += ["labels"] if one.node.get("unpaired") else []
    cells = [f"[{one.name}](#{one.name})", ", ".join(map(_link, one.papers)), reference]
    cells += [one.node["unit"], ", ".join(read), "yes" if one.divergences else ""]
    return f"| {' | '.join(cells)} |"


def _link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})"


def _seen(one: Objective) -> Pushes | None:
    return None if "beside" in one.asks else pushes(one.loss())


def section(one: Objective, seen: Pushes | None) -> str:
    parts = [f"## {one.name}", one.title]
    parts += [one.formula] if one.formula else []
    if seen is not None:
        parts += [f"![{one.name}](objectives/{one.name}.svg)", _told(seen)]
    parts += ["\n".join(f"- `{key.name}: {_said(key.default)}` {key.meaning}" for key in one.keys)]
    parts += [WHOLE] if one.node.get("whole_batch") else []
    parts += [UNPAIRED] if one.node.get("unpaired") else []
    return "\n\n".join([*parts, f"Survey (2503.11701): {one.survey}"]) + "\n"


def _said(default: Any) -> Any:
    return "null" if default is None else default


def _told(seen: Pushes) -> str:
    over = seen.over_from
    if over is None:
        return f"It pushes still at a margin of {RANGE:g} nats."
    return f"From a margin of {over:g} nats on it pushes with less than a hundredth of its most."


def written(found: Sequence[Objective], room: Path) -> list[Path]:
    """The page and its pictures in a directory."""
    pictures = room / "objectives"
    pictures.mkdir(parents=True, exist_ok=True)
    files = {room / "objectives.md": page(found)}
    for one in found:
        seen = _seen(one)
        if seen is not None:
            files[pictures / f"{one.name}.svg"] = svg(one.name, seen)
    for path, text in files.items():
        path.write_text(text, "utf-8")
    return [*files]
