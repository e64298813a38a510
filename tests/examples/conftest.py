"""The model and the sentences of tiny.py, saved once."""

import pytest

from tests.examples import tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("tiny-bert"))
    tiny.save_model(path)
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "tiny.tsv"
    tiny.save_sentences(path)
    return str(path)
