"""A model run layer by layer gives the logits of its own forward, to the bit, and is left as it was."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    MambaConfig,
    OPTConfig,
    Qwen2Config,
)

import families
import folders
import tiny
from layercut.errors import ModelError
from layercut.export.checkpoint import verify_reload
from layercut.healing.quick_fold import FoldCosts
from layercut.models.decoder_stack import BEHIND_PADDING, positions, share
from layercut.models.losses import Teacher, kl_divergence, mean_kl, next_token_loss
from layercut.models.runner import DecoderRunner, intercepted
from layercut.pipeline.stages.text import check_prompt
from layercut.segments import Segment
from layercut.surgery import cut_segment_

SIZES = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_hidden_layers": 4, "max_position_embeddings": 64, "initializer_range": 0.15, "pad_token_id": 0,
}  # fmt: skip
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "init_std": 0.2}
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
    "a projection behind the layers": lambda: tiny.tiny(OPTConfig(**SIZES, **OPT)),
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


def test_interception_ends_also_after_an_error():
    layers = list(tiny.llama().model.layers)
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


def test_a_model_that_is_not_the_same_twice_is_checked_by_its_own_noise(caplog):
    """As one with kernels that add in any order."""
    generator, model = torch.Generator().manual_seed(0), tiny.llama(3)
    head = model.lm_head.forward
    model.lm_head.forward = lambda h: head(h) + 1e-5 * torch.randn(*h.shape[:-1], 96, generator=generator)
    with caplog.at_level("INFO", "layercut"):
        DecoderRunner(model)
    assert "does not give the same logits twice" in caplog.text


# --- losses ---


def test_kl_is_torchs_own_and_so_is_its_gradient():
    p, q = torch.randn(2, 3, 5, 50, generator=torch.Generator().manual_seed(0)).unbind(0)
    q.requires_grad_(True)
    logs = q.log_softmax(-1), p.log_softmax(-1)
    reference = torch.nn.functional.kl_div(*logs, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(Teacher(p).kl(q), reference)
    (expected,), (got,) = (torch.autograd.grad(kl.sum(), q) for kl in (reference, Teacher(p).kl(q)))
    torch.testing.assert_close(got, expected)
    assert kl_divergence(p, p).abs().max() < 1e-6


def test_next_token_loss_is_the_models_own_loss():
    model, tokens = tiny.llama(), tiny.some_tokens()
    ours = next_token_loss(model(input_ids=tokens).logits, tokens).mean()
    torch.testing.assert_close(ours, model(input_ids=tokens, labels=tokens).loss)


def test_mean_kl_against_full_forwards():
    dense, tokens = tiny.llama(), tiny.some_tokens()
    student = share(dense)
    cut_segment_(student, [Segment(3, 5)])
    p, q = (m(input_ids=tokens, use_cache=False).logits for m in (dense, student))
    expected = pytest.approx(kl_divergence(p, q).mean().item(), rel=1e-5)
    for prefix in (0, 3):
        assert mean_kl(DecoderRunner(dense), DecoderRunner(student), tokens, prefix=prefix) == expected


# --- models that know few positions ---


def gpt2(known: int):
    sizes = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 40, "bos_token_id": 0, "eos_token_id": None}
    return tiny.tiny(GPT2Config(n_positions=known, initializer_range=0.3, **sizes))


@pytest.mark.parametrize("model_type", [*sorted(BEHIND_PADDING), "gpt2", "mpt", "opt", "whisper"])
def test_a_row_as_long_as_the_positions_is_run_and_a_longer_one_cannot_be(model_type):
    names = ("max_seq_len", "max_target_positions", "max_position_embeddings")
    sizes = {name: 24 for name in names if hasattr(families.tiny_config(model_type), name)}
    model = families.tiny(model_type, **sizes).eval()
    known = positions(model.config)
    with torch.no_grad():
        model(input_ids=families.tokens(known, 1))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=families.tokens(known + 1, 1))


def test_rows_that_are_put_together_are_longer_than_the_positions():
    stack, segments = DecoderRunner(gpt2(24)), [Segment(1, 2)]
    fit, judged = (torch.randint(40, (rows, 24), generator=torch.Generator().manual_seed(rows)) for rows in (8, 3))
    together, alone = FoldCosts(stack, fit, judged), [FoldCosts(stack, fit, judged[i : i + 1]) for i in range(3)]
    assert together(segments) == pytest.approx(math.fsum(cost(segments) for cost in alone) / 3, rel=1e-4)


def test_a_chat_with_tokens_that_the_model_lacks_is_refused_before_any_work():
    tokenizer = folders.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m.content }}{% endfor %}"
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<u>"]})
    config = tiny.llama(2, vocab_size=size).config
    work = SimpleNamespace(tokenizer=tokenizer, architecture=config, checkpoint=SimpleNamespace(name="mine"))
    with pytest.raises(ModelError, match=f"the tokenizer of mine gives token {size}, and"):
        check_prompt(work)
    config.vocab_size += 1
    check_prompt(work)


def test_a_model_that_generates_at_other_positions_than_it_reads_at_is_verified(tmp_path):
    """As RoBERTa's kin: `generate` counts from 0, where the model by itself begins behind the padding's."""
    model = families.randomize_(families.tiny("roberta", 4)).float().eval()
    torch.manual_seed(4)
    model.roberta.embeddings.position_embeddings.weight.data.mul_(20)
    model.lm_head.decoder.weight.data.normal_()  # so that the likeliest token goes by the position
    model.lm_head.layer_norm.weight.data.fill_(3)
    model.save_pretrained(tmp_path)
    assert verify_reload(model, tmp_path)["cached_generation"] == "equal"
