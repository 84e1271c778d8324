"""data=images: the same pairs from every form of file, and one line of what is wrong."""

import io
import json
import tarfile

import numpy as np
import pytest

from spo_lightning.data.images import images
from spo_lightning.errors import UserError

pictured = pytest.importorskip("PIL.Image")
PLAIN = dict(path=None, eval_path=None, eval_fraction=0.3, max_rows=None)


def image(level, size=4):
    return np.full((size, size, 3), level, np.uint8)


def png(level):
    file = io.BytesIO()
    pictured.fromarray(image(level)).save(file, "PNG")
    return file.getvalue()


ROWS = [
    {"prompt": f"a cat number {n}", "image_0": png(n), "image_1": png(100 + n), "label": n % 2}
    for n in range(12)
]


def parquet(path, rows):
    import pyarrow as arrow
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


def archive(path, rows):
    with tarfile.open(path, "w") as held:
        for number, row in enumerate(rows):
            told = {"prompt": row["prompt"], "label": row["label"]}
            files = {"json": json.dumps(told).encode()}
            files |= {f"{side}.png": row[side] for side in ("image_0", "image_1")}
            for name, content in files.items():
                member = tarfile.TarInfo(f"{number:04}.{name}")
                member.size = len(content)
                held.addfile(member, io.BytesIO(content))
    return path


def folder(path, rows):
    path.mkdir()
    lines = []
    for number, row in enumerate(rows):
        told = dict(row)
        for side in ("image_0", "image_1"):
            (path / f"{number}-{side}.png").write_bytes(row[side])
            told[side] = f"{number}-{side}.png"
        lines.append(json.dumps(told))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def read(path, **words):
    return images(**PLAIN | {"path": str(path)} | words)


def levels(task):
    rows = [*task.train, *task.held_out]
    return {row.prompt: (int(row.chosen[0, 0, 0]), int(row.rejected[0, 0, 0])) for row in rows}


@pytest.mark.parametrize(
    "write, name", [(parquet, "p.parquet"), (archive, "p.tar"), (folder, "p")]
)
def test_the_same_pairs_from_every_form(tmp_path, write, name):
    found = read(write(tmp_path / name, ROWS))
    wanted = {f"a cat number {n}": (n, 100 + n) if n % 2 else (100 + n, n) for n in range(12)}
    assert levels(found) == wanted
    assert not {row.prompt for row in found.train} & {row.prompt for row in found.held_out}
    assert found.samples == 0 and found.judge is None


def test_pick_a_pics_names_and_sides(tmp_path):
    theirs = {"prompt": "caption", "image_0": "jpg_0", "image_1": "jpg_1", "label": "label_0"}
    named = [{theirs[key]: value for key, value in row.items()} for row in ROWS]
    sides = [
        {"prompt": r["prompt"], **dict(zip(("chosen", "rejected"), pair))}
        for r in ROWS
        for pair in [(r["image_0"], r["image_1"])[:: 1 if r["label"] else -1]]
    ]
    plain = levels(read(parquet(tmp_path / "plain.parquet", ROWS)))
    assert levels(read(parquet(tmp_path / "named.parquet", named))) == plain
    assert levels(read(parquet(tmp_path / "sides.parquet", sides))) == plain
    both = [{**row, "image_0": {"bytes": row["image_0"], "path": None}} for row in ROWS]
    assert levels(read(parquet(tmp_path / "both.parquet", both))) == plain


def test_ties_and_equal_images_are_left_out(tmp_path):
    tie = {**ROWS[0], "prompt": "a tie", "label": 0.5}
    equal = {**ROWS[0], "prompt": "the same twice", "image_1": ROWS[0]["image_0"]}
    rows = [{**row, "label": float(row["label"])} for row in (*ROWS, tie, equal)]
    found = read(parquet(tmp_path / "p.parquet", rows))
    assert len(levels(found)) == 12 and "2 ties left out" in found.notes[0]


def test_held_out_pairs_of_their_own(tmp_path):
    all_, some = (
        parquet(tmp_path / n, r) for n, r in (("a.parquet", ROWS), ("b.parquet", ROWS[:2]))
    )
    found = read(all_, eval_path=str(some), max_rows=5)
    assert [row.prompt for row in found.held_out] == ["a cat number 0", "a cat number 1"]
    assert [row.prompt for row in found.train] == [f"a cat number {n}" for n in range(2, 7)]


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"prompt": ""}, "row 3: 'prompt' is missing or no text"),
        ({"label": 3}, "row 3: 'label' is 3: give 1 (image_0 is better), 0 or 0.5"),
        ({"label": None}, "row 3: 'label' is None"),
        ({"image_1": None}, "row 3: 'image_1' is missing"),
        ({"image_0": b"no image"}, "row 3: 'image_0' is no image that can be read"),
    ],
)
def test_bad_rows_in_one_line(tmp_path, changed, says):
    rows = [*ROWS[:2], {**ROWS[2], **changed}, *ROWS[3:]]
    with pytest.raises(UserError) as caught:
        read(parquet(tmp_path / "p.parquet", rows))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files_in_one_line(tmp_path):
    (tmp_path / "no.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "no.tar").write_bytes(b"nothing")
    beside = folder(tmp_path / "f", ROWS[:3])
    (beside / "1-image_0.png").unlink()
    for name, says in (
        ("no.parquet", "is no parquet file"),
        ("no.tar", "is no archive"),
        ("f", "row 2: 'image_0' names 1-image_0.png, which is not there"),
        ("gone", "no such file, or no parquet, tar or folder"),
    ):
        with pytest.raises(UserError, match=says):
            read(tmp_path / name)
    with pytest.raises(UserError, match="data.path: name parquet files"):
        images(**PLAIN)
