"""Images in, their latents by content out; drawn images and weights by what they depend on."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from spo_lightning.cache.shards import KEY, Shards, cache_of, limit_of
from spo_lightning.data.pictures import Image
from spo_lightning.diffusion.pipeline import Encoded, Pipeline
from spo_lightning.records.disk import writing

AT_ONCE = 64  # images that an autoencoder is given between two writes


def name_of(image: Image) -> str:
    """An image's name is what it shows, so that equal ones are one."""
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=KEY)
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


def latents_of(pipeline: Pipeline, images: Iterable[Image], cfg: DictConfig) -> dict[str, Tensor]:
    """By name, of every image once. What an autoencoder made is kept, whatever a run does with it;
    folding pixels is not worth a file."""
    named = {name_of(image): image for image in images}
    cache = cache_of(cfg)
    if cache is None or not isinstance(pipeline.codec, Encoded):
        return dict(zip(named, pipeline.latents([*named.values()]))) if named else {}
    about = f"{weights_of(pipeline.codec.vae)}-{pipeline.codec.side}"
    shards = Shards(cache / "latents", about, limit_of(cfg))
    keys = {bytes.fromhex(name): name for name in named}
    found = shards.find(keys.keys())
    missing = [key for key in keys if key not in found]
    shape = pipeline.latents([next(iter(named.values()))])[0].shape
    for start in range(0, len(missing), AT_ONCE):
        some = missing[start : start + AT_ONCE]
        rows = dict(zip(some, pipeline.latents([named[keys[key]] for key in some])))
        shards.keep(rows)
        found |= rows
    shards.trim()
    return {keys[key]: row.view(shape) for key, row in found.items()}


def weights_of(module: Any) -> str:
    """A hash of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def key_of(*parts: Any) -> str:
    """A name for what depends on these and nothing else."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def images_kept(cfg: DictConfig, key: str, draw: Callable[[], Sequence[Image]]) -> Sequence[Image]:
    """Images that an earlier run drew of the same, or drawn now and kept."""
    cache = cache_of(cfg)
    if cache is None:
        return draw()
    file = cache / "images" / f"{key}.npz"
    if file.exists():
        with np.load(file) as held:
            return [*held["images"]]
    found = draw()
    write_whole(file, {"images": np.stack([*found])})
    return found


def write_whole(file: Path, arrays: Mapping[str, Any]) -> None:
    """Beside, then renamed: no reader sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.stem}.{uuid4().hex}.npz")
    with writing(file):
        try:
            np.savez_compressed(beside, **arrays)
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)
