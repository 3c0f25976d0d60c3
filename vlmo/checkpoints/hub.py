"""Models on the Hugging Face hub: huggingface_hub knows where it is and who one is (`HF_ENDPOINT`, `HF_TOKEN`)."""

from pathlib import Path

from vlmo.errors import VLMoError


def push_folder(folder: Path, repository: str, private: bool | None = None) -> str:
    """Uploads a folder of `save_pretrained` as "owner/name", made where it is not there; returns its address.

    All files come in one commit: where it fails, nothing has changed there.

    Raises:
        VLMoError: if the name is none of the hub's, one may not write there, or it does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="VLMo model")
    except HFValidationError as error:
        raise VLMoError(f"{repository}: is no name on the hub; give OWNER/NAME") from error
    except Exception as error:  # what the hub's HTTP library raises has changed with every major version
        reason, status = reason_of(error), getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            remedy = "log in with `hf auth login`, by a token that may write there"
        elif status == 404:
            remedy = "there is no such owner, or this login may not see it"
        else:
            remedy = "nothing has changed there; push it again"
        raise VLMoError(f"{repository}: cannot be pushed ({reason}); {remedy}") from error
    return str(address)


def reason_of(error: BaseException) -> str:
    """Says in one line what the hub, or the way to it, was in want of."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    under = f": {reason_of(error.__cause__)}" if isinstance(error, RuntimeError) and error.__cause__ else ""
    return " ".join(lines[:2]) + under
