"""`layercut chat`: a run's dense and pruned model answer the same messages, side by side.

Each keeps its own conversation and writes greedily, one after the other, so that the tokens per second are its own.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from layercut.config.commands import ChatConfig
from layercut.data.chat_templates import open_ended, render_chat
from layercut.errors import ConfigError, ModelError, RunError
from layercut.evaluation.generation import greedy, padding
from layercut.files import is_run
from layercut.models import checkpoints, decoder_stack, loading, placement
from layercut.models.layer_reader import layers_on_disk
from layercut.pipeline.run_folder import models_of
from layercut.report.formatting import printable

if TYPE_CHECKING:
    from rich.console import Console

NEW = "/new"
"""Begins a new chat."""


@dataclass
class Speaker:
    """A model and what it and the user have said."""

    name: str
    loaded: loading.LanguageModel
    said: list[dict[str, str]] = field(default_factory=list)

    def prompt(self, room: int) -> torch.Tensor:
        """Token ids [1, T] of the chat; the oldest messages are left out where no `room` would be left."""
        tokenizer, positions = self.loaded.tokenizer, decoder_stack.positions(self.loaded.model.config)
        while True:
            if tokenizer.chat_template:
                text = render_chat(tokenizer, self.said, prompt=True, today=True)
                ids = tokenizer(text, add_special_tokens=False).input_ids
            else:
                ids = open_ended(tokenizer, "\n".join(message["content"] for message in self.said) + "\n")
            if positions is None or len(ids) + room <= positions:
                return torch.tensor([ids])
            if len(self.said) == 1:
                raise ModelError(
                    f"the message has {len(ids):,} tokens, and {self.name} has {positions:,} positions",
                    "a shorter message, or a smaller --max-new-tokens",
                )
            del self.said[:2]


def chat(run: Path, config: ChatConfig) -> None:
    """Read messages from stdin, print both models' answers."""
    from rich.console import Console

    if not is_run(run):
        raise RunError(f"{run} is no run folder", "layercut compress MODEL --out RUN, then layercut chat RUN")
    models, speakers = models_of(run, "chat", allow_pickle=config.load.allow_pickle), []
    if not (run / "model").is_dir():
        raise RunError(f"the run in {run} is not finished", "give its compress command again, then chat")
    for name, source in models.items():
        checkpoint = checkpoints.resolve(source, allow_pickle=config.load.allow_pickle)
        loaded = placement.load(checkpoint, **asdict(config.load))
        decoder_stack.refuse_on_disk(layers_on_disk(loaded.model))
        speakers.append(Speaker("pruned" if name == "compressed" else name, loaded))
    console = Console(highlight=False)
    while True:
        try:
            line = console.input("[bold]> [/bold]") if sys.stdin.isatty() else input()
            line.encode()  # what a locale without UTF-8 could not read stands in it as surrogates
        except EOFError:
            return
        except UnicodeError:
            raise ConfigError("what came in is not UTF-8", "messages as UTF-8: iconv -t UTF-8 FILE | …") from None
        if line.strip() == NEW:
            for speaker in speakers:
                speaker.said.clear()
        elif line.strip():
            _turn(console, speakers, line.strip(), config.max_new_tokens)


def _turn(console: Console, speakers: list[Speaker], message: str, room: int) -> None:
    """Both answers to a message: in two columns on a terminal, else one below the other."""
    from rich.live import Live
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    texts = dict.fromkeys((speaker.name for speaker in speakers), "")
    speeds = dict.fromkeys(texts, "")

    def columns() -> Table:
        table = Table.grid(expand=True)
        panels = []
        for name, text in texts.items():
            table.add_column(ratio=1)
            lines = "\n".join(map(printable, text.splitlines()))
            panels.append(Panel(Text(lines), title=name, subtitle=speeds[name], title_align="left"))
        table.add_row(*panels)
        return table

    live = Live(get_renderable=columns, console=console, refresh_per_second=8, vertical_overflow="visible")
    with live if console.is_terminal else nullcontext():
        for speaker in speakers:
            speaker.said.append({"role": "user", "content": message})
            begun = time.perf_counter()
            tokens = _answer(speaker, room, texts)
            speeds[speaker.name] = f"{tokens / (time.perf_counter() - begun):.1f} tokens/s"
            speaker.said.append({"role": "assistant", "content": texts[speaker.name]})
            if not console.is_terminal:
                print(f"{speaker.name}: {texts[speaker.name].strip()}", flush=True)


@torch.no_grad()
def _answer(speaker: Speaker, room: int, texts: dict[str, str]) -> int:
    """Write an answer of at most `room` tokens, word by word into `texts`; how many tokens it has."""
    from transformers import TextStreamer

    tokenizer = speaker.loaded.tokenizer

    class Words(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            texts[speaker.name] += text

    words = Words(tokenizer, skip_prompt=True, skip_special_tokens=True)
    found = greedy(speaker.loaded.model, speaker.prompt(room), room, padding(tokenizer), streamer=words)
    return len(found[0])
