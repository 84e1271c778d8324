"""TRL's own tokenisation, the peer that ours is compared with."""

from types import SimpleNamespace


def peer(rows, tokenizer, max_length):
    """TRL's own tokenisation, filter and truncation: (prompt, chosen, rejected) per row."""
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    args = SimpleNamespace(
        dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start"
    )
    data = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(rows), tokenizer, args, "x"
    )
    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length)
    for example in data:
        batch = collator([example])
        sides = [
            tuple(tokens[mask.bool()].tolist())
            for tokens, mask in zip(batch["input_ids"], batch["completion_mask"])
        ]
        yield tuple(example["prompt_ids"]), *sides
