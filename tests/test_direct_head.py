"""Logits by final norm and head alone, layer arguments that are remembered: as the model's own forward, to the bit."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
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
from layercut.healing import endpoint_tuning, tune_
from layercut.models import direct_head, model_weights
from layercut.models.runner import DecoderRunner, same_values
from layercut.segments import Segment
from layercut.surgery import cut_segment_

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
}


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_called_directly_and_gives_the_models_own_logits(name, monkeypatch):
    model = MODELS[name]().eval().requires_grad_(False)
    stack, tokens, others = DecoderRunner(model), *tiny.some_tokens(4, 12).split(2)
    expected = model(input_ids=tokens, use_cache=False).logits
    stack.enter(others)
    layers = []
    for layer in stack.layers[1:]:
        layer.register_forward_pre_hook(lambda module, given: layers.append(module))
    hidden, calls = stack.enter(tokens)  # the arguments of other tokens
    hidden = stack.run(hidden, calls, 0, len(stack))
    layers.clear()
    assert torch.equal(stack.exit(hidden, tokens), expected)
    assert torch.equal(stack.exit(hidden, tokens, slice(3, 7)), expected[:, 3:7])
    assert bool(layers) == (name == "gpt2, tied"), "what is behind GPT-2's norm cannot be seen"
    assert torch.equal(model(input_ids=tokens, use_cache=False).logits, expected), "and the model is as it was"
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_gradient_passes_through_the_head():
    model = MODELS["capped logits"]()
    stack, tokens = DecoderRunner(model), tiny.some_tokens(2, 12)
    hidden, calls = stack.enter(tokens)
    last = stack.run(hidden, calls, 0, len(stack)).requires_grad_(True)
    slopes = [
        torch.autograd.grad(way(last, tokens).square().mean(), last)[0] for way in (stack.exit, stack._exit_whole)
    ]
    assert torch.equal(*slopes)


def test_what_cannot_be_seen_is_run_whole():
    """OPT of 350M: the projection behind its layers changes the width, and a scale in Python is seen by nobody."""
    small = OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_attention_heads=4, num_hidden_layers=3, word_embed_proj_dim=16,
        do_layer_norm_before=False, max_position_embeddings=64, init_std=0.2,
    )  # fmt: skip
    for model in (tiny.tiny(small), tiny.llama(3)):
        if model.config.model_type == "llama":
            own = model.model.forward

            def scaled(*args, own=own, **kwargs):
                found = own(*args, **kwargs)
                found.last_hidden_state = found.last_hidden_state * 0.5
                return found

            model.model.forward = scaled
        stack, tokens = DecoderRunner(model), tiny.some_tokens(2, 12)
        hidden, calls = stack.enter(tokens)
        logits = stack.exit(stack.run(hidden, calls, 0, len(stack)), tokens)
        assert torch.equal(logits, model(input_ids=tokens, use_cache=False).logits)
    assert stack._head is None


def test_arguments_that_depend_on_the_tokens_are_not_remembered():
    model = tiny.llama(3)
    model.config.pad_token_id = 5
    rotary = model.model.rotary_emb.forward

    def looking(h, position_ids):
        cos, sin = rotary(h, position_ids)
        return cos + model.seen.any(), sin

    def noting(input_ids):
        model.seen = input_ids == 5
        return embed(input_ids)

    embed = model.model.embed_tokens.forward
    model.model.embed_tokens.forward, model.model.rotary_emb.forward = noting, looking
    stack = DecoderRunner(model)
    assert stack._arguments is None
    plain, padded = torch.full((1, 6), 50), torch.tensor([[50, 50, 50, 50, 50, 5]])
    assert not same_values(stack.enter(plain)[1], stack.enter(padded)[1])


def test_the_shapes_remembered_are_few():
    stack = DecoderRunner(tiny.llama(2))
    for window in range(6, 16):
        stack.enter(tiny.some_tokens(1, window))
    assert len(stack._arguments) == 4
    assert (1, 15) in stack._arguments


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


class Reads(TorchDispatchMode):
    """Counts what is read from the device by the host."""

    def __init__(self):
        super().__init__()
        self.reads = self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_of_many_passes_is_read_once(monkeypatch):
    model, counted = tiny.llama(), []
    step_ = endpoint_tuning._Training.step_

    def counting(self):
        with Reads() as mode:
            found = step_(self)
        counted.append(mode.reads)
        return found

    monkeypatch.setattr(endpoint_tuning._Training, "step_", counting)
    monkeypatch.setattr("layercut.models.memory.PASS_TOKENS", 32)
    for batch_tokens in (32, 128):
        student = model_weights.share(model)
        cut_segment_(student, [Segment(3, 5)])
        heldout = tiny.some_tokens(1, seed=1)
        rows = tiny.some_tokens(8).repeat(2, 1)
        tune_(student, model, rows, heldout=heldout, batch_tokens=batch_tokens)
    # of 8 steps of one pass, and 2 of four; masks are made, and looked at, once for each shape. One tensor is read into
    # a list without an operation, and fused AdamW reads nothing
    assert {*counted[1:8], counted[9]} == {0}
    assert counted[0] > 0


def test_float16_keeps_gradients_that_it_has_no_numbers_for(monkeypatch):
    """256 tokens and 8,192 words: an entry of the logits' gradient is 5e-7 and less, the least of float16 is 6e-8."""
    tokens = torch.randint(8192, (5, 64), generator=torch.Generator().manual_seed(0))
    step_ = endpoint_tuning._Training.step_

    def tuned(dtype, scale):
        model = tiny.llama(4, vocab_size=8192, initializer_range=0.02)
        model_weights.convert_parameters_(model, dtype)
        student, found = model_weights.share(model), []
        cut_segment_(student, [Segment(1, 3)])

        def noting(self):
            count = step_(self)
            found.append(torch.cat([m.grad.flatten() for m in self.masters]))
            return count

        with monkeypatch.context() as patch:
            patch.setattr(endpoint_tuning._Training, "step_", noting)
            patch.setattr(endpoint_tuning, "LOSS_SCALE", scale)
            rate = {"batch_tokens": 256, "learning_rate": 3e-3}
            return found, tune_(student, model, tokens[:-1].repeat(4, 1), heldout=tokens[-1:], **rate)

    (exact, *_), wanted = tuned(torch.float32, 1.0)
    errors, reports = {}, {}
    for scale in (1.0, 2.0**16, 2.0**30):
        (found, *_), reports[scale] = tuned(torch.float16, scale)
        errors[scale] = ((found - exact).norm() / exact.norm()).item()
    assert errors[2.0**16] < 0.01
    assert errors[2.0**30] < 0.01, "what overflows is taken again by half"
    assert errors[1.0] > 0.1
    assert 1 < reports[2.0**30].loss_scale < 2.0**30
    assert reports[2.0**16].best == pytest.approx(wanted.best, rel=0.01)
    assert wanted.best < 0.9 * wanted.heldout[0]["loss"]


def test_a_head_that_reads_more_than_the_hidden_state_is_not_called_directly():
    model, tokens = tiny.llama(2), tiny.some_tokens(1, 8)
    stack = DecoderRunner(model)
    hidden, calls = stack.enter(tokens)
    last = stack.run(hidden, calls, 0, 2)
    found = direct_head.find_direct_head(model, stack.layers, lambda h, t: stack._exit_whole(h, t) + 1, last, tokens)
    assert found is None
