"""``pytest bench/``: measures each cell, feeds pytest-benchmark, prints and writes the rows."""

import contextlib
import pathlib

import pytest
import torch

from bench import base, report, roofline
from bench.implementations import IMPLEMENTATIONS, choose
from bench.measure import measure, subject_of
from bench.models import MODEL_IMPLEMENTATIONS
from lora_kernels.tuning import machine, repository, rows, shapes
from lora_kernels.tuning.options import count, listed, probability

ROWS = pytest.StashKey[list[dict]]()
MEASURED = pytest.StashKey[dict]()
DEVICE = pytest.StashKey[str]()
RECORD = pytest.StashKey[pathlib.Path]()
COMPARED = pytest.StashKey[dict[str, tuple]]()


class RecordedClock:
    """A timer for pytest-benchmark that stands still but for the times it is told."""

    __name__ = "recorded"  # the timer's name in pytest-benchmark's JSON
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = RecordedClock()


def pytest_addoption(parser):
    group = parser.getgroup("bench", "layers against their peers; lists are comma-separated")

    def add(name, text, **how):
        group.addoption(name, help=text, **how)

    compared = (*IMPLEMENTATIONS, *MODEL_IMPLEMENTATIONS)
    names = list(dict.fromkeys(each.name for each in compared))
    modes = {"forward": rows.FORWARD, "backward": rows.BACKWARD, "both": rows.BOTH}
    lists = {
        "--shapes": (listed(str, shapes.SETS), f"sets of layers: {', '.join(shapes.SETS)}"),
        "--mode": (
            lambda text: [modes[mode] for mode in listed(str, modes)(text)],
            "forward, backward, both (one step of forward and backward)",
        ),
        "--execution": (listed(str, (rows.EAGER, rows.GRAPH)), "eager, graph (CUDA graphs)"),
        "--peers": (
            listed(str, names),
            f"implementations, of {', '.join(names)}; frozen and lora_kernels always take part",
        ),
        "--tokens": (listed(count), "numbers of tokens M"),
        "--ranks": (listed(count), "ranks r"),
        "--dropout": (listed(probability), "dropout probabilities p"),
    }
    for name, (kind, text) in lists.items():
        add(name, text, type=kind, default=[], metavar="LIST")
    factors = "the dtype of lora_A and lora_B; default: that of the layer"
    add("--factors", factors, choices=("float32",))
    add("--base", "one more peer: this package as it is at the commit", metavar="COMMIT")
    add("--bench-device", "default: cuda if there is a GPU", choices=("cpu", "cuda"))
    seconds = "time to spend on a cell; default: 6 on a CPU, 2 on a GPU"
    add("--bench-seconds", seconds, type=float, metavar="S")
    add("--bench-results", "write the rows to this file", metavar="FILE.json")
    record = "write the rows to bench/results/<gpu>/<commit>.json; refuses a dirty tree"
    add("--bench-record", record, action="store_true")
    add("--bench-assert", "fail if ours is slower than it must be", action="store_true")


def pytest_configure(config):
    option, stash = config.option, config.stash
    stash[ROWS], stash[MEASURED] = [], {}
    stash[DEVICE] = option.bench_device or ("cuda" if torch.cuda.is_available() else "cpu")
    stash[COMPARED] = {"layer": IMPLEMENTATIONS, "model": MODEL_IMPLEMENTATIONS}
    if option.bench_seconds is None:
        option.bench_seconds = 2.0 if stash[DEVICE] == "cuda" else 6.0
    _check(option, stash[DEVICE])
    try:  # before minutes are spent
        if option.bench_record:
            gpu = machine.gpu_name(stash[DEVICE])
            stash[RECORD] = repository.result_file(repository.commit(), gpu)
        if option.base:
            stack = contextlib.ExitStack()
            config.add_cleanup(stack.close)
            at_base = base.implementations(*stack.enter_context(base.package(option.base)))
            for kind, (*others, ours) in stash[COMPARED].items():
                stash[COMPARED][kind] = (*others, at_base[kind], ours)
    except (repository.DirtyTreeError, base.UnknownCommitError) as error:
        raise pytest.UsageError(str(error)) from None
    option.benchmark_quiet = True  # the table below says more; -v prints both


def _check(option, device: str) -> None:
    """What is asked for can be measured. Raises: pytest.UsageError, one line."""
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device cuda: PyTorch sees no GPU here")
    if not option.bench_seconds >= 0:
        raise pytest.UsageError(f"--bench-seconds must not be negative, got {option.bench_seconds}")


def pytest_generate_tests(metafunc):
    """A test for each of its cells among the chosen ones, and for every implementation."""
    if "row" in metafunc.fixturenames:
        config, function = metafunc.config, metafunc.function
        clock = pytest.mark.benchmark(timer=CLOCK)
        pairs = [
            pytest.param(cell, name, id=f"{cell}-{name}", marks=clock)
            for cell in metafunc.module.cells(function, config.stash[DEVICE], config.option)
            for name in chosen(config, cell)
        ]
        metafunc.parametrize(("cell", "implementation"), pairs)


def chosen(config, cell) -> dict:
    """The implementations that take part in a cell."""
    compared = config.stash[COMPARED][cell.fields()["kind"]]
    return choose(cell, config.option.peers, compared)


@pytest.fixture(scope="session")
def environment(request) -> dict:
    """What a row says of the machine and the code it was measured on, ceilings included."""
    config, device = request.config, request.config.stash[DEVICE]
    info = config.hook.pytest_benchmark_generate_machine_info(config=config)
    ceilings = roofline.measure(device, shapes.DTYPES[device])
    return {**machine.describe(device), "cpu": info["cpu"].get("brand_raw"), **ceilings}


@pytest.fixture
def measured(cell, environment, request) -> dict[str, tuple[dict, list[float]]]:
    """Row and times by implementation; a cell's first test measures all of them, interleaved."""
    config, done = request.config, request.config.stash[MEASURED]
    if cell not in done:
        by_name, samples = measure(
            cell, subject_of(cell), chosen(config, cell), config.option.bench_seconds
        )
        by_name = {name: row | environment for name, row in by_name.items()}
        config.stash[ROWS] += by_name.values()
        done[cell] = {name: (row, samples.get(name)) for name, row in by_name.items()}
    return done[cell]


@pytest.fixture
def row(measured, implementation, request) -> dict:
    """One implementation's row; its times go to pytest-benchmark on the way."""
    row, samples = measured[implementation]
    if row["skipped"]:
        end = pytest.fail if implementation == rows.OURS else pytest.skip
        end(f"{implementation}: {row['skipped']}")
    benchmark = request.getfixturevalue("benchmark")
    benchmark.group = row["cell"]
    benchmark.extra_info = row
    times = iter(samples)
    benchmark.pedantic(CLOCK.advance, setup=lambda: ((next(times),), {}), rounds=len(samples))
    return row


@pytest.fixture
def enforced(request) -> bool:
    return request.config.getoption("bench_assert")


def pytest_terminal_summary(terminalreporter, config):
    measured = config.stash[ROWS]
    if measured:
        terminalreporter.section("lora_kernels against its peers")
        terminalreporter.write_line(report.terminal(measured))
        for path in (config.option.bench_results, config.stash.get(RECORD, None)):
            if path:
                rows.save(measured, pathlib.Path(path))
                terminalreporter.write_line(f"rows: {path}")
