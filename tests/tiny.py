"""Tiny policies built by ``policies.load``, random pairs, and one-token-at-a-time scoring."""

import random
from dataclasses import replace

import torch

from spo_lightning.data.batch import Pair
from spo_lightning.models import policy as policies

# wide initial weights: a wrong mask or position must show in the log-probabilities
WIDE = {"initializer_range": 0.3, "tie_word_embeddings": False}
GATED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    **WIDE,
}
CONFIGS = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4, **GATED},
    "llama-grouped": {"model_type": "llama", "num_key_value_heads": 2, **GATED},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, **GATED},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        **WIDE,
    },
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, **GATED},
    "gemma2": {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8, **GATED},
}


def in_float64(monkeypatch):
    """Take out the float32 in which transformers normalises and eager attention takes its softmax.

    It rounds a float64 model to 1e-6, behind which a wrong mask of small effect could hide.
    """
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    def norm(self, x):
        eps = getattr(self, "eps", None) or self.variance_epsilon
        one = 1.0 if isinstance(self, Gemma2RMSNorm) else 0.0
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (one + self.weight)

    for kind in (Gemma2RMSNorm, LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm):
        monkeypatch.setattr(kind, "forward", norm)
    plain = torch.nn.functional.softmax
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim, dtype=None, **_: plain(x, dim)
    )


def policy(name="llama", *, dtype="float64", attention="auto", seed=0, **changes):
    """A policy with the byte tokenizer (258 ids)."""
    return policies.load(
        pretrained=None,
        revision=None,
        trust_remote_code=False,
        dtype=dtype,
        attention=attention,
        config={**CONFIGS[name], **changes},
        seed=seed,
    )


def lora(made, rank=4, seed=0):
    return policies.adapt(made, rank=rank, alpha=8, targets="all-linear", merge=False, seed=seed)


def random_pairs(count, seed=0, longest=14):
    """Ragged: prompts and responses of 1 to ``longest`` tokens."""
    chance = random.Random(seed)

    def text():
        return tuple(chance.randrange(256) for _ in range(chance.randint(1, longest)))

    return [Pair(text(), text(), text(), row=row) for row in range(count)]


def with_context(pair, chosen=(), rejected=()):
    """The pair, of which these places, (begin, end, begin, end, ...), are read and not scored."""
    return replace(pair, chosen_context=tuple(chosen), rejected_context=tuple(rejected))


def random_contexts(pairs, seed=0):
    """The pairs with context anywhere: none, in between, at the begin, at the end, all of it."""
    chance = random.Random(seed)

    def edges(length):
        count = 2 * chance.randint(0, min(2, length // 2))
        return sorted(chance.sample(range(length + 1), count))

    return [with_context(p, edges(len(p.chosen)), edges(len(p.rejected))) for p in pairs]


def slow_logps(lm, pair):
    """[tokens] chosen, then rejected: unpadded forwards of the whole model, token by token."""
    found = []
    contexts = (pair.chosen_context, pair.rejected_context)
    for response, context in zip((pair.chosen, pair.rejected), contexts):
        if response:
            logits = lm(input_ids=torch.tensor([pair.prompt + response])).logits[0]
            for place, token in enumerate(response):
                if sum(edge <= place for edge in context) % 2 == 0:
                    before = logits[len(pair.prompt) + place - 1]
                    found.append(before.log_softmax(-1)[token])
    return torch.stack(found)


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
