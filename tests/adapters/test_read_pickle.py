"""Files of torch.save whose tensors are not dense, or larger than the file, are refused."""

import zipfile

import pytest
import torch

from lora_kernels.adapters import files
from lora_kernels.adapters.files import read_pickle

OTHERS = {
    "sparse": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "meta": lambda: torch.empty(4, 4, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(4)] * 4, layout=torch.jagged),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore")  # torch: beta
def test_tensors_that_are_not_dense_are_refused_by_name(name, tmp_path):
    state = {"a.lora_A": OTHERS[name](), "a.lora_B": torch.ones(4, 4)}
    torch.save({"model": state}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: a\.lora_A: must be a dense tensor"):
        read_pickle(tmp_path / "x.pt")


def test_a_view_that_is_larger_than_the_file_is_refused(tmp_path):
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: a: \[1099511627776\] is larger than the file"):
        read_pickle(tmp_path / "x.pt")
    small = torch.ones(1).expand(8)
    torch.save({"a": small}, tmp_path / "y.pt")
    assert torch.equal(read_pickle(tmp_path / "y.pt")["a"], small)


def test_records_that_are_compressed_are_refused(tmp_path):
    torch.save({"a": torch.zeros(8)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as stored,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for info in stored.infolist():
            deflated.writestr(info.filename, stored.read(info))
    with pytest.raises(ValueError, match=r"y\.pt: .*data\.pkl is compressed"):
        read_pickle(tmp_path / "y.pt")


def test_containers_that_hold_themselves_are_walked_once(tmp_path):
    state = {"a": torch.ones(2)}
    state["self"] = state
    torch.save(state, tmp_path / "x.pt")
    assert torch.equal(read_pickle(tmp_path / "x.pt")["self"]["a"], torch.ones(2))


@pytest.mark.parametrize("read", [files.read_json, read_pickle, files.read_safetensors])
def test_an_empty_file_is_told_so(tmp_path, read):
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.pt: is empty"):
        read(tmp_path / "x.pt")


def test_numbers_of_eight_bits_are_checked(tmp_path):
    from lora_kernels.adapters.mapped import is_finite

    values = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    assert is_finite(values[:1])
    assert not is_finite(values)
