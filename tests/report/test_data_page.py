"""The page of inspect: what it says, when it is written, how it does in a browser."""

import json
from dataclasses import asdict

import pytest
from conftest import forked
from looks import HELD, TRAIN, row, summed
from test_page import HOSTILE, Elements, browsed, needs_browser

from spo_lightning.data.rows import Dropped
from spo_lightning.report import data_page
from spo_lightning.report.page import Browsed

WORDS = ("data=pairs", "data.path=rows.jsonl", "data.eval_fraction=0.4", "model=llama")


def found(train=TRAIN, held=HELD, **more):
    """Through JSON, as the room has it."""
    return json.loads(json.dumps(asdict(summed(train, held, **more))))


def blocks(of):
    return {section.title: section.blocks for section in data_page.sections(of)}


def texts(blocks):
    return [block.text for block in blocks if hasattr(block, "alarm")]


def inspected(cwd, *words):
    rows = [*TRAIN, *(row(f"q{n}:", "1", "2") for n in range(20))]
    (cwd / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return forked(cwd, *WORDS, *words, module=("-m", "spo_lightning.inspect"))


def test_what_the_page_says():
    ties = Dropped(7, [(f"f.jsonl:{n}", {"winner": "tie"}) for n in range(3)])
    told = blocks(
        found(layout="arena", notes=("Layout: arena (...)", "no template"), dropped={"ties": ties})
    )
    layout, note, counts, _ = told["What became of the rows"]
    assert (layout.alarm, note.alarm) == (False, True)
    assert counts.head == ["", "file", "train", "held-out"]
    assert ["dropped", 7, 3, 0] in counts.rows and ["dropped: ties", 7, None, None] in counts.rows
    (lost,) = told["Dropped"]
    assert [one[:2] for one in lost.rows[:3]] == [["ties", f"f.jsonl:{n}"] for n in range(3)]
    assert lost.rows[0][2].pieces == [("winner: ", "name", ""), ("tie\n", "", "")]
    assert [one[1] for one in told["Checks"][0].rows] == [1, 1, 2]
    assert texts(told["Lengths"])[0].startswith("max_length=12 cuts 1 of 9 pairs (11.1%) and 12 ")
    assert [chart.key for chart in told["Lengths"][3:]] == ["lengths", "limit"]
    margins, _, subsets = told["Margins and subsets"]
    assert margins.rows == [["margin", 0.5, 0.5, 2.0, 2.0, 2.0]]
    assert subsets.rows == [["x", 1, "11.1%", 1, "33.3%"], ["y", 1, "11.1%", 0, "0.0%"]]
    assert [block.title for block in told["One pair, token by token"][1:]] == [
        "prompt, 3 tokens",
        "chosen, 2 tokens",
        "rejected, 3 tokens",
    ]


def test_rows_are_marked_for_the_menu():
    (rows,) = blocks(found())["Rows"]
    assert isinstance(rows, Browsed) and len(rows.rows) == 9
    assert rows.marks[0] == "train rejected" and rows.marks[3] == "train cut chosen"
    assert list(rows.menu) == ["train", "held-out", "cut", "chosen", "rejected"]


def test_long_texts_are_folded_and_whole():
    long = row("p" * 900 + "?", "a" * 900, "b" * 2000)
    (rows,) = blocks(found([long], limit=9000))["Rows"]
    _, prompt, chosen, rejected, *_ = rows.rows[0]
    assert prompt.ends and prompt.pieces[-1][0].endswith("p?") and prompt.hidden == 301
    whole = [text for text, *_ in [*chosen.pieces, *chosen.folded]]
    assert whole == ["a" * 600, "a" * 300, "</s>"]
    # what is longer than anybody reads stays out of the page, and is told
    assert [text for text, *_ in rejected.folded] == ["b" * 400, "[1,001 tokens left out]"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_rows_are_text(tmp_path, name):
    text = HOSTILE[name].replace("\ud800", "")  # which reading refuses

    def elements(text):
        train = [row(f"{text}{n}", f"{text}1", f"{text}2", subset=text) for n in range(3)]
        dropped = {text: Dropped(1, [(text, {text: text})])}
        of = found(train, limit=10**6, notes=(text,), layout=text, dropped=dropped)
        data_page.write(of, tmp_path / "page.html")
        return Elements((tmp_path / "page.html").read_text()).found

    got, plainly = elements(text), elements("plain" + "x" * len(text))
    kinds = [{tag for tag, _ in some} - {"span", "details", "summary"} for some in (got, plainly)]
    assert kinds[0] == kinds[1] and [t for t, _ in got].count("script") == 4
    assert not any(key.startswith("on") for _, attrs in got for key in attrs)


def test_nothing_is_written_on_a_refusal(tmp_path):
    for words, says in (
        (("output=rows.jsonl",), "output=rows.jsonl: name a page, as in output=inspect.html"),
        (("output=absent/a.html",), "there is no directory absent"),
        (("data.strict=true",), "correct or remove the row"),
    ):
        done = inspected(tmp_path, *words)
        assert done.code == 2 and says in done.err and done.err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert "ab:" in (tmp_path / "rows.jsonl").read_text()


def test_the_command_writes_the_page_over_its_own(tmp_path):
    (tmp_path / "inspect.html").write_text("of yesterday")
    done = inspected(tmp_path)
    assert (done.code, done.err) == (0, "") and done.out.endswith("Page: inspect.html\n")
    assert "Data: rows.jsonl" in (tmp_path / "inspect.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "inspect.html"}


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("size", ["1200,900", "390,800"])
def test_in_a_browser(tmp_path, size):
    hostile = [text for text in HOSTILE.values() if text != HOSTILE["surrogate"]]
    train = [*TRAIN, *(row(text, f"{text}1", f"{text}2") for text in hostile)]
    train += [row(f"q{n} 2+{n}=", "1", "22") for n in range(40)]
    path = data_page.write(found(train, limit=10**6), tmp_path / "page.html")
    told = browsed(path, tmp_path, f"--window-size={size}")
    assert told["errors"] == [] and told["requests"] == 0 and not told["harmed"]
    assert told["empty"] == [] and told["charts"] == 3 and not told["wide"]
    assert told["covered"] == 0 and told["printed"] == [470]
    assert (told["all"], told["searched"]) == (25, 11)  # 2 and 20 to 29
