"""What tree.json holds in, its page out, in the look of the reports."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from spo_lightning.report.charts import GREY, Chart, axes, series
from spo_lightning.report.page import Block, Browsed, Lines, Note, Section, Table, Text, page
from spo_lightning.report.style import COLOURS

NAME = "tree.html"
SEEN = 600  # letters of a text that stand open
TREE = (
    "Every prompt that was tried, over the steps; a line leads from each to those made of it. "
    "Full: it went on. Open: it was left. The value is the mean score of the path from the start, "
    "or with a beam of 1 the last score."
)
NODES = (
    "Aspects: mean scores over the step's questions. Against the prompt that it was made of, new "
    "words are marked, words that went are struck out."
)
MENU = {"beam": "went on", "left": "left", "best": "on the way to the best"}
Record = Mapping[str, Any]


def whole(record: Record) -> str:
    """The file."""
    return page("Prompt search", sections(record))


def sections(record: Record) -> list[Section]:
    """The prompt, what it is worth, the tree, and what it took."""
    nodes = record["nodes"]
    calls = [[role, *of.values()] for role, of in record.get("calls", {}).items()]
    head = ["role", "calls", "tokens read", "tokens written", "dollars"]
    cost = Section("Calls", [Table("calls", head, calls)] if calls else [])
    if not nodes:
        why = record["stopped"] or "running"
        return [Section("Prompt", [Note(f"No prompt has been tried yet ({why}).")]), cost]
    way = way_to(nodes, record["best"])
    start, best = nodes[0], nodes[record["best"]]
    blocks: list[Block] = (
        []
        if record["stopped"] is None
        else [
            Note(f"The budget is spent ({record['stopped']}): this is what there was.", alarm=True)
        ]
    )
    blocks += [
        Lines(f"Start: score {start['reward']:.3f}", Text([(start["prompt"], "", "")])),
        Lines(
            f"Best, at step {best['depth']}: value {best['value']:.3f}, score "
            f"{best['reward']:.3f}",
            Text(changes(start["prompt"], best["prompt"])),
        ),
    ]
    return [
        Section("Prompt", blocks, "New words against the start are marked."),
        Section("On questions that were set apart", check(record["check"])),
        Section("Tree", [drawn(nodes, way)], TREE),
        Section("Prompts that were tried", [table(nodes, way)], NODES),
        Section("Answers on the way to the best", [answers(nodes, way)]),
        cost,
    ]


def way_to(nodes: Sequence[Record], number: int) -> list[int]:
    """From the start to a node."""
    found = [number]
    while (parent := nodes[found[0]]["parent"]) is not None:
        found.insert(0, parent)
    return found


def check(found: Mapping[str, Record] | None) -> list[Block]:
    """Start, best and random prompt, with 95% intervals over questions."""
    told = {name: of for name, of in (found or {}).items() if of["rows"]}
    rows = []
    for name, of in told.items():
        moved = of["against_start"]
        rows.append(
            [name, of["rows"], of["score"], of["low"], of["high"]]
            + ([moved[key] for key in ("difference", "low", "high")] if name != "start" else [])
        )
    head = ["prompt", "questions", "score", "low", "high", "against the start", "low", "high"]
    return [Table("check", head, [[*row, *[None] * (8 - len(row))] for row in rows])] * bool(rows)


def drawn(nodes: Sequence[Record], way: Sequence[int]) -> Chart:
    """Value over steps."""
    data = []
    for node in nodes:
        if node["parent"] is not None:
            ends = (nodes[node["parent"]], node)
            on = node["number"] in way
            x, y = [end["depth"] for end in ends], [end["value"] for end in ends]
            data.append(series("", x, y, colour=COLOURS[0] if on else GREY))
    for label, mark, some in (
        ("went on", "circle", [node for node in nodes if node["in_beam"]]),
        ("left", "circle-open", [node for node in nodes if not node["in_beam"]]),
    ):
        x, y = [node["depth"] for node in some], [node["value"] for node in some]
        texts = [f"{node['number']}: {node['prompt']}" for node in some]
        data.append(series(label, x, y, "markers", mark=mark, texts=texts))
    return Chart("tree", "Prompts", data, axes("step", "value") | {"showlegend": False}, 420)


def table(nodes: Sequence[Record], way: Sequence[int]) -> Browsed:
    """A row per prompt."""
    rows, marks = [], []
    for node in nodes:
        of = node["parent"]
        before = "" if of is None else nodes[of]["prompt"]
        told = "\n".join(f"{name} {score:.2f}" for name, score in aspects(node).items())
        rows.append(
            [
                *(node["number"], of, node["depth"], node["how"]),
                *(float(node["reward"]), float(node["value"])),
                Text([(told, "", "")]),
                Text(changes(before, node["prompt"])),
            ]
        )
        on = "best" if node["number"] in way else ""
        marks.append(f"{'beam' if node['in_beam'] else 'left'} {on}")
    head = ["", "made of", "step", "how", "score", "value", "aspects", "prompt"]
    return Browsed("nodes", head, rows, marks, MENU, digits=3)


def aspects(node: Record) -> dict[str, float]:
    """Mean scores over the cases in which an aspect mattered."""
    found: dict[str, list[float]] = {}
    for case in node["cases"]:
        for name, score in case["aspects"].items():
            found.setdefault(name, []).append(score)
    return {name: sum(of) / len(of) for name, of in sorted(found.items())}


def answers(nodes: Sequence[Record], way: Sequence[int]) -> Table:
    """What the base answered under the prompts of the path."""
    rows = [
        [
            *(node["number"], folded(case["prompt"]), folded(case["answer"]), case["score"]),
            folded("\n".join(judged(case))),
        ]
        for node in (nodes[number] for number in way)
        for case in node["cases"]
    ]
    return Table("cases", ["prompt", "question", "answer", "score", "judged"], rows, digits=2)


def judged(case: Record) -> list[str]:
    return [f"{k} {v:g} {case['reasons'].get(k, '')}".strip() for k, v in case["aspects"].items()]


def changes(before: str, after: str) -> list[tuple[str, str, str]]:
    """The second text in pieces, with what it has not of the first; word by word."""
    if not before:
        return [(after, "", "")]
    mine, theirs = (re.findall(r"\s+|\S+", text) for text in (before, after))
    found = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, mine, theirs, False).get_opcodes():
        if tag != "equal" and a < b:
            found.append(("".join(mine[a:b]), "gone", "before"))
        if c < d:
            new = tag != "equal"
            found.append(("".join(theirs[c:d]), "scored" if new else "", "new" if new else ""))
    return found


def folded(text: str) -> Text:
    return Text([(text[:SEEN], "", "")], [(text[SEEN:], "", "")] if len(text) > SEEN else ())


def told(record: Record) -> str:
    """The same in a few lines."""
    nodes = record["nodes"]
    lines = [] if record["stopped"] is None else [f"stopped by {record['stopped']}"]
    if nodes:
        start, best = nodes[0], nodes[record["best"]]
        lines.append(f"{len(nodes)} prompts tried in {nodes[-1]['depth']} steps")
        lines.append(f"start  {start['reward']:.4f}")
        lines.append(
            f"best   {best['reward']:.4f} (value {best['value']:.4f})\n\n{best['prompt']}"
        )
    for name, of in (record["check"] or {}).items():
        if of["rows"]:
            interval = f"{of['low']:.4f} to {of['high']:.4f}"
            lines.append(
                f"set apart, {name}: {of['score']:.4f} ({interval}), {of['rows']} questions"
            )
    return "\n".join(lines)
