"""Models that know few positions: how many those are, and that nothing is run on more."""

import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel

import families
import folders
import tiny
from layercut.cli.chat import Speaker
from layercut.errors import ModelError
from layercut.evaluation.speed import DECODE, PROMPT, speed
from layercut.export.checkpoint import verify_reload
from layercut.healing.fold_prices import FoldPrices
from layercut.models.decoder_stack import BEHIND_PADDING, positions
from layercut.models.runner import DecoderRunner
from layercut.pipeline.stages.text import check_prompt
from layercut.segments import Segment
from layercut.surgery import cut

KNOWN = 24


def gpt2(known: int = KNOWN) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 40, "bos_token_id": 0, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(n_positions=known, initializer_range=0.3, **sizes)).eval()


@pytest.mark.parametrize("model_type", [*sorted(BEHIND_PADDING), "gpt2", "mpt", "opt", "whisper"])
def test_a_row_as_long_as_the_positions_is_run_and_a_longer_one_cannot_be(model_type):
    names = ("max_seq_len", "max_target_positions", "max_position_embeddings")
    sizes = {name: KNOWN for name in names if hasattr(families.tiny_config(model_type), name)}
    model = families.tiny(model_type, **sizes).eval()
    known = positions(model.config)
    assert known is not None
    with torch.no_grad():
        model(input_ids=families.tokens(known, 1))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=families.tokens(known + 1, 1))


def test_rows_that_are_put_together_are_longer_than_the_positions():
    model = gpt2()
    stack, segments = DecoderRunner(model), [Segment(1, 2)]
    fit, judged = (torch.randint(40, (rows, KNOWN), generator=torch.Generator().manual_seed(rows)) for rows in (8, 3))
    together, alone = FoldPrices(stack, fit, judged), [FoldPrices(stack, fit, judged[i : i + 1]) for i in range(3)]
    assert together(segments) == pytest.approx(math.fsum(price(segments) for price in alone) / 3, rel=1e-4)


def test_speed_is_measured_within_the_positions():
    model = gpt2(64)
    found = speed(model, cut(model, [Segment(1, 2)]), repeats=1)
    assert (found["prompt_tokens"], found["decode_tokens"]) == (64 - 16 - 1, 16)
    assert found["prefill"]["dense"] > 0
    assert positions(gpt2(PROMPT + DECODE + 1).config) == PROMPT + DECODE + 1, "of so many all are measured"


def test_a_chat_with_tokens_that_the_model_lacks_is_refused_before_any_work():
    tokenizer = folders.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m.content }}{% endfor %}"
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<u>"]})
    model = tiny.llama(2, vocab_size=size)
    work = SimpleNamespace(tokenizer=tokenizer, architecture=model.config, checkpoint=SimpleNamespace(name="mine"))
    with pytest.raises(ModelError, match=f"the tokenizer of mine gives token {size}, and"):
        check_prompt(work)
    model.config.vocab_size += 1
    check_prompt(work)


def test_a_chat_is_not_asked_behind_the_end_that_a_tokenizer_writes_by_itself():
    tokenizer = folders.tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    assert tokenizer("ba").input_ids[-1] == tokenizer.eos_token_id
    loaded = SimpleNamespace(tokenizer=tokenizer, model=tiny.llama(2))
    (asked,) = Speaker("dense", loaded, [{"role": "user", "content": "ba ko"}]).prompt(4).tolist()
    assert tokenizer.eos_token_id not in asked
    assert tokenizer.decode(asked, skip_special_tokens=True) == "ba ko\n"


def test_a_model_that_generates_at_other_positions_than_it_reads_at_is_verified(tmp_path):
    """As RoBERTa's kin: `generate` counts from 0, where the model by itself begins behind the padding's."""
    model = families.randomize_(families.tiny("roberta", 4)).float().eval()
    torch.manual_seed(4)
    model.roberta.embeddings.position_embeddings.weight.data.mul_(20)
    model.lm_head.decoder.weight.data.normal_()  # so that the likeliest token goes by the position
    model.lm_head.layer_norm.weight.data.fill_(3)
    model.save_pretrained(tmp_path)
    assert verify_reload(model, tmp_path)["cached_generation"] == "equal"
