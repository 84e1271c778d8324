"""Grade-school maths: right against wrong model solutions of the same question.

Files of openai/grade-school-math: ``example_model_solutions.jsonl`` for the pairs, ``train.jsonl``
for the SFT text.
"""

import re
from pathlib import Path

from spo_lightning.data.reading import read
from spo_lightning.data.rows import Row, Task, limit, split, without
from spo_lightning.errors import UserError

SOLUTIONS, WORKED = "example_model_solutions.jsonl", "train.jsonl"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
FINAL = re.compile(r"(?:A:|####)\s*\$?\s*(-?[\d,]*\.?\d+)")


def gsm8k(
    *,
    path: str | None,
    eval_path: str | None,
    eval_fraction: float,
    max_rows: int | None,
    seed: int,
    ground_truth: bool,
) -> Task:
    """Every right solution (or the ground truth) against every wrong one, split by question."""
    if path is None:
        raise UserError(f"data.path is not set: name the directory that holds {SOLUTIONS}")
    pairs, counts = _pairs(Path(path), "data.path", ground_truth)
    if eval_path is None:
        train, held = split(pairs, eval_fraction)
    else:
        held, _ = _pairs(Path(eval_path), "data.eval_path", ground_truth)
        train = without(pairs, held)
    return Task(
        train=limit(train, max_rows, seed),
        held_out=held,
        sft=without(_worked(Path(path)), held),
        answer_of=final_number,
        counts=counts,
    )


def _pairs(folder: Path, where: str, ground_truth: bool) -> tuple[list[Row], dict[str, int]]:
    questions = read(str(folder / SOLUTIONS), split="train", where=where)
    pairs, unpaired = [], 0
    for at, row in enumerate(questions):
        here = questions.named(at)
        question, truth = _texts(row, ("question", "ground_truth"), here)
        solutions = [_solution(row, model, here) for model in MODELS]
        # two models may give one text: a set in order, so that no pair stands twice
        right = dict.fromkeys(text for text, correct in solutions if correct)
        right = [truth] if ground_truth else list(right)
        wrong = list(dict.fromkeys(text for text, correct in solutions if not correct))
        unpaired += not (right and wrong)
        shared = {"prompt": question + "\n", "answer": final_number(truth)}
        pairs += [{**shared, "chosen": c, "rejected": r} for c in right for r in wrong]
    return pairs, {"questions": len(questions), "questions without a right/wrong pair": unpaired}


def _solution(row: Row, model: str, where: str) -> tuple[str, bool]:
    solution = row.get(model)
    if not isinstance(solution, dict) or not isinstance(solution.get("is_correct"), bool):
        raise UserError(f"{where}: {model!r} is not {{solution, is_correct}}: restore the file")
    return _texts(solution, ("solution",), f"{where}, {model}")[0], solution["is_correct"]


def _worked(folder: Path) -> list[Row]:
    found, rows = read(str(folder / WORKED), split="train", where="data.path"), []
    for at, row in enumerate(found):
        question, answer = _texts(row, ("question", "answer"), found.named(at))
        rows.append({"prompt": question + "\n", "completion": answer.replace("####", "A:")})
    return rows


def _texts(row: Row, names: tuple[str, ...], where: str) -> list[str]:
    for name in names:
        if not isinstance(row.get(name), str):
            raise UserError(f"{where}: no text under {name!r}: restore the file")
    return [row[name] for name in names]


def final_number(completion: str) -> str | None:
    """The number after the last ``A:`` or ``####``; 1,080.00 and 1080 are one answer."""
    found = FINAL.findall(completion)
    if not found:
        return None
    number = found[-1].replace(",", "")
    return (number.rstrip("0").rstrip(".") or "0") if "." in number else number
