"""Options of quantization, of measuring and of what is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from cyclopts import Parameter

from layercut.config.stages import (
    COARSE_BITS,
    MEASURING,
    NEAR_ENOUGH,
    QUANTIZATION,
    RUN,
    AskedBits,
    Bits,
    EmbeddingBits,
    GgufType,
    ModelConfig,
    at_least,
    flat,
    no_negative,
    one_of,
    options,
    rare,
    split_names,
)
from layercut.errors import ConfigError
from layercut.registries import evaluations, quantizers

ALL_BITS = "16,8,6,4,3,2"
"""What --bits auto chooses among unless it is told."""


@options(QUANTIZATION)
@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """In how many bits the weights are stored."""

    bits: AskedBits = 16
    """Bits for each weight of the decoder layers. 16: not quantized. vLLM reads 8 and 4. auto: each matrix, embeddings
    and head too, in the bits of --bits-allowed that keep KL to the model least within --target-size."""
    bits_allowed: Annotated[str, rare] = ALL_BITS
    """What --bits auto chooses among, separated by commas. For vLLM: 8,4 with --embedding-bits 16."""
    quantizer: Annotated[
        str,
        one_of(
            quantizers,
            "gptq: calibrated on the calibration text, column by column. rtn: round to nearest, without text.",
        ),
    ] = "gptq"
    group_size: Annotated[int | None, rare] = None
    """Columns that share a scale. Not given: for each weight the largest of 128, 64 and 32 that divides its columns,
    where all weights have the same the largest that divides all."""
    embedding_bits: Annotated[EmbeddingBits | None, rare] = None
    """Bits of embeddings and head: 8, or the same as --bits, and then in the same groups as all other weights; only
    transformers reads those. Not given, or 16: they stay as they are; with --bits auto not given means chosen too."""

    def __post_init__(self) -> None:
        quantizers.check(self.quantizer, "--quantizer")
        _ = self.allowed
        if self.bits == "auto" and self.embedding_bits not in (None, 16):
            flag = f"--embedding-bits {self.embedding_bits}"
            raise ConfigError(f"--bits auto chooses bits, and {flag} is given", f"leave out {flag}")
        if self.bits == "auto" and self.allowed == (16,):
            raise ConfigError("--bits auto has nothing to choose: --bits-allowed is 16", "--bits-allowed 16,8,4")
        if self.embedding_bits not in (None, 16, 8, self.bits):  # stock transformers cannot load others
            raise ConfigError(
                f"--embedding-bits {self.embedding_bits} beside --bits {self.bits} cannot be loaded by transformers",
                f"give --embedding-bits 8 or {self.bits}",
            )
        if self.group_size is not None:
            at_least("group_size", self.group_size, 8)

    @property
    def rounds(self) -> bool:
        """Whether anything is quantized."""
        return self.bits != 16

    @property
    def how(self) -> list[str]:
        """The flags that are given beside --bits: they say how weights are rounded."""
        plain = QuantizeConfig()
        values = {
            "--quantizer": self.quantizer != plain.quantizer, "--group-size": self.group_size is not None,
            "--embedding-bits": self.embedding_bits is not None, "--bits-allowed": self.bits_allowed != ALL_BITS,
        }  # fmt: skip
        return [flag for flag, is_given in values.items() if is_given]

    @property
    def allowed(self) -> tuple[int, ...]:
        """What `bits` auto chooses among, the most bits first. ConfigError: no such bits."""
        widths = get_args(Bits)
        given = split_names(self.bits_allowed)
        if not given or any(name not in map(str, widths) for name in given):
            raise ConfigError(
                f"--bits-allowed is {self.bits_allowed!r}",
                f"allowed are {', '.join(map(str, widths))}, separated by commas",
            )
        return tuple(width for width in widths if str(width) in given)

    @property
    def zero_points(self) -> bool:
        """Whether every group has a zero point: up to `COARSE_BITS` where all weights that are rounded have as many."""
        same = self.embedding_bits in (None, 16, self.bits)
        return self.bits != "auto" and self.bits <= COARSE_BITS and same

    @property
    def packs_embeddings(self) -> bool:
        """Whether embeddings are packed as the other weights are, and not stored as whole bytes."""
        return self.embedding_bits == self.bits and self.embedding_bits not in (8, 16)

    @property
    def one_width(self) -> bool:
        """Whether all weights must have the same bits and groups, since a loader takes the first group's for all."""
        return self.zero_points or self.packs_embeddings

    def check_allowed(self) -> None:
        """Refuse --bits-allowed where nothing is chosen."""
        if self.bits != "auto" and self.bits_allowed != ALL_BITS:
            raise ConfigError("--bits-allowed is what --bits auto chooses among", "give --bits auto, or leave it out")

    @property
    def small_head(self) -> bool:
        """Whether the head has so few bits that it is calibrated, or may be given them."""
        return self.bits == "auto" or (self.embedding_bits or 16) < NEAR_ENOUGH

    @property
    def small(self) -> bool:
        """Whether any weight has, or may be given, so few bits that scales are fitted to what it does."""
        return self.bits == "auto" or self.bits < NEAR_ENOUGH


@options(QUANTIZATION)
@dataclass(frozen=True, kw_only=True)
class AfterRoundingConfig:
    """What is trained once the weights are rounded."""

    tune_quantized: Literal["auto", "scales", "rounding", "none"] = "auto"
    """Train what was rounded towards what it was before, on the tokens to tune on: the groups' scales and the norms
    (scales), these and the rounding itself (rounding, 28 to 40 bytes a weight), or nothing. auto: scales below 8
    bits, the rounding too where packed weights have 3.5 bits or fewer on average and the device has such memory."""


@options(MEASURING)
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What the result is measured on."""

    eval_data: str = "wikitext2"
    """Held-out text for perplexity, named like --data; wikitext2 is then its test split, c4 its validation split."""
    eval_tokens: int = 32768
    """Tokens to measure perplexity on."""
    eval_window: int | None = None
    """Tokens in a window that perplexity is reported on: windows do not overlap, the first token of each is not
    predicted. Not given: 2048, or as many as the model has positions."""
    speed: bool = True
    """Measure prefill and decode speed, the cache's size and the memory of generation."""

    def __post_init__(self) -> None:
        at_least("eval_tokens", self.eval_tokens, 2)
        if self.eval_window is not None:
            at_least("eval_window", self.eval_window, 8)


@options(MEASURING)
@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Tasks, generated tests and evaluations of packages, run on the dense and on the compressed model."""

    tasks: str = ""
    """Tasks, groups or tags of lm-evaluation-harness, separated by commas: arc_easy,piqa. Not given: none."""
    limit: int | None = None
    """Items of each task, from its first; all where not given."""
    include_path: Annotated[Path | None, rare] = None
    """A folder with lm-eval task files of your own. They may hold Python code, which is run."""
    probes: Annotated[bool, Parameter(negative="")] = False
    """Measure as well what is found of keys hidden in long text and of values in lists as long, up to 1,024 tokens, and
    the damage to tests of each capability, all generated from the tokenizer."""
    evaluations: Annotated[
        str,
        Parameter(
            help="Evaluations that packages bring, by name, separated by commas. Not given: none. Installed: "
            f"{', '.join(evaluations) or 'none'}."
        ),
    ] = ""

    def __post_init__(self) -> None:
        if self.limit is not None:
            at_least("limit", self.limit, 1)
        for name in self.evaluation_names:
            evaluations.check(name, "--evaluations")

    @property
    def names(self) -> list[str]:
        """The tasks, each once, in the order given."""
        return split_names(self.tasks)

    @property
    def evaluation_names(self) -> list[str]:
        """The evaluations, each once, in the order given."""
        return split_names(self.evaluations)


@options(MEASURING)
@dataclass(frozen=True, kw_only=True)
class LongConfig:
    """Long context."""

    long_context: int = 0
    """Measure perplexity by position and the recall of hidden keys up to this many tokens; 0 leaves it out."""

    def __post_init__(self) -> None:
        at_least("long_context", self.long_context, 0)
        if self.long_context == 1:
            raise ConfigError("--long-context 1 has no token to predict", "allowed is 0, for none, or 2 and more")


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder."""

    out: Path | None = None
    """Run folder; runs/NAME where not given. A run that was stopped is resumed there. NAME.gguf: the file to write; the
    run folder is then NAME.gguf-run."""
    force: Annotated[bool, Parameter(negative="")] = False
    """Run finished stages again, also where a finished run of other settings, text, model or code is there, which is
    then replaced."""
    config: Path | None = None
    """A YAML file that fills the flags not given; its keys are the flags' names, with underscores. Of the file of
    a compress run, the other commands take the keys they know."""


@options(RUN)
@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """In which file format the result is written."""

    format: Literal["auto", "gguf", "safetensors"] = "auto"
    """safetensors: a checkpoint folder for transformers. gguf: a file for llama.cpp; of a .gguf file, with the bytes of
    all that healing left alone. auto: gguf where MODEL is one or --out is named so, else safetensors."""
    gguf_type: GgufType | None = None
    """Number format of what is written in a GGUF file. Of a .gguf file, what healing changed is in the next finer
    format than it had, as Q5_1 for Q4_1 (finer; not given, unless --target-size is), in the format that it had (same)
    or in that of f32 to q4_0. Of a folder q8_0 where not given. q6_k to iq1_s: all weights, by llama.cpp with an
    importance matrix (extra gguf)."""


@flat
@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is logged on stderr while a command runs."""

    quiet: Annotated[bool, Parameter(negative="")] = False
    """Log nothing but warnings and errors."""


@options(MEASURING)
@dataclass(frozen=True, kw_only=True)
class PerplexityConfig:
    """Measuring alone."""

    load: ModelConfig = field(default_factory=ModelConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    eval_data: str | None = None
    """Held-out text for perplexity, named like --data; wikitext2 is its test split. Not given: wikitext2, or no text
    where --tasks, --evaluations or --probes is given."""
    eval_tokens: int = 32768
    """Tokens to measure perplexity on."""
    eval_window: Annotated[int | None, Parameter(alias="--window")] = None
    """Tokens in a window: windows do not overlap, the first token of each is not predicted. Not given: 2048, or as
    many as the model has positions."""
    seed: int = 0
    """Seed of the evaluations and of --probes, and of the text where --eval-data is self."""
    config: Annotated[Path | None, Parameter(group=RUN)] = None
    """A YAML file that fills the flags not given; its keys are the flags' names, with underscores. Of the file of
    a compress run, the other commands take the keys they know."""
    json: Annotated[bool, no_negative] = False
    """Print everything as one JSON object on stdout instead of lines."""

    def __post_init__(self) -> None:
        EvaluateConfig(eval_tokens=self.eval_tokens, eval_window=self.eval_window)
