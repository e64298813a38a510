"""Options that contradict an adapter's files, or that nothing in them takes, are refused."""

import pytest

from lora_kernels.adapters.agreement import check_agrees
from lora_kernels.adapters.formats import FORMATS, locate
from lora_kernels.adapters.formats.adapter import Hints
from tests.adapters.formats import made

ATTENTION = {p: s for p, s in made.LINEARS.items() if p.endswith(("q_proj", "k_proj", "v_proj"))}
FILES = {"gguf": "a.gguf", "kohya": "a.safetensors", "loralib": "a.pt"}


@pytest.fixture(params=FORMATS)
def written(request, tmp_path, seed):
    """Format and file of an adapter whose files tell lora_alpha 6."""
    if request.param == "gguf":
        pytest.importorskip("gguf")
    path = tmp_path / FILES.get(request.param, "a")
    FORMATS[request.param].write(made.adapter(ATTENTION), path, made.HINTS)
    return request.param, locate(path)[1]


def read(written, **hints):
    name, file = written
    return FORMATS[name].read(file, Hints(base=made.BASE, **hints))


def test_every_format_takes_what_its_files_tell(written):
    assert len(read(written, lora_alpha=6.0).layers) == 6


@pytest.mark.parametrize(
    ("hints", "named"),
    [
        ({"lora_alpha": 32.0}, "32 was given: leave it out"),
        ({"embedding": ("q_proj",)}, "says kind=linear, and embedding was given: leave it out"),
        ({"out_splits": (("q_proj", (8, 8)),)}, "says out_splits=none, and "),
        ({"out_splits": (("", (8, 8)),)}, "--out-splits: the file has no MergedLinear: leave it"),
        ({"modules_to_save": ("q_proj",)}, "--modules-to-save: the file says none, and q_proj was"),
    ],
)
def test_every_format_refuses_what_its_files_contradict(written, hints, named):
    if written[0] == "loralib" and "modules_to_save" in hints:
        named = "--modules-to-save: no module in the file is called 'q_proj'"
    if written[0] == "mlx" and "embedding" in hints:
        pytest.skip("MLX's file leaves it to the user")
    with pytest.raises(ValueError, match=r"leave it out|no module in the file") as error:
        read(written, **hints)
    assert named in str(error.value)
    assert str(written[1].parent) in str(error.value)


@pytest.mark.parametrize("name", ["adapterhub", "mlx", "peft", "loralib", "litgpt"])
def test_formats_that_keep_dropout_refuse_another_one(tmp_path, name, seed):
    path = tmp_path / FILES.get(name, "a")
    FORMATS[name].write(made.adapter(ATTENTION, lora_dropout=0.25), path, made.HINTS)
    _, file = locate(path)
    assert len(FORMATS[name].read(file, Hints(base=made.BASE, lora_dropout=0.25)).layers) == 6
    with pytest.raises(ValueError, match=r"lora_dropout=0.25, and 0.5 was given: leave it out"):
        FORMATS[name].read(file, Hints(base=made.BASE, lora_dropout=0.5))


def test_litgpt_refuses_other_projections_than_its_file_beside(tmp_path, seed):
    FORMATS["litgpt"].write(made.adapter(ATTENTION), tmp_path / "a", made.HINTS)
    _, file = locate(tmp_path / "a")
    three = Hints(base=made.BASE, enable_lora=(("", (1, 1, 1)),))
    assert len(FORMATS["litgpt"].read(file, three).layers) == 6
    two = Hints(base=made.BASE, enable_lora=(("", (1, 0, 1)),))
    with pytest.raises(ValueError, match=r"enable_lora=\[1, 1, 1\], and \[1, 0, 1\] was given"):
        FORMATS["litgpt"].read(file, two)
    elsewhere = Hints(base=made.BASE, enable_lora=(("proj", (1, 1, 1)),))
    with pytest.raises(ValueError, match="no qkv in it is called 'proj'"):
        FORMATS["litgpt"].read(file, elsewhere)


def test_options_that_no_layer_takes_are_refused():
    embeddings = made.adapter({}, embedding=True)
    for hints in (Hints(lora_dropout=0.1), Hints(fan_in_fan_out=True)):
        with pytest.raises(ValueError, match=r"the file has no .*: leave it out"):
            check_agrees(embeddings, hints)
