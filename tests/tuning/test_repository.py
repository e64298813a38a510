"""Figures are kept of committed code only."""

import subprocess

import pytest

from lora_kernels.tuning import repository


def git(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_commit_of_a_clean_tree_names_the_result_file(checkout):
    commit = repository.commit(checkout)
    assert len(commit) == 40
    path = repository.result_file(commit, "NVIDIA H200", checkout)
    assert path == checkout / "bench/results/nvidia-h200" / f"{commit[:10]}.json"
    assert repository.result_file(commit, None, checkout).parent.name == "cpu"


@pytest.mark.parametrize("name", ["code.py", "new.py"])
def test_commit_is_dirty_if_a_file_is_changed_or_new(checkout, name):
    (checkout / name).write_text("x = 2\n")
    commit = repository.commit(checkout)
    assert commit.endswith(repository.DIRTY)
    with pytest.raises(repository.DirtyTreeError, match="committed code only"):
        repository.result_file(commit, None, checkout)


@pytest.mark.parametrize("git_is_there", [True, False], ids=["no repository", "no git"])
def test_result_file_is_refused_for_files_without_a_commit(tmp_path, git_is_there, monkeypatch):
    if not git_is_there:
        (tmp_path / ".git").mkdir()
        monkeypatch.setenv("PATH", str(tmp_path))
    commit = repository.commit(tmp_path)
    assert commit == "unversioned-dirty"
    with pytest.raises(
        repository.DirtyTreeError, match=r"unversioned-dirty: .*committed code only"
    ):
        repository.result_file(commit, None, tmp_path)


def test_commit_is_clean_whatever_the_results_are(checkout):
    results = checkout / "bench/results/cpu"
    results.mkdir(parents=True)
    (results / "0.json").write_text("[]")
    assert not repository.commit(checkout).endswith(repository.DIRTY)


def test_commit_of_an_installed_package_is_not_that_of_the_repository_around_it(checkout):
    installed = checkout / "venv/site-packages"
    installed.mkdir(parents=True)
    assert repository.commit(installed) == "unversioned-dirty"
