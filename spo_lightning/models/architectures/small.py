"""The name of an architecture in, a model of it with few and random weights out."""

from dataclasses import fields
from typing import Any

import torch
from torch import nn

VOCABULARY = 128
ORDINARY = range(16, VOCABULARY)  # ids that no architecture gives a meaning
# what configs call the sizes of a model; of a name that a config lacks nothing is said
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "n_embed", "emb_dim", "embed_dim"), 64
    ),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "attention_hidden_size"), 64),
    **dict.fromkeys(("lru_width", "dim_model", "mamba_d_ssm", "backbone_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "dim_ff", "dff"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("intermediate_size_mlp", "feed_forward_size", "dense_intermediate_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_hybrid_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "attention_head_dim"), 16),
    **dict.fromkeys(("v_head_dim", "swa_v_head_dim", "dim_head", "kv_channels"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "index_num_heads"), 2),
    **dict.fromkeys(("index_head_dim",), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("moe_num_experts",), 4),
    **dict.fromkeys(("n_shared_experts",), 1),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 32),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("context_length", "max_seq_length", "block_length"), 256),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY),
    "hidden_size_per_layer_input": 8,
}
FOLLOWS = (
    "head_dim",
    "num_key_value_heads",
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
)
LATENT = {"head_dim": 8, "num_key_value_heads": 4}


def config_of(kind: str) -> Any:
    """The config of ``kind``, a model_type of transformers, small."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _small(CONFIG_MAPPING[kind], OWN.get(kind, {}))


def _small(made: Any, own: dict[str, Any]) -> Any:
    """A config of the class ``made``."""
    defaults = {field.name: field.default for field in fields(made)}
    found = {name: size for name, size in SIZES.items() if _counts(defaults, name)}
    if "qk_rope_head_dim" in defaults:  # keys of every head, of which a part has positions
        found |= {name: LATENT[name] for name in LATENT if name in defaults}
    whole = made()
    return made(**{**found, **_turned(whole), **_ids(whole), **_small_parts(whole, own), **own})


def _counts(defaults: dict[str, Any], name: str) -> bool:
    """Whether a config has ``name``, as a number or as one that follows from others."""
    value = defaults.get(name, False)
    return isinstance(value, int) and value is not False or name in FOLLOWS and value is None


def _turned(whole: Any) -> dict[str, Any]:
    """Rotary frequencies dealt over time, height and width, where they are."""
    given = getattr(whole, "rope_parameters", None)
    ignored = getattr(whole, "ignore_keys_at_rope_validation", None) or ()
    if not isinstance(given, dict) or "mrope_section" not in {*given, *ignored}:
        return {}
    half = int(SIZES["head_dim"] * given.get("partial_rotary_factor", 1.0)) // 2
    return {"rope_parameters": {**given, "mrope_section": [half // 2, half // 4, half // 4]}}


def _small_parts(whole: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Configs within the config: of the text, of towers for images and sound."""
    found = {}
    for name in whole.sub_configs:
        part = getattr(whole, name, None)
        if part is not None and not isinstance(part, dict):
            given = OWN.get(part.model_type, {}) | own.get(name, {})
            found[name] = _small(type(part), given)
    return found


def _ids(whole: Any) -> dict[str, Any]:
    """Ids with a meaning, where the default is beyond the few that there are."""
    found, free = {}, iter(range(ORDINARY.start))
    for name, value in sorted(vars(whole).items()):
        if name.endswith(("token_id", "token_index")) and isinstance(value, int):
            found[name] = next(free)
        elif name.endswith("token_id") and isinstance(value, list):
            found[name] = [next(free)]
    return found


# what sizes alone do not settle: patterns of layers that have to fit their number, and what real
# checkpoints have where the default is 1
MIXED = {"num_hidden_layers": 4}
SCALED = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 13.0}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXED = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "codegen": {"rotary_dim": 8},
    "cohere2": {"logit_scale": 0.25},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "falcon_h1": {"mamba_d_ssm": 128, "lm_head_multiplier": 0.0390625},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm5_next_text": {"qk_rope_head_dim": 0, "qk_nope_head_dim": 16, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granite": SCALED,
    "granite_docling": {"vision_config": {"out_hidden_size": 64}},
    "granitemoe": SCALED,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **SCALED},
    "granitemoeshared": SCALED,
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 32},
    "qwen3_5_moe_text": MIXED,
    "qwen3_5_text": MIXED,
    "qwen3_next": MIXED,
    "qwen4_exp_text": {**MIXED, **INDEXED, "indexer_budget": 64, "indexer_compress_ratio": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "step3p5": {"sliding_window": 64},
    "unlimited_ocr_text": {"num_key_value_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**MIXED, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


@torch.no_grad()
def stir(model: nn.Module, seed: int = 0) -> None:
    """Random weights, wide enough that a wrong mask or position shows in the logits."""
    seeded = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if not value.is_floating_point():
            continue
        if value.ndim > 1:
            spread = value.shape[-1] ** -0.5
            value.copy_(spread * torch.randn(value.shape, generator=seeded))
        elif name.endswith(("bias", "sinks")):
            value.copy_(0.2 * torch.randn(value.shape, generator=seeded))
