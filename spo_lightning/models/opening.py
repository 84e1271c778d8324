"""A source in, a transformers model and its tokenizer out: whole, or refused in one line."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spo_lightning.errors import UserError, verdict
from spo_lightning.models import adapters
from spo_lightning.models.foreign import auto_class
from spo_lightning.models.parts import Unread, begun
from spo_lightning.models.quantized import Bits, bits_of, in_bits, plain, prepared
from spo_lightning.models.rewards import gives_rewards, with_head
from spo_lightning.models.sources import Source, check, found


@dataclass(frozen=True)
class Opened:
    """What a checkpoint holds."""

    module: Any  # the model, or peft's wrapper of it
    lm: Any
    tokenizer: Any
    base: str | None  # where the weights without adapters stand; None: nowhere but here
    unread: Unread | None = None  # parameters that are still in their files


@dataclass(frozen=True)
class Asked:
    """How a checkpoint is to be opened."""

    revision: str | None  # of a hub id
    trust: bool  # run its own Python
    base: str | None  # of adapters, in place of the one that they name
    bits: Bits | None = (
        None  # of its linear layers; None: all, or what its adapters were trained on
    )
    unread: bool = False  # its parameters may stay in their files

    @property
    def hub(self) -> dict[str, Any]:
        return {"revision": self.revision or "main", "trust_remote_code": self.trust}


def opened(name: str, asked: Asked, family: str, settings: dict[str, Any]) -> Opened:
    """The checkpoint; ``family``: what its architecture must be, or "" for any."""
    source = check(name)
    directory = _adapters_of(source, asked)
    if directory is None:
        lm, unread = _model(source, asked, family, settings)
        tokenizer = tokenizer_of(name, asked)
        _check_room(source, tokenizer, lm)
        return Opened(lm, lm, tokenizer, source.lasting, unread)
    below, asked_below = _below(source, directory, asked)
    bits = asked.bits or Bits.recorded(directory)
    lm, _ = _model(below, replace(asked_below, bits=bits), family, settings)
    tokenizer = tokenizer_of(name, asked)
    if adapters.of_rewards(directory) and not gives_rewards(lm):  # they bring the head
        lm = with_head(lm, tokenizer.pad_token_id, seed=0)
    module, alters = adapters.attached(lm, directory, name)
    _check_room(source, tokenizer, lm)
    # where the adapters bring weights of the model too, what they stand on is in no other file
    return Opened(module, lm, tokenizer, None if alters else below.lasting)


def tokenizer_of(name: str, asked: Asked) -> Any:
    """The checkpoint's tokenizer, or of adapters without one that of their base."""
    source = found(name)
    directory = _adapters_of(source, asked)
    if directory is not None and not _has_tokenizer(source, directory):
        below, asked = _below(source, directory, asked)
        return tokenizer_of(below.name, asked)
    if not source.tokenizer:
        raise UserError(
            f"{name} has no tokenizer (tokenizer.json, tokenizer.model or the like): save it there"
        )
    from transformers import AutoTokenizer

    with _readable(source):
        tokenizer = AutoTokenizer.from_pretrained(source.where, **asked.hub, **_gguf(source))
    if source.gguf is not None:
        _forget_strangers(tokenizer)
    if tokenizer.pad_token is None:  # padding is masked, so that any special token serves
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    if tokenizer.pad_token is None:
        raise UserError(f"{name}: its tokenizer has no end mark (eos_token): set one there")
    return tokenizer


def _forget_strangers(tokenizer: Any) -> None:
    """transformers adds <|endoftext|> to what it reads of a .gguf file, where it is not there."""
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer
    last = max(backend.get_vocab(with_added_tokens=False).values())
    held = json.loads(backend.to_str())
    own = [token for token in held["added_tokens"] if token["id"] <= last]
    if len(own) < len(held["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(held | {"added_tokens": own}))


def _has_tokenizer(source: Source, directory: Path) -> bool:
    return Source(source.name, str(directory), local=True).tokenizer


def _adapters_of(source: Source, asked: Asked) -> Path | None:
    """The directory of a checkpoint's adapters, or None; those of a hub id are fetched."""
    if source.local:
        return Path(source.where) if source.adapters else None
    from transformers.utils.hub import cached_file

    how: dict[str, Any] = {"revision": asked.revision or "main"}
    # what cannot be reached is told of when the model itself is asked for
    for kind in ("missing_entries", "gated_repo", "connection_errors"):
        how[f"_raise_exceptions_for_{kind}"] = False
    with _readable(source):
        settings = cached_file(source.where, "adapter_config.json", **how)
        if settings is None:
            return None
        if cached_file(source.where, adapters.FILE, **how) is None:
            raise UserError(f"{source.name} holds adapters, but no {adapters.FILE}")
    for extra in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        cached_file(source.where, extra, **how)
    return Path(settings).parent


def _below(source: Source, directory: Path, asked: Asked) -> tuple[Source, Asked]:
    """What adapters stand on: as they name it, or as ``model.base`` does."""
    from peft import PeftConfig

    with _readable(source):
        settings = PeftConfig.from_pretrained(str(directory))
    named = asked.base or settings.base_model_name_or_path
    if not named:
        raise UserError(f"{source.name} holds adapters that name no base: give it as {_HOW}")
    try:
        below = check(named)
    except UserError as error:
        raise UserError(f"{source.name} holds adapters on {named}: {error}; or {_HOW}") from error
    if below.adapters:
        raise UserError(f"{source.name}: its base {named} holds adapters: export that one merged")
    return below, Asked(None if asked.base else settings.revision, asked.trust, None)


_HOW = "model.base=DIR_OR_HUB_ID (base= of eval and sample)"


def _gguf(source: Source) -> dict[str, Any]:
    return {} if source.gguf is None else {"gguf_file": source.gguf}


def _model(
    source: Source, asked: Asked, family: str, settings: dict[str, Any]
) -> tuple[Any, Unread | None]:
    from transformers import AutoConfig, AutoModelForCausalLM

    how: dict[str, Any] = {"use_safetensors": True}
    opens = AutoModelForCausalLM
    with _readable(source):
        if source.gguf is None:  # of a GGUF file reading the config alone costs seconds
            config = AutoConfig.from_pretrained(source.where, **asked.hub)
            _check_family(source, config.model_type, family)
            opens = auto_class(config)
            if asked.unread and asked.bits is None:
                found = begun(source.where, opens, config, settings, asked.hub)
                if found is not None:
                    return found
            if asked.bits is not None:
                how |= _in_bits(source, config, asked.bits)
        else:
            from transformers import GgufConfig

            packed = GgufConfig(gguf_file=source.gguf, dequantize=True)
            how = {"gguf_file": source.gguf, "quantization_config": packed}
        how |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # told of below
        # the bar of a .gguf file knows no verbosity
        with nullcontext() if source.gguf is None else redirect_stderr(io.StringIO()):
            loaded: Any = opens.from_pretrained(source.where, **how, **settings, **asked.hub)
    lm, read = loaded
    _check_whole(source, type(lm).__name__, read)
    if source.gguf is not None:
        _check_family(source, lm.config.model_type, family)
        if any(not p.dtype.is_floating_point for p in lm.parameters()):
            raise UserError("the .gguf file was not dequantised: upgrade transformers")
        plain(lm)
        if asked.bits is not None:
            lm = in_bits(lm, asked.bits, settings)
    return lm if bits_of(lm) is None else prepared(lm, source.name), None


def _in_bits(source: Source, config: Any, bits: Bits) -> dict[str, Any]:
    """How transformers quantises what it reads, file by file."""
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"model.quantize: {source.name} is quantised already: leave it out")
    return {"quantization_config": bits.settings(), "device_map": {"": "cpu"}}


def _check_whole(source: Source, kind: str, read: dict[str, Any]) -> None:
    """What a checkpoint lacks transformers would fill with random numbers."""
    for wrong, words in (("missing_keys", "lacks"), ("mismatched_keys", "has in other shapes")):
        names = sorted(key if isinstance(key, str) else key[0] for key in read[wrong])
        if names:
            raise UserError(
                f"{source.name} does not load: it {words} {len(names)} of the weights of {kind}, "
                f"the first {names[0]}"
            )


def _check_family(source: Source, kind: str, family: str) -> None:
    if family and not kind.startswith(family.rstrip("0123456789")):
        raise UserError(
            f"{source.name} is a {kind} checkpoint, not {family}: "
            "choose the model option of its architecture, or model=pretrained"
        )


def _check_room(source: Source, tokenizer: Any, lm: Any) -> None:
    """A token beyond the embedding would end in an index error, or in another's row."""
    rows = getattr(lm.get_input_embeddings(), "weight", None)
    last = max(tokenizer.get_vocab().values())
    if rows is not None and last >= len(rows):
        raise UserError(
            f"{source.name}: its tokenizer has tokens up to {last}, its embedding {len(rows)} "
            "rows: resize the embedding, or take the tokenizer that it was trained with"
        )


@contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Whatever a reader makes of a stranger's file is the user's error, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if verdict(error)[1].startswith("out of memory"):
            raise
        raise UserError(_refused(source, error)) from error


def _refused(source: Source, error: BaseException) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if source.local:
        return f"{source.name} does not load: {first}"
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, GatedRepoError):
            return (
                f"{source.name} is gated: accept its terms at https://huggingface.co/{source.name}"
                " and log in (hf auth login, or HF_TOKEN)"
            )
        if isinstance(seen, RepositoryNotFoundError):
            return (
                f"{source.name} is no local directory, and the hub does not have it, or shows it "
                "only to who has logged in (hf auth login, or HF_TOKEN)"
            )
        seen = seen.__cause__ or seen.__context__
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    reason = "HF_HUB_OFFLINE is set" if offline else "the hub did not give it"
    return (
        f"{source.name} is neither a local directory nor in the hub's cache, and {reason}: {first}"
    )
