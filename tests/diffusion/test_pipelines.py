"""Pipelines of diffusers: what is read of their directories, and images there and back."""

import io
import json

import numpy as np
import pytest
import torch
from denoisers import diffusers, scheduler
from fitting import config

from spo_lightning.diffusion.objective import Schedule
from spo_lightning.diffusion.opening import loaded, opened
from spo_lightning.diffusion.pipeline import Classes, Encoded, Folded, Texts, Words
from spo_lightning.diffusion.store import latents_of
from spo_lightning.errors import UserError
from spo_lightning.train import train

WORDS = ("one", "two", "red")
DRAWING = dict(steps=3, guidance=1.0, size=4, advance=lambda _: None)


def vae():
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.5,
    )


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A pipeline that draws classes."""
    torch.manual_seed(0)
    made = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=3,
    )
    where = tmp_path_factory.mktemp("pipelines") / "dit"
    diffusers.DiTPipeline(made, vae(), scheduler("epsilon")).save_pretrained(where)
    index = json.loads((where / "model_index.json").read_text())
    index["id2label"] = {"0": "cat", "1": "dog", "2": "cow"}  # as published ones have it
    (where / "model_index.json").write_text(json.dumps(index))
    return where


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """A pipeline of texts as Stable Diffusion's, with a vocabulary of letters."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    home = tmp_path_factory.mktemp("stable")
    letters = [chr(n) for n in range(97, 123)]
    ids = [*letters, *(f"{it}</w>" for it in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(ids)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **sizes))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    parts = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    made = diffusers.StableDiffusionPipeline(
        vae(), text, tokenizer, unet, scheduler("v_prediction"), **parts
    )
    made.save_pretrained(home / "whole")
    return home / "whole"


def test_classes_are_read(classes):
    found = loaded(str(classes))
    assert isinstance(found.told, Classes) and isinstance(found.codec, Encoded)
    assert found.told("dog")["class_labels"] == found.told("1")["class_labels"] == 1
    assert found.told("")["class_labels"] == 3 and found.codec.side == 16
    with pytest.raises(UserError, match="'horse' is none of the classes"):
        found.told("horse")
    images = found.drawn(["cat", "dog", "cat"], seed=0, **DRAWING)
    assert [it.shape for it in images] == [(16, 16, 3)] * 3
    assert not np.array_equal(images[0], images[2])  # another noise


def test_texts_are_read(stable):
    found = loaded(str(stable))
    assert isinstance(found.told, Texts)
    one, other = (found.told(text)["encoder_hidden_states"] for text in ("a cat", "a dog"))
    assert one.shape == (12, 8) and not torch.equal(one, other)
    guided = found.drawn(["a cat"], seed=0, **DRAWING | {"guidance": 3.0})
    plain = found.drawn(["a cat"], seed=0, **DRAWING)
    assert not np.array_equal(guided[0], plain[0])


def test_an_image_does_not_depend_on_its_batch(stable):
    found, prompts = loaded(str(stable)), ["a", "b", "c"]
    whole, apart = (found.drawn(prompts, seed=1, **DRAWING | {"size": n}) for n in (3, 2))
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(whole, apart))


def test_the_sampler_follows_the_schedule(classes):
    """With the right noise told, one image comes out of any noise."""
    found = loaded(str(classes))
    wanted = torch.randn(1, 4, 8, 8)
    schedule = Schedule.of(found.scheduler)

    class Oracle(torch.nn.Module):
        config, device = found.denoiser.config, torch.device("cpu")

        def forward(self, noisy, times, **told):
            a, s = schedule.at(times.long(), noisy)
            return type("Said", (), {"sample": (noisy - a * wanted) / s})

    codec = type("Plain", (), {"decode": staticmethod(lambda it: it[:, :3]), "side": 8})()
    drawing = type(found)(Oracle(), found.scheduler, codec, found.told, False)
    (image,) = drawing.drawn(["cat"], seed=0, **DRAWING | {"steps": 10})
    target = ((wanted[0, :3].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(image.astype(float) - target).mean() < 12


def test_latents_are_kept_by_content(classes, tmp_path):
    cfg = config("experiment=diffusion_shapes", f"cache.dir={tmp_path}")
    found, chance = loaded(str(classes)), np.random.default_rng(0)
    images = [chance.integers(0, 255, (20, 20, 3), dtype=np.uint8) for _ in range(3)]
    first = latents_of(found, [*images, images[0]], cfg)
    assert len(first) == 3 and next(iter(first.values())).shape == (4, 8, 8)
    counted = []
    encode = found.codec.vae.encode
    found.codec.vae.encode = lambda pixels: counted.append(1) or encode(pixels)
    again = latents_of(found, images, cfg)
    assert len(counted) == 1  # for the shape alone
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_folding_pixels_is_exact():
    codec = Folded(2, 8)
    pixels = torch.randn(2, 3, 8, 8)
    assert codec.encode(pixels).shape == (2, 12, 4, 4)
    assert torch.equal(codec.decode(codec.encode(pixels)), pixels)


def test_words():
    told = Words(WORDS, 3)
    found = told("two red")["encoder_hidden_states"]
    assert found.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    with pytest.raises(UserError, match="knows no 'blue'"):
        told("two blue")
    with pytest.raises(UserError, match="reads 3 words at most"):
        told("two red red red")


def test_a_model_needs_words_to_be_built_for():
    cfg = config("experiment=diffusion_shapes")
    with pytest.raises(UserError, match="brings no words"):
        opened(cfg.model, (), 0, "cpu")


def test_what_is_not_read_is_refused(stable, tmp_path):
    from diffusers import DDPMPipeline, UNet2DModel

    plain = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(plain, scheduler("epsilon")).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(UserError, match="DDPMPipeline has no autoencoder"):
        loaded(str(tmp_path / "ddpm"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["classes", "stable"])
def test_own_pairs_train_a_pipeline(kind, request, tmp_path):
    from PIL import Image

    chance, lines = np.random.default_rng(0), []
    for number, prompt in enumerate(["cat", "dog", "cow"] * 4):
        row = {"prompt": prompt, "label": number % 2}
        for side in ("image_0", "image_1"):
            pixels = chance.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            (tmp_path / f"{number}{side}.png").write_bytes(file.getvalue())
            row[side] = f"{number}{side}.png"
        lines.append(json.dumps(row))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    where = request.getfixturevalue(kind)
    numbers = train(
        config(
            *("data=images", "model=diffusion", f"data.path={tmp_path}", "hardware=cpu"),
            *(f"model.pretrained={where}", "data.eval_fraction=0.4", "loss=dpo", "max_steps=2"),
            *("batch_size=4", "micro_batch_size=4", "model.sampling.steps=2", "model.lora.rank=2"),
            *("model.surrogate.eval_draws=2", "log.every_n_steps=1"),
            f"cache.dir={tmp_path / 'cache'}",
        ),
        tmp_path / "run",
    )
    assert numbers["steps"] == 2 and numbers["init"]["rewards/margins"] == 0.0
    assert "win_rate" not in numbers["final"]
    assert (tmp_path / "run" / "samples.png").exists()
