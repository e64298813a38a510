"""Adapters on the Hugging Face Hub: downloaded by the name of a repository, and uploaded."""

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from lora_kernels.adapters.formats.contents import CONFIG, DOWNLOADED, candidates
from lora_kernels.adapters.save import save_adapter
from lora_kernels.distributed import rank_of
from lora_kernels.foreign import importing

__all__ = ["is_name", "path_of", "push_to_hub"]

_NAME = re.compile(r"(\w[\w.-]*)/\w[\w.-]*", re.ASCII)


def is_name(source: str | os.PathLike) -> bool:
    """Whether source is a name on the Hub.

    That is a string OWNER/NAME that is no path here, as long as there is no directory OWNER.
    """
    match = _NAME.fullmatch(source) if isinstance(source, str) else None
    return match is not None and not (Path(source).exists() or Path(match[1]).is_dir())


def path_of(
    source: str | os.PathLike,
    place: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """The path of an adapter: source, or where its download is if source is a name on the Hub.

    adapter_config.json stands for its directory.
    place: what errors begin with. revision, token, cache_dir: as of huggingface_hub.
    Raises: FileNotFoundError for a path that is not there, and if the Hub does not give an adapter
    of this name; ValueError for a revision of a path.
    """
    path = Path(source)
    if not is_name(source):
        if revision is not None:
            raise ValueError(
                f"{place}={str(source)!r} is a path, and revision={revision!r} is for names on the "
                f"Hugging Face Hub"
            )
        if not path.exists():
            raise FileNotFoundError(f"{place}={str(source)!r}: no such file or directory")
        return path.parent if path.name == CONFIG and path.is_file() else path
    missing = f"{place}={source!r}: there is no such path, and the Hugging Face Hub"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{missing} cannot be asked: pip install huggingface_hub") from None
    options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    try:
        copy = snapshot_download(str(source), allow_patterns=list(DOWNLOADED), **options)
        found = Path(str(copy))
    except Exception as error:  # of the network, of the Hub, of what this machine keeps of it
        raise FileNotFoundError(
            f"{missing} does not give it: {_in_a_line(error)} (a private repository needs token=, "
            f"or `hf auth login`; without a network, give the path of a copy)"
        ) from error
    if not (found.is_dir() and candidates(found)):
        raise FileNotFoundError(
            f"{missing}'s repository has no file that adapters are called by; if it holds one by "
            f"another name, download that file and give its path"
        )
    return found


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    modules_to_save: str | Iterable[str] | None = None,
    *,
    adapter: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload LoRA adapter",
) -> str | None:
    """Uploads what save_adapter writes to the Hugging Face Hub; returns the URL of the commit.

    ``load_adapter(model, repo_id)`` loads it, and so does PEFT. A repository that does not exist is
    made, private or not; other files in it stay as they are. Of several ranks rank 0 uploads, the
    others return None; all have to call if save_adapter says so.
    repo_id: OWNER/NAME. modules_to_save, adapter: as of save_adapter. token: None takes that of
    `hf auth login`. revision: the branch, which must exist.
    Raises: what save_adapter raises, before anything is made or uploaded; ImportError without
    huggingface_hub; OSError, naming repo_id, if the Hub refuses or cannot be reached.
    """
    with importing("huggingface_hub", "push_to_hub"):
        from huggingface_hub import HfApi
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder, modules_to_save, adapter=adapter)
        rank, _ = rank_of()
        if rank != 0:
            return None
        api = HfApi(token=token)
        try:
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            done = api.upload_folder(
                repo_id=name, folder_path=folder, revision=revision, commit_message=commit_message
            )
        except Exception as error:  # of the network, or of the Hub
            raise OSError(
                f"push_to_hub: repo_id={repo_id!r}: {_in_a_line(error)} (token= or `hf auth login` "
                f"says who you are; save_adapter writes the same files to a directory)"
            ) from error
    return done.commit_url


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
