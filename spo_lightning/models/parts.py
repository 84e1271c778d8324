"""Safetensors files in, weights out, and back again: one at a time, so none holds a whole model.

A model begins with its parameters on the meta device. ``sharded.py`` fills block after block and
deals each over the processes, and what they have goes into files part by part.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo_lightning.models.sources import WEIGHTS

log = logging.getLogger(__name__)

INDEX = f"{WEIGHTS}.index.json"
KINDS = {  # what files call them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class Unread:
    """Parameters on the meta device, each with its file and its name there."""

    places: Mapping[int, tuple[nn.Parameter, Path, str]]  # by id, which stays while they do

    @contextmanager
    def seen(self, lm: nn.Module) -> Iterator[None]:
        """Inside, one number stands for each of the model's: adapters, which follow the device of
        what they adapt, come to where numbers are."""
        others: dict[int, nn.Parameter] = {}  # by id, there and back
        for hollow, *_ in self.places.values():
            one = torch.zeros((), dtype=hollow.dtype).expand(hollow.shape)
            there = nn.Parameter(one, hollow.requires_grad)
            others |= {id(hollow): there, id(there): hollow}

        def swap() -> None:
            for layer in lm.modules():
                for name, p in layer._parameters.items():
                    if p is not None and id(p) in others:
                        others[id(p)].requires_grad = p.requires_grad
                        layer._parameters[name] = others[id(p)]

        swap()
        try:
            yield
        finally:
            swap()

    def fill(self, module: nn.Module, device: Any) -> None:
        """Read what stands in the module, in place; what two layers share, they share after it."""
        from safetensors import safe_open

        read: dict[int, nn.Parameter] = {}
        for layer in module.modules():
            for name, hollow in layer._parameters.items():
                if hollow is None or not hollow.is_meta:
                    continue
                if id(hollow) not in read:
                    _, path, key = self.places[id(hollow)]
                    with safe_open(path, "pt") as file:
                        value = file.get_tensor(key).to(device, hollow.dtype)
                    read[id(hollow)] = nn.Parameter(value, hollow.requires_grad)
                layer._parameters[name] = read[id(hollow)]


def begun(
    where: str, opens: Any, config: Any, settings: Any, hub: Any
) -> tuple[Any, Unread] | None:
    """The model as ``opens.from_pretrained`` gives it, but for its parameters, and where they are.

    None, which a line tells of, where its files hold other tensors than the model, or not all.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        lm = opens.from_config(config, **settings, trust_remote_code=hub["trust_remote_code"])
    lm.tie_weights()  # which making it there has undone
    names = None
    # some of the weights of such models stay in float32
    if not lm._get_dtype_plan(settings["dtype"]) and not hasattr(config, "quantization_config"):
        names = names_of(lm)
    parameters, places = dict(lm.named_parameters(remove_duplicate=False)), {}
    files = {} if names is None else _files(where, hub["revision"], [*names])
    for key, name in (names or {}).items():
        if files.get(key, ("", ()))[1] == [*parameters[name].shape]:
            places[id(parameters[name])] = (parameters[name], files[key][0], key)
    if not names or len(places) < len(names):
        log.info("Every process reads the whole model: the files of %s have other tensors.", where)
        return None
    if lm.can_generate():
        how = (None, True, None, where, None, False, None, None, None, hub["revision"], "")
        lm.adjust_generation_fn(*how, hub["trust_remote_code"])
    return lm.eval(), Unread(places)


def _files(where: str, revision: str, wanted: Sequence[str]) -> dict[str, tuple[Path, list[int]]]:
    """Of those wanted that are there, the file of each, and its shape."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    how: Any = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    names, one = [WEIGHTS], cached_file(where, WEIGHTS, **how)
    if one is None:
        index = cached_file(where, INDEX, **how)
        shards = {} if index is None else json.loads(Path(index).read_text("utf-8"))["weight_map"]
        names = sorted({shards[key] for key in wanted if key in shards})
    found = {}
    for name in names:
        path = cached_file(where, name, **how)
        if path is None:
            continue
        with safe_open(path, "pt") as file:
            for key in {*file.keys()} & {*wanted}:  # noqa: SIM118 (a file iterates no keys)
                found[key] = (Path(path), file.get_slice(key).get_shape())
    return found


def names_of(lm: Any) -> dict[str, str] | None:
    """By its name in transformers' files, the model's own name of every weight, of tied ones once.

    None where files hold other tensors, blocks put together for instance. ``lm``: on meta.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = lm.state_dict()
    for name in lm._keys_to_ignore_on_save or ():
        state.pop(name, None)
    if state.keys() - dict(lm.named_parameters(remove_duplicate=False)).keys():
        return None  # buffers
    state = remove_tied_weights_from_state_dict(state, lm)
    own = {id(value): name for name, value in state.items()}
    files = revert_weight_conversion(lm, dict(state))
    if {*map(id, files.values())} != own.keys():
        return None
    return {name: own[id(value)] for name, value in files.items()}


def write(
    lm: Any, names: Mapping[str, str], values: Mapping[str, Tensor], directory: Path, *,
    most: int, first: bool,
) -> None:  # fmt: skip
    """A Hugging Face directory, as ``save_pretrained`` writes it. Every process calls it, the
    ``first`` writes.

    ``lm``: without its parameters. ``names``: of ``names_of``. ``values``: the parameters by the
    model's own names, spread over processes. ``most``: bytes of the largest file.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    pattern = WEIGHTS.replace(".", "{suffix}.")
    hollow = {name: torch.empty(values[own].shape, dtype=values[own].dtype, device="meta")
              for name, own in names.items()}  # fmt: skip
    split = split_torch_state_dict_into_shards(
        hollow, filename_pattern=pattern, max_shard_size=most
    )
    if first:
        lm.save_pretrained(directory, state_dict={})
    for name, inside in split.filename_to_tensors.items():
        _write(directory / name, {key: values[names[key]] for key in inside}, first)
    if first and split.is_sharded:
        told = {"total_parameters": lm.num_parameters(), **split.metadata}
        index = {"metadata": told, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / INDEX).write_text(text, encoding="utf-8")


@torch.no_grad()
def _write(path: Path, values: Mapping[str, Tensor], first: bool) -> None:
    """One file of the format (https://github.com/huggingface/safetensors): the length of a header,
    the header, and every tensor's bytes where it says."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order = sorted(values, key=lambda name: (-values[name].dtype.itemsize, name))
    end = 0
    for name in order:
        value = values[name]
        begin, end = end, end + value.numel() * value.dtype.itemsize
        kind, shape = KINDS[value.dtype], [*value.shape]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    told = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    told += b" " * (-len(told) % 8)
    with path.open("wb") if first else nullcontext() as file:
        if file is not None:
            file.write(len(told).to_bytes(8, "little") + told)
        for part in (part for name in order for part in _in_order(values[name].detach())):
            if file is not None:
                flat: Any = part.cpu().contiguous().view(-1).view(torch.uint8).numpy()
                file.write(flat)


def _in_order(value: Tensor) -> Iterator[Tensor]:
    """A tensor's rows; of one that is spread over processes the part of each, told to all."""
    spread: Any = value
    if not hasattr(spread, "full_tensor"):
        yield value
        return
    mesh, own = spread.device_mesh, spread.to_local()
    size = mesh.size(mesh.ndim - 1)  # all parts stand again in every copy of a mesh of two
    each = -(-len(value) // size)
    for rank in range(size):
        rows = max(0, min(each, len(value) - rank * each))
        mine = rank == mesh.get_local_rank(mesh.ndim - 1)
        part = own.contiguous() if mine else own.new_empty(rows, *value.shape[1:])
        if rows:
            torch.distributed.broadcast(part, group=mesh.get_group(mesh.ndim - 1), group_src=rank)
        yield part
