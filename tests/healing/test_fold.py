"""The fold is least squares in float64, goes into weights that are there, and finds them by what they do."""

import pytest
import torch
import transformers

import tiny
from layercut.healing import normal_equations
from layercut.healing.least_squares import RIDGES, fold_, fold_cut_
from layercut.healing.linear_outputs import find_targets
from layercut.healing.normal_equations import Normal, add_split_
from layercut.models import decoder_stack
from layercut.models.losses import mean_kl
from layercut.models.runner import DecoderRunner, hidden_of, shared_layers
from layercut.segments import Segment
from layercut.surgery import cut_segment_

SHAPE = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 5, "initializer_range": 0.15, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = SHAPE | {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}

FAMILIES = {
    "llama": (transformers.LlamaConfig(**SHAPE), ["self_attn.o_proj", "mlp.down_proj"]),
    "gpt2": (
        transformers.GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=5, n_head=4, initializer_range=0.15),
        ["attn.c_proj", "mlp.c_proj"],
    ),
    "phi3": (transformers.Phi3Config(**SHAPE), ["self_attn.o_proj", "mlp.down_proj"]),
    "gpt_neox": (
        transformers.GPTNeoXConfig(**(SHAPE | {"num_key_value_heads": None}), use_parallel_residual=True),
        ["attention.dense", "mlp.dense_4h_to_h"],
    ),
    "falcon": (
        transformers.FalconConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=32, num_attention_heads=4, num_hidden_layers=5,
            initializer_range=0.15, parallel_attn=True,
        ),
        ["self_attention.dense", "mlp.dense_4h_to_h"],
    ),
    "mixtral": (transformers.MixtralConfig(**EXPERTS, num_local_experts=4), ["self_attn.o_proj", "mlp"]),
    "gpt_oss": (transformers.GptOssConfig(**EXPERTS, num_local_experts=4, head_dim=8), ["self_attn.o_proj", "mlp"]),
    "deepseek_v3": (
        transformers.DeepseekV3Config(
            **(EXPERTS | {"num_key_value_heads": 4}),
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=0,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        ["self_attn.o_proj", "mlp"],
    ),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig(**EXPERTS, num_experts=4, decoder_sparse_step=1),
        ["self_attn.o_proj", "mlp"],
    ),
    "granite": (transformers.GraniteConfig(**SHAPE, residual_multiplier=0.22), ["self_attn.o_proj", "mlp.down_proj"]),
    "bert": (
        transformers.BertConfig(**(SHAPE | {"is_decoder": True})),  # the norm reads the stream and what is added to it
        ["output.dense"],
    ),
    **{
        name: (config, ["self_attn.o_proj", "mlp.down_proj"])
        for name, config in {
            "gemma3": transformers.Gemma3TextConfig(**SHAPE, head_dim=8), "olmo2": transformers.Olmo2Config(**SHAPE),
            "glm4": transformers.Glm4Config(**SHAPE, head_dim=8),
            "gemma4": transformers.Gemma4TextConfig(**SHAPE, head_dim=8, hidden_size_per_layer_input=0),
        }.items()
    },
    "dbrx": (
        transformers.DbrxConfig(
            vocab_size=tiny.VOCABULARY, d_model=32, n_heads=4, n_layers=5, initializer_range=0.15,
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        ),
        ["norm_attn_norm.attn.out_proj", "ffn"],
    ),
    "granitemoehybrid": (
        transformers.GraniteMoeHybridConfig(
            **SHAPE, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=24,
            layer_types=["full_attention"] * 5, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1,
        ),
        ["self_attn.o_proj", "shared_mlp.output_linear", "block_sparse_moe"],
    ),
    "gemma4_moe": (
        transformers.Gemma4TextConfig(
            **EXPERTS, head_dim=8, hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=4, top_k_experts=2
        ),
        ["self_attn.o_proj"],  # MLP and experts are behind a norm of norms
    ),
    "flex_olmo": (transformers.FlexOlmoConfig(**EXPERTS, num_experts=4), ["self_attn.o_proj", "mlp"]),
}  # fmt: skip
"""Configs, and what a fold changes in them."""
NORMS = {
    "bert": ["output.LayerNorm"],
    "glm4": ["post_self_attn_layernorm", "post_mlp_layernorm"],
    "gemma4_moe": ["post_attention_layernorm"],
    **{
        name: ["post_attention_layernorm", "post_feedforward_layernorm"]
        for name in ("gemma3", "olmo2", "gemma4", "flex_olmo")
    },
}
"""Norms behind them, which a fold changes as well."""


def family(name):
    model = tiny.tiny(FAMILIES[name][0])
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # norms of ones and biases of zero would hide mistakes
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def cut_copy(model, *segments):
    student = decoder_stack.share(model)
    cut_segment_(student, list(segments))
    return student


def changed_weights(student, model):
    return {name for name, p in student.named_parameters() if not any(p is q for q in model.parameters())}


def read_by(stack, position, tokens, modules, *, output=False):
    """h after a layer, and what modules in it read, side by side, or put out."""
    caught = {}

    def catch(name):
        return lambda _, x, y: caught.update({name: hidden_of(y) if output else x[0]})

    layer = stack.layers[position]
    handles = [layer.get_submodule(name).register_forward_hook(catch(name)) for name in modules]
    hidden, calls = stack.enter(tokens)
    out = stack.run(hidden, calls, 0, position + 1)
    for handle in handles:
        handle.remove()
    return out, torch.cat([caught[name].reshape(*out.shape[:2], -1) for name in modules], dim=-1)


def ridge_regression(x, y, ridge, size):
    """Of errors relative to the size of what is wanted, token by token."""
    x, y = ((each / size).flatten(0, 1).double() for each in (x, y))
    gram = x.T @ x
    return torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype), x.T @ y)


@pytest.mark.parametrize("columns", [5, 1024])
def test_streamed_normal_equations_are_float64_least_squares(columns, monkeypatch):
    monkeypatch.setattr(normal_equations, "COLUMNS", columns)
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(200, 12, generator=generator), torch.randn(200, 7, generator=generator)
    sums = Normal.zeros(12, 7, torch.device("cpu"))
    for part in range(0, 200, 50):
        sums.add_(z[part : part + 50], y[part : part + 50])
    solution = torch.linalg.lstsq(z.double(), y.double()).solution
    torch.testing.assert_close(sums.solve(0.0), solution)
    torch.testing.assert_close(sums.whole_(), z.double().T @ z.double())
    assert sums.left(solution) == pytest.approx((z.double() @ solution - y.double()).square().sum().item())
    assert sums.left(torch.zeros(12, 7, dtype=torch.float64)) == pytest.approx(sums.yy)
    # a larger ridge pulls the solution towards doing nothing
    assert sums.solve(10.0).norm() < sums.solve(0.1).norm() < sums.solve(0.0).norm()


def test_sums_that_rounding_made_indefinite_are_solved_all_the_same():
    zz, zy = torch.diag(torch.tensor([1.0, -1e-3], dtype=torch.float64)), torch.ones(2, 1, dtype=torch.float64)
    torch.testing.assert_close(Normal(zz, zy).solve(0.0), torch.tensor([[1.0], [-1e3]], dtype=torch.float64))


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0, 3.0, 30.0])
def test_the_ridge_is_the_best_of_all_for_half_of_the_solving(noise, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 7, generator=generator)
    fit, check = (Normal.zeros(12, 7, torch.device("cpu")) for _ in range(2))
    for sums, rows in ((fit, 15), (check, 40)):  # hardly more rows than unknowns: the more noise, the larger the ridge
        z = torch.randn(rows, 12, generator=generator)
        sums.add_(z, z @ weight + noise * torch.randn(rows, 7, generator=generator))
    wanted, solve, solved = min(RIDGES, key=lambda ridge: check.left(fit.solve(ridge))), Normal.solve, []
    monkeypatch.setattr(Normal, "solve", lambda self, ridge: solved.append(ridge) or solve(self, ridge))
    ridge, x = fit.solve_best(RIDGES, check)
    assert ridge == wanted
    assert torch.equal(x, solve(fit, ridge))
    assert len(solved) == len(set(solved)) <= abs(RIDGES.index(wanted) - len(RIDGES) // 2) + 3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fold_finds_its_weights_and_brings_the_student_nearer(name):
    model = family(name)
    student = cut_copy(model, Segment(2, 4))
    dense, cut = DecoderRunner(model), DecoderRunner(student)
    tokens = tiny.some_tokens(128, 16)
    untouched = {key: p.clone() for key, p in model.named_parameters()}
    before = mean_kl(dense, cut, tokens)
    outcome = fold_cut_(cut, dense, Segment(2, 4), tokens, rows=16)
    assert outcome.modules == FAMILIES[name][1]
    assert outcome.layer == 1
    assert set(outcome.ridges) <= set(RIDGES)
    assert outcome.error_after < 1
    assert mean_kl(dense, cut, tokens) < before
    changed = changed_weights(student, model)
    assert changed
    touched = [*outcome.modules, *NORMS.get(name, [])]
    assert all(any(f".1.{module}." in key for module in touched) for key in changed)
    assert all(any(f".1.{module}." in key for key in changed) for module in touched)
    assert all(torch.equal(p, untouched[key]) for key, p in model.named_parameters())


def test_where_no_cut_has_a_fold_nothing_is_run_and_nothing_is_changed(monkeypatch):
    model, ran = family("llama"), []
    student, tokens = cut_copy(model, Segment(0, 2)), tiny.some_tokens(16, 16)
    dense, cut = DecoderRunner(model), DecoderRunner(student)
    monkeypatch.setattr(DecoderRunner, "layer", lambda *given: ran.append(given))
    found = fold_(cut, dense, tokens)
    assert (found.kl_before, found.kl_after, found.kept, ran) == (None, None, False, [])
    assert not changed_weights(student, model)
    assert "None" not in found._repr_html_()


def test_what_a_class_keeps_in_float32_is_not_rounded_by_the_fold():
    model = tiny.llama().to(torch.bfloat16).float()
    model.stored_dtype, wide = torch.bfloat16, "model.layers.1.mlp.down_proj.weight"
    model.get_parameter(wide).data[0, 0] = 1 + 2**-20
    student = cut_copy(model, Segment(2, 4))
    outcome = fold_cut_(DecoderRunner(student), DecoderRunner(model), Segment(2, 4), tiny.some_tokens(64, 16), rows=16)
    assert outcome.modules == ["self_attn.o_proj", "mlp.down_proj"]
    rounded = [name for name, p in student.named_parameters() if not torch.equal(p, p.bfloat16().float())]
    assert rounded == [wide]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_each_projection_is_the_ridge_regression_on_what_it_reads(name):
    model = family(name)
    dense, cut = DecoderRunner(model), DecoderRunner(cut_copy(model, Segment(2, 4)))
    tokens = tiny.some_tokens(64, 16)
    outcome = fold_cut_(cut, dense, Segment(2, 4), tokens, rows=16)

    # the same by hand on a second copy, all rows at once: both together for the first, the second on what it then reads
    plain = DecoderRunner(cut_copy(model, Segment(2, 4)))
    hidden, calls = dense.enter(tokens)
    wanted = dense.run(hidden, calls, 0, 4)
    fit, size = torch.arange(64) % 8 != 7, wanted.square().mean(-1, keepdim=True).sqrt()
    lacking = []
    for number, ridge in enumerate(outcome.ridges):
        out, x = read_by(plain, 1, tokens, outcome.modules[number:])
        lacking.append(((wanted - out) / size)[~fit].square().sum())
        delta = ridge_regression(x[fit], (wanted - out)[fit], ridge, size[fit])
        module = plain.layers[1].get_submodule(outcome.modules[number])
        linear = isinstance(module, torch.nn.Linear)
        delta = delta[: module.weight.shape[1 if linear else 0]]
        new = module.weight + (delta.T if linear else delta).float()
        module.weight = torch.nn.Parameter(new, requires_grad=False)
    ours, _ = read_by(cut, 1, tokens, outcome.modules)
    theirs, _ = read_by(plain, 1, tokens, outcome.modules)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    left = ((ours - wanted) / size)[~fit].square().sum() / lacking[0]
    assert outcome.error_after == pytest.approx(left.item(), rel=1e-2)


def test_a_few_tokens_of_massive_activations_do_not_decide(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    z, out, truth, noise = (
        torch.randn(*shape, generator=draw) for shape in ((64, 16, 12), (64, 16, 7), (12, 7), (64, 7))
    )
    wanted = out + z @ truth
    wanted[:, 0] = 1000 * noise  # as at the sinks of attention: no map of what is read

    def off():
        fit, check = (Normal.zeros(12, 7, torch.device("cpu")) for _ in range(2))
        add_split_(fit, check, slice(0, 64), z, out, wanted)
        return (fit.solve_best(RIDGES, check)[1] - truth).norm() / truth.norm()

    assert off() < 0.2
    monkeypatch.setattr(normal_equations, "SMALLEST", 1e12)  # every token counts by its size
    assert off() > 1


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe"])
def test_experts_are_multiplied_by_the_best_matrix(name):
    model = family(name)
    dense, cut = DecoderRunner(model), DecoderRunner(cut_copy(model, Segment(2, 4)))
    tokens = tiny.some_tokens(64, 16)
    plain = DecoderRunner(cut_copy(model, Segment(2, 4)))
    outcome = fold_cut_(cut, dense, Segment(2, 4), tokens, rows=16)
    # the attention as it was folded, the experts as they were
    folded = cut.layers[1].self_attn.o_proj.weight
    plain.layers[1].self_attn.o_proj.weight = folded
    hidden, calls = dense.enter(tokens)
    wanted = dense.run(hidden, calls, 0, 4)
    out, m = read_by(plain, 1, tokens, ["mlp"], output=True)
    fit, size = torch.arange(64) % 8 != 7, wanted.square().mean(-1, keepdim=True).sqrt()
    delta = ridge_regression(m[fit], (wanted - out)[fit], outcome.ridges[1], size[fit])
    hidden, calls = cut.enter(tokens)
    torch.testing.assert_close(cut.run(hidden, calls, 0, 2).double(), out + m.double() @ delta, rtol=1e-3, atol=1e-3)


def test_an_mlp_too_wide_to_solve_is_multiplied_instead(monkeypatch):
    monkeypatch.setattr("layercut.healing.linear_outputs.WIDEST", 40)
    model = family("gpt2")
    student = cut_copy(model, Segment(2, 4))
    dense, cut = DecoderRunner(model), DecoderRunner(student)
    outcome = fold_cut_(cut, dense, Segment(2, 4), tiny.some_tokens(64, 16), rows=16)
    assert outcome.modules == ["attn.c_proj", "mlp.c_proj"]
    changed = {key.split(".1.")[1] for key in changed_weights(student, model)}
    assert changed == {"attn.c_proj.weight", "mlp.c_proj.weight", "mlp.c_proj.bias"}
    # W (I + X) keeps the span of what W puts out
    old, new = model.transformer.h[1].mlp.c_proj.weight, student.transformer.h[1].mlp.c_proj.weight
    x = torch.linalg.lstsq(old.double(), new.double()).solution
    torch.testing.assert_close((old.double() @ x).float(), new, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writers_are_found_in_the_models_own_number_format(dtype):
    model = family("llama").to(dtype)
    with torch.no_grad():  # a stream so large that in bfloat16 what a layer adds drowns in rounding
        model.model.embed_tokens.weight[:, 0] += 500
    names = [target.name for target in find_targets(DecoderRunner(model), 1, tiny.some_tokens(2, 16))]
    assert names == ["self_attn.o_proj", "mlp.down_proj"]


# --- several rounds ---


def test_shared_layers_are_counted_by_identity():
    model = tiny.llama()
    student = cut_copy(model, Segment(4, 6))
    dense, cut = DecoderRunner(model), DecoderRunner(student)
    assert shared_layers(dense, cut) == 4
    layer = student.model.layers[2].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)
    assert shared_layers(dense, cut) == 2
    student.model.embed_tokens.weight = torch.nn.Parameter(student.model.embed_tokens.weight.clone())
    assert shared_layers(dense, cut) == 0


def test_a_later_cut_is_folded_on_what_the_healed_student_computes():
    """Layer 1 of the student was changed in an earlier round: the fold must not take the dense model's stream there."""
    model, tokens = tiny.llama(), tiny.some_tokens(64)
    old, new = Segment(2, 3), Segment(5, 6)
    student = cut_copy(model, old, new)
    healed = student.model.layers[1].mlp.down_proj
    healed.weight = torch.nn.Parameter(1.5 * healed.weight, requires_grad=False)
    dense, cut = DecoderRunner(model), DecoderRunner(student)
    plain = decoder_stack.share(student)
    outcome = fold_cut_(cut, dense, new, tokens, rows=16)
    assert (outcome.segment, outcome.layer) == ([5, 6], 3)
    assert student.model.layers[1].mlp.down_proj.weight is healed.weight

    hidden, calls = dense.enter(tokens)
    wanted = dense.run(hidden, calls, 0, 6)
    out, x = read_by(DecoderRunner(plain), 3, tokens, outcome.modules)
    fit, size = torch.arange(64) % 8 != 7, wanted.square().mean(-1, keepdim=True).sqrt()
    delta = ridge_regression(x[fit], (wanted - out)[fit], outcome.ridges[0], size[fit])[:32]
    got = student.model.layers[3].self_attn.o_proj.weight - plain.model.layers[3].self_attn.o_proj.weight
    torch.testing.assert_close(got, delta.T.float(), rtol=1e-3, atol=1e-4)
