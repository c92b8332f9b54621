"""Uploading to the Hub: a check before long work begins, and the upload at its end.

Uploaded is the finished model, with its card, and nothing else of a run: no text, settings, log or report.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layercut.errors import ConfigError, LayercutError, first_line
from layercut.progress import bar

LOGIN = "run `hf auth login`, or set HF_TOKEN; a token with write access: https://huggingface.co/settings/tokens"
WEIGHTS = (".safetensors", ".safetensors.index.json")


def check_destination(name: str, *, private: bool = False) -> str:
    """Ask the Hub whose the token is, and whether it may write there; nothing is written."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
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
    owner = owner or who["name"]
    _check_owner(owner, who)
    found = f"{owner}/{short}"
    if private:
        _check_not_public(found)
    return found


def _check_owner(owner: str, who: Mapping[str, Any]) -> None:
    """Refuse what the token cannot write to, as far as the Hub tells it in advance."""
    roles = {each["name"]: each.get("roleInOrg") for each in who.get("orgs", [])} | {who["name"]: "admin"}
    if owner not in roles:
        raise ConfigError(
            f"the token is {who['name']}'s, who is no member of {owner!r}", f"--push-to-hub {who['name']}/NAME"
        )
    if roles[owner] == "read":
        raise ConfigError(f"{who['name']} may only read in {owner!r}", f"--push-to-hub {who['name']}/NAME")
    token = who.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise ConfigError("the token may only read", LOGIN)


def _check_not_public(repo_id: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        is_private = HfApi().model_info(repo_id, expand=["private"]).private
    except RepositoryNotFoundError:
        return
    except Exception as error:
        raise _refused(error, f"the Hub cannot be asked about {repo_id}") from None
    if not is_private:
        raise ConfigError(
            f"{repo_id} is there and public, and --private is given", "name another, or leave out --private"
        )


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


def folder_files(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint folder by their path in it, hidden ones left out."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    inside = {str(path.relative_to(folder)): path for path in found}
    return {name: path for name, path in inside.items() if not any(part.startswith(".") for part in Path(name).parts)}


def _refused(error: Exception, what: str) -> LayercutError:
    """What to tell the user of an error of huggingface_hub or of the network below it."""
    from huggingface_hub.errors import HfHubHTTPError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status in (401, 403):
        return ConfigError(f"{what}: the token is refused ({status})", LOGIN)
    hint = "try again later" if status else "check the network; HF_ENDPOINT names another Hub"
    return ConfigError(f"{what}: {first_line(error)}", hint)
