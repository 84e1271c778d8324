"""Every format, compression and place: the same rows, and a broken one named by its own file."""

import functools
import http.server
import itertools
import json
import subprocess
import sys
import threading

import fsspec
import pyarrow.ipc
import pyarrow.parquet
import pytest
from written import PACKED, TABLES, TEXTS, as_csv, as_json, as_jsonl, as_stream

from spo_lightning.data.pairs import pairs
from spo_lightning.data.reading import Place
from spo_lightning.errors import UserError

PAIRS = [
    {"prompt": "one\u2028two", "chosen": "good, yes", "rejected": 'bad "no"'},
    {"prompt": "three\nfour; five\t", "chosen": "ä", "rejected": "€"},
]
MANY = [{"prompt": f"{n}?", "chosen": f"{n}.", "rejected": f"{n};"} for n in range(20)]
FILES = {
    **{f"a{suffix}": write for suffix, write in (TEXTS | TABLES).items()},
    **{
        f"a{suffix}{packed}": functools.partial(lambda w, p, rows: p(w(rows)), write, pack)
        for (suffix, write), (packed, pack) in itertools.product(TEXTS.items(), PACKED.items())
    },
}


def is_list(name):
    return name.startswith("a.json") and not name.startswith("a.jsonl")


def taken(path, **how):
    return Place(path, "data.path", **how).rows()


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def broken(name):
    """A file whose fourth row is broken, and how its refusal begins, without the folder."""
    suffix, _, packed = name.removeprefix("a.").partition(".")
    rows = MANY[:3] + [{**MANY[3], "chosen": None}] + MANY[4:]
    if suffix in ("parquet", "arrow"):
        return FILES[name](rows), f"{name}, row 4: 'chosen' is null"
    if suffix == "json":
        raw, told = as_json(rows), f"{name}, row 4: 'chosen' is null"
    elif suffix == "jsonl":
        raw, told = as_jsonl(MANY).replace(b'{"prompt": "3?', b"{'prompt': \"3?"), f"{name}:4: "
        told += "broken JSON (Expecting property name enclosed in double quotes at column 2)"
    else:
        raw = TEXTS[f".{suffix}"](MANY).replace(b"3?", b'3",\t"?'.replace(b'"', b""))
        told = f"{name}:5: not 3 cells: quote the {'tabs' if suffix == 'tsv' else 'commas'}"
    return PACKED[f".{packed}"](raw) if packed else raw, told


def laid(tmp_path, where, files):
    """What names all of the files in such a place; of a ``file``, the last."""
    if where == "memory://":
        folder = f"memory://{tmp_path.name}"
        with fsspec.open_files([f"{folder}/{name}" for name in files], "wb") as opened:
            for file, raw in zip(opened, files.values()):
                file.write(raw)
    else:
        for name, raw in files.items():
            (tmp_path / name).write_bytes(raw)
        folder = f"file://{tmp_path}" if where == "file://" else str(tmp_path)
    paths = [f"{folder}/{name}" for name in files]
    return {"list": paths, "glob": f"{folder}/*", "file": paths[-1]}.get(where, folder)


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name](PAIRS))
    assert taken(str(path)) == PAIRS
    path.write_bytes(FILES[name](MANY))
    place = Place(str(path), "data.path")
    assert place.rows() == MANY
    if is_list(name):
        assert f"{path}: one list, which is read whole" in message(next, place.parts(8, 0))
        return
    for start in range(4):
        parts = [*place.parts(8, start)]
        assert [row for part in parts for row in part] == MANY[8 * start :]
        assert [part.named(0) for part in parts] == [
            f"{path}, row {8 * at + 1}" for at in range(start, 3)
        ]


def task_of(path, **changed):
    given = {"path": path, "eval_path": None, "eval_fraction": 0.1, "max_rows": None, "seed": 0}
    given |= {"split": "train", "name": None, "revision": None, "separator": None, "by": None}
    given |= {"unpaired": False}
    given |= {"layout": None, "columns": {}, "pairing": "best_worst"}
    given |= {"sft": None, "summary": False, "stream": False, "chunk_rows": 8}
    return pairs(**given | changed)


@pytest.mark.parametrize("where", ["file", "list", "glob", "directory", "memory://", "file://"])
@pytest.mark.parametrize("name", FILES)
def test_a_broken_row_is_named_by_its_own_file_and_place(tmp_path, name, where):
    raw, told = broken(name)
    path = laid(tmp_path, where, {f"0{name}": FILES[name](MANY), f"1{name}": raw})
    line = message(task_of, path)
    folder, _, rest = line.partition(f"/1{name}")
    assert folder.endswith(tmp_path.name) and f"{name}{rest}".startswith(told)
    if not is_list(name):  # read in parts, the same line
        assert message(lambda: [*task_of(path, stream=True).chunks(0)]) == line


def test_many_files_are_one_place(tmp_path):
    some = {name: MANY[at % 9 : at % 9 + 2] for at, name in enumerate(FILES)}
    files = {name: write(some[name]) for name, write in FILES.items()}
    rows = [row for part in some.values() for row in part]
    assert taken(laid(tmp_path, "list", files)) == rows
    shards = [str(tmp_path / f"part{at}.jsonl") for at in range(4)]
    for at, shard in enumerate(shards):
        with open(shard, "wb") as file:
            file.write(as_jsonl(MANY[5 * at : 5 * at + 5]))
    for named in (shards, str(tmp_path / "part*.jsonl")):
        place = Place(named, "data.path")
        assert place.rows() == MANY
        assert [place.rows().named(at) for at in (0, 5, 19)] == [
            f"{tmp_path}/part0.jsonl, row 1",
            f"{tmp_path}/part1.jsonl, row 1",
            f"{tmp_path}/part3.jsonl, row 5",
        ]
        for start in range(4):
            later = [*place.parts(7, start)]
            assert [row for part in later for row in part] == MANY[7 * start :]
            if start == 1:
                assert later[0].named(0) == f"{tmp_path}/part1.jsonl, row 3"


def test_a_directory_gives_the_files_of_its_split(tmp_path):
    (tmp_path / "README.md").write_text("about it")
    for name, rows in (("train-0.jsonl.gz", MANY[:5]), ("train-1.csv", MANY[5:9])):
        (tmp_path / name).write_bytes(FILES["a" + name[7:]](rows))
    (tmp_path / "test.jsonl").write_bytes(as_jsonl(MANY[9:]))
    assert taken(str(tmp_path)) == MANY[:9]
    assert taken(str(tmp_path), split="test") == MANY[9:]
    assert "named for the splits train, test" in message(taken, str(tmp_path), split="dev")


def test_saved_datasets_give_the_same_rows(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(MANY)
    data.save_to_disk(tmp_path / "flat")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "dict")
    for name in ("flat", "dict"):
        assert taken(str(tmp_path / name)) == taken(f"file://{tmp_path / name}") == MANY
    assert taken(str(tmp_path / "dict"), split="test") == MANY[1:2]
    assert "no split 'dev'" in message(taken, str(tmp_path / "dict"), split="dev")
    (tmp_path / "flat/state.json").write_text("{}")
    assert "not whole as datasets saved it" in message(taken, str(tmp_path / "flat"))
    (shard,) = (tmp_path / "dict/train").glob("*.arrow")
    assert taken(str(shard)) == MANY  # a stream of arrow's


def test_the_stream_form_of_arrow(tmp_path):
    (tmp_path / "a.arrow").write_bytes(as_stream(MANY))
    assert taken(str(tmp_path / "a.arrow")) == MANY


def test_a_server_is_read_as_a_disk_is(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    for name in ("a.jsonl.gz", "a.parquet"):
        (tmp_path / name).write_bytes(FILES[name](MANY))
    serve = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_port}"
        assert taken(f"{home}/a.jsonl.gz?download=true") == MANY
        assert taken(f"{home}/a.parquet") == MANY
        assert f"{home}/b.jsonl: no such file" in message(taken, f"{home}/b.jsonl")
        assert f"{home}/set: no such file" in message(taken, f"{home}/set")
        server.shutdown()
    told = message(taken, f"{home}/a.jsonl.gz")
    assert told.startswith(f"{home}/a.jsonl.gz: no such file (Cannot connect")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_delimiter_of_a_csv_is_found(tmp_path, delimiter):
    path = tmp_path / "a.csv"
    for rows in (PAIRS, MANY, [{"a;b": "1", "c": "2,3", "d\te": "4"}] * 3):
        path.write_bytes(b"\xef\xbb\xbf" + as_csv(rows, delimiter))
        assert taken(str(path)) == rows
    path.write_bytes(as_csv(MANY * 30, delimiter))  # longer than what it is found by
    assert taken(str(path)) == MANY * 30
    long = [{"prompt": "a", "chosen": "b" * 200_000, "rejected": "c"}]
    path.write_bytes(as_csv(long, delimiter))
    assert taken(str(path)) == long


def test_a_json_file_may_hold_a_row_a_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf\n" + as_jsonl(MANY))
    assert taken(str(path)) == MANY
    assert [row for part in Place(str(path), "data.path").parts(6, 1) for row in part] == MANY[6:]


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.jsonl", json.dumps(MANY)),
        ("a.jsonl", json.dumps(MANY, indent=1)),
        ("a.json", json.dumps({"version": "1", "data": MANY})),
        ("a.json", "\n" + json.dumps({"train": MANY}, indent=1)),
        ("a.ndjson", "".join(f"{json.dumps(row)}\n\n" for row in MANY)),
    ],
)
def test_rows_of_json_as_others_write_them(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert taken(str(path)) == MANY
    if name == "a.jsonl":
        assert "one list, which is read whole" in message(
            next, Place(str(path), "data.path").parts(8, 0)
        )


def test_one_row_that_stands_over_several_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**PAIRS[0], "answers": [{"x": 1}]}, indent=2))
    assert taken(str(path)) == [{**PAIRS[0], "answers": [{"x": 1}]}]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_two_columns_of_one_name(tmp_path, suffix):
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "chosen", "chosen"])
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    assert message(taken, str(path)) == f"{path}: two columns 'chosen': rename one of them"


LINE = json.dumps(PAIRS[0])


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: the file is empty"),
        ("a.jsonl", f"{LINE}\n".encode() + b'{"prompt": "\xff"}', "a.jsonl:2: not utf-8"),
        ("a.jsonl", f"{LINE}\n" * 6 + '{"prompt": ', "a.jsonl:7: broken JSON"),
        ("a.jsonl", f"{LINE}\n[1]\n", "a.jsonl:2: a list, not an object"),
        ("a.jsonl", "3" * 5000, "a.jsonl:1: unreadable JSON"),
        ("a.jsonl", "[" * 200000, "a.jsonl:1: unreadable JSON"),
        ("a.json", "[{},\n{},\n{]", "a.json:3: broken JSON"),
        ("a.json", "{\n", "a.json:2: broken JSON"),
        (
            "a.json",
            '{"train": [{"a": 1}], "test": [{"a": 1}]}',
            "a.json: lists of rows under train and test",
        ),
        ("a.jsonl", b"\x1f\x8b\x08", "a.jsonl: packed, by its first bytes: name it "),
        ("a.json", "[{}, 3]", "a.json, row 2: a number, not an object"),
        ("a.json", "[]", "a.json: no rows"),
        ("a.csv", "prompt,chosen\na,b\nc\n", "a.csv:3: not 2 cells: quote the commas"),
        ("a.csv", "prompt,chosen\na,b,c\n", "a.csv:2: not 2 cells"),
        ("a.csv", "prompt;chosen\na;b;c\n", "a.csv:2: not 2 cells: quote the semicolons"),
        ("a.csv", 'prompt,chosen\n"a"b,c\n', "a.csv:2: broken csv"),
        ("a.csv", "prompt,chosen\n", "a.csv: no rows"),
        ("a.csv", "prompt,chosen,prompt\n1,2,3\n", "a.csv:1: two columns 'prompt'"),
        ("a.csv", "a,b;c\n1,2;3\n", "a.csv:1: its header can be parted in more than one way"),
        ("a.csv.gz", b"prompt,chosen", "a.csv.gz: not a csv.gz file (Not a gzipped file"),
        ("a.jsonl.gz", FILES["a.jsonl.gz"](MANY)[:-20], "a.jsonl.gz: broken or cut off after row"),
        ("a.jsonl.zst", FILES["a.jsonl.zst"](MANY)[:-9], "a.jsonl.zst: not a jsonl.zst file"),
        ("a.jsonl.xz", b"x" * 99, "a.jsonl.xz: not a jsonl.xz file"),
        ("a.jsonl.bz2", b"x" * 99, "a.jsonl.bz2: not a jsonl.bz2 file"),
        ("a.parquet", "PAR0", "a.parquet: not a parquet file"),
        ("a.arrow", "PAR0", "a.arrow: not an arrow file"),
        ("a.txt", "x", "a.txt: no such file, or its suffix is not .jsonl"),
        ("a.parquet.gz", "x", "a.parquet.gz: no such file, or its suffix is not .jsonl"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message(taken, str(path)).removeprefix(f"{tmp_path}/").startswith(says)


@pytest.mark.parametrize(
    "path, says",
    [
        ("none.jsonl", "none.jsonl: no such file: check data.path"),
        ("./none", "./none: no such file, or its suffix"),
        ("~/no-such-dir-at-all/x", "~/no-such-dir-at-all/x: no such file, or its suffix"),
        ("none*.jsonl", "none*.jsonl: no file matches: check data.path"),
        (["none.jsonl", "other.jsonl"], "none.jsonl: no such file"),
        ([], "data.path=[]: name a file, directory, glob, url or hub id"),
        ([3], "data.path=[3]: name a file, directory"),
        ("memory://none.jsonl", "memory://none.jsonl: no such file: check data.path"),
        ("memory://none", "memory://none: no such file, or no file in it"),
        ("s3://b/a.jsonl", "s3://b/a.jsonl: s3:// is read by s3fs: pip install s3fs"),
        ("gs://b/*.jsonl", "gs://b/*.jsonl: gs:// is read by gcsfs: pip install gcsfs"),
        ("foo://b/a.jsonl", "foo://b/a.jsonl: Protocol not known: foo: check data.path"),
        ("hf://datasets/a/b/c.jsonl", "hf://datasets/a/b/c.jsonl: Cannot reach"),
    ],
)
def test_places_that_cannot_be_found(path, says):
    told = message(taken, path)
    assert (
        told.startswith(says)
        and "hub (" not in told
        and "data.path" in told + "data.path" * ("pip install" in told)
    )


def test_directories_without_rows(tmp_path):
    assert f"{tmp_path}: no such file, or no file in it" in message(taken, str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    assert f"{tmp_path}: no file in it has a suffix of .jsonl" in message(taken, str(tmp_path))
    assert f"{tmp_path}/notes.txt: its suffix is not" in message(taken, f"{tmp_path}/*")


@pytest.mark.parametrize("key", ["name", "revision"])
def test_keys_of_a_hub_id_are_refused_with_a_file(tmp_path, key):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_jsonl(MANY))
    told = message(task_of, str(path), **{key: "x"})
    assert told.startswith(f"data.{key}=x has no effect: {path} is no hub id")
    # held-out rows of a hub id read them
    told = message(task_of, str(path), eval_path="own/set", **{key: "x"})
    assert told.startswith("own/set: no such file, and not loaded from the hub")


def test_a_split_is_refused_with_files_alone(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_bytes(as_jsonl(MANY))
    told = message(task_of, str(path), split="test")
    assert told.startswith(f"data.split=test has no effect: {path} is read whole")
    assert len(task_of(str(tmp_path), split="test").train) > 10


def test_the_hub_without_a_network_is_one_line():
    code = (
        "from spo_lightning.data.reading import read\n"
        "from spo_lightning.errors import UserError\n"
        "try: read('someone/no-such-set', split='train', where='data.path')\n"
        "except UserError as error: print(error)"
    )
    env = {"HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    told = ran.stdout.strip()
    assert told.startswith("someone/no-such-set: no such file, and not loaded from the hub"), ran
    assert "\n" not in told and "data.path" in told
