"""README.md and docs/ hold true: their Python runs, what they name and link to exists."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_kernels
from lora_kernels.cli import main
from tests import torchrun

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = {
    str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8")
    for path in (REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md")))
    if "_build" not in path.parts
}
README = PAGES["README.md"]
ENVIRONMENT = PAGES["docs/reference/environment.md"]


def blocks_of(text: str) -> list[re.Match]:
    return list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, seed):
    """A folder of its own, as the only rank of torchrun, and PEFT as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    for name, value in torchrun.environment().items():
        monkeypatch.setenv(name, value)
    yield
    lora_kernels.unpatch_peft()


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_python_blocks_run_one_after_the_other(page, elsewhere):
    text, names = PAGES[page], {}
    assert len(blocks_of(text)) == text.count("```python")
    for block in blocks_of(text):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], page, "exec"), names)


def test_the_notebook_runs_and_holds_no_output(elsewhere):
    path = REPOSITORY / "examples/quickstart.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    names = {}
    for number, cell in enumerate(cells):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        source = "".join(cell["source"])
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_every_name_it_mentions_with_the_package_exists(page):
    mentioned = set(re.findall(r"(?<![\w.-])lora\.(\w+)", PAGES[page])) - {"pt"}
    # In messages PEFT's classes are called lora.Linear, too.
    assert not {name for name in mentioned if not hasattr(lora_kernels, name)}


def test_every_public_name_is_in_the_reference():
    listed = []
    for page, text in PAGES.items():
        if page.startswith("docs/reference/"):
            listed += re.findall(r"^\.\. auto\w+:: lora_kernels\.(\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(lora_kernels.__all__)


def test_every_command_is_on_the_page_of_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    _, _, commands = capsys.readouterr().out.partition("COMMAND\n")
    names = re.findall(r"^    (\w+) ", commands, re.MULTILINE)
    page = PAGES["docs/reference/command_line.md"]
    assert names
    assert re.findall(r"^```\{command-help\} (\w+)$", page, re.MULTILINE) == names


def test_every_variable_has_a_row_and_every_row_is_a_variable():
    sources = [
        path.read_text(encoding="utf-8")
        for folder in ("lora_kernels", "bench", "examples", "tests")
        for path in (REPOSITORY / folder).rglob("*.py")
    ]
    variable = r"\bLORA_KERNELS_[A-Z]+(?:_[A-Z]+)*\b"
    used = {name for source in sources for name in re.findall(variable, source)}
    rows = [line.split("|")[1] for line in ENVIRONMENT.splitlines() if line.startswith("| `")]
    told = {name for row in rows for name in re.findall(variable, row)}
    assert told == used
    for page, text in PAGES.items():
        assert set(re.findall(variable, text)) <= told, page


def texts_of(path: Path) -> Iterator[str]:
    """Every text in the code of a file, with a line break for each value in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            values = node.values
            yield "".join(v.value if isinstance(v, ast.Constant) else "\n" for v in values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_that_the_troubleshooting_names_are_those_of_the_code():
    sources = (REPOSITORY / "lora_kernels").rglob("*.py")
    texts = {text for path in sources for text in texts_of(path)}
    page = PAGES["docs/troubleshooting.md"]
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 80
    unknown = []
    for message in messages:
        pieces = re.split(r"\.\.\.|LORA_KERNELS_\w+", message)
        pattern = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
        if not any(map(pattern.search, texts)):
            unknown.append(message)
    assert not unknown


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def headings_of(path: Path) -> set[str]:
    """The anchors of a page's headings, and of those of a page that it includes."""
    text = path.read_text(encoding="utf-8")
    found = set()
    for heading in re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M
    ):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(words.replace(" ", "-"))
    for included in re.findall(r"^```\{include\} (\S+)$", text, re.MULTILINE):
        found |= headings_of(path.parent / included)
    return found


WITH_LINKS = [
    *PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "examples/nlg/README.md", "examples/nlu/README.md",
]  # fmt: skip


@pytest.mark.parametrize("page", WITH_LINKS)
def test_relative_links_lead_somewhere(page):
    source = REPOSITORY / page
    text = without_blocks(source.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\((?!https?:)([^)\s]*)\)", text):
        name, _, anchor = link.partition("#")
        target = source.parent / name if name else source
        assert target.is_file(), link
        assert not anchor or anchor in headings_of(target), link


def test_commands_that_ci_runs_stand_right_behind_their_markers():
    commands = {
        "main": "python -m examples.finetune",
        "test": "pytest tests -n 2 --dist loadfile",
    }
    for marker, ending in commands.items():
        blocks = re.findall(rf"^<!-- ci: {marker} -->\n```bash\n(.*?)^```$", README, re.M | re.S)
        assert len(blocks) == 1
        assert blocks[0].endswith(f"{ending}\n")
        assert f"run_readme_block {marker}" in (REPOSITORY / ".ci/run").read_text().splitlines()


def test_the_first_lines_say_that_no_gpu_has_run_the_kernels():
    said = "**The kernels have not run on a GPU yet.**"
    assert said in "\n".join(README.splitlines()[:12])
    assert said in PAGES["docs/index.md"]


def test_one_version_is_told_everywhere():
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    version, date = re.search(r"^## \[?(\d\S*?)\]? - (\S+)$", changes, re.MULTILINE).groups()
    assert version == lora_kernels.__version__
    assert f"\nversion: {version}\n" in citation
    assert f'\ndate-released: "{date}"\n' in citation
