"""The site: ``pip install -e ".[docs]" && sphinx-build -W -b html docs docs/_build``."""

import contextlib
import inspect
import io
import os
import re

from docutils import nodes
from docutils.parsers.rst import Directive

import lora_kernels
from lora_kernels.cli import main

project = "lora_kernels"
author = copyright = "lora_kernels contributors"
version = release = lora_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"lora_kernels {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False

# What begins a part of a docstring: "Shapes: ...", "dropout_p, seed: ...".
_PART = re.compile(r"^(\w[\w, ]*):(?= )")
_WORD = re.compile(r"^\w+(?=[ ,:])")


def parts_as_paragraphs(app, what, name, value, options, lines):
    """Plain docstrings as reStructuredText: a paragraph for each part, names as written.

    A part begins with words and a colon, or with the name of an argument.
    """
    arguments = inspect.signature(value).parameters if callable(value) else {}
    found = []
    for index, line in enumerate(lines):
        before = lines[index - 1].rstrip() if index else "-"
        part, word = _PART.match(line), _WORD.match(line)
        if before == "" or before.endswith((".", ":")):
            if part:
                line = f"**{part[0]}**{line[part.end() :]}"
            elif word and word[0] in arguments:
                line = f"``{word[0]}``{line[word.end() :]}"
            found += [""] * bool(part or (word and word[0] in arguments))
        code = line.split("``")
        code[::2] = [re.sub(r"(?<=\w)_(?!\w)", r"\\_", text) for text in code[::2]]
        found.append("``".join(code))
    lines[:] = found


class CommandHelp(Directive):
    """What ``lora-kernels COMMAND --help`` prints; without an argument, the program's own help."""

    optional_arguments = 1

    def run(self):
        columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "88"
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
                main([*self.arguments, "--help"])
        finally:
            del os.environ["COLUMNS"]
            if columns is not None:
                os.environ["COLUMNS"] = columns
        return [nodes.literal_block(printed.getvalue(), printed.getvalue(), language="none")]


def setup(app):
    app.connect("autodoc-process-docstring", parts_as_paragraphs)
    app.add_directive("command-help", CommandHelp)
