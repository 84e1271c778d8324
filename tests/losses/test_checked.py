"""Every loss and its sources in, docs/objectives-checked.md out: measured here and compared.

Where the page says anything else, the failure names the file that was measured: it is the page.
"""

import math
import re
from pathlib import Path

import pytest
import test_properties as properties
import torch
from fitting import config
from pairs import CONF
from sources import BATCH, PAIR, YAMLS
from test_agreement import differences
from test_peers import AROUND, CASES, SAME, beside_trl, dpo_trainer, trl_parts  # noqa: F401

from spo_lightning.config.objective import check_loss
from spo_lightning.errors import UserError

PAGE = Path(__file__).resolve().parents[2] / "docs/objectives-checked.md"
HEAD = """# All objectives, checked

What `pytest -n 0 -m slow tests/losses/test_checked.py` measured of every loss of
[objectives.md](objectives.md). Differences are the largest of 200 pairs, of numbers above 1 as a
share of them, rounded up to a power of ten; 1e-16 is the last digit of a float64.

- **definition**: the paper's formula in plain Python (`tests/losses/sources.py`), in float64;
  gradients against its differences of the fourth order.
- **TRL 1.16**: its own trainer's loss of that name, token by token. Of those with numbers
  `tests/losses/test_trl.py` also trains ten steps side by side; `tests/losses/test_unpaired.py`
  does so of `kto` and `bco` in plain PyTorch. `exo_pair`'s 1e-07 is TRL's, which keeps the label
  smoothing in float32.
- **does not see**: whose log-probabilities may all be moved by as much, the loss staying.
- **order, parts**: a permuted batch has permuted values, and parts of it the same; or only the
  mean stays, and a batch in parts is refused.
- **finite**: value and gradient, of answers of one token or none, and at margins of 1e4 and 1e5.
- **solvers**: what `solver=` may be; `tests/solvers/test_losses_and_solvers.py` trains them all.

"""
HEADINGS = (
    *("loss", "definition: values", "gradients", "TRL 1.16", "values", "gradients"),
    *("does not see", "order, parts", "finite", "solvers"),
)
# TRL has these in other trainers, which other tests compare with
OTHERS = {
    "cpo": "CPOTrainer: values to 1e-6",
    "simpo": "CPOTrainer: values to 1e-6",
    "orpo": "ORPOTrainer: values to 1e-6",
    "kto": "KTOTrainer: ten steps to 1e-4",
    "apo_zero_unpaired": "KTOTrainer: ten steps to 1e-4",
    "reward": "RewardTrainer: twelve steps to 1e-3",
}
SOLVERS = sorted(path.stem for path in CONF.joinpath("solver").glob("*.yaml"))
# one that was just written has no definition in sources.py yet, and no row
DEFINED = [name for name in YAMLS if name in PAIR or name in BATCH or name == "mixture"]
POWER = re.compile(r"1e-\d\d")


def power(off):
    return f"1e{math.ceil(math.log10(max(off, 1e-16))):03}"


def row(name, trainer):
    """A row of the table; an invariance that does not hold fails the test."""
    sums = ["a sum of its parts", ""]
    defined = sums if name == "mixture" else [*map(power, differences(name))]
    same = next((case for case in SAME if case[1] == name), None)
    theirs = [OTHERS.get(name, ""), "", ""]
    if same is not None:
        theirs = [f"`{same[0]}`", *map(power, beside_trl(trainer, "nothing", *same)[0])]
    properties.test_the_formula_says_what_it_does_not_see(name)
    properties.test_a_permuted_batch_has_permuted_values(name)
    if name in properties.EACH:
        properties.test_microbatches_have_the_values_of_the_batch(name)
    properties.test_answers_of_one_token_or_none(name)
    for dtype in (torch.float32, torch.float64):
        properties.test_finite_far_out(name, dtype)
    order = "the same" if name in properties.EACH else "the mean"
    unseen = ", ".join(it.removesuffix(" by as much") for it in properties.moves(name))
    return [name, *defined, *theirs, unseen, order, "yes", taken(name)]


def taken(name):
    """The solvers that are not refused beside it."""
    found = []
    for solver in SOLVERS:
        try:
            check_loss(config(f"loss={name}", f"solver={solver}"), [])
        except UserError:
            continue
        found.append(solver)
    return "all" if found == SOLVERS else ", ".join(found)


def around(trainer):
    """Rows of what stands around a loss: over all of TRL's that can have it."""
    for kind in AROUND:
        some = [case for case in CASES if case[0] == kind]
        found = [beside_trl(trainer, *case)[0] for case in some]
        yield [kind, len(some), *(power(max(column)) for column in zip(*found))]


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


@pytest.mark.slow
def test_the_page_says_what_is_measured(dpo_trainer, tmp_path):  # noqa: F811
    parts = [
        HEAD + table(HEADINGS, [row(name, dpo_trainer) for name in DEFINED]),
        "`spo` is `dpo` with `solver=penalty`.",
        "What stands around a loss, against TRL 1.16 with the same around its own losses "
        "(`alpha` in float32, as TRL has it):",
        table(("around", "losses", "values", "gradients"), around(dpo_trainer)),
    ]
    measured = tmp_path / PAGE.name
    measured.write_text("\n\n".join(parts) + "\n", "utf-8")
    found, told = (path.read_text("utf-8") for path in (measured, PAGE))
    assert POWER.sub("", found) == POWER.sub("", told), f"the page is now {measured}"
    for one, other in zip(POWER.findall(found), POWER.findall(told), strict=True):
        assert abs(int(one[2:]) - int(other[2:])) <= 1, f"the page is now {measured}"


def test_the_page_has_every_loss():
    assert re.findall(r"^\| (\w+) \| (?:1e|a sum)", PAGE.read_text("utf-8"), re.M) == DEFINED
