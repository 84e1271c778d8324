"""A file or row that no layout fits in, the one line that says what it lacks out."""

from collections.abc import Sequence

from spo_lightning.data.layouts.columns import WORDS, samples, takes
from spo_lightning.data.layouts.file import File
from spo_lightning.data.layouts.known import PAIRS, Found, Kinds, Layout, paths_of

GUESSES = {  # column words that a user's own file may have for a role
    "prompt": ("prompt", "question", "query", "ask", "instruction", "context", "input", "q"),
    "chosen": ("chosen", "best", "better", "good", "win", "prefer", "accept", "pos", "right"),
    "rejected": ("reject", "worst", "worse", "bad", "los", "neg", "wrong", "other"),
}


def odd_row(layout: Layout, file: File, place: int) -> str:
    """The line for a row that lacks what the layout needs."""
    kinds, where = file.kinds[place], file.name(place)
    role = layout.found(kinds)[1][0]
    if role not in layout.roles and ":" in role:  # roles that are not alike
        return f"{where}: {role}"
    wanted = layout.roles[role]
    for path in dict.fromkeys(path for names in wanted.values() for path in paths_of(names)):
        if path in kinds and not any(takes(kind, kinds[path]) for kind in wanted):
            told = f"{path!r} is {WORDS[kinds[path]]}, and the layout {layout.name} has "
            told += " or ".join(WORDS[kind] for kind in wanted)
            return f"{where}: {told} there: mend the row, or choose another data.layout"
    found = ", ".join(path for path in kinds if "*" not in path) or "nothing"
    told = f"no field {role!r} (found {found}), which the layout {layout.name} needs"
    return f"{where}: {told}: add it or rename a column"


def passed_over(layout: Layout, file: File) -> str:
    """The line for a file that fits a layout but for columns that say what it does not read."""
    columns = " and ".join(map(repr, layout.passed_over(file.groups)))
    told = f"{file.path}: the layout {layout.name} fits, and would leave {columns} unread"
    if file.asked.key is None:
        return f"{told}: leave out the column, and the rows that it warns of"
    return f"{told}: {_named(file, file.groups[0][0])}; or force it, data.layout={layout.name}"


def no_layout(file: File, layouts: Sequence[Layout]) -> str:
    """The line for a file of which no layout has most rows."""
    kinds, _, place = max(file.groups, key=lambda group: group[1])
    has, near = ", ".join(samples(file.rows)), ""
    found = [(*one.found(kinds), one) for one in layouts]
    if found:
        _, lacks, nearest = min(found, key=_distance)
        if not lacks:  # it has some rows
            others = (at for each, _, at in file.groups if nearest.found(each)[1])
            return odd_row(nearest, file, next(others, place))
        named = [
            one for one in found if one[1] and all(_stands(role, one[2], kinds) for role in one[1])
        ]
        if named:
            return odd_row(min(named, key=_distance)[2], file, place)
        near = f"; the nearest, {nearest.name}, lacks {' and '.join(lacks)}"
    return f"{file.path}: no layout fits its columns {has}{near}; {_named(file, kinds)}"


def _stands(role: str, layout: Layout, kinds: Kinds) -> bool:
    """Whether there is a column of the role, with values of another kind."""
    words = layout.roles.get(role, {}).values()
    return any(path in kinds for names in words for path in paths_of(names))


def _named(file: File, kinds: Kinds) -> str:
    """What to write where the columns may be meant otherwise."""
    key, names = file.asked.key, {role: _guess(role, kinds) for role in GUESSES}
    words = " ".join(f"{key}.{role}={name}" for role, name in names.items())
    return f"say which is which: {words}" if key else "rename them"


def _distance(found: tuple[Found, list[str], Layout]) -> tuple:
    """How far a layout is from a file, of which it has found and lacks these roles."""
    columns, lacks, layout = found
    return -len(columns), layout.gives != PAIRS, -len(layout.alike), len(lacks)


def _guess(role: str, kinds: Kinds) -> str:
    """The column that may be meant for a role, or a word for it."""
    for word in GUESSES[role]:
        for path, kind in kinds.items():
            same = word in path.lower() if len(word) > 1 else word == path.lower()
            if same and kind != "object" and "*" not in path:
                return path
    return "COLUMN"
