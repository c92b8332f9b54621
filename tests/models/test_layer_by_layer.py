"""The opened-up decoder computes what the model computes, and leaves it as it was."""

import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig, GPTNeoXConfig, OPTConfig, Qwen3Config

import tiny
from layercut.errors import ModelError
from layercut.models import decoder_stack
from layercut.models.losses import Teacher, kl_divergence, mean_kl, next_token_loss
from layercut.models.runner import DecoderRunner, intercepted
from layercut.segments import Segment
from layercut.surgery import cut_segment_

SMALL = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "qwen3": lambda: tiny.tiny(Qwen3Config(**GROUPED)),
    "gemma2": lambda: tiny.tiny(Gemma2Config(**GROUPED, sliding_window=8)),
    "gemma3": lambda: tiny.tiny(Gemma3TextConfig(**GROUPED, sliding_window=8)),
    "neox": lambda: tiny.tiny(GPTNeoXConfig(**SMALL)),
    "opt": lambda: tiny.tiny(
        OPTConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_layer_by_layer_is_the_models_own_forward(name):
    model = MODELS[name]()
    stack, tokens = DecoderRunner(model), tiny.some_tokens(3, 16)
    expected = model(input_ids=tokens, use_cache=False).logits
    hidden, calls = stack.enter(tokens)
    for i in range(len(stack)):
        hidden = stack.layer(i, hidden, calls)
    assert torch.equal(stack.exit(hidden, tokens), expected)
    assert torch.equal(model(input_ids=tokens, use_cache=False).logits, expected)
    assert all("forward" not in vars(layer) for layer in stack.layers)


def test_interception_ends_also_after_an_error():
    model = tiny.llama()
    layers = list(model.model.layers)
    with pytest.raises(RuntimeError, match="on purpose"), intercepted(layers, lambda *_: 1 / 0):
        raise RuntimeError("on purpose")
    assert all("forward" not in vars(layer) for layer in layers)


def test_layers_that_talk_beside_the_hidden_state_are_refused():
    model = tiny.llama()
    first, last = model.model.layers[0], model.model.layers[-1]
    plain, heard = last.forward, []
    first.register_forward_hook(lambda module, args, out: heard.append(out[..., :1]))
    last.forward = lambda hidden, *args, **kwargs: plain(hidden, *args, **kwargs) + len(heard)
    with pytest.raises(ModelError, match="exchange more than the hidden state"):
        DecoderRunner(model)


def test_kl_is_torchs_own_and_so_is_its_gradient():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 5, 50, generator=generator).unbind(0)
    q.requires_grad_(True)
    reference = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )
    torch.testing.assert_close(Teacher(p).kl(q), reference)
    (expected,) = torch.autograd.grad(reference.sum(), q)
    (got,) = torch.autograd.grad(Teacher(p).kl(q).sum(), q)
    torch.testing.assert_close(got, expected)
    assert kl_divergence(p, p).abs().max() < 1e-6


def test_next_token_loss_is_the_models_own_loss():
    model, tokens = tiny.llama(), tiny.some_tokens()
    ours = next_token_loss(model(input_ids=tokens).logits, tokens).mean()
    torch.testing.assert_close(ours, model(input_ids=tokens, labels=tokens).loss)


def test_mean_kl_against_full_forwards():
    dense, tokens = tiny.llama(), tiny.some_tokens()
    student = decoder_stack.share(dense)
    cut_segment_(student, [Segment(3, 5)])
    p, q = (m(input_ids=tokens, use_cache=False).logits for m in (dense, student))
    expected = pytest.approx(kl_divergence(p, q).mean().item(), rel=1e-5)
    assert mean_kl(DecoderRunner(dense), DecoderRunner(student), tokens) == expected
    assert mean_kl(DecoderRunner(dense), DecoderRunner(student), tokens, prefix=3) == expected
    assert mean_kl(DecoderRunner(dense), DecoderRunner(dense), tokens) == pytest.approx(0, abs=1e-6)
