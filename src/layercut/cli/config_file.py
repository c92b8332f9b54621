"""The flags that --config FILE fills, where the command line does not give them."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import cyclopts

from layercut.config.commands import joined_names
from layercut.errors import ConfigError


def take_config(app: cyclopts.App, arguments: list[str]) -> set[str]:
    """Let --config FILE fill the flags that are not given; the flags that are given, here or there."""
    app.config = ()
    given: dict[str, Any] = {}
    file = _value(arguments, "--config")
    if file is not None:
        if not file or file.startswith("-"):
            raise ConfigError("--config names no file", "give a YAML file: --config run.yaml")
        given = _for_command(app, _yaml(Path(file)), arguments[0])
        app.config = (cyclopts.config.Dict(given, source=file, use_commands_as_keys=False),)
    flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    return flags | {f"--{key.replace('_', '-')}" for key in given}


def _for_command(app: cyclopts.App, given: dict[str, Any], command: str) -> dict[str, Any]:
    """Without the keys of a compress run's file that this command does not take, so that the file fits all of them.

    A key that no compress run has either is left, and refused with the flags.
    """
    if command.startswith("-") or command not in app:
        return given
    first, own = _keys_of(app, command)
    of_compress, all_of_compress = _keys_of(app, "compress")
    own -= of_compress - first  # another name here of what is something else there: --window of evaluate
    return {key: value for key, value in given.items() if key in own or key not in all_of_compress}


def _keys_of(app: cyclopts.App, command: str) -> tuple[set[str], set[str]]:
    """The keys of a command's flags in a file: by their first names, and by all."""
    arguments = app[command].assemble_argument_collection()
    named = [[name.strip("-").replace("-", "_") for name in argument.names] for argument in arguments]
    return {names[0] for names in named if names}, {name for names in named for name in names}


def _value(arguments: list[str], flag: str) -> str | None:
    """The value of a flag; None where it is not given."""
    found = None
    for argument, following in pairwise([*arguments, ""]):
        if argument == flag:
            found = following
        elif argument.startswith(f"{flag}="):
            found = argument.partition("=")[2]
    return found


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 without its numbers of base 60 and its words for true and false but these two.

        Else 13:19 would be read as 799, and a name such as `off` as false.
        """

    Loader.yaml_implicit_resolvers = {
        first: [
            (tag, form) for tag, form in known
            if not (tag.endswith(":int") and first in "123456789") and not tag.endswith(":bool")
        ]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }  # fmt: skip
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?i:true|false)$"), list("tTfF"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[1-9][0-9_]*$"), list("123456789"))
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}", "give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"--config {path} is not YAML: {words}", "correct the file") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} does not hold keys", "one flag a line, such as  ratio: 0.2")
    # a resolved config.yaml also lists what was left at None
    return {key: joined_names(key, value) for key, value in content.items() if value is not None}
