"""A ``model.config`` in, a model with random weights and the byte-level tokenizer out."""

from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.models.foreign import auto_class


def build(config: dict, settings: dict) -> tuple[Any, Any]:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    tokenizer = byte_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    try:
        made = AutoConfig.for_model(
            **config, vocab_size=len(tokenizer), bos_token_id=None, use_cache=True, **ids
        )
        return auto_class(made).from_config(made, **settings), tokenizer
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.config does not build: {cause(error)}") from error


def cause(error: BaseException) -> str:
    """What the innermost error says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


def byte_tokenizer() -> Any:
    """256 bytes, an end mark and padding: any text, no file."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", padding_side="right"
    )
