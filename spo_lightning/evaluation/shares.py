"""Answers in, what can be counted of them without a judge out: how many refuse, turn in a circle,
are empty or were cut, how long they are and how many words they share.
"""

from collections.abc import Sequence

from spo_lightning.models.generate import Answer

Items = dict[str, list[float]]  # by the name of a number: a value per answer
SHARES = ("refused", "repeated", "empty", "cut", "tokens", "distinct1", "distinct2")
STRAIGHT = {ord("\u2019"): "'", ord("\u2018"): "'"}
MARKS = " \"'*_#>-.\u201c"  # that an answer may begin with
# below it a passage that comes three times is no fault: "no, no, no", 1,000,000
SHORTEST = 20  # letters


def items(answers: Sequence[Answer], refusals: Sequence[str]) -> Items:
    """What each answer adds. ``refusals``: how one that refuses begins."""
    openings = tuple(plain(opening) for opening in refusals)
    return {
        "answers/refused": [float(plain(one.text).startswith(openings)) for one in answers],
        "answers/repeated": [float(repeats(one.text)) for one in answers],
        "answers/empty": [float(not one.text.strip()) for one in answers],
        "answers/cut": [float(one.cut) for one in answers],
        "answers/tokens": [float(one.tokens) for one in answers],
    }


def shares(answers: Sequence[Answer], refusals: Sequence[str]) -> dict[str, float]:
    """Means of what each answer adds, and how many of all answers' n-grams are different ones."""
    if not answers:
        return {}
    found = {name: sum(of) / len(of) for name, of in items(answers, refusals).items()}
    texts = [one.text for one in answers]
    for size in (1, 2):
        grams = [gram for text in texts for gram in ngrams(text.split(), size)]
        if grams:
            found[f"answers/distinct{size}"] = len(set(grams)) / len(grams)  # Li et al. 2016
    return found


def plain(text: str) -> str:
    """In small letters, with straight apostrophes, from its first letter on."""
    return " ".join(text.translate(STRAIGHT).lower().split()).lstrip(MARKS)


def repeats(text: str) -> bool:
    """Whether at least its last half is one passage, three times or more."""
    letters = " ".join(text.split())
    size = len(letters)
    for period in range(1, (size + 1) // 3 + 1):
        same = period
        while same < size and letters[-same - 1] == letters[-same - 1 + period]:
            same += 1
        # sentences have a space between them, and none behind the last
        if same >= max(3 * period - 1, size / 2, SHORTEST):
            return True
    return False


def ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
