"""A model whose layers are on disk computes what the same model in memory computes, to the bit, reading little."""

import json
import math
import time
import weakref

import pytest
import torch
from transformers import Gemma2Config, GPTNeoXConfig, MixtralConfig, PhimoeConfig, Qwen2MoeConfig, RwkvConfig

import folders
import tiny
from layercut.errors import ModelError
from layercut.layer_search import search
from layercut.layer_search.baselines import taylor_scores
from layercut.layer_search.result import Cost
from layercut.layer_search.sweep import DENSE, all_segments, set_costs, streams_held
from layercut.models import checkpoints, decoder_stack, layer_reader, loading, placement, runner
from layercut.models.runner import DecoderRunner

SMALL = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_hidden_layers": 4, "max_position_embeddings": 64, "initializer_range": 0.15,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS = {
    "llama": tiny.llama,
    "llama tied": lambda: tiny.llama(tie_word_embeddings=True),
    "gpt2": tiny.gpt2,  # buffers in its layers that are not stored
    "neox": lambda: tiny.tiny(GPTNeoXConfig(**SMALL)),
    "gemma2": lambda: tiny.tiny(Gemma2Config(**GROUPED, head_dim=8, sliding_window=8)),  # two masks; tied
    # experts stored one by one, and fused on loading
    "mixtral": lambda: tiny.tiny(MixtralConfig(**GROUPED, num_local_experts=4)),
    "phimoe": lambda: tiny.tiny(PhimoeConfig(**GROUPED, num_local_experts=4)),
    "qwen2 moe": lambda: tiny.tiny(Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=32)),
}


def saved(model, folder):
    """The model as a sharded checkpoint."""
    model.save_pretrained(folder, max_shard_size="40KB")
    folders.tokenizer().save_pretrained(folder)
    return checkpoints.resolve(str(folder))


def on_disk(checkpoint, **how):
    """The model with its layers on disk, and their reader."""
    model = placement.load(checkpoint, place="disk", **how).model
    return model, layer_reader.layers_on_disk(model)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of 8 layers, saved in several shards."""
    return saved(tiny.llama(), tmp_path_factory.mktemp("llama"))


def both(checkpoint):
    """Stacks over the same model in memory and on disk, and the reader of the latter."""
    model, disk = on_disk(checkpoint)
    return DecoderRunner(loading.load(checkpoint).model), DecoderRunner(model), disk


def pairs(stack):
    return [(segment,) for segment in all_segments(2, len(stack))]


# --- the same model ---


@pytest.mark.parametrize("name", MODELS)
def test_on_disk_is_in_memory_to_the_bit(name, tmp_path):
    checkpoint = saved(MODELS[name](), tmp_path)
    memory, (model, disk) = loading.load(checkpoint).model, on_disk(checkpoint)
    tokens = tiny.some_tokens(3, 16)
    expected = memory(input_ids=tokens, use_cache=False).logits
    assert torch.equal(model(input_ids=tokens, use_cache=False).logits, expected)
    assert disk.files.layers_read == [1] * len(disk.layers)
    stack = DecoderRunner(model)
    hidden, calls = stack.enter(tokens)
    assert torch.equal(stack.exit(stack.run(hidden, calls, 0, len(stack)), tokens), expected)
    assert disk.files.layers_read == [2] * len(disk.layers)  # neither the check nor the way in and out read any
    stored = sum(math.prod(tensor.shape) * 4 for tensor in checkpoints.stored_tensors(checkpoint.folder).values())
    layers = sum(p.nbytes for layer in decoder_stack.find_decoder(memory).layers for p in layer.parameters())
    assert disk.files.bytes_read == stored + layers  # the rest once, the layers twice
    for name, buffer in memory.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name))
        assert buffer.dtype == model.get_buffer(name).dtype


def test_the_dtype_is_the_one_that_load_would_choose(llama):
    memory, (model, _) = loading.load(llama, dtype="bfloat16").model, on_disk(llama, dtype="bfloat16")
    tokens = tiny.some_tokens(2)
    assert torch.equal(model(input_ids=tokens).logits, memory(input_ids=tokens).logits)
    assert model.dtype == memory.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_two_layers_are_in_memory_at_most(llama, monkeypatch):
    model, disk = on_disk(llama)
    read, alive, most = disk.files._read, {}, []

    def watched(layer):
        arrays = {name: tensor.numpy().copy() for name, tensor in read(layer).items()}
        alive[layer] = [weakref.ref(array) for array in arrays.values()]
        for _ in range(100):  # the thread that has read ahead lets go of what it gave a moment later
            if (count := sum(any(ref() is not None for ref in refs) for refs in alive.values())) <= 2:
                break
            time.sleep(0.01)
        most.append(count)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    monkeypatch.setattr(disk.files, "_read", watched)
    stack, tokens = DecoderRunner(model), tiny.some_tokens()
    set_costs(stack, tokens, pairs(stack), Cost())
    assert len(most) == 8
    taylor_scores(stack, tokens, Cost())  # and the way down
    for method in ("clp", "fisher"):
        search(stack, tokens, n_layers=2, method=method, seed=0)
    for i in (0, 5, 2):  # and where another layer was read ahead
        disk.enter_(disk.layers[i])
    assert max(most) == 2
    disk.files.leave_()
    del stack
    assert all(p.is_meta for layer in disk.layers for p in layer.parameters())


# --- what it is for ---


@pytest.mark.parametrize("method", ["clp", "fisher"])
def test_a_search_by_gradients_is_the_same(llama, method):
    found, expected = (search(each, tiny.some_tokens(4), n_layers=2, method=method) for each in both(llama)[:2])
    assert found == expected


def test_rows_go_in_several_passes_where_their_streams_do_not_fit(llama, monkeypatch):
    memory, stack, disk = both(llama)
    tokens = tiny.some_tokens(6)
    expected = set_costs(memory, tokens, pairs(stack), Cost(), rows=2)
    per_row = streams_held([DENSE, *pairs(stack)], 8) * tokens.shape[1] * 32 * 4
    monkeypatch.setattr(runner, "available_bytes", lambda device: 4 * per_row / runner.STREAMS_SHARE)
    assert set_costs(stack, tokens, pairs(stack), Cost(), rows=2) == expected
    assert disk.files.layers_read == [2] * 8
    monkeypatch.setattr(runner, "available_bytes", lambda device: 4 * per_row)
    with pytest.raises(ModelError, match="do not fit in memory"):
        taylor_scores(stack, tokens.repeat(4, 1), Cost())


# --- gradients ---


# --- what is refused ---


def test_a_shard_that_breaks_while_it_is_read(tmp_path):
    checkpoint = saved(tiny.llama(), tmp_path)
    model, disk = on_disk(checkpoint)
    last = max(checkpoints.weight_files(checkpoint.folder))
    last.write_bytes(last.read_bytes()[:-400])
    with pytest.raises(ModelError, match=last.name):
        model(input_ids=tiny.some_tokens(1))
    last.unlink()
    with pytest.raises(ModelError, match=last.name):
        disk.enter_(disk.layers[7])


def test_a_checkpoint_that_does_not_fit_its_config_is_refused_before_it_is_read(tmp_path):
    checkpoint = saved(tiny.llama(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (({"num_hidden_layers": 9}, "lacks 9 weights"), ({"intermediate_size": 48}, "another shape")):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=words):
            placement.load(checkpoint, place="disk")


def test_what_cannot_be_read_layer_by_layer_is_refused(tmp_path):
    shared = tiny.llama()
    shared.model.layers[3].mlp = shared.model.layers[1].mlp
    with pytest.raises(ModelError, match=r"layers 1 and 3 .* share"):
        layer_reader.refuse_sharing(shared)
    tied = tiny.llama()
    tied.model.norm.weight = tied.model.layers[2].input_layernorm.weight
    with pytest.raises(ModelError, match=r"ties model\.norm\.weight to layer 2"):
        layer_reader.refuse_sharing(tied)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert "GGUF" in layer_reader.why_not_by_layer(checkpoints.Checkpoint("model", tmp_path, gguf.name), None)


def test_a_model_that_changes_its_weights_as_it_runs_is_refused(tmp_path):
    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 8, "attention_hidden_size": 32}
    config = RwkvConfig(**sizes, rescale_every=3)
    model, _ = on_disk(saved(tiny.tiny(config), tmp_path))
    with pytest.raises(ModelError, match="changes the weights"):
        model(input_ids=tiny.some_tokens(1), use_cache=False)


def test_auto_takes_the_disk_where_memory_is_too_small(llama, monkeypatch):
    weights = sum(p.nbytes for p in loading.load(llama).model.parameters())
    for share, on_disk in ((1.1, True), (1.3, False)):
        monkeypatch.setattr(placement, "available_bytes", lambda device, share=share: weights * share)
        assert (placement.place_of(llama) == "disk") == on_disk
        assert bool(layer_reader.layers_on_disk(placement.load(llama).model)) == on_disk
        assert placement.place_of(llama, dtype="bfloat16") == "memory"
        assert placement.place_of(llama, "memory") == "memory"
