"""lora-kernels report: the rows of lora_kernels.report, for a model that has no weights."""

import json

import pytest

import lora_kernels
from tests.tiny_models import tiny_llama

pytestmark = pytest.mark.usefixtures("unpatched")


@pytest.fixture
def folder(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def said(in_process, capsys):
    """Runs report: exit code, stdout, the last line of stderr."""

    def run(*arguments):
        try:
            code = in_process(["report", *arguments])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code, out, (err.splitlines() or [""])[-1]

    return run


@pytest.mark.parametrize("peft", [False, True])
def test_it_says_what_report_says_of_the_model_itself(folder, said, peft):
    arguments = ["--target-modules", "q_proj,v_proj", "--rank", "3", "--tokens", "7", "--json"]
    code, out, _ = said(folder, *arguments, *["--peft"] * peft)
    assert code == 0
    model = tiny_llama().model
    if peft:
        from peft import LoraConfig, get_peft_model

        lora_kernels.patch_peft()
        model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    else:
        lora_kernels.apply_lora(model, r=3, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    assert json.loads(out) == lora_kernels.report(model, tokens=7).as_dict()


def test_without_options_it_is_a_table_of_every_linear_layer(folder, said):
    code, out, _ = said(f"{folder}/config.json")
    assert code == 0
    model = lora_kernels.apply_lora(tiny_llama().model, r=16, lora_alpha=16)
    assert out == f"{lora_kernels.report(model)}\n"


def test_verbose_is_a_line_for_each_layer_and_dtype_that_of_the_weights(folder, said):
    code, out, _ = said(folder, "--verbose", "--dtype", "bfloat16")
    assert code == 0
    assert "layers.0.self_attn.q_proj" in out
    assert "bfloat16" in out


@pytest.mark.parametrize("peft", [False, True])
def test_modules_that_are_not_there_are_one_line_and_2(folder, said, peft):
    code, out, err = said(folder, "--target-modules", "qproj", *["--peft"] * peft)
    assert (code, out) == (2, "")
    assert err.startswith("lora-kernels: error: report: ")
    assert "qproj" in err


def test_a_folder_that_is_not_there_is_one_line_and_2(tmp_path, said):
    code, _, err = said(f"{tmp_path}/a/b")
    assert code == 2
    assert "a/b: no such file or directory" in err


def test_a_quantised_model_is_refused_because_its_configuration_does_not_make_its_layers(
    tmp_path, said
):
    config = tiny_llama().config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    code, _, err = said(str(tmp_path))
    assert code == 2
    assert "its layers are quantised" in err
    assert "lora_kernels.report(model)" in err


@pytest.mark.parametrize("peft", [False, True])
def test_a_name_of_no_module_beside_others_is_a_warning(folder, said, peft):
    with pytest.warns(Warning, match="match no module, and are ignored: 'foo'"):
        code, out, _ = said(folder, "--target-modules", "q_proj,foo", *["--peft"] * peft)
    assert code == 0
    assert "q_proj" in out
