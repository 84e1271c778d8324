"""Tiny tokenizers with chat templates in the manner of model families, and their answers read out.

One token per byte, and one per special token. Templates are short: what of a family decides which
tokens are scored is in them, its default texts are not.
"""

from typing import Any

from spo_lightning.data.batch import Pair
from spo_lightning.data.encode import encode_pairs

KNOBS = {"max_length": 4096, "on_mismatch": "split", "strict": False, "scored": "assistant"}

# a default system turn, tools in it; calls are tagged, and results stand in a user's turn
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content }}</tool_response>"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% if loop.first and tools %}\n# Tools\n{{ tools | tojson }}{% endif %}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the template writes the beginning of the sequence, and asks the date
LLAMA = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today: {{ date_string or strftime_now('%d %b %Y %H:%M:%S.%f') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
    "{% set messages = messages[1:] %}{% endif %}<|eot_id|>"
    "{% for m in messages %}"
    "<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}<|eom_id|>"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# no header before an answer, no system turn, turns alternate
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# no system turn, the assistant has another name
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# thoughts of the answers before the last question are taken out
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the generation prompt opens a thought that the data need not have
THINKING = (
    "{{ bos_token }}{% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# the template marks what is generated, here without the end mark, and rewrites earlier turns
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% if not loop.last %}(earlier) {% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = ("<|im_start|>", "<|im_end|>")
FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {  # template, EOS, special tokens
    "chatml": (CHATML, "<|im_end|>", CHAT),
    "llama": (
        LLAMA,
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    ),
    "mistral": (MISTRAL, "</s>", ("[INST]", "[/INST]")),
    "gemma": (GEMMA, "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "qwen3": (QWEN3, "<|im_end|>", CHAT),
    "thinking": (THINKING, "</s>", ("<|user|>", "<|assistant|>")),
    "marked": (MARKED, "<|im_end|>", CHAT),
}


def tokenizer_of(family: str) -> Any:
    """One token per byte and one per special token; it puts nothing around a text by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    template, eos, marks = FAMILIES[family]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
        extra_special_tokens=list(marks),
    )
    made.chat_template = template
    return made


def turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def user(content: str) -> dict[str, Any]:
    return turn("user", content)


def says(content: str | None, **more: Any) -> dict[str, Any]:
    return turn("assistant", content, **more)


def pair_of(tokenizer: Any, prompt: Any, chosen: Any, rejected: Any, **more: Any) -> Pair:
    """The one pair that a row becomes."""
    knobs = {**KNOBS, **{key: more.pop(key) for key in KNOBS if key in more}}
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}
    return encode_pairs([row], tokenizer, where="a.jsonl", **knobs).pairs[0]


def shown(tokenizer: Any, pair: Pair) -> tuple[str, str, str]:
    """The prompt, the chosen and the rejected answer; what is scored stands in ⟦ ⟧."""

    def text(ids: tuple[int, ...], runs: list[range]) -> str:
        edges = {n: "⟦" for n in (run.start for run in runs)}
        ends = {run.stop: "⟧" for run in runs}
        parts, last = [], 0
        for edge in sorted({*edges, *ends}):
            parts += [tokenizer.decode(ids[last:edge]), ends.get(edge, ""), edges.get(edge, "")]
            last = edge
        return "".join([*parts, tokenizer.decode(ids[last:])])

    chosen, rejected = pair.scored
    return (
        tokenizer.decode(pair.prompt),
        text(pair.chosen, chosen),
        text(pair.rejected, rejected),
    )
