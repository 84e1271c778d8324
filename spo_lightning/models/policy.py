"""The ``model`` config in, a policy out: built small or loaded, with adapters or without; saved.

A new architecture is one yaml in ``conf/model``.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from spo_lightning.errors import UserError
from spo_lightning.models import adapters, opening, parts
from spo_lightning.models.attention import FLEX, IMPLEMENTATION
from spo_lightning.models.built import build, byte_tokenizer
from spo_lightning.models.foreign import take_attention, without_dropout
from spo_lightning.models.opening import Asked, Opened
from spo_lightning.models.quantized import Bits, bits_of, in_full, scales
from spo_lightning.models.rewards import gives_rewards, with_head
from spo_lightning.models.spread import Spread
from spo_lightning.world import ALONE, World, whole

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
TEMPLATE = "ranker_template"  # in tokenizer_config.json
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
    # the checkpoint that adapters stand on; None: it is in no file, so they are saved merged
    base: str | None = None
    # what the adapters of a checkpoint held when they were loaded; None: they are new
    began: Mapping[str, Tensor] | None = None
    # how the whole is made of the parts that processes have; None: each has the whole
    spread: Spread | None = None
    # the parameters that are on the meta device until each is a part; None: all are read
    unread: parts.Unread | None = None

    @property
    def rewards(self) -> bool:
        """Whether it is a reward model, which gives numbers for answers and writes none."""
        return gives_rewards(self.lm)

    @property
    def template(self) -> str | None:
        """Of a ranker: how it is asked which of two answers is better. Its tokenizer keeps it."""
        return self.tokenizer.init_kwargs.get(TEMPLATE)

    def is_asked(self, template: str | None) -> None:
        """From now on it is asked like this; None: it is no ranker."""
        kept = self.tokenizer.init_kwargs
        kept.pop(TEMPLATE, None)
        kept |= {} if template is None else {TEMPLATE: template}

    def start(self) -> Any:
        """A context in which the policy is its own start: new adapters off, those of a checkpoint
        as they were loaded."""
        if self.began is not None:
            return adapters.holding(self.lm, self.began)
        return self.module.disable_adapter() if self.adapted else nullcontext()  # type: ignore

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer as files name them, whole, one at a time."""
        yield from self.lm.state_dict().items()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that decides the start's numbers, in the order of their names, whole, one at a time:
        parameters but new adapters', buffers."""
        found = {
            name.replace(".base_layer.", "."): value
            for name, value in self.lm.named_parameters()
            if not (self.adapted and value.requires_grad)
        }
        found |= {**(self.began or {}), **dict(scales(self.lm))}
        found |= dict(self.lm.named_buffers())  # also those that no file holds: rotary frequencies
        for name in sorted(found):
            yield name, whole(found[name].detach())

    def agree(self, world: World) -> None:
        """Every process has the first one's weights."""
        world.agree(value for _, value in self.weights())

    def settings(self) -> dict[str, Any]:
        """What else decides them: how the adapters of a checkpoint compute."""
        return {} if self.began is None else adapters.settings_of(self.module)

    def read(self, directory: Path) -> None:
        """Take the weights that ``save`` wrote of the same model, in place."""
        from safetensors.torch import load_model

        load_model(self.lm, directory / "model.safetensors", device=str(self.lm.device))

    def save(
        self,
        directory: Path,
        *,
        merge: bool,
        card: str,
        world: World = ALONE,
        file_gb: float | None = None,
    ) -> None:
        """Write a Hugging Face directory: weights, tokenizer, generation config, model card.

        With adapters: the adapters alone when the base is a checkpoint of its own, else merged.
        ``file_gb``: of the largest file, in 10^9 bytes; None: one file, up to transformers' own
        50. Every process calls it, the first writes.
        """
        if world.first:
            directory.mkdir(parents=True, exist_ok=True)
        most = int(1e9 * (file_gb or 50))
        alone = self.adapted and self.base is not None and not merge
        names = None
        if self.spread is not None and not self.adapted:
            names = parts.names_of(self.spread.empty)
        if self.spread is not None and names is not None:
            values = dict(self.lm.named_parameters(remove_duplicate=False))
            how = {"most": most, "first": world.first}
            parts.write(self.spread.empty, names, values, directory, **how)
        else:
            mine = self.gathered("cpu" if world.first else None, trained=alone)
            if mine is not None and world.first and alone:
                adapters.write(mine.module, directory, str(self.base))
            elif mine is not None and world.first:
                mine.whole().save_pretrained(directory, max_shard_size=most)
        if world.first:
            self.tokenizer.save_pretrained(directory)
            (directory / "README.md").write_text(card, encoding="utf-8")
        world.barrier()

    @property
    def device(self) -> Any:
        """Where it computes."""
        return self.lm.device if self.spread is None else self.spread.device

    def gathered(self, device: Any, *, trained: bool = False) -> "Policy | None":
        """The policy with every weight in this process: itself, or of parts a copy on ``device``
        (None: this process wants none). ``trained``: only with those that train. Every process
        calls it."""
        if self.spread is None:
            return self
        made: Any = self.spread.filled(self.module, device, trained)
        if made is None:
            return None
        lm = made if self.module is self.lm else made.get_base_model()
        return replace(self, module=made, lm=lm, spread=None)

    def whole(self) -> Any:
        """A transformers model without peft's layers, in full."""
        if self.adapted:
            return adapters.merged(self.module)
        return self.lm if bits_of(self.lm) is None else in_full(self.lm)


def load(
    *,
    pretrained: str | None,
    revision: str | None,
    trust_remote_code: bool,
    dtype: str,
    attention: str,
    config: dict,
    seed: int,
    base: str | None = None,
    bits: Bits | None = None,
    device: torch.device | str = "cpu",
    unread: bool = False,
) -> Policy:
    """Build or load a policy on ``device``: every weight trains, or the checkpoint's adapters.

    ``unread``: its parameters stay in their files where they can, for ``sharded.py`` to read.
    """
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
        lm, tokenizer = build(dict(config), settings)
        found = Opened(lm, lm, tokenizer, None)
    else:
        asked = Asked(revision, trust_remote_code, base, bits, unread)
        found = opening.opened(pretrained, asked, str(config.get("model_type", "")), settings)
    lm = found.lm
    without_dropout(lm)
    if attention in OWN:
        take_attention(lm, OWN[attention])
    if found.unread is None:
        lm.to(device)
    adapted = found.module is not lm
    return Policy(
        found.module,
        lm,
        found.tokenizer,
        adapted=adapted,
        built=pretrained is None,
        base=found.base,
        began=adapters.trained(lm) if adapted else None,
        unread=found.unread,
    )


def of_config(cfg: DictConfig, device: torch.device | str, *, unread: bool = False) -> Policy:
    """The model of a run's config; ``unread`` as in ``load``."""
    model: Any = OmegaConf.to_container(cfg.model, resolve=True)
    named = ("pretrained", "revision", "trust_remote_code", "dtype", "attention", "config")
    some = {key: model[key] for key in named} | {"base": model.get("base")}
    policy = load(**some, bits=Bits.of(model), seed=cfg.seed, device=device, unread=unread)
    _refuse_idle(policy, cfg.model)
    if not OmegaConf.select(cfg, "loss.rewards"):
        _refuse_rewards(policy, cfg.model.pretrained)
    return policy


def _refuse_rewards(policy: Policy, name: str) -> None:
    if policy.rewards:
        raise UserError(
            f"{name} is a reward model, which has no log-probabilities and writes no answers: "
            "name a causal language model"
        )


def _refuse_idle(policy: Policy, model: DictConfig) -> None:
    """What the checkpoint itself makes idle: whether it holds adapters is seen in it alone."""
    lora, name = model.lora, model.pretrained
    if policy.adapted and lora.rank and not lora.get("fresh"):
        raise UserError(
            f"model.lora.rank={lora.rank} is of new adapters, and those of {name} go on: leave it "
            "out, or model.lora.fresh=true merges them first"
        )
    if policy.adapted:
        return
    if bits_of(policy.lm) is not None and not lora.rank:
        raise UserError(
            f"the weights of {name} are quantised, and such do not train: set model.lora.rank, "
            "for adapters that do"
        )
    if lora.get("fresh"):
        raise UserError(f"model.lora.fresh has no effect: {name} holds no adapters; leave it out")
    if lora.merge and not lora.rank:
        raise UserError("model.lora.merge has no effect: model.lora.rank is 0; leave it out")
    if model.get("base") is not None and model.reference is None:
        raise UserError(f"model.base has no effect: {name} holds no adapters; leave it out")


def opened(
    where: str,
    settings: DictConfig,
    device: torch.device | str,
    *,
    rewards: bool = False,
    bits: Bits | None = None,
    unread: bool = False,
) -> Policy:
    """A checkpoint as it is; ``settings``: its dtype, attention, trust_remote_code and base.

    ``rewards``: whether it may be a reward model. ``bits``: of its linear layers. ``unread`` as in
    ``load``.
    """
    found = load(
        pretrained=where,
        revision=None,
        trust_remote_code=settings.trust_remote_code,
        dtype=settings.dtype,
        attention=settings.attention,
        config={},
        seed=0,
        base=settings.get("base"),
        bits=bits,
        device=device,
        unread=unread,
    )
    if not rewards:
        _refuse_rewards(found, where)
    return found


def tokenizer_of(where: str | None, settings: Mapping[str, Any]) -> Any:
    """The tokenizer alone; ``settings`` as in ``opened``, and the revision of a hub id."""
    if where is None:
        return byte_tokenizer()
    revision, base = settings.get("revision"), settings.get("base")
    return opening.tokenizer_of(where, Asked(revision, settings["trust_remote_code"], base))


def check_same_tokens(mine: Any, theirs: Any, where: str) -> None:
    """Log-probabilities of two models compare only over the same token ids, so same tokenizer."""
    if mine.get_vocab() != theirs.get_vocab():
        raise UserError(f"the reference {where} has another tokenizer than the policy")


def to_rewards(policy: Policy, seed: int) -> Policy:
    """The policy's body under a reward head; adapters that it has become part of the weights."""
    if policy.rewards:
        return policy
    base, lm = policy.base, policy.lm
    if policy.adapted:
        base, lm = None, policy.whole().to(policy.lm.device).requires_grad_(True)
    made = with_head(lm, policy.tokenizer.pad_token_id, seed)
    return replace(policy, module=made, lm=made, adapted=False, base=base, began=None)


def adapt(
    policy: Policy,
    *,
    rank: int,
    alpha: float,
    targets: Any,
    merge: bool,
    seed: int,
    fresh: bool = False,
    dora: bool = False,
    rslora: bool = False,
) -> Policy:
    """The policy with low-rank adapters, which alone train; rank 0 adds none.

    ``fresh``: those of its checkpoint become part of the weights first; else they go on.
    """
    if policy.adapted and not fresh:
        return policy
    if policy.adapted:
        lm = policy.whole().to(policy.lm.device).requires_grad_(True)
        policy = replace(policy, module=lm, lm=lm, adapted=False, base=None, began=None)
    if not rank:
        return policy
    how = {"alpha": alpha, "targets": targets, "dora": dora, "rslora": rslora, "seed": seed}
    with nullcontext() if policy.unread is None else policy.unread.seen(policy.lm):
        module = adapters.fresh(policy.lm, rank=rank, **how)
    return replace(policy, module=module, adapted=True)
