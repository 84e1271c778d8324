"""Chat templates of several families: what is scored, by hand; what they cannot do, in one line.

What is scored stands in ⟦ ⟧.
"""

from datetime import datetime

import pytest
from chats import FAMILIES, pair_of, says, shown, tokenizer_of, turn, user
from trl_tokens import peer

from spo_lightning.data import chat
from spo_lightning.data.chat import in_turns, remarks
from spo_lightning.data.encode import encode_pairs, encode_texts, prompt_ids
from spo_lightning.errors import UserError

KNOBS = {"max_length": 4096, "on_mismatch": "split", "strict": False, "scored": "assistant"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
SEVERAL = [says("a"), user("b"), says("c")]
IGNORED = [says("a", weight=0), user("b"), says("c")]
CALLED = [says(None, tool_calls=[CALL]), turn("tool", "4"), says("four")]
CLOSED = "<|eot_id|>"


@pytest.fixture(autouse=True)
def _one_day(monkeypatch):
    monkeypatch.setattr(chat, "BEGAN", datetime(2026, 2, 3))


def head(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


TODAY = f"<s>{head('system')}Today: 03 Feb 2026 00:00:00.000000\n\n{CLOSED}"
ASKED = {  # the prompt "hi"
    "chatml": "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama": f"{TODAY}{head('user')}hi{CLOSED}{head('assistant')}",
    "mistral": "<s>[INST] hi [/INST]",
    "gemma": "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "qwen3": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "thinking": "<s><|user|>hi<|assistant|>",
    "marked": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
}
B = "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
WRITTEN = {  # a, the user's b, c
    "chatml": f"⟦a<|im_end|>\n⟧{B}⟦c<|im_end|>\n⟧",
    "llama": f"⟦a{CLOSED}⟧{head('user')}b{CLOSED}{head('assistant')}⟦c{CLOSED}⟧",
    "mistral": "⟦ a</s>⟧[INST] b [/INST]⟦ c</s>⟧",
    "gemma": "⟦a<end_of_turn>\n⟧<start_of_turn>user\nb<end_of_turn>\n<start_of_turn>model\n"
    "⟦c<end_of_turn>\n⟧",
    "qwen3": f"⟦a<|im_end|>\n⟧{B}⟦c<|im_end|>\n⟧",
    "thinking": "⟦a</s>⟧<|user|>b<|assistant|>⟦c</s>⟧",
    # its own marks, the end mark that they leave out, and what the template puts before a turn
    "marked": f"(earlier) ⟦a<|im_end|>⟧\n{B}⟦c<|im_end|>⟧",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_assistants_turns_are_scored(family):
    tokenizer = tokenizer_of(family)
    # sides of unlike numbers of turns; what follows the last scored word is not read
    pair = pair_of(tokenizer, [user("hi")], SEVERAL, [says("a"), user("d")])
    assert shown(tokenizer, pair)[:2] == (ASKED[family], WRITTEN[family])
    alone = WRITTEN[family].split("⟧")[0] + "⟧"
    assert (
        shown(tokenizer, pair)[2] == alone and pair.chosen[: len(pair.rejected)] == pair.rejected
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_marked_messages_are_context(family):
    tokenizer = tokenizer_of(family)
    pair = pair_of(tokenizer, [user("hi")], IGNORED, [*SEVERAL[:2], says("c", train=False)])
    first, last = WRITTEN[family].replace("⟦", "", 1).split("⟧", 1)
    assert shown(tokenizer, pair)[1:] == (first + last, WRITTEN[family].split("⟧")[0] + "⟧")


CALLS = {
    "chatml": '⟦<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call><|im_end|>\n⟧'
    "<|im_start|>user\n<tool_response>4</tool_response><|im_end|>\n<|im_start|>assistant\n"
    "⟦four<|im_end|>\n⟧",
    "llama": '⟦{"name": "add", "arguments": {"a": 2}}<|eom_id|>⟧'
    f"{head('ipython')}4{CLOSED}{head('assistant')}⟦four{CLOSED}⟧",
}


@pytest.mark.parametrize("family", CALLS)
def test_tool_calls_are_scored_and_their_results_are_context(family):
    tokenizer = tokenizer_of(family)
    pair = pair_of(tokenizer, [user("hi")], CALLED, [says("no")], tools=TOOLS)
    assert shown(tokenizer, pair)[1] == CALLS[family]
    told = remarks([{"prompt": [user("hi")], "chosen": CALLED, "tools": TOOLS}], tokenizer)
    assert ("The chat template leaves out the tools of the rows" in told) == (family == "llama")


def test_marks_that_take_in_the_head_and_the_end_of_the_conversation():
    tokenizer = tokenizer_of("marked")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endgeneration %}"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% elif messages[-1].role == 'assistant' %}{% generation %}<end>{% endgeneration %}"
        "{% endif %}"
    )
    other = [says("a"), user("b"), says("c", weight=0)]
    pair = pair_of(tokenizer, [user("hi")], SEVERAL, other)
    first = "⟦a<|im_end|>\n⟧"
    assert shown(tokenizer, pair)[1:] == (f"{first}{B}⟦c<|im_end|>\n<end>⟧", first)


def test_all_is_what_trl_scores():
    tokenizer = tokenizer_of("chatml")
    pair = pair_of(tokenizer, [user("hi")], SEVERAL, [*IGNORED, user("d")], scored="all")
    plain = [{key: m[key] for key in ("role", "content")} for m in [*IGNORED, user("d")]]
    row = {"prompt": [user("hi")], "chosen": SEVERAL, "rejected": plain}
    assert [(pair.prompt, pair.chosen, pair.rejected)] == list(peer([row], tokenizer, 4096))
    assert not pair.chosen_context and not pair.rejected_context


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_one_turn_equal_trls(family):
    tokenizer = tokenizer_of(family)
    # TRL asks the clock itself: a row that names the date is the same in both
    day = {"chat_template_kwargs": {"date_string": "1 May"}} if family == "llama" else {}
    earlier = [user("hi"), says("<think>\nhm\n</think>\n\nyes"), user("go on")]
    rows = [
        {"prompt": earlier, "chosen": [says("<think>\nx\n</think>a")], "rejected": [says("b")]},
        {"prompt": [user("hi")], "chosen": [says("a")], "rejected": [says("b", weight=1)]},
    ]
    rows = [row | day for row in rows]
    ours = encode_pairs(rows, tokenizer, where="a", **KNOBS).pairs
    assert [(p.prompt, p.chosen, p.rejected) for p in ours] == list(peer(rows, tokenizer, 4096))
    assert all(p.scored == ([range(len(p.chosen))], [range(len(p.rejected))]) for p in ours)


def test_a_generation_prompt_that_opens_a_thought_is_split_where_the_answer_has_none():
    tokenizer = tokenizer_of("thinking")
    rows = [{"prompt": [user("hi")], "chosen": SEVERAL, "rejected": [says("<think>\nx")]}]
    found = encode_pairs(rows, tokenizer, where="a", **KNOBS)
    assert found.counts["split"] == 1
    assert shown(tokenizer, found.pairs[0])[1:] == (WRITTEN["thinking"], "⟦<think>\nx</s>⟧")
    # the first turns begin as they were asked to, a later one does not
    thought = [says("<think>\na"), user("b"), says("c")]
    rows = [{"prompt": [user("hi")], "chosen": thought, "rejected": [says("<think>\nx")]}]
    assert encode_pairs(rows, tokenizer, where="a", **KNOBS).counts["split"] == 1
    with pytest.raises(UserError, match="a, row 1: the prompt's tokens are not the beginning"):
        encode_pairs(rows, tokenizer, where="a", **KNOBS | {"on_mismatch": "error"})


def test_merged_tokens_belong_to_whom_they_begin_with():
    tokenizer = tokenizer_of("mistral")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Q' if m.role == 'user' else 'A' }}: {{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    tokenizer.add_tokens(["\nQ", ": c"])  # a token over the end of a turn, another over its start
    pair = pair_of(tokenizer, [user("hi")], SEVERAL, [says("no")])
    assert shown(tokenizer, pair)[1] == "⟦ a⟧\nQ: b\nA⟦: c\n⟧"


@pytest.mark.parametrize("fast", [True, False])
def test_a_tokenizer_without_offsets_finds_the_same(monkeypatch, fast):
    tokenizer = tokenizer_of("llama")
    monkeypatch.setattr(type(tokenizer), "is_fast", fast)
    pair = pair_of(tokenizer, [user("hi é")], SEVERAL, [says("no")])
    assert shown(tokenizer, pair)[1] == WRITTEN["llama"]


def test_the_beginning_stands_once_and_so_does_the_end():
    tokenizer = tokenizer_of("llama")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    pair = pair_of(tokenizer, [user("hi")], SEVERAL, [says("no")])
    assert shown(tokenizer, pair)[:2] == (ASKED["llama"], WRITTEN["llama"])
    # texts that bring their own end, under a template that writes one
    ended = [says(f"a{CLOSED}"), user("b"), says(f"c{CLOSED}")]
    pair = pair_of(tokenizer, [user("hi")], ended, [says(f"no{CLOSED}")])
    assert shown(tokenizer, pair)[1:] == (WRITTEN["llama"], f"⟦no{CLOSED}⟧")


def test_the_end_that_a_text_brings_stays_where_the_template_has_none():
    tokenizer = tokenizer_of("mistral")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    rows = [{"prompt": [user("hi")], "chosen": [says("a</s>")], "rejected": [says("b")]}]
    pair = pair_of(tokenizer, rows[0]["prompt"], rows[0]["chosen"], rows[0]["rejected"])
    assert shown(tokenizer, pair)[1:] == ("⟦[assistant]a</s>⟧", "⟦[assistant]b⟧")
    (told,) = remarks([{**rows[0], "chosen": [says("a")]}], tokenizer)
    assert "ends an answer with no token of its own" in told
    assert remarks(rows, tokenizer) == []


def test_the_date_is_that_of_the_run(monkeypatch):
    tokenizer = tokenizer_of("llama")
    row = {"prompt": [user("hi")], "chosen": [says("a")], "rejected": [says("b")]}
    first = encode_pairs([row], tokenizer, where="a", **KNOBS).pairs
    assert encode_pairs([row], tokenizer, where="a", **KNOBS).pairs == first
    assert prompt_ids(row, tokenizer) == list(first[0].prompt)
    assert "03 Feb 2026" in remarks([row], tokenizer)[0]
    monkeypatch.setattr(chat, "BEGAN", datetime(2026, 2, 4))
    assert encode_pairs([row], tokenizer, where="a", **KNOBS).pairs != first


def test_an_answer_without_a_scored_word_is_empty():
    tokenizer = tokenizer_of("chatml")
    kept = {"prompt": [user("hi")], "chosen": SEVERAL, "rejected": [says("no")]}
    context = [
        [says("a", weight=0)],
        [user("a")],
        [says("a", train=False), user("b")],
        [says(""), user("b")],
    ]
    rows = [kept, *({**kept, "rejected": turns} for turns in context)]
    found = encode_pairs(rows, tokenizer, where="a", **KNOBS)
    assert found.counts["dropped/empty"] == 4 and found.counts["kept"] == 1
    with pytest.raises(UserError, match="what is scored of a response is empty"):
        encode_pairs(rows, tokenizer, where="a", **KNOBS | {"strict": True})


def test_a_cut_leaves_scored_words_or_the_pair_is_too_long():
    tokenizer = tokenizer_of("chatml")
    asks_back = [user("why?"), says("so")]
    row = {"prompt": [user("hi")], "chosen": SEVERAL, "rejected": asks_back}
    whole = encode_pairs([row], tokenizer, where="a", **KNOBS).pairs[0]
    assert shown(tokenizer, whole)[2].startswith("user\nwhy?") and whole.rejected_context
    first = len(whole.prompt) + whole.scored[1][0].start
    other = {"prompt": [user("h")], "chosen": [says("a")], "rejected": [says("b")]}
    for size, kept in ((first, 0), (first + 1, 1)):
        found = encode_pairs([row, other], tokenizer, where="a", **KNOBS | {"max_length": size})
        assert found.counts["kept"] == 1 + kept and found.counts["dropped/long"] == 1 - kept
    cut = found.pairs[0]
    assert cut.rejected == whole.rejected[: len(cut.rejected)]
    assert cut.scored[1] == [range(whole.scored[1][0].start, whole.scored[1][0].start + 1)]


def test_texts_of_the_lower_level_go_by_the_same_rule():
    tokenizer = tokenizer_of("chatml")
    rows = [{"prompt": [user("hi")], "completion": SEVERAL}]
    (text,) = encode_texts(rows, tokenizer, max_length=4096, scored="assistant")
    pair = pair_of(tokenizer, [user("hi")], SEVERAL, [says("no")])
    assert (text.chosen, text.chosen_context) == (pair.chosen, pair.chosen_context)
    assert text.rejected == () and text.scored[1] == []
    (text,) = encode_texts(rows, tokenizer, max_length=4096, scored="all")
    assert text.chosen_context == ()


# -- refusals


def refused(tokenizer, prompt, chosen, **more):
    with pytest.raises(UserError) as caught:
        pair_of(tokenizer, prompt, chosen, [says("no")], **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_template_that_rewrites_earlier_turns_is_refused_where_turns_have_to_be_told_apart():
    tokenizer = tokenizer_of("qwen3")
    thought = [says("<think>\nx\n</think>\n\na"), user("b"), says("c")]
    told = refused(tokenizer, [user("hi")], thought)
    assert told.startswith("a.jsonl, row 1: the chat template writes turn 2 otherwise")
    assert "data.scored=all" in told
    # an answer of one turn is not concerned, whatever comes before it
    pair = pair_of(tokenizer, [user("hi"), *thought[:2]], [thought[0]], [says("no")])
    assert shown(tokenizer, pair)[:2] == (
        f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n{B}",
        "⟦<think>\nx\n</think>\n\na<|im_end|>\n⟧",
    )
    # and marks of the template's own tell the turns apart
    tokenizer = tokenizer_of("marked")
    pair = pair_of(tokenizer, [user("hi")], SEVERAL, [says("no")])
    assert shown(tokenizer, pair)[1] == WRITTEN["marked"]


def test_a_system_turn_is_never_lost():
    system = [turn("system", "Be brief."), user("hi")]
    told = refused(tokenizer_of("gemma"), system, [says("a")])
    assert "refuses it (System role not supported)" in told and "data.system" in told
    tokenizer = tokenizer_of("mistral")
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    told = refused(tokenizer, system, [says("a")])
    assert "leaves out the system turn 'Be brief.'" in told and "data.system" in told
    assert pair_of(tokenizer, [user("hi")], [says("a")], [says("no")])
    # as Mistral has it: in the user's turn if that is the last, so that with an answer it is gone
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}[INST]{% if loop.last and "
        "m.role == 'user' and messages[0].role == 'system' %}"
        "{{ messages[0].content }}{% endif %}{{ m.content }}{% endfor %}"
    )
    assert "leaves out the system turn 'Be brief.'" in refused(tokenizer, system, [says("a")])


def test_thoughts_that_a_template_takes_out_of_answers_are_said():
    tokenizer = tokenizer_of("qwen3")
    row = {"prompt": [user("hi")], "chosen": [says("<think>two\n</think>a")]}
    assert remarks([row], tokenizer) == []
    tokenizer.chat_template = tokenizer.chat_template.replace("loop.index0 < ns.last and ", "")
    others = {"prompt": [user("ho")], "chosen": [says("b")]}
    (told,) = remarks([others, row], tokenizer)
    assert "leaves out the thoughts of answers" in told and remarks([others], tokenizer) == []


@pytest.mark.parametrize(
    "family, chosen, fragment",
    [
        ("gemma", CALLED, "leaves out the tool call 'add'"),
        ("mistral", CALLED, "refuses it (roles must alternate"),
        ("marked", CALLED, "leaves out the tool call 'add'"),
        ("chatml", [says("a", weight=0.5), user("b"), says("c")], "weight 0.5: give weight 0 or"),
        ("chatml", [says("a", train="no"), user("b"), says("c")], "train 'no': give weight 0 or"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(family, chosen, fragment):
    told = refused(tokenizer_of(family), [user("hi")], chosen)
    assert told.startswith("a.jsonl, row 1: ") and fragment in told


def test_tools_of_a_wrong_kind_are_refused():
    told = refused(tokenizer_of("chatml"), [user("hi")], [says("a")], tools=["add"])
    assert told.startswith("a.jsonl, row 1: the chat template refuses it (Tools should")


# -- rows of text


TEXT = {"prompt": "hi", "chosen": "yes", "rejected": "no"}


def test_text_becomes_turns_where_it_is_asked_for():
    tokenizer = tokenizer_of("chatml")
    row = in_turns(TEXT, chat=True, system=None)
    turned = {"prompt": [user("hi")], "chosen": [says("yes")], "rejected": [says("no")]}
    assert row == turned and in_turns(row, chat=True, system=None) == turned
    assert shown(tokenizer, pair_of(tokenizer, **row))[:2] == (
        ASKED["chatml"],
        "⟦yes<|im_end|>\n⟧",
    )
    briefly = in_turns(TEXT, chat=True, system="Be brief.")
    assert briefly["prompt"] == [turn("system", "Be brief."), user("hi")]
    assert in_turns(briefly, chat=False, system="At length.") == briefly
    assert in_turns(turned, chat=False, system="Be brief.") == briefly
    assert in_turns(TEXT, chat=False, system=None) is TEXT
    with pytest.raises(UserError, match=r"data.system: .* data.chat=true"):
        in_turns(TEXT, chat=False, system="Be brief.")
    empty = in_turns({"prompt": "", "completion": ""}, chat=True, system="Be brief.")
    assert empty == {"prompt": [], "completion": []}  # dropped and counted as the text would be


def test_a_tokenizer_without_a_template_takes_the_text_that_the_turns_were():
    tokenizer = tokenizer_of("chatml")
    row = {**in_turns(TEXT, chat=True, system=None), "plain": {**TEXT, "prompt": "\n\nHuman: hi"}}
    pair = pair_of(tokenizer, **row)
    assert shown(tokenizer, pair)[0] == ASKED["chatml"]
    tokenizer.chat_template = None
    pair = pair_of(tokenizer, **row)
    assert shown(tokenizer, pair)[:2] == ("\n\nHuman: hi", "⟦yes<|im_end|>⟧")
    assert prompt_ids(row, tokenizer) == list(pair.prompt)
    with pytest.raises(UserError, match=r"no chat template, .* data.chat=false"):
        pair_of(tokenizer, **in_turns(row, chat=True, system=None))


def test_text_under_a_chat_template_is_told_once():
    tokenizer = tokenizer_of("chatml")
    rendered = {**TEXT, "prompt": ASKED["chatml"]}
    (told,) = remarks([TEXT, TEXT, TEXT, rendered], tokenizer)
    assert told.startswith("4 rows of text stay text") and "25% of them carry its marks" in told
    assert "data.chat=true" in told
    assert remarks([in_turns(TEXT, chat=True, system=None)], tokenizer) == []
    llama2 = tokenizer_of("mistral")
    assert "50% of them" in remarks([TEXT, {**TEXT, "prompt": "[INST] hi [/INST]"}], llama2)[0]
    tokenizer.chat_template = None
    assert remarks([TEXT], tokenizer) == []
