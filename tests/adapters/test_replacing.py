"""Files are replaced by complete ones, or not at all."""

import errno
import os

import pytest
from torch import nn

import lora_kernels as lora
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
    with pytest.raises(OSError, match="cannot be written: No space") as error:
        write()
    assert str(error.value).startswith(str(tmp_path / folder))
    assert error.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_save_adapter_names_the_directory_that_it_cannot_make(tmp_path):
    (tmp_path / "a_file").write_text("old")
    model = nn.ModuleDict({"lin": lora.LoRALinear(4, 4, r=2)})
    with pytest.raises(OSError, match=r"a_file.new: cannot be written: "):
        lora.save_adapter(model, tmp_path / "a_file/new")
