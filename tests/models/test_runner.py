"""A model run layer by layer gives the logits of its own forward, to the bit."""

import pytest
import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    MambaConfig,
    OPTConfig,
    Qwen2Config,
)

import families
import tiny
from layercut.models.runner import DecoderRunner

SIZES = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_hidden_layers": 4, "max_position_embeddings": 64, "initializer_range": 0.15, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": tiny.llama,
    "gpt2, tied": tiny.gpt2,
    "tied": lambda: tiny.tiny(Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)),
    "scaled logits": lambda: tiny.tiny(CohereConfig(**SIZES, num_key_value_heads=2, logit_scale=0.25)),
    "divided logits": lambda: tiny.tiny(GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=3.0)),
    "capped logits": lambda: tiny.tiny(
        Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, sliding_window=8)
    ),
    "two kinds of mask": lambda: tiny.gemma3([1], layers=4),
    "parallel": lambda: tiny.tiny(GPTNeoXConfig(**SIZES)),
    "recurrent": lambda: tiny.tiny(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=4, state_size=4)),
    "experts": lambda: families.tiny("mixtral"),
    "with a tower": lambda: families.tiny("qwen2_vl"),
    "a projection behind the layers": lambda: tiny.tiny(
        OPTConfig(
            vocab_size=96,
            hidden_size=32,
            ffn_dim=48,
            num_attention_heads=4,
            num_hidden_layers=3,
            word_embed_proj_dim=16,
            do_layer_norm_before=False,
            max_position_embeddings=64,
            init_std=0.2,
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_layers_run_one_by_one_are_the_models_own(name):
    model = MODELS[name]().eval().requires_grad_(False)
    stack, tokens = DecoderRunner(model), tiny.some_tokens(2, 12)
    expected = model(input_ids=tokens, use_cache=False).logits
    hidden, calls = stack.enter(tokens)
    hidden = stack.run(hidden, calls, 0, len(stack))
    assert torch.equal(stack.exit(hidden, tokens), expected)
    assert torch.equal(stack.exit(hidden, tokens, slice(3, 7)), expected[:, 3:7])
    assert torch.equal(model(input_ids=tokens, use_cache=False).logits, expected), "and the model is as it was"
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_model_that_is_not_the_same_twice_is_checked_by_its_own_noise(caplog):
    """As one with kernels that add in any order."""
    generator = torch.Generator().manual_seed(0)

    def noisy(size):
        model = tiny.llama(3)
        head = model.lm_head.forward
        model.lm_head.forward = lambda h: head(h) + size * torch.randn(*h.shape[:-1], 96, generator=generator)
        return model

    caplog.set_level("INFO", "layercut")
    DecoderRunner(noisy(1e-5))
    assert "does not give the same logits twice" in caplog.text
