"""Find what in a layer the least squares can solve again, by what it does and not by its name.

Before the least squares (`least_squares.py`). A linear module writes to the residual stream if the layer gives
out - c m without its output m, c a factor that is the same for all tokens (1 in most families). A norm that writes to
the stream is made the identity first: what then writes is what that norm reads. Everything is tried on a few tokens, on
a float32 copy of the one layer, where a sum rounds too little to hide a small m.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from layercut.models.decoder_stack import weight_as_stored
from layercut.models.runner import DecoderRunner, hidden_of, intercepted

WIDEST = 16384
"""Widest input whose Z'Z is built, 2 GiB in float64; beyond it the output is multiplied by T, as for experts."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class OutputNorm:
    """A norm between a layer's output and the stream, which receives factor * (gain * n(u) + bias) of its input u."""

    name: str  # the module, by its name in the layer
    offset: float  # the gain is this and the module's weight: 1 in Gemma, 0 elsewhere
    gain: torch.Tensor  # [D], of the model as it is
    trainable: bool  # whether there is a weight that makes the gain
    bias: torch.Tensor  # [D]
    centred: bool  # LayerNorm, which takes the mean off its input; else RMSNorm
    eps: float
    factor: torch.Tensor  # [D], between the norm and the stream

    def normal(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """n(u) [..., D] and the root mean square [..., 1] that u was divided by."""
        u = u - u.mean(-1, keepdim=True) if self.centred else u
        rms = (u.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return u / rms, rms

    def write_(self, layer: nn.Module, gain: torch.Tensor, stored: torch.dtype) -> None:
        """Put a gain into a new parameter."""
        module = layer.get_submodule(self.name)
        weight: Any = module.weight
        saved_in = weight_as_stored(weight.detach(), stored).dtype
        new = (gain - self.offset).to(weight.device).reshape(weight.shape)
        module.weight = nn.Parameter(new.to(saved_in).to(weight), requires_grad=False)


@dataclass(frozen=True, eq=False)
class LinearOutput:
    """Something inside a layer whose output is linear in weights that can be changed, and added to the stream."""

    name: str  # the module, by its name in the layer
    reads: bool
    """A linear module whose weight is solved from what it reads; else its output is multiplied by a matrix T."""
    weights: tuple[tuple[str, int], ...]
    """Names, in the layer, of the weights that take the change, each with the dimension that runs over outputs."""
    width: int  # how many numbers a token it is solved from: I, what it reads, or D, what it puts out
    factor: torch.Tensor | None = None
    """[D], what the output is multiplied by before it joins the stream, or what its norm reads; None: 1."""
    norm: OutputNorm | None = None  # what stands between the output and the stream

    def of(self, caught: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        """What the fold is solved from."""
        return caught[0 if self.reads else 1].reshape(*out.shape[:2], -1)

    def fold_into_(self, layer: nn.Module, x: torch.Tensor, stored: torch.dtype) -> None:
        """Put X into new parameters: of a module that is read, W + X with X [I, D]; else W (I + X), X [D, D].

        X is what the stream, or the norm, is to receive: what is written is X over the factor between.
        """
        if self.factor is not None:
            x = divided(x, self.factor.to(x))
        for name, dim in self.weights:
            owner, _, leaf = name.rpartition(".")
            module = layer.get_submodule(owner)
            weight = getattr(module, leaf)
            new = weight.to(x) + (x.T if dim == 0 else x) if self.reads else multiplied(weight, dim, x)
            saved_in = weight_as_stored(weight.detach(), stored).dtype
            setattr(module, leaf, nn.Parameter(new.to(saved_in).to(weight), requires_grad=False))


def norms_of(targets: Sequence[LinearOutput]) -> list[OutputNorm]:
    """The norms behind targets, each once."""
    return list(dict.fromkeys(target.norm for target in targets if target.norm))


def multiplied(weight: torch.Tensor, dim: int, x: torch.Tensor) -> torch.Tensor:
    """Outputs, along `dim`, multiplied by T = I + X; an expert at a time, as float64 is four times bfloat16."""
    if weight.dim() == 3:
        return torch.stack([multiplied(expert, dim - 1, x).to(weight) for expert in weight])
    outputs = weight.to(x).movedim(dim, -1)
    return (outputs + outputs @ x).movedim(-1, dim)


def divided(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Columns over their factors [D]; nothing where a factor hides what is written."""
    hidden = factor.abs() <= 1e-4 * factor.abs().max()
    return torch.where(hidden, 0.0, x / torch.where(hidden, 1.0, factor))


@torch.no_grad()
def find_targets(stack: DecoderRunner, position: int, tokens: torch.Tensor) -> list[LinearOutput]:
    """What to solve again in a layer, in the order in which it runs.

    First choice are linear modules that write to the stream, of the attention and of the MLP, whatever the block
    looks like. Of a mixture of experts the output is multiplied by a matrix instead.
    """
    hidden, calls = stack.enter(tokens)
    before = stack.run(hidden, calls, 0, position)
    probe = Probe.of(stack.loaded(position), stack.on_device_of(position, before), calls[position])
    norms = output_norms(probe)
    for norm in norms:
        probe.layer.get_submodule(norm.name).forward = _identity
    writers = linear_writers(probe)
    found = [_of_linear(probe, *each) for each in writers.items()]
    known = {f"{name}.{leaf}" for name in writers for leaf in ("weight", "bias")}
    if len(found) < 2 and (branch := multipliable_branch(probe, known)):  # experts, with what they share or without
        others = linear_writers(probe, silent=[probe.layer.get_submodule(branch.name)])
        outside = [each for each in others.items() if not each[0].startswith(branch.name + ".")]
        found = [*(_of_linear(probe, *each) for each in outside), branch]
    for norm in norms if not found else []:  # Gemma 4's norm of norms, of MLP and experts: attention is seen without it
        others = linear_writers(probe, silent=[probe.layer.get_submodule(norm.name)])
        found = found or [_of_linear(probe, *each) for each in others.items()]
    return [_behind(probe, target, norms) for target in found]


def _identity(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def output_norms(probe: Probe) -> list[OutputNorm]:
    """The norms whose output the layer adds to the stream, and what they compute: Gemma's, OLMo-2's, GLM-4's."""
    tried = {
        name: module
        for name, module in probe.layer.named_modules()
        if "norm" in type(module).__name__.lower() and all(each.dim() == 1 for each in module.parameters())
    }
    found: dict[nn.Module, OutputNorm] = {}
    while True:
        for name, module in reversed(tried.items()):
            factor = None if module in found else probe.adds(module, [*found])
            if factor is not None and (norm := _norm(probe, name, factor)):
                found[module] = norm
                break
        else:
            return list(found.values())


def _norm(probe: Probe, name: str, factor: torch.Tensor) -> OutputNorm | None:
    """A norm's own form, by trying: RMSNorm or LayerNorm, times its weight or 1 + weight."""
    module: Any = probe.layer.get_submodule(name)
    _, caught = probe.run([module])
    u, m = caught[module]
    weight, bias = (getattr(module, leaf, None) for leaf in ("weight", "bias"))
    none = torch.zeros(probe.width, device=u.device)
    shift, gain, offset = none if bias is None else bias, none + 1, 0.0
    if weight is not None:
        with_none = torch.func.functional_call(module, {"weight": torch.zeros_like(weight)}, (u,))
        offset = 0.0 if _same(with_none, shift.expand_as(m), m, m) else 1.0
        gain = offset + weight
    epsilons = [getattr(module, each, None) for each in ("eps", "variance_epsilon", "epsilon", "norm_eps")]
    eps = next((float(each) for each in epsilons if each is not None), 1e-6)
    for centred in (False, True):
        norm = OutputNorm(name, offset, gain, weight is not None, shift, centred, eps, factor)
        if _same(m, gain * norm.normal(u)[0] + shift, m, m):
            return norm
    return None


def _behind(probe: Probe, target: LinearOutput, norms: Sequence[OutputNorm]) -> LinearOutput:
    """A target, with the norm that reads it. All norms are the identity by now."""
    module = probe.layer.get_submodule(target.name)
    modules = [probe.layer.get_submodule(norm.name) for norm in norms]
    _, caught = probe.run([module, *modules])
    _, without = probe.run(modules, silent=[module])
    m = caught[module][1].reshape(probe.before.shape)
    for norm, each in zip(norms, modules, strict=True):
        reads = 1 / norm.factor if target.factor is None else target.factor / norm.factor
        u, rest = (some[each][0].reshape(m.shape) for some in (caught, without))
        if _same(u - rest, reads * m, m, u):
            near_one = _same(reads, torch.ones_like(reads), reads, reads)
            return replace(target, factor=None if near_one else reads, norm=norm)
    return target


def _of_linear(probe: Probe, name: str, factor: torch.Tensor) -> LinearOutput:
    module: Any = probe.layer.get_submodule(name)
    weights = [(f"{name}.weight", output_dim(module))]
    read = module.weight.shape[1 - weights[0][1]]
    if read > WIDEST and module.bias is not None:
        weights.append((f"{name}.bias", 0))
    width = read if read <= WIDEST else probe.width
    return LinearOutput(name, read <= WIDEST, tuple(weights), width, _unless_one(factor))


def _unless_one(factor: torch.Tensor) -> torch.Tensor | None:
    return None if bool((factor == 1).all()) else factor


def linear_writers(probe: Probe, silent: Sequence[nn.Module] = ()) -> dict[str, torch.Tensor]:
    """The linear modules whose output the layer adds to the stream, in the order they run, each with its factor [D].

    Those found are set to zero before the others are tried, since what the attention adds also changes what the MLP
    reads. Of lists of experts none is tried: which run depends on the tokens.
    """
    tried = {
        name: module
        for name, module in probe.layer.named_modules()
        if is_linear(module) and _width(module) == probe.width and not re.search(r"experts?\.\d", name)
    }
    found: dict[nn.Module, tuple[str, torch.Tensor]] = {}
    while True:
        for name, module in reversed(tried.items()):
            factor = None if module in found else probe.adds(module, [*silent, *found])
            if factor is not None:
                found[module] = name, factor
                break
        else:
            _, caught = probe.run(list(found))
            return dict(found[module] for module in caught)


def multipliable_branch(probe: Probe, known: Collection[str] = ()) -> LinearOutput | None:
    """A part of the layer whose output m is added to the stream, and the weights, beside `known`, that make it m T.

    The weights are found by trying: without them a part of m is gone, and with their outputs permuted and some of
    them doubled (no norm lets both pass) exactly that part is so. Weights that differ by a number in their names, the
    experts of a list, go together. All found must together turn all of m into m T.
    """
    modules = reversed(list(probe.layer.named_modules()))
    for name, module in sorted(modules, key=lambda named: named[0].count(".")):  # the whole MLP before its parts
        if not name or isinstance(module, nn.ModuleList):
            continue
        factor = probe.adds(module, [])
        if factor is None or bool((factor != factor[0]).any()):
            continue
        groups: dict[str, list[str]] = {}
        for leaf, _ in module.named_parameters(prefix=name):
            groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "#", leaf), []).append(leaf)
        found = [
            (leaf, dim)
            for group in groups.values()
            for dim in range(probe.layer.get_parameter(group[0]).dim())
            if probe.multiplies([(leaf, dim) for leaf in group])
            for leaf in group
        ]
        if not {leaf for leaf, _ in found} <= {*known} and probe.multiplies(found, module, factor):
            return LinearOutput(name, False, tuple(found), probe.width, _unless_one(factor))
    return None


@dataclass(frozen=True)
class Probe:
    """One layer in float32 and what it receives for a few tokens."""

    layer: nn.Module
    before: torch.Tensor  # h [B, T, D]
    call: Call

    @classmethod
    def of(cls, layer: nn.Module, before: torch.Tensor, call: Call) -> Probe:
        """A float32 copy of a layer, of its input and of its further arguments."""

        def as_float(value: Any) -> Any:
            return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        layer = copy.deepcopy(layer)
        layer.__dict__.pop("forward", None)  # that of a layer on disk would read it, and this copy has its weights
        return cls(layer.float(), before.float(), tree_map(as_float, call))

    @property
    def width(self) -> int:
        """D, the hidden size."""
        return self.before.shape[-1]

    def run(
        self, modules: Sequence[nn.Module] = (), silent: Sequence[nn.Module] = ()
    ) -> tuple[torch.Tensor, dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]]:
        """The layer's output, and what some modules read and put out; as of `run_and_catch`."""
        return run_and_catch(self.layer, self.before, self.call, modules, silent)

    def adds(self, module: nn.Module, silent: Sequence[nn.Module]) -> torch.Tensor | None:
        """c [D] if the layer puts out less by c m without the module's output m, whatever the token."""
        try:
            out, caught = self.run([module], silent)
        except KeyError:  # called without a hidden state
            return None
        if module not in caught or caught[module][1].numel() != out.numel():
            return None
        m = caught[module][1].reshape(out.shape)
        if not m.any():
            return None
        rest, _ = self.run(silent=[*silent, module])
        added, one = out - rest, torch.ones(self.width, device=m.device)
        if _same(added, m, m, out):
            return one
        if _same(added, torch.zeros_like(m), added, out):
            return None
        for axes in ((0, 1, 2), (0, 1)):  # a number for all channels, or one for each
            factor = (added * m).sum(axes) / m.square().sum(axes).clamp_min(1e-30) * one
            if _same(added, factor * m, added, out):
                return factor
        return None

    def multiplies(
        self, weights: Sequence[tuple[str, int]], module: nn.Module | None = None, factor: torch.Tensor | float = 1.0
    ) -> bool:
        """Whether these weights' outputs times T make their part of the stream times T."""
        values = {name: self.layer.get_parameter(name) for name, _ in weights}
        for name, dim in weights:
            if values[name].shape[dim] != self.width or (values[name].dim() == 3 and dim == 0):
                return False
        draw = torch.Generator().manual_seed(0)
        order = torch.randperm(self.width, generator=draw).to(self.before.device)
        scale = 1.0 + torch.randint(2, (self.width,), generator=draw).to(self.before.device)

        def changed(weight: torch.Tensor, dim: int) -> torch.Tensor:
            return (weight.index_select(dim, order).movedim(dim, -1) * scale).movedim(-1, dim)

        out, caught = self.run([module] if module else [])
        if module:
            m = factor * caught[module][1].reshape(out.shape)
        else:
            m = out - self._run_with({name: torch.zeros_like(value) for name, value in values.items()})
        got = self._run_with({name: changed(values[name], dim) for name, dim in weights})
        return bool(m.any()) and _same(got, out - m + m[..., order] * scale, m, out)

    def _run_with(self, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        args, kwargs = self.call
        return hidden_of(torch.func.functional_call(self.layer, weights, (self.before, *args), kwargs))


def run_and_catch(
    layer: nn.Module,
    before: torch.Tensor,
    call: Call,
    modules: Sequence[nn.Module],
    silent: Sequence[nn.Module] = (),
) -> tuple[torch.Tensor, dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]]:
    """A layer's output, and what each of these modules read and put out, in the order they ran.

    A module that runs more than once, or puts out no tensor, is left out.
    """
    caught: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
    runs: list[nn.Module] = []
    both = list(dict.fromkeys((*modules, *silent)))

    def catch(i: int, run: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = run(x, *args, **kwargs)
        tensor = hidden_of(output)
        runs.append(both[i])
        if isinstance(tensor, torch.Tensor):
            caught[both[i]] = (x, tensor)
        if both[i] not in silent:
            return output
        return (torch.zeros_like(tensor), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(tensor)

    args, kwargs = call
    with intercepted(both, catch):
        out = hidden_of(layer(before, *args, **kwargs))
    return out, {module: pair for module, pair in caught.items() if module in modules and runs.count(module) == 1}


def _same(a: torch.Tensor, b: torch.Tensor, part: torch.Tensor, stream: torch.Tensor) -> bool:
    """Equal up to what float32 rounds away in computing the part, and in adding it to the stream."""
    bound = 1e-4 * part.abs().max() + 8 * torch.finfo(torch.float32).eps * stream.abs()
    return bool(((a - b).abs() <= bound).all())


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or GPT-2's Conv1D, which is the same with a transposed weight."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _width(module: Any) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.nf


def output_dim(module: nn.Module) -> int:
    """nn.Linear holds [out, in] and computes x W'; Conv1D holds [in, out] and computes x W."""
    return 0 if isinstance(module, nn.Linear) else 1


def read_widths(layers: nn.Module, hidden: int) -> tuple[int, int]:
    """What a fold would solve anew from, told from the modules alone: what the output projections read.

    Attention's and MLP's are each the last linear module of its part that puts out the hidden width. Experts are no
    linear modules; of what they put out, and of what is too wide, D numbers are read.
    """

    def of(layer: nn.Module) -> tuple[int, int]:
        read: dict[str, int] = {}
        modules: list[tuple[str, Any]] = [(n, m) for n, m in layer.named_modules() if is_linear(m)]
        for name, module in modules:
            if module.weight.shape[output_dim(module)] == hidden:
                width = module.weight.numel() // hidden
                read[name.rpartition(".")[0]] = width if width <= WIDEST else hidden
        widths = sorted([*read.values(), *[hidden] * (2 - len(read))])
        return widths[0], widths[-1]

    return max(map(of, layers.children()), key=sum)
