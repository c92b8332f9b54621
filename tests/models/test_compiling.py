"""torch.compile of layers and losses: the same results, few compilations, nothing left behind, no silent fallback."""

import pytest
import torch
import torch._inductor.config as inductor
from torch._dynamo.testing import CompileCounterWithBackend

import tiny
from layercut import compiled
from layercut.errors import ConfigError, ModelError
from layercut.evaluation import likelihood
from layercut.healing import tune_
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import all_segments, segment_costs
from layercut.models import compiling, model_weights
from layercut.models.losses import token_loss
from layercut.models.runner import DecoderRunner, layer_output
from layercut.segments import Segment
from layercut.surgery import cut_segment_


def traced():
    """Graphs as torch.compile traces them, run without generated code; it counts them."""
    return CompileCounterWithBackend("eager")


def tuned(model):
    student = model_weights.share(model)
    cut_segment_(student, [Segment(2, 4)])
    tokens = tiny.some_tokens(7)
    found = tune_(student, model, tokens[:-2], heldout=tokens[-2:], batch_tokens=3 * tokens.shape[1])
    return found, {name: p.detach().clone() for name, p in student.named_parameters()}


def test_a_tuning_is_the_same_and_layers_are_compiled_together():
    model, backend = tiny.llama(5), traced()
    plain, weights = tuned(model)
    with compiled(backend=backend):
        found, own = tuned(model)
    assert [p["loss"] for p in found.curve] == pytest.approx([p["loss"] for p in plain.curve], rel=1e-5)
    assert found.heldout[-1]["loss"] == pytest.approx(plain.heldout[-1]["loss"], rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(own[name], weight, rtol=1e-3, atol=1e-5)
    # layers: frozen, and trained, without gradients; trained, behind a frozen and behind a trained one
    # the final norm without gradients and with them; the loss, and the score
    assert backend.frame_count == 4 + 2 + 2, "not once for each of five layers of two models"


def test_a_search_and_an_evaluation_are_the_same():
    model, tokens, backend = tiny.llama(4), tiny.some_tokens(5), traced()
    segments = all_segments(1, 4)
    prices = {c.segments: c.kl for c in segment_costs(DecoderRunner(model), tokens, segments, Cost())}
    losses = likelihood.window_losses(model, tokens)
    with compiled(backend=backend):
        found = {c.segments: c.kl for c in segment_costs(DecoderRunner(model), tokens, segments, Cost())}
        torch.testing.assert_close(likelihood.window_losses(model, tokens), losses)
        first = backend.frame_count
        segment_costs(DecoderRunner(model), tokens[:3], segments, Cost())
    assert found == pytest.approx(prices, rel=1e-4)
    assert backend.frame_count == first, "fewer rows need no other code"


def test_nothing_is_left_behind():
    model, tokens, backend = tiny.llama(2), tiny.some_tokens(2), traced()
    stack = DecoderRunner(model)
    hidden, calls = stack.enter(tokens)
    with compiled(backend=backend), torch.no_grad():
        with compiled():
            stack.layer(0, hidden, calls)
        assert backend.frame_count == 1, "one within another shares what it has compiled"
    assert compiling.opened() is None
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list
    frames = (layer_output, type(model.model.layers[0]).forward, type(model.model.layers[0].mlp).forward)
    assert not any(entries(function.__code__) for function in frames)
    with torch.no_grad():
        stack.layer(0, hidden, calls)
    assert backend.frame_count == 1


def test_what_cannot_be_compiled_whole_is_an_error_and_not_run_as_before(monkeypatch):
    model = tiny.llama(2)
    stack, kind = DecoderRunner(model), type(model.model.layers[0].mlp)
    hidden, calls = stack.enter(tiny.some_tokens(2))
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) if x.sum().item() else x)
    with pytest.raises(ModelError, match=r"compile fails: .*data-dependent") as caught, compiled(backend="eager"):
        stack.layer(0, hidden, calls)
    assert caught.value.hint == "leave out --compile"


def test_no_compiler_is_an_error_of_the_user():
    stack = DecoderRunner(tiny.llama(2))
    hidden, calls = stack.enter(tiny.some_tokens(2))
    missing = inductor.patch({"cpp.cxx": ("no-such-compiler",)})
    with pytest.raises(ModelError, match="compile fails") as caught, missing, compiled():
        stack.layer(0, hidden, calls)
    assert caught.value.hint == "leave out --compile"


@pytest.mark.parametrize(("attribute", "words"), [("on_disk", "read from disk"), ("_hf_hook", "on several devices")])
def test_layers_that_move_are_refused(attribute, words):
    stack = DecoderRunner(tiny.llama(2))
    hidden, calls = stack.enter(tiny.some_tokens(2))
    setattr(stack if attribute == "on_disk" else stack.layers[0], attribute, object())
    with pytest.raises(ConfigError, match=words), compiled(backend="eager"):
        stack.layer(0, hidden, calls)


def test_generated_code_gives_the_losses():
    logits = torch.randn(3, 5, tiny.VOCABULARY, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(15).view(3, 5)
    with compiled():
        found = token_loss(logits, targets)
    torch.testing.assert_close(found, token_loss(logits, targets))
