"""A model of texts and images as the judge of what a policy draws."""

import numpy as np
import pytest
import torch
from fitting import config
from omegaconf import OmegaConf
from torch.nn import functional as F

from spo_lightning.data.pictures import Pictures
from spo_lightning.errors import UserError
from spo_lightning.judges.images import judge_of
from spo_lightning.train import train

NONE = Pictures(train=[], held_out=[])
PROMPTS = ["red ring", "two blue squares", "a"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of real parts, with a vocabulary of letters."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
    )

    letters = [chr(n) for n in range(97, 123)]
    ids = [*letters, *(f"{it}</w>" for it in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(ids)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    ends = dict(bos_token_id=len(ids) - 2, eos_token_id=len(ids) - 1)
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config=dict(
                vocab_size=len(tokenizer), max_position_embeddings=32, **sizes, **ends
            ),
            vision_config=dict(image_size=16, patch_size=8, **sizes),
            projection_dim=8,
        )
    )
    where = tmp_path_factory.mktemp("clip") / "model"
    how = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    model.save_pretrained(where)
    CLIPProcessor(CLIPImageProcessor(**how), tokenizer).save_pretrained(where)
    return where


def images(count):
    chance = np.random.default_rng(0)
    return [chance.integers(0, 256, (20, 20, 3)).astype(np.uint8) for _ in range(count)]


def test_a_score_is_the_scaled_cosine_of_the_embeddings(clip):
    from transformers import CLIPModel, CLIPProcessor

    pictures = images(3)
    judge = judge_of(OmegaConf.create({"model": str(clip)}), NONE, "cpu", 2)
    assert judge is not None
    found = judge(PROMPTS, pictures)
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    for prompt, picture, score in zip(PROMPTS, pictures, found):
        text = processor.tokenizer(prompt, return_tensors="pt")
        pixels = processor.image_processor(picture, return_tensors="pt")
        with torch.no_grad():
            one, other = model.get_text_features(**text), model.get_image_features(**pixels)
        one, other = (getattr(it, "pooler_output", it) for it in (one, other))
        expected = model.logit_scale.exp() * F.cosine_similarity(one, other)
        assert score == pytest.approx(expected.item(), abs=1e-5)
    assert len({*found}) == 3


def test_it_makes_the_pairs_and_counts_the_wins(clip, tmp_path):
    words = (
        *("experiment=diffusion_shapes", "model.config.block_out_channels=[8,8]", "hardware=cpu"),
        *("model.config.norm_num_groups=4", "data.prompts=36", "data.eval_prompts=12"),
        *("data.sft_rows=32", "sft.max_steps=2", "max_steps=2", "batch_size=8"),
        *("micro_batch_size=8", "model.sampling.steps=2", "model.surrogate.eval_draws=2"),
        *("eval.every_n_steps=0", "checkpoint.monitor=null", "optimizer.lr=1e-2", "loss=dpo"),
    )
    pytest.importorskip("diffusers")
    numbers = train(config(*words, "judge=reward", f"judge.model={clip}"), tmp_path / "run")
    assert numbers["init"]["win_rate"] == 0.5
    assert numbers["final"]["judge/score"] != numbers["init"]["judge/score"]
    assert not 0 <= numbers["init"]["judge/score"] <= 1  # a frame's share would be


@pytest.mark.parametrize("kind", ["gone", "empty", "text"])
def test_what_is_no_such_model(tmp_path, kind):
    where = tmp_path / kind
    if kind != "gone":
        where.mkdir()
    if kind == "text":
        from transformers import BertConfig, BertModel

        BertModel(
            BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        ).save_pretrained(where)
    with pytest.raises(UserError, match=f"judge.model={where}") as caught:
        judge_of(OmegaConf.create({"model": str(where)}), NONE, "cpu", 2)
    assert "\n" not in str(caught.value)
