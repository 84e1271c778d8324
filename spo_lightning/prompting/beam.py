"""A start and questions in, a tree of prompts out: beam search, step by step.

What it knows of models are two functions: ``rewritten`` proposes prompts in a node's place, and
``judged`` says how a prompt's answers to some questions do. Singla et al. 2411.08733, algorithm 2;
where that leaves something open, what is done is written in docs/prompt-search.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.judges.dynamic import Verdict


@dataclass(frozen=True)
class Case:
    """A question, its answer under a prompt, and what the judge says of that."""

    prompt: str
    answer: str
    verdict: Verdict


@dataclass(frozen=True)
class Node:
    """A prompt that was tried. ``how``: start, kept or rewritten. ``in_beam``: it went on."""

    number: int
    parent: int | None
    depth: int
    how: str
    prompt: str
    reward: float  # mean score of its cases
    path: tuple[float, ...]  # rewards from the start to here
    value: float
    cases: tuple[Case, ...]
    in_beam: bool = False

    def told(self) -> dict[str, Any]:
        """As tree.json has it."""
        cases = [
            {"prompt": one.prompt, "answer": one.answer, **one.verdict._asdict()}
            for one in self.cases
        ]
        return asdict(self) | {"path": list(self.path), "cases": cases}


@dataclass(frozen=True)
class Shape:
    """The search's keys of the same names."""

    actions: int
    beam: int
    depth: int
    questions: int
    enough: float | None


Judged = Callable[[Sequence[str], Sequence[dict]], list[tuple[Case, ...]]]
Rewritten = Callable[[Sequence[tuple[Node, ...]]], list[list[str]]]


def search(
    start: str,
    rows: Sequence[dict],
    shape: Shape,
    rewritten: Rewritten,
    judged: Judged,
    tree: list[Node],
    note: Callable[[], None],
) -> None:
    """Grow ``tree``, the start first; ``note`` is called after each step that is whole."""

    def tried(some: Sequence[tuple[Node | None, str, str]], depth: int) -> list[Node]:
        """New nodes, (parent, how, prompt) each, that all answer the step's questions."""
        first = depth * shape.questions
        asked = [rows[(first + n) % len(rows)] for n in range(min(shape.questions, len(rows)))]
        found: list[Node] = []
        for (parent, how, prompt), cases in zip(some, judged([p for *_, p in some], asked)):
            reward = mean([c.verdict.score for c in cases if c.verdict.score is not None])
            if reward is None:  # nobody can say how good it is
                continue
            path = (*(parent.path if parent else ()), reward)
            value = sum(path) / len(path) if shape.beam > 1 else reward
            of = None if parent is None else parent.number
            number = len(tree) + len(found)
            found.append(Node(number, of, depth, how, prompt, reward, path, value, cases))
        return found

    roots = tried([(None, "start", start)], 0)
    if not roots:
        raise UserError("the judge scores no answer to the first questions: see calls.jsonl")
    tree += chosen(roots, 1)
    note()
    for depth in range(1, shape.depth + 1):
        beam = beam_of(tree)
        open_, kept = split(beam, shape.enough)
        proposed = rewritten([line(tree, node) for node in open_]) if open_ else []
        some = [(node, "kept", node.prompt) for node in kept]
        for node, prompts in zip(open_, proposed):
            some += [(node, "rewritten", prompt) for prompt in prompts] or [
                (node, "kept", node.prompt)  # no proposal could be read
            ]
        tree += chosen(tried(some, depth), shape.beam)
        note()


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def beam_of(tree: Sequence[Node]) -> list[Node]:
    """The nodes that go on: of the deepest step that has some."""
    deepest = max(node.depth for node in tree if node.in_beam)
    return sorted(
        (node for node in tree if node.depth == deepest and node.in_beam),
        key=lambda node: (-node.value, node.number),
    )


def split(beam: Sequence[Node], enough: float | None) -> tuple[list[Node], list[Node]]:
    """Those that are rewritten, and those that are good enough to stay as they are."""
    stays = [enough is not None and node.reward > enough for node in beam]
    return (
        [node for node, kept in zip(beam, stays) if not kept],
        [node for node, kept in zip(beam, stays) if kept],
    )


def chosen(nodes: Sequence[Node], size: int) -> list[Node]:
    """The same nodes, the ``size`` best by value in the beam; one text is not in it twice."""
    best: dict[str, Node] = {}
    for node in sorted(nodes, key=lambda node: (-node.value, node.number)):
        best.setdefault(node.prompt, node)
    numbers = {node.number for node in [*best.values()][:size]}
    return [replace(node, in_beam=node.number in numbers) for node in nodes]


def line(tree: Sequence[Node], node: Node) -> tuple[Node, ...]:
    """From the start to the node."""
    found = [node]
    while found[0].parent is not None:
        found.insert(0, tree[found[0].parent])
    return tuple(found)


def best_of(tree: Sequence[Node]) -> Node:
    """The end of the path with the highest value."""
    return beam_of(tree)[0]
