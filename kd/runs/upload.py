"""Upload of a trained student to the Hub. The token is that of the environment (HF_TOKEN) or of `hf auth login`."""

from __future__ import annotations

import shlex

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from kd.errors import UserError, first_line
from kd.runs.run import Run

LOGIN = "type hf auth login, or set HF_TOKEN to a token that may write"


def repository(name: str) -> str:
    """Return the whole name of a repository, OWNER/NAME, that this login may write to; raise UserError if it may not.

    A name without an owner is one of the login's own.
    """
    from huggingface_hub import HfApi

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        need, hint = "OWNER/NAME, or NAME", "type e.g. push_to_hub=my-student"
        raise UserError(option="push_to_hub", got=name, why=first_line(error), need=need, hint=hint) from None
    try:
        account = HfApi().whoami()
    except Exception as error:  # no token, no network, a token that expired
        why = f"the Hub accepts no login: {type(error).__name__}: {first_line(error)}"
        raise UserError(option="push_to_hub", got=name, why=why, hint=LOGIN) from None
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(option="push_to_hub", got=name, why="this token may only read", hint=LOGIN)
    owner, slash, _ = name.rpartition("/")
    if not slash:
        return f"{account['name']}/{name}"
    owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs", []))]
    if owner not in owners:
        need = f"an owner among {', '.join(owners)}"
        hint = f"type push_to_hub={account['name']}/{name.rpartition('/')[2]}"
        raise UserError(option="push_to_hub", got=name, need=need, hint=hint)
    return name


def upload(run: Run, result: dict, name: str) -> str:
    """Upload the student of a finished run, with its card, and return its URL. A new repository is private.

    Files that are there already are not sent again. Raises UserError with a command that uploads, if this fails.
    """
    from huggingface_hub import HfApi

    run.check(result, "student")
    try:
        api = HfApi()
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=run / "student", commit_message=f"Student of the run {run.name}")
    except Exception as error:
        why = f"the upload failed: {type(error).__name__}: {first_line(error)}. The run is done"
        command = shlex.join(["hf", "upload", name, str(run / "student"), ".", "--private"])
        hint = "type the same command again, or"
        raise UserError(option="push_to_hub", got=name, why=why, hint=hint, commands=[command]) from error
    return str(url)
