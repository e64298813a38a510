"""``pytest bench/``: measures each cell, feeds pytest-benchmark, prints and writes the rows."""

import pathlib

import pytest
import torch

from bench import ceilings, machine, report, repository, rows, shapes, timing
from bench.measure import measure, subject_of
from bench.options import listed
from bench.providers import OURS, PROVIDERS, choose

ROWS = pytest.StashKey[list[dict]]()
MEASURED = pytest.StashKey[dict]()
DEVICE = pytest.StashKey[str]()
RECORD = pytest.StashKey[pathlib.Path]()
CLOCK = timing.RecordedClock()


def pytest_addoption(parser):
    group = parser.getgroup("bench", "layers against their peers; lists are comma-separated")
    names = [provider.name for provider in PROVIDERS]
    modes = {"forward": shapes.FORWARD, "backward": shapes.BACKWARD, "both": shapes.BOTH}
    lists = {
        "--shapes": (listed(str, shapes.SETS), f"sets of layers: {', '.join(shapes.SETS)}"),
        "--mode": (
            lambda text: [modes[mode] for mode in listed(str, modes)(text)],
            "forward, backward, both (one step of forward and backward)",
        ),
        "--execution": (listed(str, shapes.EXECUTIONS), "eager, graph (CUDA graphs)"),
        "--peers": (
            listed(str, names),
            "providers by name; frozen and lora_kernels always take part",
        ),
        "--tokens": (listed(int), "numbers of tokens M"),
        "--ranks": (listed(int), "ranks r"),
        "--dropout": (listed(float), "dropout probabilities p"),
    }
    for name, (kind, text) in lists.items():
        group.addoption(name, type=kind, default=[], metavar="LIST", help=text)
    group.addoption(
        "--bench-device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    group.addoption(
        "--bench-seconds", type=float, metavar="S",
        help="time to spend on a cell; default: 6 on a CPU, 2 on a GPU",
    )  # fmt: skip
    group.addoption("--bench-results", metavar="FILE.json", help="write the rows to this file")
    group.addoption(
        "--bench-record", action="store_true",
        help="write the rows to bench/results/<gpu>/<commit>.json; refuses a dirty tree",
    )  # fmt: skip
    group.addoption(
        "--bench-assert", action="store_true", help="fail where ours is slower than it must be"
    )


def pytest_configure(config):
    config.stash[ROWS], config.stash[MEASURED] = [], {}
    on_gpu = torch.cuda.is_available()
    device = config.option.bench_device or ("cuda" if on_gpu else "cpu")
    config.stash[DEVICE] = device
    if config.option.bench_seconds is None:
        config.option.bench_seconds = 2.0 if device == "cuda" else 6.0
    if config.option.bench_record:
        try:  # before minutes are spent
            config.stash[RECORD] = repository.result_file(
                repository.commit(), machine.gpu_name(device)
            )
        except repository.DirtyTreeError as error:
            raise pytest.UsageError(str(error)) from None
    config.option.benchmark_quiet = True  # the table below says more; -v prints both


def pytest_generate_tests(metafunc):
    """A test for every cell that its module has among the chosen ones, and for every provider."""
    if "row" not in metafunc.fixturenames:
        return
    option = metafunc.config.option
    layers = shapes.select(
        metafunc.config.stash[DEVICE], option.shapes, modes=option.mode,
        executions=option.execution, tokens=option.tokens, ranks=option.ranks,
        dropout=option.dropout,
    )  # fmt: skip
    module = metafunc.module
    pairs = [
        pytest.param(cell, name, id=f"{cell}-{name}")
        for cell in module.cells(layers, metafunc.config.stash[DEVICE], asked=bool(option.shapes))
        for name in choose(cell, option.peers, module.PROVIDERS)
    ]
    metafunc.parametrize(
        ("cell", "provider"),
        pairs,
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if "row" in item.fixturenames:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session")
def environment(request) -> dict:
    """What a row says of the machine and the code it was measured on, ceilings included."""
    config, device = request.config, request.config.stash[DEVICE]
    info = config.hook.pytest_benchmark_generate_machine_info(config=config)
    return {
        **machine.describe(device),
        "cpu": info["cpu"].get("brand_raw"),
        **ceilings.measure(device, shapes.AXES[device].dtype),
    }


@pytest.fixture
def measured(cell, environment, request) -> dict[str, tuple[dict, list[float]]]:
    """Row and times by provider; the first test of a cell measures all of them, interleaved."""
    option, done = request.config.option, request.config.stash[MEASURED]
    if cell not in done:
        providers = choose(cell, option.peers, request.module.PROVIDERS)
        by_name, samples = measure(cell, subject_of(cell), providers, option.bench_seconds)
        by_name = {name: row | environment for name, row in by_name.items()}
        request.config.stash[ROWS] += by_name.values()
        done[cell] = {name: (row, samples.get(name)) for name, row in by_name.items()}
    return done[cell]


@pytest.fixture
def row(measured, provider, request) -> dict:
    """One provider's row; its times go to pytest-benchmark on the way."""
    row, samples = measured[provider]
    if row["withheld"]:
        (pytest.fail if provider == OURS else pytest.skip)(f"{provider}: {row['withheld']}")
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
    if not measured:
        return
    terminalreporter.section("lora_kernels against its peers")
    terminalreporter.write_line(report.terminal(measured))
    for path in (config.option.bench_results, config.stash.get(RECORD, None)):
        if path:
            rows.save(measured, pathlib.Path(path))
