"""Files are replaced by complete ones, or not at all."""

import errno
import os

import pytest

from lora_kernels.adapters.files import replacing


@pytest.mark.parametrize("folder", ["new/inner", "."])
def test_an_error_at_the_second_file_takes_the_first_away(folder, tmp_path, monkeypatch):
    real = os.replace

    def full(source, destination):
        if destination.name == "b":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, destination)

    def write():
        with replacing(tmp_path / folder, "ab") as scratch:
            for name in "ab":
                (scratch / name).write_text(name)

    (tmp_path / "kept").write_text("old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
