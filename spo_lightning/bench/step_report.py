"""The numbers of ``what=step`` in; a line, a markdown table and a picture out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from spo_lightning.bench.table import STYLE, aligned, save, spread

NAMES = {"ours": "ours", "floor": "floor", "trl": "TRL", "liger": "TRL + Liger"}
PEERS = ("trl", "liger")
FLOOR = (
    "floor: a bare forward and backward of the same transformers model over as many unique tokens "
    "(prompt once, both responses), in dense rows without padding or mask (plain causal "
    "attention), the head on exactly as many positions as are scored and all their logits at "
    "once, then the same clipping and AdamW. No Lightning, no preference loss, nothing logged"
)
TRL = (
    "TRL: DPOTrainer with precomputed reference log-probabilities, no gradient checkpointing, no "
    "logging, no saving; padding_free is switched off in this version by TRL itself. It encodes "
    "the prompt once per response. On the CPU it scores every position, prompts included, and "
    "computes entropies with them; on CUDA completions only"
)


def line(cell: Mapping[str, Any]) -> str:
    """One cell in a few words."""
    parts = [f"{NAMES[n]} {1000 * median(s):.1f} ms" for n, s in cell["seconds"].items()]
    if "over_floor" in cell:
        parts.append(f"ours/floor {spread(cell['over_floor'])}")
    for name in PEERS:
        if f"{name}_over" in cell:
            parts.append(f"{NAMES[name]}/ours {spread(cell[f'{name}_over'])}")
    return ", ".join(parts)


def table(numbers: Mapping[str, Any]) -> str:
    """Markdown: times, rates and memory, then what they were measured on and what they mean."""
    at = numbers["setting"]
    names = at["contestants"]
    parts = ["# One outer step of DPO", times(numbers["cells"], names), mean_line(numbers["mean"])]
    parts.append(rates(numbers["cells"], names, at["pairs_per_step"]))
    if any(cell["memory_mib"] for cell in numbers["cells"]):
        parts.append(memory(numbers["cells"], names))
    return "\n\n".join(part for part in (*parts, notes(numbers)) if part) + "\n"


def times(cells: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    head = ["shape", "vocabulary", "unique tokens", "scored"]
    head += [f"{NAMES[name]}, ms" for name in names]
    peers = [name for name in PEERS if name in names]
    head += ["ours / floor"] * ("floor" in names) + [f"{NAMES[n]} / ours" for n in peers]
    head += ["losses differ by"] * bool(peers)
    rows = []
    for cell in cells:
        row = [cell["shape"], cell["vocabulary"]]
        row += [f"{cell['unique_tokens']:.0f}", f"{cell['scored_tokens']:.0f}"]
        row += [f"{1000 * median(cell['seconds'][name]):.1f}" for name in names]
        row += [spread(cell[key], 3) for key in ("over_floor",) if key in cell]
        row += [spread(cell[f"{name}_over"]) for name in peers]
        if peers:
            row.append(f"{cell['trajectory_difference']:.1e}")
        rows.append(row)
    return aligned(head, rows)


def rates(cells: Sequence[Mapping[str, Any]], names: Sequence[str], pairs: int) -> str:
    used = any("utilisation" in cell for cell in cells)
    head = ["shape", "vocabulary", *(f"{NAMES[n]}, pairs/s" for n in names)]
    head += [f"{NAMES[n]}, unique tokens/s" for n in names]
    head += [f"{NAMES[n]}, utilisation" for n in names] * used
    rows = []
    for cell in cells:
        seconds = [median(cell["seconds"][name]) for name in names]
        row = [cell["shape"], cell["vocabulary"], *(f"{pairs / s:.2f}" for s in seconds)]
        row += [f"{cell['unique_tokens'] / s:.0f}" for s in seconds]
        row += [f"{cell['utilisation'][name]:.3f}" for name in names] if used else []
        rows.append(row)
    return aligned(head, rows)


def memory(cells: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    head = ["shape", "vocabulary"]
    head += [f"{NAMES[n]}, MiB" for n in names]
    head += ["ours / TRL"] * ("trl" in names)
    rows = []
    for cell in cells:
        row = [cell["shape"], cell["vocabulary"]]
        row += [f"{cell['memory_mib'][name]:.0f}" for name in names]
        if "trl" in names:
            ratio = cell.get("memory_over_trl")
            row.append("" if ratio is None else f"{ratio:.2f}")
        rows.append(row)
    return aligned(head, rows)


def mean_line(mean: Mapping[str, float]) -> str:
    parts = []
    if "over_floor" in mean:
        parts.append(
            f"Ours over the floor: geometric mean {mean['over_floor']:.3f}, "
            f"at most {mean['over_floor_worst']:.3f} in a cell."
        )
    for name in PEERS:
        if f"{name}_over" in mean:
            parts.append(
                f"{NAMES[name]} over ours: geometric mean {mean[f'{name}_over']:.2f}, "
                f"at least {mean[f'{name}_over_worst']:.2f} in a cell."
            )
    return " ".join(parts)


def notes(numbers: Mapping[str, Any]) -> str:
    at = numbers["setting"]
    sizes = sorted({cell["parameters"] for cell in numbers["cells"]})
    versions = ", ".join(f"{name} {number}" for name, number in at["versions"].items())
    lines = [
        f"{at['device']}, {at['threads']} threads, {at['precision']}; {versions}",
        f"{' to '.join(f'{size:,}' for size in dict.fromkeys((sizes[0], sizes[-1])))} parameters, "
        f"{at['pairs_per_step']} pairs per step, the same pairs in the same order",
        f"time: {at['steps']} steps after {at['warmup']}, median of {at['repetitions']} rounds "
        "(least..most); ratios within a round. From the batch at hand to the weights moved",
        "unique tokens: prompt once, both responses; rates count those, for every contestant",
    ]
    if at["train"]:
        lines.append(f"ours with {' '.join(at['train'])}")
    if any(cell["trajectory_difference"] is not None for cell in numbers["cells"]):
        lines.append(
            f"losses differ by: the largest difference over the first {at['trajectory']} steps "
            f"(above {at['tolerance']:g} the measurement ends)"
        )
    if any(cell["memory_mib"] for cell in numbers["cells"]):
        lines.append(
            "memory: the peak above what was in use before the first step (weights and data; "
            "gradients and the optimizer's memory count)"
            + ", in a process each"
            * (at["device"] == "cpu")
        )
    lines += [FLOOR] * ("floor" in at["contestants"]) + [TRL] * ("trl" in at["contestants"])
    for name in at["left_out"]:
        lines.append(f"{NAMES[name]} is left out: it is not installed here")
    return "\n".join(f"- {text}" for text in lines)


# -- the picture


def picture(numbers: Mapping[str, Any], directory: Path) -> list[Path]:
    """step.svg and step.png: a row per ratio, a panel per shape, a dot with extremes per cell."""
    import matplotlib
    from matplotlib.figure import Figure

    found = numbers["cells"]
    rows = [kind for kind in ROWS if any(kind[0] in cell for cell in found)]
    shapes = list(dict.fromkeys(cell["shape"] for cell in found))
    if not rows:
        return []
    with matplotlib.rc_context(STYLE):
        size = (1.6 + 2.2 * max(2, len(shapes)), 0.8 + 1.9 * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(rows), len(shapes), squeeze=False, sharex=True, sharey="row")
        for (key, label, colour, marks), across in zip(rows, panels):
            for shape, axes in zip(shapes, across):
                mine = [cell for cell in found if cell["shape"] == shape and key in cell]
                dots(axes, mine, key, colour)
                for level in marks:
                    axes.axhline(level, color="#888888", linewidth=0.8, linestyle="--")
            across[0].set_ylabel(label)
            low, high = across[0].get_ylim()
            across[0].set_ylim(min(low, 0.0 if key != "over_floor" else 0.95), high * 1.06)
        for shape, axes in zip(shapes, panels[0]):
            axes.set_title(shape)
        for axes in panels[-1]:
            axes.set_xlabel("vocabulary")
        figure.suptitle("One outer step of DPO: median and extremes of the rounds")
        return save(figure, directory, "step")


# what is drawn, its label, its colour and the levels to compare with
ROWS = (
    ("over_floor", "time, ours / floor", "#0072B2", (1.0, 1.1)),
    ("trl_over", "time, TRL / ours", "#D55E00", (1.0,)),
    ("liger_over", "time, TRL + Liger / ours", "#CC79A7", (1.0,)),
    ("memory_over_trl", "memory, ours / TRL", "#009E73", (1.0,)),
)


def dots(axes: Any, cells: Sequence[Mapping[str, Any]], key: str, colour: str) -> None:
    """A dot per vocabulary, with its value beside it."""
    for place, cell in enumerate(cells):
        value = cell[key]
        whole = value if isinstance(value, dict) else {name: value for name in ENDS}
        middle = whole["median"]
        bars = [[middle - whole["min"]], [whole["max"] - middle]]
        axes.errorbar(place, middle, bars, fmt="o", color=colour, capsize=3, markersize=5)
        axes.annotate(
            f"{middle:.2f}", (place, middle), xytext=(6, 3), textcoords="offset points", size=8
        )
    axes.set_xticks(range(len(cells)), [thousands(cell["vocabulary"]) for cell in cells])
    axes.set_xlim(-0.5, max(len(cells), 1) - 0.3)


ENDS = ("median", "min", "max")


def thousands(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count:,}"
