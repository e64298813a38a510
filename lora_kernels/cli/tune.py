"""lora-kernels tune: measures algorithms and tiles on this machine's GPU, and keeps them."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator

import torch

from lora_kernels.checks import dtype_name
from lora_kernels.cli.arguments import DTYPES
from lora_kernels.cli.errors import UsageError, of_files, of_gpu
from lora_kernels.dispatch import cache, measured
from lora_kernels.tuning import machine, model_shapes, user, workers
from lora_kernels.tuning.shapes import Layer
from lora_kernels.tuning.user import Plan

__all__ = ["main"]

_MOST_MINUTES = 1440
_INTERRUPTED = 130
_DTYPES = {name: getattr(torch, name) for name in DTYPES}


def main(options: argparse.Namespace) -> int:
    """Does what the command line asks for: 0; 1 if the GPU failed on the way; 130 after Ctrl-C.

    Without a GPU, --dry-run leaves out tiles, and --show has what is kept for every GPU.
    Raises: UsageError for arguments that are wrong, no GPU to measure or to clear, a directory that
    cannot be written, and another process that tunes.
    """
    if options.all and not options.clear:
        raise UsageError("tune: --all goes with --clear")
    if options.clear:
        print("\n".join(_clear(options.all)) or "there was nothing to remove")
        return 0
    with of_gpu("tune"):
        device = machine.device_of_kernels()
        if options.show:
            with of_files("tune", _removes(device)):
                _require_directory()
                print("\n".join(_every_gpu() if device is None else _this_gpu(device)))
            return 0
        plan = _plan(device or torch.device("cuda"), options)
        if options.dry_run:
            print("\n".join(_dry_run(plan, device)))
            return 0
        if device is None:
            raise UsageError(f"tune: {machine.NO_KERNELS}")
        path = cache.path_of(measured.KIND, device)
    try:
        with cache.exclusive(measured.KIND):
            return _run(plan, path)
    except cache.BusyError as error:
        raise UsageError(f"tune: another process is tuning: {error}") from error
    except BrokenPipeError:  # of stdout
        raise
    except OSError as error:
        raise UsageError(
            f"tune: {cache.directory()} cannot be written ({error.strerror or error}): set "
            f"LORA_KERNELS_CACHE to a directory that can"
        ) from error


def _clear(everything: bool) -> list[str]:
    """Removes what is kept for this GPU, or for all of them, which share a directory."""
    with of_gpu("tune"), of_files("tune", "remove it by hand"):
        _require_directory()
        device = None if everything else machine.device_of_kernels()
        if device is None and not everything:
            raise UsageError(
                "tune: there is no GPU here whose measurements --clear could remove; --clear --all "
                "removes those of every GPU"
            )
        return [f"removed {path}" for path in measured.clear(device)]


def _require_directory() -> None:
    """Raises: UsageError if something else is at the cache directory's place."""
    path = cache.directory()
    if path.exists() and not path.is_dir():
        raise UsageError(f"tune: {path} is not a directory: set LORA_KERNELS_CACHE to one")


def _removes(device: torch.device | None) -> str:
    """What removes what --show shows."""
    return f"lora-kernels tune --clear{' --all' if device is None else ''} removes it"


def _run(plan: Plan, path: os.PathLike) -> int:
    compared = 0

    def write(line: str) -> None:
        print(line, flush=True)

    try:
        compared = user.tune(plan, write)
    except KeyboardInterrupt:
        print(f"lora-kernels tune: stopped; what was measured is kept in {path}", file=sys.stderr)
        return _INTERRUPTED
    except RuntimeError as error:  # of the device; OutOfMemoryError is one as well
        reason = " ".join(str(error).split())
        print(
            f"lora-kernels tune: error: {plan.device} failed ({reason}); what was measured is kept "
            f"in {path}",
            file=sys.stderr,
        )
        return 1
    print(f"{compared} of {len(user.cells(plan))} products were compared; kept in {path}")
    return 0


def _plan(device: torch.device, options: argparse.Namespace) -> Plan:
    default = user.DEFAULTS[device.type]
    if not 0 < options.minutes <= _MOST_MINUTES:
        raise UsageError(
            f"tune: --minutes must be more than 0, and {_MOST_MINUTES} at most, got "
            f"{options.minutes:g}"
        )
    layers: tuple[Layer, ...] = ()
    try:
        if options.model:
            layers += model_shapes.layers_of(options.model)
        if options.shapes:
            layers += model_shapes.parse_shapes(options.shapes)
    except ValueError as error:
        raise UsageError(f"tune: {error}") from error
    layers = tuple(dict.fromkeys(layers)) or default.layers
    if not layers:
        raise UsageError("tune: give a model (its folder or config.json) or --shapes KxN,...")
    dtype = _DTYPES[options.dtype] if options.dtype else default.dtype
    asked = (None if name == "own" else _DTYPES[name] for name in options.factors)
    factors = tuple(dict.fromkeys(None if factor == dtype else factor for factor in asked))
    return Plan(
        device=device,
        dtype=dtype,
        layers=layers,
        tokens=tuple(sorted(set(options.tokens or default.tokens))),
        ranks=tuple(sorted(set(options.ranks))),
        dropout=tuple(sorted(set(options.dropout))),
        factors=factors,
        seconds=60 * options.minutes,
        jobs=options.jobs or workers.most_jobs(),
    )


def _dry_run(plan: Plan, device: torch.device | None) -> Iterator[str]:
    """What would be measured, and where it would be kept."""
    layers, measures, products = _products(plan)
    yield from (layers, measures)
    if device is None:
        yield from (products, "there is no GPU here, and tiles are a GPU's")
        return
    yield plan.tiles_in_words(plan.tile_cases())
    yield from (products, f"results go to {cache.path_of(measured.KIND, device)}")


def _products(plan: Plan) -> tuple[str, str, str]:
    """What would be measured, but for tiles: the layers, all else, and how many products."""
    layers = ", ".join(f"{layer.k} -> {layer.n}" for layer in plan.layers)
    factors = " and ".join(dtype_name(factors or plan.dtype) for factors in plan.factors)
    return (
        f"layers: {layers}",
        f"tokens {plan.tokens}, ranks {plan.ranks}, dropout {plan.dropout}, "
        f"{dtype_name(plan.dtype)}, factors in {factors}, {plan.seconds / 60:g} minutes",
        f"algorithms: {len(user.cells(plan))} products",
    )


def _this_gpu(device: torch.device) -> Iterator[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = measured.content(device)
    for warning in caught:
        print(f"{warning.message}: {_removes(device)}", file=sys.stderr)
    yield str(cache.path_of(measured.KIND, device))
    yield json.dumps(found, indent=1)


def _every_gpu() -> Iterator[str]:
    """The path and the text of every file, whatever it holds for; of a bad one, what is wrong."""
    found = cache.files(measured.KIND)
    if not found:
        yield f"nothing is kept in {cache.directory()}"
    for path in found:
        yield str(path)
        try:
            cache.parse(path)
            yield path.read_text("utf-8").rstrip()
        except ValueError as error:
            yield f"{error}: {_removes(None)}"
