"""`--time`: this machine is measured on one layer of the model, and the run takes the most tokens that end in time.

What was decided stands in the run's config.yaml, and a resumed run takes it from there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from layercut.config.commands import CompressConfig, flattened
from layercut.distributed import processes
from layercut.errors import ConfigError, LayercutError
from layercut.models import checkpoints, loading
from layercut.pipeline.resolve_options import Stage, default_folder, with_defaults, with_windows
from layercut.pipeline.run_folder import ELSEWHERE
from layercut.plan import Planner
from layercut.plan.time_budget import ON_ACCELERATOR, describe_fitted, fitted
from layercut.progress import say


def in_time(model: str, config: CompressConfig, until: Stage = "report") -> CompressConfig:
    """The config with the tokens and the effort that fit its time; as it is where it names no time and runs on a CPU.

    ConfigError: the time is too short, or what the run takes cannot be planned.
    """
    heal = config.heal
    config.check()
    device = loading.pick_device(config.load.device)
    if until == "search" or (heal.time is None and (heal.tune_tokens is not None or device.type == "cpu")):
        return config
    asked = replace(config, heal=replace(heal, time=heal.time or ON_ACCELERATOR))

    def decide() -> dict[str, Any] | None:
        checkpoint = checkpoints.resolve(model, allow_pickle=config.load.allow_pickle)
        architecture = loading.load_config(checkpoint, trust_remote_code=config.load.trust_remote_code)
        filled = with_windows(with_defaults(asked), architecture)
        given = {"tune_tokens": heal.tune_tokens, "effort": config.search.effort}
        if (before := decided(model, filled, [name for name, value in given.items() if value is None])) is not None:
            return before
        try:
            planner = Planner.of(filled, checkpoint, architecture)
            seconds = planner.seconds(asked, device, until)
        except LayercutError as error:  # of --max-loss, or a class that cannot be built without its own code
            if heal.time is None:
                return None
            raise ConfigError(
                f"--time cannot be planned: {error.message}", "give --tune-tokens in its place"
            ) from error
        found = fitted(asked, seconds)
        say("time", describe_fitted(found, seconds(found)))
        return {"tune_tokens": found.heal.tokens, "effort": found.search.effort}

    if (found := processes.on_main(decide)) is None:
        return config
    search, tuned = replace(asked.search, effort=found["effort"]), replace(asked.heal, tune_tokens=found["tune_tokens"])
    return replace(asked, search=search, heal=tuned)


def decided(model: str, asked: CompressConfig, left_open: list[str]) -> dict[str, Any] | None:
    """What the run's folder says was decided for the same command; None where there is no such run.

    asked: with windows filled in, as a run's config.yaml has them. left_open: options that the command does not give.
    """
    folder = asked.run.folder or default_folder(model)
    try:
        before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    now = yaml.safe_load(yaml.safe_dump({"model": model, **flattened(asked)}))
    same = [key for key in now if key not in (*ELSEWHERE, *left_open)]
    if asked.run.force or not isinstance(before, dict) or any(before.get(key) != now[key] for key in same):
        return None
    return {key: before[key] for key in ("tune_tokens", "effort")}
