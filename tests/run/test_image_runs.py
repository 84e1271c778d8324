"""Runs whose policy draws: losses and solvers, going on after a stop, and what is refused."""

import csv
import json
import math
from functools import partial

import pytest
import torch
from conftest import forked
from fitting import config
from safetensors.torch import load_file

from spo_lightning.config import knobs
from spo_lightning.errors import UserError
from spo_lightning.train import train

pytest.importorskip("diffusers")
TINY = (
    *("experiment=diffusion_shapes", "model.config.block_out_channels=[8,8]", "hardware=cpu"),
    *("model.config.norm_num_groups=4", "data.prompts=36", "data.eval_prompts=12"),
    *("data.sft_rows=32", "sft.max_steps=2", "sft.batch_size=8", "max_steps=3", "batch_size=8"),
    *("micro_batch_size=8", "model.sampling.steps=2", "model.surrogate.eval_draws=2"),
    *("eval.every_n_steps=0", "log.every_n_steps=1", "checkpoint.monitor=null"),
    *("optimizer=sgd", "optimizer.lr=0.5"),
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of these words, with one cache for all: the denoiser, its images and its numbers."""
    home = tmp_path_factory.mktemp("images")

    def run(*words, name=None):
        where = home / (name or f"run-{len([*home.iterdir()])}")
        return train(config(*TINY, *words, f"cache.dir={home / 'cache'}"), where), where

    return run


def weights(where):
    return load_file(where / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def rows(where):
    with (where / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if "/time/" not in k} for row in csv.DictReader(file)
        ]


def differ(one, other):
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.fixture(scope="module")
def start(ran):
    return weights(ran("loss=dpo", "max_steps=0")[1])


SLOW = (pytest.mark.slow, pytest.mark.timeout(300))  # as runs are of seconds
LOSSES = ("dpo", "kto", "spo")
MORE = ("dmpo", "ipo", "sft", "simpo", "kto_pair", "bco", "apo_zero")


@pytest.mark.parametrize("loss", [*LOSSES, *(pytest.param(it, marks=SLOW) for it in MORE)])
def test_losses_train(ran, start, loss):
    numbers, where = ran(f"loss={loss}", name=f"loss-{loss}")
    assert numbers["steps"] == 3 and numbers["init"]["win_rate"] == 0.5
    assert {"exact_match", "rewards/margins", "displacement/chosen"} <= numbers["final"].keys()
    assert differ(start, weights(where))
    if loss in ("dpo", "spo"):  # policy = reference at the same times and noise
        assert float(rows(where)[0]["train/loss"]) == pytest.approx(math.log(2), abs=1e-6)
        assert float(rows(where)[0]["train/rewards/margins"]) == 0.0
    others = [it for it in where.parent.glob("loss-*") if it != where]
    assert all(differ(weights(other), weights(where)) for other in others)


SOLVERS = {
    "penalty": ["solver/phi=softplus"],
    "unrolled": ["solver.lower_lr=1e-4"],
    "implicit": ["solver.lower_lr=1e-6", "solver.steps=1", "solver.gamma=1e-5"],
    "alternating": [],
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_train(ran, start, solver):
    numbers, where = ran("loss=dpo", "max_steps=2", f"solver={solver}", *SOLVERS[solver])
    assert numbers["steps"] == 2 and differ(start, weights(where))


@pytest.mark.parametrize("loss", ["spo", pytest.param("kto", marks=SLOW)])
def test_a_run_goes_on_bit_for_bit(ran, loss):
    how = (f"loss={loss}", "model.lora.rank=2", "model.surrogate.draws=2", "optimizer=adamw")
    how += ("optimizer.lr=1e-3", "checkpoint.every_n_steps=1")
    _, whole = ran(*how, "max_steps=4", name=f"whole-{loss}")
    _, half = ran(*how, "max_steps=2", name=f"half-{loss}")
    assert rows(half) == rows(whole)[:2]
    ran(*how, "max_steps=4", "ckpt_path=last", name=f"half-{loss}")
    assert rows(half) == rows(whole) and len(rows(whole)) == 4
    assert not differ(weights(half), weights(whole))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_microbatches_make_no_difference(ran):
    words = ("loss=dpo", "max_steps=1")  # what float32 rounds grows thirtyfold in two more
    one, other = (weights(ran(*words, f"micro_batch_size={n}")[1]) for n in (8, 3))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_adapters_alone_move_and_are_merged(ran, start):
    _, where = ran("loss=dpo", "model.lora.rank=2", "model.lora.targets=[to_q]")
    moved = differ(start, weights(where))
    assert moved and all(".to_q." in name for name in moved)
    assert weights(where).keys() == start.keys()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_was_saved_is_a_policy_to_go_on_from(ran):
    numbers, where = ran("loss=dpo")
    again, _ = ran(
        "loss=dpo", f"model.pretrained={where / 'model'}", "max_steps=0", "sft.max_steps=0"
    )
    assert again["init"]["exact_match"] == again["final"]["exact_match"]
    assert (where / "model" / "README.md").read_text().count("diffusers") == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_is_left_to_look_at(ran):
    from PIL import Image

    numbers, where = ran("loss=dpo", "eval.every_n_steps=1")
    with Image.open(where / "samples.png") as page:
        assert page.width > page.height > 128
    told = [json.loads(line) for line in (where / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "before", "after", "chosen_delta"} <= told[0].keys()
    assert float(rows(where)[-1]["eval/displacement/chosen"]) == pytest.approx(
        numbers["final"]["displacement/chosen"], rel=1e-4
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_wandb_has_the_grids(tmp_path):
    words = (*TINY, "loss=dpo", "logger=wandb", "hydra.run.dir=run")
    done = forked(tmp_path, *words, WANDB_MODE="offline")
    assert done.code == 0, done.err
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*/files/media/images/images")
    for name in ("samples", "pairs"):
        (kept,) = folder.glob(f"{name}*.png")
        assert kept.read_bytes() == (tmp_path / "run" / f"{name}.png").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_min_snr_weighs_otherwise(ran):
    plain, weighed = (ran("loss=dpo", *more)[1] for more in ([], ["model/weighting=min_snr"]))
    assert differ(weights(plain), weights(weighed))


REFUSED = [
    (("data=shapes",), "add model=diffusion"),
    (("model=diffusion",), "a denoiser draws images, and this data is texts"),
    ((*TINY[:1], "loss=orpo"), "it takes 1 - p of a probability"),
    ((*TINY[:1], "loss=ranker"), "a ranker reads answers of text"),
    ((*TINY[:1], "loss=aspo"), "it reads sentences"),
    ((*TINY[:1], "judge=likelihood"), "images are judged by the data itself, or by judge=reward"),
    ((*TINY[:1], "loss.wpo=true"), "loss.wpo=True does not go with pairs of images"),
    ((*TINY[:1], "hardware.devices=2"), "they train in one process"),
    ((*TINY[:1], "max_length=7"), "max_length has no effect"),
    ((*TINY[:1], "diagnostics.ches.every_n_steps=1"), "it reads answers of text"),
    ((*TINY[:1], "model.surrogate.scale=0"), "model.surrogate.scale=0: it must be above 0"),
    ((*TINY[:1], "model.surrogate.draws=0"), "it must be at least 1"),
    ((*TINY[:1], "model.lora.alpha=8"), "model.lora.alpha has no effect: model.lora.rank is 0"),
]


@pytest.mark.parametrize(
    "words, says", REFUSED, ids=lambda it: it[-1] if type(it) is tuple else ""
)
def test_what_does_not_go_together(words, says):
    groups = {"experiment", "loss", "data", "model", "judge"}
    plain = config(*(word for word in words if word.partition("=")[0] in groups))
    line = partial(knobs.Given, [word.partition("=")[0] for word in words])
    with pytest.raises(UserError) as caught:
        knobs.check(config(*words), line(dict.fromkeys(groups, ""), plain))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("loss", ["tdpo1", "odpo"])
def test_losses_that_cannot_apply(ran, loss):
    with pytest.raises(UserError, match="which pairs of images lack"):
        ran(f"loss={loss}")


def test_pretrained_that_is_none(ran, tmp_path):
    (tmp_path / "unet").mkdir()
    for place in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match=f"model.pretrained={place}"):
            ran("loss=dpo", f"model.pretrained={place}", "sft.max_steps=0")


def test_a_model_that_cannot_be_built(ran):
    for word in ("model.config.norm_num_groups=3", "model.config.patch=3"):
        with pytest.raises(UserError, match="model.config"):
            ran("loss=dpo", word)
