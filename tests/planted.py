"""An endpoint that plays base, judge and optimizer, behind which one prompt is the best.

The base says which of the planted words stand in its system prompt; the judge gives a point for
each; the optimizer adds a word, planted or not, by the seed that it is asked with.
"""

import hashlib
import re

from endpoints import Handler, serving

PLANTED = ("brief", "kind", "exact", "sober")
OTHERS = ("loud", "vague")
START = "You answer."
PRICES = ("dollars_read=1", "dollars_written=10")


class Played(Handler):
    """``body["model"]`` is the role."""

    def said(self, body):
        return {"base": base, "judge": judge, "optimizer": optimizer}[body["model"]](body)


def base(body):
    *_, system, question = [turn["content"] for turn in body["messages"]]
    return f"{' '.join(word for word in PLANTED if word in system)}. To {question}"


def judge(body):
    asked = body["messages"][-1]["content"]
    if "Which of them matter" in asked:
        return "- Clarity\n- critical thinking"
    answer = re.search(r"The assistant answers:\n(.*)\n", asked)[1]
    points = 1 + sum(word in answer for word in PLANTED)
    return f"**Clarity**: {points}/5 - more words\ncritical-thinking: {points}"


def optimizer(body):
    asked = body["messages"][-1]["content"]
    if "become an example" in asked:
        return "<text>brief kind, as rewritten</text>"
    now = re.findall(r"^[\d.]+: (.*)$", asked, re.MULTILINE)[-1]
    number = int(hashlib.sha256(f"{now}{body['seed']}".encode()).hexdigest(), 16)
    words = [word for word in (*PLANTED, *OTHERS) if word not in now]
    return f"Here it is.\n<text>{now} Be {words[number % len(words)]}.</text>"


def playing(**how):
    return serving(handler=Played, **how)


def roles(url, *more):
    """The words of a search whose three roles that endpoint plays."""
    names = {"roles.base": "base", "roles.optimizer": "optimizer", "judge.engine": "judge"}
    words = []
    for role, model in names.items():
        keys = (f"base_url={url}", f"model={model}", "retries=3", *PRICES, *more)
        words += [f"engine@{role}=openai", *(f"{role}.{key}" for key in keys)]
    return words
