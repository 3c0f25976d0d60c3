"""Models on the Hugging Face hub: huggingface_hub knows where it is and who one is (`HF_ENDPOINT`, `HF_TOKEN`)."""

from pathlib import Path

from vlmo.errors import VLMoError


def push_folder(folder: Path, repository: str, private: bool | None = None) -> str:
    """Uploads a folder of `save_pretrained` as "owner/name", made where it is not there; returns its address.

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
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise VLMoError(f"{repository}: cannot be pushed ({reason}); log in with `hf auth login`") from error
    return str(address)
