"""Rows as somebody published them in, rows in the normal form out.

A layout is a function of one row and a yaml in ``conf/data/layout`` (``known``). ``recognised``
chooses it by the columns and the kinds of their values in all rows (``columns``), ``made`` applies
it: the functions stand in ``given``, ``compared`` and ``single``, the normal form in ``normal``.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from spo_lightning.data.labels import on_its_side
from spo_lightning.data.layouts import known
from spo_lightning.data.layouts.compared import check_numbers
from spo_lightning.data.layouts.file import Asked, File, file_of
from spo_lightning.data.layouts.known import LABELLED, PAIRS, TEXTS, Found, Layout
from spo_lightning.data.layouts.normal import normal
from spo_lightning.data.layouts.refusals import no_layout, odd_row, passed_over
from spo_lightning.data.layouts.single import ALONE, paired
from spo_lightning.data.layouts.turns import LeftOut
from spo_lightning.data.rows import Dropped, Row, Rows
from spo_lightning.errors import UserError

COMPARED = (PAIRS, LABELLED)  # what a pair objective can train on
EXAMPLES = 3  # rows of each reason that are kept to be shown


@dataclass(frozen=True)
class Made:
    """Rows in the normal form, each with the place of the raw one; what became of the others."""

    layout: Layout
    rows: list[Row]
    places: list[int]
    labelled: list[Row]  # where pairs were made of them: all
    dropped: dict[str, Dropped]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Fit:
    """How a layout fits a file."""

    layout: Layout
    covered: int  # rows that have all it needs
    explained: float  # columns that it reads in one of them, on average
    exact: float  # of those, columns of the very kind it asks for
    odd: int | None  # the first row that lacks something

    @property
    def rank(self) -> tuple[float, float]:
        return round(self.explained, 6), round(self.exact, 6)


def recognised(file: File, gives: Sequence[str] = (PAIRS, LABELLED, TEXTS)) -> Layout:
    """The layout that explains most columns, over all rows; one that some rows lack is refused."""
    fits = [
        _fit(layout.settled(file.groups, file.asked.columns), file)
        for layout in known.layouts().values()
        if layout.gives in gives and file.asked.columns.keys() <= layout.roles.keys()
    ]
    most = sorted((fit for fit in fits if 2 * fit.covered >= len(file.rows)), key=lambda f: f.rank)
    whole = [fit for fit in most if not fit.layout.passed_over(file.groups)]
    if most and not whole:
        raise UserError(passed_over(most[-1].layout, file))
    if not most:
        raise UserError(no_layout(file, [fit.layout for fit in fits]))
    most, best = whole, whole[-1]
    if file.asked.separator is not None:  # of those that read as much, the one that it is for
        as_much = [fit for fit in most if fit.rank[0] == best.rank[0]]
        best = next((fit for fit in as_much if fit.layout.asks("separator")), best)
    if best.odd is not None:
        raise UserError(odd_row(best.layout, file, best.odd))
    alike = [fit.layout.name for fit in most if fit.rank == best.rank and fit.odd is None]
    if len(alike) > 1:
        raise UserError(
            f"{file.path}: its columns fit the layouts {' and '.join(alike)} equally well: choose "
            f"one, data.layout={alike[0]}"
        )
    return best.layout


def fitting(file: File, layout: Layout, gives: Sequence[str]) -> Layout:
    """The layout itself, if all rows fit it, else the one that is recognised."""
    own = known.layouts()[layout.name].settled(file.groups, file.asked.columns)
    return own if _fit(own, file).odd is None else recognised(file, gives)


def forced(file: File, name: str) -> Layout:
    """The layout that ``data.layout`` names."""
    layouts = known.layouts()
    if name not in layouts:
        raise UserError(f"data.layout={name}: no such layout: choose one of {', '.join(layouts)}")
    layout = layouts[name]
    for role in file.asked.columns:
        if role not in layout.roles:
            has = ", ".join(layout.roles)
            raise UserError(f"data.columns.{role}: layout {name} has no such role: it has {has}")
    return layout.settled(file.groups, file.asked.columns)


def _fit(layout: Layout, file: File) -> _Fit:
    covered, explained, exact, odd = 0, 0, 0, None
    for kinds, count, place in file.groups:
        found, lacks = layout.found(kinds)
        if lacks:
            odd = place if odd is None else odd
            continue
        covered += count
        explained += count * sum(len(column.paths) for column in found.values())
        exact += count * sum(len(column.paths) for column in found.values() if column.exact)
    return _Fit(layout, covered, explained / max(1, covered), exact / max(1, covered), odd)


def made(file: File, layout: Layout) -> Made:
    """The layout applied to all rows; labelled ones become pairs, where they are asked for."""
    asked = {k: v for k, v in vars(file.asked).items() if layout.asks(k)}
    odd = _fit(layout, file).odd
    if odd is not None:
        raise UserError(odd_row(layout, file, odd))
    found = {id(k): layout.found(k)[0] for k, _, _ in file.groups}
    rows, places, said, left = [], [], Counter(), {}
    for place, roles in _read(file, layout, found):
        raw = file.rows[place]
        try:
            parts = layout.function(roles, **asked)
        except LeftOut as reason:
            left.setdefault(str(reason), []).append(place)
            continue
        except UserError as error:
            raise UserError(f"{file.name(place)}: {error}") from None
        for part in parts:
            said.update(part.pop("said", ()))
            rows.append(normal(part, raw, file.name(place)))
            places.append(place)
    whole: list[Row] = []
    if layout.gives == LABELLED and not file.asked.unpaired:
        whole = rows
        found_pairs, alone = paired(whole)
        if alone:
            left[ALONE] = [places[place] for place in alone]
        places = [places[place] for place in found_pairs]
        rows = list(found_pairs.values())
    dropped = {reason: _dropped(file, at) for reason, at in left.items()}
    pairs = layout.gives == PAIRS or bool(whole)
    notes = (_line(file, layout, found, rows, pairs), *_told(said, dropped, pairs))
    return Made(layout, rows, places, whole, dropped, notes)


def _read(file: File, layout: Layout, found: Mapping[int, Found]) -> list[tuple[int, Row]]:
    """The roles of every row, and its place; of rows that are gathered in one, the first's."""
    told = []
    for place, (raw, kinds) in enumerate(zip(file.rows, file.kinds)):
        read = (one for one in found[id(kinds)].items() if one[0] not in layout.aside)
        told.append((place, {role: column.value(raw) for role, column in read}))
    if "label" in layout.needs:
        try:
            check_numbers([roles for _, roles in told])
        except UserError as error:
            raise UserError(f"{file.path}: {error}") from None
    if not layout.gathered:
        return told
    one: dict[str, tuple[int, Row]] = {}
    for place, roles in told:
        rest = {role: value for role, value in roles.items() if role not in layout.gathered}
        lists = {role: [] for role in layout.gathered}
        _, whole = one.setdefault(json.dumps(rest, sort_keys=True), (place, {**rest, **lists}))
        for role in layout.gathered:
            whole[role].append(roles[role])
    return list(one.values())


def made_to_train(file: File, layout: Layout) -> Made:
    """The same, with the one answer of a row on its side: that of a text is the chosen one."""
    found = made(file, layout)
    single = layout.gives == TEXTS or (layout.gives == LABELLED and file.asked.unpaired)
    return replace(found, rows=[on_its_side(row) for row in found.rows] if single else found.rows)


def normalised(raw: Rows, path: str, gives: Sequence[str], unpaired: bool = False) -> Made:
    """The rows of a place of which no key says how it is read."""
    file = file_of(path, raw, Asked(unpaired=unpaired))
    if LABELLED not in gives:  # else answers marked as bad would be read as good ones
        for layout in known.layouts().values():
            own = layout.settled(file.groups, file.asked.columns)
            if layout.gives == LABELLED and _fit(own, file).odd is None:
                told = "says which answers are good, and all would be taken for good"
                raise UserError(f"{path}: the layout {layout.name} {told}: keep those alone")
    found = recognised(file, gives)
    return made_to_train(file, found) if unpaired else made(file, found)


def _dropped(file: File, places: Sequence[int]) -> Dropped:
    shown = [(file.name(place), file.rows[place]) for place in places[:EXAMPLES]]
    return Dropped(len(places), shown)


def _line(
    file: File, layout: Layout, found: Mapping[int, Found], rows: Sequence[Row], pairs: bool
) -> str:
    """The layout, the columns that it reads, and how many rows there are."""
    needed, more = {}, {}
    for columns in found.values():
        for role, column in columns.items():
            if role in layout.aside:
                continue
            into = more if role in layout.may else needed
            own = file.asked.columns.get(role)
            into |= {f"{role}={own}" if own else path: None for path in column.paths}
    form = "messages" if rows and isinstance(rows[0]["prompt"], list) else "text"
    also = f"; also {', '.join(more)}" if more else ""
    word = "pairs" if pairs else "texts" if layout.gives == TEXTS else "answers"
    became = f", {len(rows):,} {word}"
    return (
        f"Layout: {layout.name} ({', '.join(needed)} as {form}{also}): {len(file.rows):,} rows"
        f"{became if len(rows) != len(file.rows) else ''}"
    )


def _told(said: Counter, dropped: Mapping[str, Dropped], pairs: bool) -> list[str]:
    told = [f"{count:,} rows: {reason}" for reason, count in said.items()]
    reasons = ", ".join(f"{reason}: {one.count:,}" for reason, one in dropped.items())
    lost = "become no pair" if pairs else "are left out"
    return [*told, *([f"Rows that {lost}: {reasons}"] if reasons else [])]
