"""The cost of a cut after a quick fold is that of the model with the fold in its weights."""

import pytest
import torch

import tiny
from layercut.healing import quick_fold
from layercut.healing.normal_equations import HELD_OUT
from layercut.healing.quick_fold import RIDGES, FoldCosts
from layercut.models.losses import mean_kl
from layercut.models.runner import DecoderRunner
from layercut.segments import Segment
from layercut.surgery import cut

FIT, SEGMENT = tiny.some_tokens(rows=16), [Segment(2, 4)]


def caught(stack, position):
    """(what a layer's last projection reads, what leaves the layer), float64."""
    seen = []
    hook = stack.layers[position].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hidden, calls = stack.enter(FIT)
    out = stack.run(hidden, calls, 0, position + 1)
    hook.remove()
    return seen[-1].double(), out.double()


@torch.no_grad()
def folded_by_hand(model, cuts):
    """The cut model, the last projection before each cut solved in float64; cuts from the first."""
    student, dense = cut(model, cuts), DecoderRunner(model)
    stack = DecoderRunner(student)
    held = torch.arange(len(FIT)) % HELD_OUT == HELD_OUT - 1
    gone = 0
    for segment in cuts:
        position = segment.start - gone - 1
        gone += len(segment)
        if position < 0:
            continue
        z, out = caught(stack, position)
        hidden, calls = dense.enter(FIT)
        wanted = dense.run(hidden, calls, 0, segment.stop).double()
        size = wanted.square().mean(-1, keepdim=True).sqrt()
        z, y = z / size, (wanted - out) / size
        a, b = (z[~held].flatten(0, 1), y[~held].flatten(0, 1))
        eye = torch.eye(a.shape[1], dtype=torch.float64)
        solved = [torch.linalg.solve(a.T @ a + r * (a * a).sum() / a.shape[1] * eye, a.T @ b) for r in RIDGES]
        x = min(solved, key=lambda x: (y[held] - z[held] @ x).square().sum())
        projection = stack.layers[position].mlp.down_proj
        projection.weight = torch.nn.Parameter((projection.weight.double() + x.T).float())
    return student


@pytest.mark.parametrize("cuts", ["1:2,4:6", "0:1,3:4"])
def test_it_is_that_of_the_model_with_the_fold_in_its_weights(cuts):
    model, cuts = tiny.llama(), [Segment.parse(one) for one in cuts.split(",")]
    dense, judged = DecoderRunner(model), tiny.some_tokens(rows=5, seed=1)
    expected = mean_kl(dense, DecoderRunner(folded_by_hand(model, cuts)), judged)
    assert FoldCosts(dense, FIT, judged)(cuts) == pytest.approx(expected, rel=1e-3)
    plain = mean_kl(dense, DecoderRunner(cut(model, cuts)), judged)
    assert abs(plain / expected - 1) > 0.01, "a fold that does nothing would pass"


def test_weights_say_what_each_position_counts_and_states_beyond_memory_are_in_files(tmp_path, monkeypatch):
    dense, judged = DecoderRunner(tiny.llama()), tiny.some_tokens(rows=4, seed=1)
    first = torch.zeros(judged.shape)
    first[:2] = 1 / judged.shape[1]
    whole = FoldCosts(dense, FIT, judged[:2])(SEGMENT)
    assert FoldCosts(dense, FIT, judged, first)(SEGMENT) == pytest.approx(whole / 2, rel=1e-4)
    monkeypatch.setattr(quick_fold, "IN_MEMORY", 0)
    assert FoldCosts(dense, FIT, judged[:2], folder=tmp_path)(SEGMENT) == whole
    assert not list(tmp_path.iterdir()), "they vanish"
