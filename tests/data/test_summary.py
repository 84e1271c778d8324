"""What inspect says of rows: every number against rows whose numbers are known by hand."""

import json
import re
from dataclasses import asdict

import pytest
from looks import HELD, TRAIN, encoded, row, summed
from test_encode import byte_tokenizer

from spo_lightning.data import pieces, summary
from spo_lightning.data.batch import Pair
from spo_lightning.data.encode import FIXES
from spo_lightning.data.page import page
from spo_lightning.data.rows import Dropped
from spo_lightning.data.spread import BINS, spread


def test_the_numbers_by_hand():
    found, lost = summed(TRAIN, HELD), ("identical", "empty", "long")
    assert found.counts == {
        "rows": {"train": 9, "held-out": 3},
        "kept": {"train": 6, "held-out": 3},
        "dropped": {"train": 3, "held-out": 0},
        **{f"dropped: {FIXES[reason]}": {"train": 1, "held-out": 0} for reason in lost},
        "pairs that max_length cuts": {"train": 1, "held-out": 0},
    }
    assert [(one.what, one.count) for one in found.checks] == [
        ("rows that repeat an earlier one", 1),
        ("pairs that stand both ways round", 1),
        ("held-out prompts also in train (but for case and spaces)", 2),
    ]
    repeated, turned, shared = (one.examples[0].where for one in found.checks)
    assert repeated == "train, row 5, as train, row 1"
    assert turned == "train, row 6, and train, row 2"
    assert shared == "held-out, row 1, and train, row 1"
    assert found.longer == {"chosen": 2, "rejected": 4, "as long": 3}
    # 5+3 7+2 5 ... prompts and both answers of the nine, uncut
    sizes = [(3, 2, 3), (3, 4, 2), (3, 2, 2), (3, 21, 4), (3, 2, 3), (3, 2, 4)]
    sizes += [(4, 2, 2), (5, 2, 2), (2, 2, 3)]
    assert found.cut == (1, 12, sum(map(sum, sizes)))
    for n, part in enumerate(("prompt", "chosen", "rejected")):
        ordered = sorted(size[n] for size in sizes)
        one = found.lengths[part]
        assert (one.count, one.lowest, one.highest) == (9, ordered[0], ordered[-1])
        assert (one.median, one.p90) == (ordered[4], ordered[8])
        assert sum(one.bars) == 9
    assert found.lengths["prompt + longer"].highest == 24
    assert found.subsets == {"x": {"train": 1, "held-out": 1}, "y": {"train": 1}}
    assert found.margins is not None and (found.margins.lowest, found.margins.highest) == (0.5, 2)
    assert found.columns == {
        "prompt": "text",
        "chosen": "text",
        "rejected": "text",
        "subset": "in 3 of 12 rows",
        "margin": "in 2 of 12 rows",
    }


def test_each_reason_shows_three_rows():
    rows = [row("q", str(n), str(n)) for n in range(5)]
    ties = Dropped(7, [(f"f.jsonl:{n}", {"winner": "tie", "text": "t" * 900}) for n in range(3)])
    found = summed([*TRAIN, *rows], HELD, layout="arena", dropped={"ties": ties})
    whys = {one.why: one for one in found.dropped}
    assert whys["ties"].counts == {"file": 7} and found.counts["dropped"]["file"] == 7
    assert [one.where for one in whys["ties"].examples] == ["f.jsonl:0", "f.jsonl:1", "f.jsonl:2"]
    assert len(whys["ties"].examples[0].fields["text"]) <= summary.LONG
    same = whys[FIXES["identical"]]
    assert same.counts == {"train": 6, "held-out": 0}
    assert [one.where for one in same.examples] == [f"train, row {n}" for n in (7, 10, 11)]
    assert same.examples[0].fields == {"prompt": "same", "chosen": "9", "rejected": "9"}


def test_nothing_is_left_out_of_bars_and_one_long_row_flattens_none():
    one = spread([*range(1, 1000), 10**6])
    assert (one.median, one.p90, one.p99, one.highest) == (500, 900, 990, 10**6)
    assert sum(one.bars) == 1000 and len(one.bars) <= BINS + 1
    assert one.start + one.width * len(one.bars) < 1100
    alike = spread([3.0] * 4)
    assert (alike.bars, alike.start, alike.width) == ([4], 3.0, 1)
    fine = spread([0.1, 0.2, 0.30000000000000004])
    assert sum(fine.bars) == 3 and fine.start <= 0.1
    assert {
        some.width for name, some in summed(TRAIN, HELD).lengths.items() if "+" not in name
    } == {2}


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("What is  it?", "what is it", True),
        ("ＡＢ　c", "ab c", True),
        ("12+7=?", "12+8=?", False),
        ([{"role": "user", "content": "Hi"}], [{"role": "user", "content": "hi "}], True),
        ([{"role": "user", "content": "Hi"}], [{"role": "system", "content": "hi"}], False),
    ],
)
def test_prompts_that_are_alike(one, other, same):
    assert (summary.alike(one) == summary.alike(other)) is same


def test_rows_to_browse_reach_from_the_first_to_the_last():
    pairs = [Pair((1,), (2,), (3,), row=n) for n in range(1000)]
    picked = [pair.row for pair in summary.evenly(pairs, 200)]
    assert picked == list(range(0, 1000, 5))
    assert summary.evenly(pairs[:3], 200) == pairs[:3]


def test_a_pair_token_by_token():
    """Letters of several tokens stand together; special tokens apart; what is scored is told."""
    tokenizer = byte_tokenizer(before="<s>")
    (pair,) = encoded([row("é ", "a😀", "</s>b")], tokenizer, 64).pairs
    found = pieces.shown(pair, "train", tokenizer, by_token=True)
    assert [(p.text, p.special, len(p.ids)) for p in found.prompt] == [
        ("<s>", True, 1),
        ("é", False, 2),
        (" ", False, 1),
    ]
    assert [(p.text, p.use) for p in found.chosen] == [
        ("a", "scored"),
        ("😀", "scored"),
        ("</s>", "scored"),
    ]
    assert [p.special for p in found.rejected] == [True, False, True]
    runs = pieces.shown(pair, "train", tokenizer, by_token=False)
    assert [p.text for p in runs.chosen] == ["a😀", "</s>"]
    for side in ("prompt", "chosen", "rejected"):
        for one in (found, runs):
            ids = [i for piece in getattr(one, side) for i in piece.ids]
            assert tuple(ids) == getattr(pair, side)


def test_a_decoder_that_drops_the_first_space():
    """Llama's first tokenizer: each word's space comes back where the word before it is given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: n for n, word in enumerate(["<s>", "</s>", "▁one", "▁two", "▁three"])}
    inner = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>")
    found = pieces.shown(Pair((2,), (3, 4), (4,)), "train", tokenizer, by_token=True)
    assert [piece.text for piece in found.prompt + found.chosen] == ["one", " two", " three"]


def test_the_text():
    long = row("p" * 3000, "a\n" * 900, "b" * 3000)
    found = summed([*TRAIN, long], HELD, limit=9000, notes=("no template: " + "word " * 60,))
    text = page(found)
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"kept +8 +3\n", text) and f"  {FIXES['identical']}  " in text
    assert "max_length=9000 cuts 0 of 11 pairs (0.0%)" in text
    told = "chosen one in 2 (18.2%), the rejected one in 5 (45.5%); equally long: 4 (36.4%)"
    assert told in " ".join(text.split())
    assert text.index("no template") < text.index("kept") < text.index("tokens  ")
    assert "prompt (3 tokens)\n  ab:\n\nchosen (2 tokens)\n  ⟦1</s>⟧\n" in text
    shown = page(summed([long], HELD, limit=9000))
    assert "[2,000 tokens left out]" in shown and "⟧[2,001 tokens left out]" in shown
    assert max(map(len, shown.splitlines())) <= 100 and len(shown) < 9000


def test_what_is_not_scored_stands_outside_the_brackets(monkeypatch):
    monkeypatch.setattr(
        pieces, "scored", lambda pair: ([n > 1 for n in range(len(pair.chosen))], [False] * 3)
    )
    text = page(summed([row("q:", "abc", "de")], HELD))
    assert "\n  ab⟦c</s>⟧\n" in text and "\n  de</s>\n" in text


def test_nothing_is_left(monkeypatch):
    monkeypatch.setattr("spo_lightning.data.encode.check_survivors", lambda counts, where: None)
    found = summed([row("same", "9", "9")], [])
    assert "no pair is left to show" in page(found)


def test_it_is_plain_json():
    found = asdict(summed(TRAIN, HELD, layout="trl", notes=("n",)))
    assert json.loads(json.dumps(found))["checks"][0]["count"] == 1


def test_text_beside_messages_is_no_column():
    text = {"prompt": "a", "chosen": "b", "rejected": "c"}
    turns = {name: [{"role": "user", "content": said}] for name, said in text.items()}
    assert summary.columns([{**turns, "plain": text}] * 2) == dict.fromkeys(text, "messages")
