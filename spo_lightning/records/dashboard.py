"""The numbers that runs log in, a W&B workspace and a sweep report that show them out."""

import json
from typing import Any

STEP = "trainer/global_step"  # our outer step, under Lightning's name
# section -> panels: title, what is drawn over the step
LINES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "Probability evolution": (
        ("Chosen and rejected, nats", ("train/logps/chosen", "train/logps/rejected")),
        ("Chosen and rejected held out, nats", ("eval/logps/chosen", "eval/logps/rejected")),
        ("Probability on the ten likeliest tokens", ("eval/mass/top10",)),
        ("Entropy of the ten likeliest tokens, bits", ("eval/entropy/top10",)),
    ),
    "Displacement": (
        (
            "Share of pairs whose chosen answer lost probability",
            ("train/displacement/rate", "eval/displacement/rate"),
        ),
        (
            "Change of log pi(y_w), nats",
            ("train/displacement/chosen", "eval/displacement/chosen"),
        ),
        ("Alarm", ("train/displacement/alarm",)),
    ),
    "Rewards": (
        ("Rewards", ("train/rewards/chosen", "train/rewards/rejected")),
        ("Margin", ("train/rewards/margins", "eval/rewards/margins")),
        ("Share of pairs told apart", ("train/rewards/accuracies", "eval/rewards/accuracies")),
    ),
    "Levels": (
        ("Upper level", ("train/loss", "train/loss/upper")),
        ("Lower level, nats per token", ("train/loss/lower", "train/solver/value")),
        ("Weight", ("train/solver/weight",)),
        ("Violation, nats per token", ("train/solver/violation",)),
        ("Gradient norm", ("train/grad_norm",)),
    ),
    "Held out": (("NLL of the chosen, nats per token", ("eval/nll/chosen", "train/nll/chosen")),),
    "Throughput": (("Tokens per second", ("train/time/tokens_per_second",)),),
}
# numbers of a finished run, before and after
HELD_OUT = ("exact_match", "win_rate", "nll/chosen", "displacement/chosen", "displacement/rate")
GRID = ("loss.beta", "solver.weight")  # settings that a sweep varies
SAMPLES, HISTOGRAM = "samples", "displacement/pairs"


def definitions(project: str, entity: str) -> dict[str, Any]:
    """Workspace and report as W&B would be sent them."""
    both = {"workspace": workspace(project, entity), "report": report(project, entity)}
    return {
        name: json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True))
        for name, made in both.items()
    }


def names() -> set[str]:
    """Every metric that a panel shows."""
    lines = {name for panels in LINES.values() for _, drawn in panels for name in drawn}
    return lines | {STEP, SAMPLES, HISTOGRAM} | {f"final/{name}" for name in HELD_OUT}


def workspace(project: str, entity: str | None) -> Any:
    """A section per question, a panel per number."""
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name=title, panels=lines(panels), is_open=number < 2)
        for number, (title, panels) in enumerate(LINES.items())
    ]
    sections.append(ws.Section(name="Before and after", panels=held_out(), is_open=True))
    sections.append(ws.Section(name="beta by weight", panels=grid()))
    sections.append(ws.Section(name="Samples", panels=texts()))
    return ws.Workspace(
        entity=entity or default_entity(),
        project=project,
        name="spo_lightning",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=STEP),
    )


def report(project: str, entity: str | None) -> Any:
    """One page of a sweep: the grid first, then the curves."""
    import wandb_workspaces.reports.v2.interface as wr

    whose = entity or default_entity()
    runs = [wr.Runset(entity=whose, project=project)]
    blocks: list[Any] = []
    for title, panels in (
        ("beta by weight", grid()),
        ("Before and after", held_out()),
        *((title, lines(drawn)) for title, drawn in LINES.items()),
        ("Samples", texts()),
    ):
        blocks += [wr.H2(title), wr.PanelGrid(runsets=runs, panels=panels)]
    named = "Sweep: capability, preference and displacement"
    return wr.Report(project=project, entity=whose, title=named, blocks=blocks, width="fluid")


def lines(panels: Any) -> list[Any]:
    import wandb_workspaces.reports.v2.interface as wr

    return [wr.LinePlot(title=title, x=STEP, y=list(drawn)) for title, drawn in panels]


def held_out() -> list[Any]:
    import wandb_workspaces.reports.v2.interface as wr

    return [
        wr.BarPlot(title=f"{name}, final", metrics=[wr.SummaryMetric(f"final/{name}")])
        for name in HELD_OUT
    ]


def grid() -> list[Any]:
    """A point per run at its beta and weight, coloured by what it came to."""
    import wandb_workspaces.reports.v2.interface as wr

    beta, weight = (wr.Config(name) for name in GRID)
    found: list[Any] = [
        wr.ScatterPlot(
            title=f"{name} over beta and weight",
            x=beta,
            y=weight,
            z=wr.SummaryMetric(f"final/{name}"),
            log_x=True,
            log_y=True,
        )
        for name in HELD_OUT
    ]
    ends = [wr.SummaryMetric(f"final/{name}") for name in HELD_OUT]
    columns = [wr.ParallelCoordinatesPlotColumn(metric=one) for one in (beta, weight, *ends)]
    return [*found, wr.ParallelCoordinatesPlot(columns=columns)]


def texts() -> list[Any]:
    """Answers before and after, and how far each pair moved."""
    import wandb_workspaces.reports.v2.interface as wr

    return [
        wr.WeavePanelSummaryTable(table_name=SAMPLES),
        wr.MediaBrowser(title="Change of log pi(y_w) per pair", media_keys=[HISTOGRAM]),
    ]


def default_entity() -> str:
    from spo_lightning.records.loggers import has_login

    if not has_login():
        return ""
    import wandb

    return wandb.Api().default_entity or ""
