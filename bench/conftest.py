"""``pytest bench/``: measures each cell, feeds pytest-benchmark, prints and writes the rows."""

import json
import pathlib
import platform

import pytest
import torch

from bench import accuracy, report, timing

ROWS = pytest.StashKey[list[dict]]()
CLOCK = timing.RecordedClock()


def pytest_addoption(parser):
    group = parser.getgroup("bench", "layers against their peers")
    group.addoption(
        "--bench-seconds", type=float, default=8.0, metavar="S", help="time to spend on a cell"
    )
    group.addoption("--bench-results", metavar="FILE.json", help="write the rows to this file")
    group.addoption(
        "--bench-assert", action="store_true", help="fail where ours is slower than it must be"
    )


def pytest_configure(config):
    config.stash[ROWS] = []
    config.option.benchmark_quiet = True  # the table below says more; -v prints both


def pytest_collection_modifyitems(items):
    for item in items:
        if "row" in item.fixturenames:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session")
def environment(request) -> dict:
    """What a row says of the machine and the code it was measured on."""
    config, hook = request.config, request.config.hook
    commit = hook.pytest_benchmark_generate_commit_info(config=config)
    machine = hook.pytest_benchmark_generate_machine_info(config=config)
    return {
        "commit": commit["id"] + ("-dirty" if commit["dirty"] else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": machine["cpu"].get("brand_raw"),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(scope="module")
def cell(request):
    return request.module.CELLS[request.param]


@pytest.fixture(scope="module")
def measured(cell, environment, request) -> dict[str, tuple[dict, list[float]]]:
    """Row and times by provider: first all are checked, then timed in one interleaved loop."""
    config, providers = request.config, request.module.PROVIDERS
    problem = cell.problem()
    for name, build in providers.items():
        if name != report.FLOOR:
            accuracy.check(name, build, problem)
    x = problem.x.requires_grad_()
    steps = {
        name: timing.step(build(problem), x, problem.dy, cell.mode)
        for name, build in providers.items()
    }
    samples = timing.interleave(steps, config.getoption("bench_seconds"))
    rows = {name: row | environment for name, row in report.make_rows(cell, samples).items()}
    config.stash[ROWS] += rows.values()
    return {name: (row, samples[name]) for name, row in rows.items()}


@pytest.fixture
def row(measured, provider, benchmark) -> dict:
    """One provider's row; its times go to pytest-benchmark on the way."""
    row, samples = measured[provider]
    benchmark.group = row["cell"]
    benchmark.extra_info = row
    times = iter(samples)
    benchmark.pedantic(CLOCK.advance, setup=lambda: ((next(times),), {}), rounds=len(samples))
    return row


@pytest.fixture
def enforced(request) -> bool:
    return request.config.getoption("bench_assert")


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("lora_kernels against its peers")
    terminalreporter.write_line(report.table(rows))
    path = config.getoption("bench_results")
    if path:
        pathlib.Path(path).write_text(json.dumps(rows, indent=1) + "\n")
