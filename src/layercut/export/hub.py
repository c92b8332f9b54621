"""Uploading to the Hub: a check before long work begins, and the upload at its end.

Uploaded is the finished model, with its card, and nothing else of a run: no text, settings, log or report.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from layercut.errors import ConfigError, LayercutError, first_line
from layercut.progress import bar

LOGIN = "run `hf auth login`, or set HF_TOKEN; a token with write access: https://huggingface.co/settings/tokens"
WEIGHTS = (".safetensors", ".safetensors.index.json")


def check_destination(name: str, *, private: bool = False) -> str:
    """Ask the Hub whose the token is, and whether it may write there, as far as it tells; nothing is written."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        who = HfApi().whoami()
    except HFValidationError as error:
        raise ConfigError(f"{name!r} is no name for a repository: {first_line(error)}", "owner/name, or name") from None
    except LocalTokenNotFoundError:
        raise ConfigError("uploading to the Hub needs a token, and there is none", LOGIN) from None
    except OfflineModeIsEnabled:
        raise ConfigError("uploading to the Hub needs a network, and HF_HUB_OFFLINE is set", "unset it") from None
    except Exception as error:
        raise _refused(error, "the Hub cannot be asked who the token belongs to") from None
    owner, _, short = name.rpartition("/")
    owner, own = owner or who["name"], f"layercut push RUN {who['name']}/NAME"
    roles = {each["name"]: each.get("roleInOrg") for each in who.get("orgs", [])} | {who["name"]: "admin"}
    if owner not in roles:
        raise ConfigError(f"the token is {who['name']}'s, who is no member of {owner!r}", own)
    if roles[owner] == "read":
        raise ConfigError(f"{who['name']} may only read in {owner!r}", own)
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError("the token may only read", LOGIN)
    found = f"{owner}/{short}"
    try:
        public = private and not HfApi().model_info(found, expand=["private"]).private
    except RepositoryNotFoundError:
        return found
    except Exception as error:
        raise _refused(error, f"the Hub cannot be asked about {found}") from None
    if public:
        words = f"{found} is there and public, and --private is given"
        raise ConfigError(words, "name another, or leave out --private")
    return found


def push(
    files: Mapping[str, Path | bytes], repo_id: str, *, private: bool = False, replaces_weights: bool = False
) -> str:
    """Upload files as one commit; the repository is made where there is none."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(library_name="layercut")
    try:
        with bar(f"uploading to {repo_id}", None):
            address = api.create_repo(repo_id, private=private or None, exist_ok=True)
            there = api.list_repo_files(repo_id) if replaces_weights else []
            stale = [name for name in there if name.endswith(WEIGHTS) and name not in files]
            adds = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
            deletes = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale]
            api.create_commit(repo_id, [*deletes, *adds], commit_message="A model made smaller by layercut")
    except Exception as error:
        raise _refused(error, f"{repo_id} could not be uploaded") from error
    return str(address)


def _refused(error: Exception, what: str) -> LayercutError:
    """What to tell the user of an error of huggingface_hub or of the network below it."""
    from huggingface_hub.errors import HfHubHTTPError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status in (401, 403):
        return ConfigError(f"{what}: the token is refused ({status})", LOGIN)
    hint = "try again later" if status else "check the network; HF_ENDPOINT names another Hub"
    return ConfigError(f"{what}: {first_line(error)}", hint)
