"""What preflight.json holds in, its page out, in the look of the reports."""

from collections.abc import Mapping, Sequence
from typing import Any

from spo_lightning.report.charts import GREY, histogram, lines, series
from spo_lightning.report.page import Block, Note, Section, Table, Text, page

SEEN = 400  # letters of a text that stand open
SPLIT = (
    "Nats, means over the pairs, half the 95% interval beside. First order: the gradient of "
    "log pi(y_w) at the start times the step taken; the rest is what no gradient sees. Random: a "
    "step as long in every tensor, the price of moving at all. Margin: log pi(y_w) - log pi(y_l). "
    "Each pilot starts anew, on the pairs that come next; held: their mean; the others: the first."
)
WEIGHTS = (
    "A pilot each, on the first one's pairs: what it does to held-out pairs, nats, corrected by "
    "how the run's own differ from their first. Weight 0 is the run without. Foreseen: what is "
    "likely. A weight holds them whose mean is above half its 95% interval, and that above 0."
)
GEOMETRY = (
    "Gradients of log pi(y_w) and log pi(y_l) of training pairs. Overlap is their product over "
    "the square of the first: above 1 a pair's own step lowers its chosen answer (own condition)."
)
RISK = (
    "Held-out pairs, those first that the pilots took most from. Measured: the nats by which "
    "log pi(y_w) changed, the pilots' mean, which ranked the ends of real runs best. Score: by "
    "how many it would, to first order, in a step of the training pairs' mean gradient, scaled "
    "as AdamW's."
)
PILOT = ("mean", "half", "displaced", "margin")
RISKY = ("row", "measured", "score", "ches")


def whole(found: Mapping[str, Any]) -> str:
    """The file."""
    return page("Preflight", sections(found))


def sections(found: Mapping[str, Any]) -> list[Section]:
    """The advice, what it rests on, and the pairs."""
    ahead = found["foreseen"]
    low, high = ahead["displaced"]
    said = (
        f"At step {ahead['step']} of {found['steps']}: {ahead['mean']:+.3g} nats "
        f"({ahead['low']:+.3g} to {ahead['high']:+.3g}), {low:.0%} to {high:.0%} of held-out "
        "pairs displaced. Beyond that step the pilot says nothing."
    )
    alarm = min(found["sides"]["held"]["mean"], ahead["mean"]) < 0
    head = (*PILOT, "first", "rest", "random")
    sides = [{"pairs": name} | one for name, one in found["sides"].items()]
    changes = [pair["measured"] for pair in found["pairs"]]
    after = histogram(
        "changes", "Held-out pairs after the pilots", "change of log pi(y_w), nats", {"": changes}
    )
    risk = Table("pairs", [*RISKY, "prompt", "chosen", "rejected"], risky(found["pairs"]))
    return [
        Section("Advice", [Note(found["advice"], alarm=alarm), Note(said)]),
        Section(
            f"Pilots of {found['pilot_steps']} steps",
            [
                columns("pilot", ("pairs", *head), sides),
                columns("each", ("pilot", *PILOT), found["pilots"]),
                after,
            ],
            SPLIT,
        ),
        Section("Weights of the solver", weights(found["weights"]), WEIGHTS),
        Section("Geometry", geometry(found), GEOMETRY),
        Section("Pairs most at risk", [risk], RISK),
        Section("Cost", [Table("cost", ["", ""], cost(found), digits=1)]),
    ]


def columns(key: str, head: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table(key, head, [[row[name] for name in head] for row in rows])


def weights(tried: Sequence[Mapping[str, Any]]) -> list[Block]:
    if not tried:
        return []
    x = [one["weight"] for one in tried]
    drawn = [
        series(name, x, [one[key] for one in tried], "lines+markers", **how)
        for name, key, how in (
            ("log pi(y_w)", "mean", {}),
            ("margin", "margin", {"colour": GREY, "dash": "dot"}),
        )
    ]
    title = "Mean change of held-out pairs after the pilot"
    return [
        columns("weights", ("weight", *PILOT, "foreseen"), tried),
        lines("weight", title, "solver.weight", "nats", drawn),
    ]


def geometry(found: Mapping[str, Any]) -> list[Block]:
    means = [[name, value] for name, value in found["geometry"].items()]
    rank = ["rank correlation of score and pilot, held out", found["ranking"]]
    cosines = [pair["cosine"] for pair in found["sample"]]
    return [
        Table("geometry", ["mean of", ""], [*means, rank]),
        histogram("cosine", "Gradients of a pair's two answers", "cosine", {"": cosines}),
    ]


def risky(pairs: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    return [
        [
            *(pair[name] for name in RISKY),
            Text([(pair["prompt"][-SEEN:], "", "")], [(pair["prompt"][:-SEEN], "", "")], True),
            *(
                Text([(pair[name][:SEEN], "", "")], [(pair[name][SEEN:], "", "")])
                for name in ("chosen", "rejected")
            ),
        ]
        for pair in sorted(pairs, key=lambda pair: pair["measured"])
    ]


def cost(found: Mapping[str, Any]) -> list[list[Any]]:
    costs = [[f"{name}, s", value] for name, value in found["seconds"].items()]
    return [*costs, ["a step of the run at its peak, MiB", found["mib"]]]
