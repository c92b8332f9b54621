"""Where users extend layercut without editing it: one registry for each kind of part that can be replaced.

    criteria      which layers to remove            --method
    objectives    what healing minimises            --objective
    quantizers    how a weight is rounded           --quantizer
    evaluations   what else to measure              --evaluations
    exporters     into which format to write        layercut export --format

A part is registered by a decorator, or by an entry point of an installed package, which makes it known to the command:

    @layercut.criteria.register("mypackage-middle")         [project.entry-points."layercut.criteria"]
    def middle(runner, tokens, length, **_):                mypackage-middle = "mypackage:middle"
        ...

What a part must look like is documented where it is used: `layer_search/criteria.py`, `models/losses.py`,
`quantization/quantizers.py`, `evaluation/comparison.py`, `export/formats.py`. Nothing is imported before it is asked
for, so that `layercut --help` knows all names and loads none of them.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from layercut.errors import ConfigError

Part = TypeVar("Part")


THIS_PROCESS = uuid.uuid4().hex
"""In the hash of what Python has no source of: it is never taken for what another process had."""
NOT_FOLLOWED = {"layercut", "torch", *sys.stdlib_module_names}
"""Packages whose classes may be bases without that their files count: another version makes no other part."""


def source_digest(part: Any) -> str:
    """Hash of how a function, or an object's class, is written, by which a changed one is run again.

    Of its source, of the whole file that it stands in, whose other functions and constants it may use, and of its
    bases' files; where Python has no source of it, another in every process.
    """
    if isinstance(part, partial):
        said = [source_digest(part.func), repr(part.args), repr(sorted(part.keywords.items()))]
    else:
        of = inspect.unwrap(part) if inspect.isroutine(part) or inspect.isclass(part) else type(part)
        bases = inspect.getmro(of)[1:] if inspect.isclass(of) else ()
        followed = [base for base in bases if base.__module__.partition(".")[0] not in NOT_FOLLOWED]
        said = [each for one in (of, *followed) for each in _written(one)]
    return hashlib.sha256("\0".join(said).encode()).hexdigest()[:16]


def _written(of: Any) -> Iterator[str]:
    """The source of something, and the hash of the file that it stands in; no file of a cell of a notebook."""
    try:
        yield inspect.getsource(of)
    except (OSError, TypeError):
        yield f"{THIS_PROCESS} {id(of)}"
    try:
        yield hashlib.sha256(Path(inspect.getsourcefile(of) or "").read_bytes()).hexdigest()
    except (OSError, TypeError):
        yield ""


@dataclass
class Registry(Generic[Part]):
    """Parts of one kind by name: those of layercut, those registered in this process, those of installed packages."""

    kind: str
    """What one of them is called in an error: "criterion"."""
    group: str
    """The entry points' group: "layercut.criteria"."""
    own: Mapping[str, str] = field(default_factory=dict)
    """layercut's own: name -> "module:attribute"."""
    registered: dict[str, Part] = field(default_factory=dict)
    """Those that `register` has added in this process."""

    def register(self, name: str) -> Callable[[Part], Part]:
        """A decorator that makes a part known under a name, in this process.

        Raises:
            ConfigError: the name belongs to a part of layercut.
        """
        if name in self.own:
            raise ConfigError(f"{name!r} is a {self.kind} of layercut itself", f"prefix it: mypackage-{name}")

        def add(part: Part) -> Part:
            self.registered[name] = part
            return part

        return add

    @cached_property
    def installed(self) -> dict[str, EntryPoint]:
        """Entry points of installed packages, by name; read once, without loading any."""
        return {point.name: point for point in entry_points(group=self.group) if point.name not in self.own}

    def __iter__(self) -> Iterator[str]:
        """All names: layercut's own in their order, then the others sorted."""
        yield from self.own
        yield from sorted({*self.registered, *self.installed})

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self.registered or name in self.installed

    def check(self, name: str, flag: str) -> None:
        """Refuse a name, given to a flag, that no part has."""
        if name in self:
            return
        near = difflib.get_close_matches(str(name), list(self), 1)
        hint = f"did you mean {flag} {near[0]}?" if near else f"a package can add one: entry point group {self.group!r}"
        raise ConfigError(f"{flag} {name!r} is unknown; there are {', '.join(self)}", hint)

    def edition(self, name: str) -> list[str]:
        """By what a part of another package that was edited is known from what it was; nothing of layercut's own."""
        return [] if name in self.own else [source_digest(self.get(name))]

    def get(self, name: str) -> Part:
        """The part of a name, imported now. ConfigError: unknown, or its package cannot be imported."""
        self.check(name, self.kind)
        if name in self.registered:
            return self.registered[name]
        own = self.own.get(name)
        try:
            return (EntryPoint(name, own, self.group) if own else self.installed[name]).load()
        except (ImportError, AttributeError) as error:
            words = f"the {self.kind} {name!r} cannot be imported: {error}"
            raise ConfigError(words, "reinstall the package that brings it") from error


_SEARCH = "layercut.layer_search."
criteria: Registry[Any] = Registry("criterion", "layercut.criteria", {
    "auto": _SEARCH + "fisher:fisher", "fisher": _SEARCH + "fisher:fisher", "clp": _SEARCH + "concave_gate:clp",
    "race": _SEARCH + "race:race", "exhaustive": _SEARCH + "race:exhaustive",
    "random": _SEARCH + "baselines:random_segment", "reverse-order": _SEARCH + "baselines:reverse_order",
    "block-influence": _SEARCH + "baselines:block_influence", "angular": _SEARCH + "baselines:angular",
    "cosine": _SEARCH + "baselines:cosine", "perplexity": _SEARCH + "baselines:perplexity",
    "taylor": _SEARCH + "baselines:taylor", "sleb": _SEARCH + "baselines:sleb",
    "evolution": _SEARCH + "baselines:evolution",
})  # fmt: skip
objectives: Registry[Any] = Registry("objective", "layercut.objectives", {
    "kl": "layercut.models.losses:KL", "next-token": "layercut.models.losses:NextToken",
})  # fmt: skip
quantizers: Registry[Any] = Registry("quantizer", "layercut.quantizers", {
    "gptq": "layercut.quantization.quantizers:Gptq", "rtn": "layercut.quantization.quantizers:RoundToNearest",
})  # fmt: skip
evaluations: Registry[Any] = Registry("evaluation", "layercut.evaluations")
exporters: Registry[Any] = Registry("exporter", "layercut.exporters", {
    "gguf": "layercut.export.formats:gguf", "safetensors": "layercut.export.formats:safetensors",
})  # fmt: skip
