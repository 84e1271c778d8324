"""What preflight.json holds in, its page out, in the look of the reports."""

from collections.abc import Mapping
from typing import Any

from spo_lightning.report.charts import histogram, lines, series
from spo_lightning.report.page import Note, Section, Table, Text, page

SEEN = 400  # letters of a text that stand open
SPLIT = (
    "Nats. First order is the gradient of log pi(y_w) at the start times the step taken; the rest "
    "is what no gradient sees. Random: a step as long in every tensor, the price of moving at all."
)
RISK = "Lowest score first: the change of log pi(y_w) per unit of lr that one step would bring."


def whole(found: Mapping[str, Any]) -> str:
    """The file."""
    return page("Preflight", sections(found))


def sections(found: Mapping[str, Any]) -> list[Section]:
    """The advice, what it rests on, and the pairs."""
    ahead = found["foreseen"]
    low, high = ahead["displaced"]
    said = (
        f"At step {ahead['step']} of {found['steps']}: {ahead['mean']:+.2f} nats "
        f"({ahead['low']:+.2f} to {ahead['high']:+.2f}), {low:.0%} to {high:.0%} of held-out "
        "pairs displaced. Beyond that step the pilot says nothing."
    )
    head = ("mean", "half", "displaced", "first", "rest", "random")
    sides = [[name, *(one[key] for key in head)] for name, one in found["sides"].items()]
    pilots = Table("pilot", ["pairs", *head], sides)
    costs = [[name, value] for name, value in found["seconds"].items()]
    costs.append(["memory at the peak, MiB", found["memory_mib"]])
    alarm = found["sides"]["held"]["mean"] < 0
    return [
        Section("Advice", [Note(found["advice"], alarm=alarm), Note(said)]),
        Section(f"A pilot of {found['pilot_steps']} steps", [pilots, drawn(found)], SPLIT),
        Section("Weights of the solver", weights(found)),
        Section("Geometry", [Table("geometry", ["mean of", ""], geometry(found))]),
        Section("Pairs most at risk", [Table("pairs", HEAD, rows(found))], RISK),
        Section("Cost", [Table("cost", ["seconds of", ""], costs, digits=1)]),
    ]


def drawn(found: Mapping[str, Any]) -> Any:
    changes = [pair["measured"] for pair in found["pairs"]]
    title, x = "Held-out pairs after the pilot", "change of log pi(y_w), nats"
    return histogram("changes", title, x, {"held out": changes})


def weights(found: Mapping[str, Any]) -> list[Any]:
    tried = found["weights"]
    if not tried:
        return []
    x, y = ([one[key] for one in tried] for key in ("weight", "mean"))
    line = [series("held out", x, y, "lines+markers")]
    head = ("weight", "mean", "half", "displaced")
    return [
        Table("weights", head, [[one[key] for key in head] for one in tried]),
        lines("weight", "Mean change of held-out log pi(y_w)", "solver.weight", "nats", line),
    ]


def geometry(found: Mapping[str, Any]) -> list[list[Any]]:
    rank = [["rank correlation of score and pilot, held out", found["ranking"]]]
    return [[name, value] for name, value in found["geometry"].items()] + rank


HEAD = ("row", "score", "ches", "measured", "prompt", "chosen", "rejected")


def rows(found: Mapping[str, Any]) -> list[list[Any]]:
    return [
        [
            *(pair[name] for name in HEAD[:4]),
            Text([(pair["prompt"][-SEEN:], "", "")], [(pair["prompt"][:-SEEN], "", "")], True),
            *(
                Text([(pair[name][:SEEN], "", "")], [(pair[name][SEEN:], "", "")])
                for name in HEAD[5:]
            ),
        ]
        for pair in found["pairs"]
    ]
