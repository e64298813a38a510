"""python -m bench.convert: an adapter of 500 MB from PEFT's directory to each format, and back.

Beside each conversion, a plain copy of the same file is timed. Every one runs in a process of its
own, interleaved, and the median of the rounds is printed: bytes per second over the copy's, and the
largest memory of the process, over the file's size and over what it has before it starts.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

__all__ = ["main"]

CONFIG = {
    "model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
    "head_dim": 128,
}  # fmt: skip
SIZES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024), "mlp.gate_proj": (4096, 14336),
    "mlp.up_proj": (4096, 14336), "mlp.down_proj": (14336, 4096),
}  # fmt: skip
SUFFIXES = {"gguf": ".gguf", "kohya": ".safetensors", "loralib": ".pt"}


def make(folder: Path, megabytes: int) -> None:
    """PEFT's directory of a Llama's adapter of about so many megabytes."""
    import torch

    from lora_kernels.adapters.formats import peft
    from lora_kernels.adapters.formats.adapter import Adapter, AdapterLayer, BaseModule
    from lora_kernels.model.targets import LayerSpec

    layers, numbers = {}, sum(k + n for k, n in SIZES.values()) * 32
    r = max(1, round(megabytes * 1e6 / 4 / numbers))
    for i in range(32):
        for name, (k, n) in SIZES.items():
            path = f"model.layers.{i}.{name}"
            spec, base = LayerSpec(r, 2 * r, 2.0), BaseModule("linear", k, n)
            layers[path] = AdapterLayer(path, base, spec, torch.randn(r, k), torch.randn(n, r))
    peft.write(Adapter(layers, {}, "none", [], sorted(layers)), folder)


def child(source: str, destination: str, options: list[str]) -> None:
    """Makes an adapter, copies, or converts; prints seconds and memory in bytes."""
    if source == "make":  # in a process of its own: others would inherit its peak
        make(Path(destination), int(options[0]))
        return
    if options:
        from lora_kernels.cli import main as command
        from lora_kernels.cli.convert import convert  # noqa: F401  imported before the time starts
    before, start = _peak(), time.perf_counter()
    if options:
        assert command(["convert", source, destination, *options]) == 0, (source, options)
    else:
        shutil.copyfile(source, destination, follow_symlinks=True)
    print(json.dumps([time.perf_counter() - start, _peak(), before]))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _run(*arguments: object) -> tuple[float, float, float]:
    command = [sys.executable, "-m", "bench.convert", "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return tuple(json.loads((done.stdout.splitlines() or ["[]"])[-1]))


def _file(path: Path) -> Path:
    """The file of weights at path."""
    return max(path.iterdir(), key=lambda f: f.stat().st_size) if path.is_dir() else path


def _gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each format."""
    parser = argparse.ArgumentParser(prog="python -m bench.convert", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--formats", default="", metavar="NAME,...", help="(default: all)")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(*options.child[:2], options.child[2:])
        return
    from lora_kernels.adapters.formats import FORMATS

    names = options.formats.split(",") if options.formats else list(FORMATS)
    names = [name for name in names if name != "adapterhub"]  # has no gate_proj
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _run("make", folder / "peft", options.megabytes)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        size = _file(folder / "peft").stat().st_size
        print(
            f"{size / 1e6:.0f} MB; peak: of the process, and beyond what it had before, over that"
        )
        print("from       to         copy MB/s  convert MB/s  share  peak  beyond")
        for name in names:
            other = folder / f"other{SUFFIXES.get(name, '')}"
            back = ["--to", name] if name == "peft" else ["--to", "peft"]
            legs = [("peft", folder / "peft", name, other, ["--to", name])]
            if name != "peft":
                legs.append((name, other, "peft", folder / "back", back))
            for start, source, end, destination, flags in legs:
                hints = ["--base", folder / "config.json", *flags]
                rates, copies, peaks, rises = [], [], [], []
                for _ in range(options.rounds):
                    if destination.exists():
                        _gone(destination)
                    _run(_file(source), folder / "copy")
                    os.sync()
                    copies.append(size / _run(_file(source), folder / "copy")[0])
                    os.sync()
                    seconds, peak, before = _run(source, destination, *hints)
                    os.sync()
                    rates.append(size / seconds)
                    peaks.append(peak / size)
                    rises.append((peak - before) / size)
                copy, rate = statistics.median(copies), statistics.median(rates)
                print(
                    f"{start:10} {end:10} {copy / 1e6:9.0f} {rate / 1e6:13.0f} {rate / copy:6.2f} "
                    f"{max(peaks):5.2f} {max(rises):7.2f}",
                    flush=True,
                )
            for path in (other, folder / "back"):
                if path.exists():
                    _gone(path)


if __name__ == "__main__":
    main()
