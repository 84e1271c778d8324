"""The ``model`` config in, a policy out: built small or loaded, with adapters or without; saved.

A new architecture is one yaml in ``conf/model``.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from spo_lightning.errors import UserError
from spo_lightning.models.attention import FLEX, IMPLEMENTATION
from spo_lightning.models.foreign import auto_class, take_attention, without_dropout
from spo_lightning.world import ALONE, World

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
OWN = {"auto": IMPLEMENTATION, "flex": FLEX}  # batches without padding


@dataclass(frozen=True)
class Policy:
    """A causal language model with its tokenizer.

    ``module`` owns the parameters (a transformers model, or peft's wrapper of it); ``lm`` is the
    transformers model itself, in which peft's adapters are injected in place.
    """

    module: nn.Module
    lm: Any
    tokenizer: Any
    adapted: bool  # only low-rank adapters train
    built: bool  # from config, not from a checkpoint

    def start(self) -> Any:
        """A context in which the policy is its own start: adapters off, where there are any."""
        return self.module.disable_adapter() if self.adapted else nullcontext()  # type: ignore

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer as files name them, whole, one at a time."""
        yield from self.lm.state_dict().items()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that decides the start's numbers: parameters but adapters', and buffers; whole."""
        for name, value in self.lm.named_parameters():
            if not (self.adapted and value.requires_grad):
                yield name.replace(".base_layer.", "."), value
        yield from self.lm.named_buffers()  # also those that no file holds: rotary frequencies

    def read(self, directory: Path) -> None:
        """Take the weights that ``save`` wrote of the same model, in place."""
        from safetensors.torch import load_model

        load_model(self.lm, directory / "model.safetensors", device=str(self.lm.device))

    def save(self, directory: Path, *, merge: bool, card: str, world: World = ALONE) -> None:
        """Write a Hugging Face directory: weights, tokenizer, generation config, model card.

        With adapters: the adapters alone when the base is a checkpoint of its own, else merged.
        Every process calls it, the first writes.
        """
        if world.first:
            self._save(directory, merge=merge, card=card)
        world.barrier()

    def _save(self, directory: Path, *, merge: bool, card: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if self.adapted and not (merge or self.built):
            self.module.save_pretrained(directory)  # type: ignore[operator]
        else:
            with self._merged():
                self._plain().save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        (directory / "README.md").write_text(card, encoding="utf-8")

    @contextmanager
    def _merged(self) -> Iterator[None]:
        if self.adapted:
            self.module.merge_adapter()  # type: ignore[operator]
        try:
            yield
        finally:
            if self.adapted:
                self.module.unmerge_adapter()  # type: ignore[operator]

    def _plain(self) -> Any:
        """The transformers model without peft's layers, for saving."""
        if not self.adapted:
            return self.lm
        plain = auto_class(self.lm.config).from_config(self.lm.config, dtype=self.lm.dtype)
        merged = {
            name.replace(".base_layer.", "."): value
            for name, value in self.lm.state_dict().items()
            if ".lora_" not in name
        }
        plain.load_state_dict(merged, strict=True)
        plain.generation_config = self.lm.generation_config
        return plain


def load(
    *,
    pretrained: str | None,
    revision: str | None,
    trust_remote_code: bool,
    dtype: str,
    attention: str,
    config: dict,
    seed: int,
    device: torch.device | str = "cpu",
) -> Policy:
    """Build or load a policy of which every weight trains, on ``device``."""
    if dtype not in DTYPES:
        raise UserError(f"model.dtype={dtype} is not one of {', '.join(DTYPES)}")
    if attention not in (*OWN, "sdpa", "eager"):
        raise UserError(f"model.attention={attention} is not auto, flex, sdpa or eager")
    if attention == "flex" and not torch.cuda.is_available():
        raise UserError("model.attention=flex needs a CUDA GPU: use auto, which packs as well")
    plain = "eager" if attention in OWN else attention  # the one that every architecture has
    settings = {"dtype": DTYPES[dtype], "attn_implementation": plain}
    torch.manual_seed(seed)  # initial weights
    if pretrained is None:
        lm, tokenizer = _build(dict(config), settings)
    else:
        lm, tokenizer = _open(pretrained, revision, trust_remote_code, dict(config), settings)
    without_dropout(lm)
    if attention in OWN:
        take_attention(lm, OWN[attention])
    lm.to(device)
    return Policy(lm, lm, tokenizer, adapted=False, built=pretrained is None)


def of_config(cfg: DictConfig, device: torch.device | str) -> Policy:
    """The model of a run's config."""
    model: Any = OmegaConf.to_container(cfg.model, resolve=True)
    named = ("pretrained", "revision", "trust_remote_code", "dtype", "attention", "config")
    return load(**{key: model[key] for key in named}, seed=cfg.seed, device=device)


def opened(where: str, settings: DictConfig, device: torch.device | str) -> Policy:
    """A checkpoint as it is; ``settings`` has its dtype, attention and trust_remote_code."""
    return load(
        pretrained=where,
        revision=None,
        trust_remote_code=settings.trust_remote_code,
        dtype=settings.dtype,
        attention=settings.attention,
        config={},
        seed=0,
        device=device,
    )


def check_same_tokens(mine: Any, theirs: Any, where: str) -> None:
    """Log-probabilities of two models compare only over the same token ids, so same tokenizer."""
    if mine.get_vocab() != theirs.get_vocab():
        raise UserError(f"the reference {where} has another tokenizer than the policy")


def _build(config: dict, settings: dict) -> tuple[Any, Any]:
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
        raise UserError(f"model.config does not build: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """What the innermost error says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


def tokenizer_of(pretrained: str | None, revision: str | None, trust: bool) -> Any:
    """The tokenizer alone, for looking at data."""
    if pretrained is None:
        return byte_tokenizer()
    source, local = source_of(pretrained)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust
        )
    except (OSError, ValueError) as error:
        raise UserError(_refused(pretrained, local, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def source_of(where: str) -> tuple[str, bool]:
    """A checked local directory or a hub id, and which of the two it is."""
    path = Path(where).expanduser()
    local = path.exists() or where.startswith((".", "/", "~"))
    if local:
        check_directory(path)
    return (str(path) if local else where), local


def check_sources(model: DictConfig) -> None:
    """Refuse local directories that hold no model, before any is loaded."""
    for where in (model.pretrained, model.reference):
        if where is not None:
            source_of(where)


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


def _open(
    where: str, revision: str | None, trust: bool, config: dict, settings: dict
) -> tuple[Any, Any]:
    source, local = source_of(where)
    tokenizer = tokenizer_of(where, revision, trust)
    from transformers import AutoConfig

    shared = {"revision": revision or "main", "trust_remote_code": trust}
    try:
        base = _base_of(Path(source)) if local else source
        found = AutoConfig.from_pretrained(base, **shared)
        _check_family(where, found, config)
        lm = auto_class(found).from_pretrained(source, use_safetensors=True, **settings, **shared)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(_refused(where, local, error)) from error
    if hasattr(lm, "peft_config"):
        raise UserError(f"{where} holds adapters: merge them first (model.lora.merge=true)")
    return lm, tokenizer


def check_directory(path: Path) -> None:
    """Refuse what is no checkpoint, before anything heavy is imported."""
    if not path.exists():
        raise UserError(f"no such checkpoint: {path}; give a directory or a hub id")
    if not path.is_dir() or not any(
        (path / name).exists() for name in ("config.json", "adapter_config.json")
    ):
        raise UserError(f"{path} is no Hugging Face checkpoint: it has no config.json")


def _base_of(path: Path) -> str:
    """Where the config stands: for an adapter directory that of its base model."""
    if (path / "config.json").exists() or not (path / "adapter_config.json").exists():
        return str(path)
    import json

    return json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]


def _check_family(where: str, found: Any, config: dict) -> None:
    family = str(config.get("model_type", "")).rstrip("0123456789")
    if family and not found.model_type.startswith(family):
        raise UserError(
            f"{where} is a {found.model_type} checkpoint, not {config['model_type']}: "
            "choose the model option of its architecture, or model=pretrained"
        )


def _refused(where: str, local: bool, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    if local:
        return f"{where} does not load: {first}"
    reason = "HF_HUB_OFFLINE is set" if offline else "the hub did not give it"
    return f"{where} is neither a local directory nor in the hub's cache, and {reason}: {first}"


def adapt(
    policy: Policy, *, rank: int, alpha: float, targets: Any, merge: bool, seed: int
) -> Policy:
    """The policy with low-rank adapters, which alone train; rank 0 adds none."""
    if not rank:
        return policy
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    chosen = targets if isinstance(targets, str) else list(targets)
    scale: Any = alpha  # peft declares an int and takes any number
    settings = LoraConfig(r=rank, lora_alpha=scale, target_modules=chosen, task_type="CAUSAL_LM")
    try:
        return replace(policy, module=get_peft_model(policy.lm, settings), adapted=True)
    except ValueError as error:
        raise UserError(f"model.lora.targets={targets}: {_cause(error)}") from error
