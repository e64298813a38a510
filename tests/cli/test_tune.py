"""lora-kernels tune: what it refuses, prints, keeps and removes. What it measures: tests/tuning."""

import json
import subprocess
import sys

import pytest
import torch

from lora_kernels.cli import arguments, main
from lora_kernels.cli.tune import main as tune_command
from lora_kernels.dispatch import cache as caches
from lora_kernels.dispatch import measured
from lora_kernels.tuning import user

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SHAPES = ["--shapes=48x40", "--jobs=1"]


@pytest.fixture(autouse=True)
def own(cache):
    return cache


@pytest.fixture
def tune(monkeypatch, capsys):
    """Runs it: exit code, lines of stdout, stderr. result: what measuring returns or raises."""

    def run(*arguments, result=4):
        def measure(plan, write):
            write("measuring")
            if isinstance(result, BaseException):
                raise result
            return result

        monkeypatch.setattr(user, "tune", measure)
        capsys.readouterr()
        try:
            code = main(["tune", *arguments])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


def refused(result) -> str:
    code, lines, err = result
    assert code == 2
    assert lines == []
    assert err.startswith("lora-kernels")
    assert err.count("\n") == 1
    return err


def test_it_says_what_was_compared_and_where_it_is_kept(tune, device):
    code, lines, err = tune(*SHAPES)
    assert (code, err) == (0, "")
    path = caches.path_of("tuned", device)
    assert lines == ["measuring", f"4 of {4 * 1} products were compared; kept in {path}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes=0"], "--minutes must be more than 0, and 1440 at most, got 0"),
        (["--minutes=-1"], "--minutes must be more than 0, and 1440 at most, got -1"),
        (["--minutes=nan"], "--minutes must be more than 0, and 1440 at most, got nan"),
        (["--minutes=inf"], "--minutes must be more than 0, and 1440 at most, got inf"),
        (["--minutes=soon"], "invalid float value"),
        (["--shapes=48"], "'48' must be KxN"),
        (["--tokens=many"], "--tokens: must be an integer >= 1, got 'many'"),
        (["--tokens=16,0"], "--tokens: must be an integer >= 1, got '0'"),
        (["--ranks=-1"], "--ranks: must be an integer >= 1, got '-1'"),
        (["--dropout=0,1"], "--dropout: must be in [0, 1), got '1'"),
        (["--dropout=nan"], "--dropout: must be in [0, 1), got 'nan'"),
        (["--jobs=0"], "--jobs: must be an integer >= 1, got '0'"),
        (["nowhere/at/all"], "nowhere/at/all: no such file or directory"),
        (["/nowhere"], "/nowhere: no such file or directory"),
        (["config.json"], "config.json: no such file or directory"),
        (["no-model/of-anyone"], "no-model/of-anyone: "),
        (["--dtype=float64"], "float64"),
        (["--show", "--clear"], "not allowed with"),
    ],
)
def test_wrong_arguments_are_one_line(tune, arguments, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert message in refused(tune(*arguments))


@without_gpu
def test_without_a_gpu_it_is_one_line(tune, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "there is no GPU" in refused(tune(*SHAPES))
    assert "'48' must be KxN" in refused(tune("--shapes=48"))
    assert "--minutes must be" in refused(tune(*SHAPES, "--minutes=0"))


@without_gpu
def test_without_a_gpu_dry_run_says_what_one_would_measure(tune, own, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    code, lines, err = tune(*SHAPES, "--dry-run", "--ranks=8", "--dropout=0")
    assert (code, err) == (0, "")
    assert lines == [
        "layers: 48 -> 40",
        "tokens (16, 512, 4096), ranks (8,), dropout (0.0,), bfloat16, factors in bfloat16 "
        "and float32, 5 minutes",
        "algorithms: 12 products",
        "there is no GPU here, and tiles are a GPU's",
    ]
    assert not own.exists()
    assert "give a model" in refused(tune("--dry-run"))


@without_gpu
def test_without_a_gpu_show_has_what_is_kept_for_every_one(tune, own, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert tune("--show") == (0, [f"nothing is kept in {own}"], "")
    own.mkdir()
    (own / "tuned-a.json").write_text('{"format": 1, "machine": {},\n "content": {}}\n')
    (own / "tuned-b.json").write_bytes(b'{"format": \xff\x1b[31m')
    (own / "tuned-c.json").write_text("[]")
    (own / "checked-a.json").write_text("{}")
    code, lines, err = tune("--show")
    assert (code, err) == (0, "")
    a, *content, b, of_b, c, of_c = lines
    assert (a, b, c) == tuple(str(own / f"tuned-{name}.json") for name in "abc")
    assert content == ['{"format": 1, "machine": {},', ' "content": {}}']
    removes = "lora-kernels tune --clear --all removes it"
    assert of_b.startswith("it cannot be read: 'utf-8' codec can't decode byte 0xff")
    assert of_b.endswith(f": {removes}")
    assert of_c == f"it is not a file of format 1: {removes}"


def test_a_damaged_file_of_this_gpu_is_one_line(tune, own, device):
    path = caches.path_of("tuned", device)
    own.mkdir()
    path.write_text("{")
    code, lines, err = tune("--show")
    assert code == 0
    assert json.loads("\n".join(lines[1:])) == {"algorithms": [], "tiles": []}
    assert err.startswith(f"lora_kernels: {path} is ignored: it cannot be read: ")
    assert err.endswith(": lora-kernels tune --clear removes it\n")
    assert err.count("\n") == 1


def test_a_file_in_place_of_the_directory_is_one_line(tune, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "file"))
    words = f"{tmp_path / 'file'} is not a directory: set LORA_KERNELS_CACHE to one"
    for _ in range(2):
        for options in (["--show"], ["--clear"], ["--clear", "--all"]):
            assert words in refused(tune(*options))
        monkeypatch.setattr("lora_kernels.tuning.machine.device_of_kernels", lambda: None)


def test_a_directory_that_cannot_be_written_is_one_line(tune, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "file"))
    err = refused(tune(*SHAPES))
    assert "file cannot be written" in err
    assert "set LORA_KERNELS_CACHE to a directory that can" in err


def test_two_processes_do_not_tune_at_once(tune, own):
    code = """
import sys
from lora_kernels.dispatch import cache
with cache.exclusive("tuned"):
    print("inside", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "inside\n"
        assert f"another process is tuning: process {other.pid} holds" in refused(tune(*SHAPES))
    finally:
        other.communicate("")
    assert tune(*SHAPES)[0] == 0


def test_a_gpu_that_disappears_is_one_line_and_1(tune, device):
    error = RuntimeError("CUDA error: device not ready\nCompile with TORCH_USE_CUDA_DSA")
    code, lines, err = tune(*SHAPES, result=error)
    assert code == 1
    assert lines == ["measuring"]
    assert err.count("\n") == 1
    assert "failed (CUDA error: device not ready Compile" in err
    assert f"what was measured is kept in {caches.path_of('tuned', device)}" in err


def test_a_gpu_that_does_not_answer_is_one_line(tune, monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nCompile with ...")

    for module, name in ((caches, "path_of"), (user.cases, "cases"), (measured, "content")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails)
            words = ["--show"] if module is measured else [*SHAPES, "--dry-run"]
            assert "the GPU cannot be used (CUDA error: all" in refused(tune(*words))


def test_a_reader_that_ends_is_no_fault_of_the_directory(monkeypatch):
    def tune(plan, write):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(user, "tune", tune)
    with pytest.raises(BrokenPipeError):  # main() has an exit code for it
        tune_command(arguments.parser().parse_args(["tune", *SHAPES]))


def test_a_file_that_cannot_be_removed_or_read_is_one_line(tune, own, device, monkeypatch):
    path = caches.path_of("tuned", device)
    path.mkdir(parents=True)
    for options in (["--clear"], ["--clear", "--all"]):
        assert f"{path}: Is a directory: remove it by hand" in refused(tune(*options))
    monkeypatch.setattr("lora_kernels.tuning.machine.device_of_kernels", lambda: None)
    err = refused(tune("--show"))
    assert f"{path}: Is a directory: lora-kernels tune --clear --all removes it" in err


def test_an_interrupt_is_one_line_and_130(tune):
    code, _, err = tune(*SHAPES, result=KeyboardInterrupt())
    assert code == 130
    assert err.startswith("lora-kernels tune: stopped; what was measured is kept in")
    assert err.count("\n") == 1


def test_dry_run_measures_nothing(tune, own, device):
    code, lines, _ = tune(*SHAPES, "--dry-run", "--tokens=16,512", "--ranks=8")
    assert code == 0
    assert lines[0] == "layers: 48 -> 40"
    assert lines[1].startswith("tokens (16, 512), ranks (8,), dropout (0.0, 0.1), ")
    assert lines[2].startswith("tiles: ")
    assert lines[3] == "algorithms: 8 products"
    assert lines[4] == f"results go to {caches.path_of('tuned', device)}"
    assert not own.exists()


def test_a_model_gives_the_layers(tune, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1,
                vocab_size=9).save_pretrained(tmp_path / "model")  # fmt: skip
    _, lines, _ = tune(str(tmp_path / "model"), "--dry-run")
    assert lines[0] == "layers: 32 -> 32, 32 -> 48, 48 -> 32"


def test_show_and_clear(tune, device, own):
    _, lines, _ = tune("--show")
    assert lines[0] == str(caches.path_of("tuned", device))
    assert json.loads("\n".join(lines[1:])) == {"algorithms": [], "tiles": []}
    assert tune("--clear") == (0, ["there was nothing to remove"], "")
    measured.add(device, tiles=[{"kernel": "shrink"}])
    _, lines, _ = tune("--show")
    assert json.loads("\n".join(lines[1:]))["tiles"] == [{"kernel": "shrink"}]
    assert tune("--clear") == (0, [f"removed {lines[0]}"], "")
    assert json.loads("\n".join(tune("--show")[1][1:]))["tiles"] == []


def test_clear_leaves_what_other_gpus_have_measured(tune, device, own, monkeypatch):
    measured.add(device, tiles=[{"kernel": "shrink"}])
    its, other = caches.path_of("tuned", device), own / "tuned-another-gpu.json"
    other.write_text("{}")
    assert "--all goes with --clear" in refused(tune("--all"))
    assert tune("--clear") == (0, [f"removed {its}"], "")
    assert other.exists()
    assert tune("--clear") == (0, ["there was nothing to remove"], "")
    with monkeypatch.context() as patch:
        patch.setattr("lora_kernels.tuning.machine.device_of_kernels", lambda: None)
        assert "--clear --all removes those of every GPU" in refused(tune("--clear"))
        assert other.exists()
        assert tune("--clear", "--all") == (0, [f"removed {other}"], "")
    assert not other.exists()


@without_gpu
def test_a_run_in_the_interpreter_is_read_by_the_next_process(own):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=False
        )

    done = run("-m", "lora_kernels", "tune", "--minutes=0.02", "--jobs=1", "--dropout=0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " of 2 products were compared" in done.stdout
    code = """
import torch
from lora_kernels.dispatch.algorithm import choose, GemmShape
print(choose(GemmShape(32, 40, 48, 16, torch.float32, torch.device("cpu"))).reason)
"""
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.environ['LORA_KERNELS_PLAN'] = 'auto'\n{code}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "measured on this GPU\n", done.stderr
