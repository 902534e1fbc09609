"""Sphinx configuration of the documentation site: `make docs`.

The source directory is the repository: pages link to each other as they do on a code host.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import modelstock_jax  # noqa: E402

project = "modelstock_jax"
author = "The modelstock_jax authors"
project_copyright = "The modelstock_jax authors, Apache-2.0"
version = release = modelstock_jax.__version__

root_doc = "docs/index"
include_patterns = [
    "*.md",
    "benchmarks/README.md",
    "docs/**.md",
    "notebooks/*.ipynb",
]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

# Headings link as on a code host; notebooks are stored with their outputs.
myst_heading_anchors = 6
myst_enable_extensions = ["dollarmath", "colon_fence"]
nb_execution_mode = "off"

html_theme = "sphinx_book_theme"
html_title = "modelstock_jax"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "show_navbar_depth": 1}
html_show_sourcelink = False
html_copy_source = False

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
python_maximum_signature_line_length = 88
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Example", "example"), ("Examples", "example")]
# `name` in a docstring is code.
default_role = "code"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Examples?|Note):$")


def blocks_as_code(app, what, name, obj, options, lines):
    """Mark indented blocks and Markdown tables of a docstring as code.

    Sections such as Args, whose entries are indented too, are left to napoleon.
    """
    out, section, code = [], False, False
    for number, line in enumerate(lines):
        text = line.strip()
        before = lines[number - 1].strip() if number else ""
        if text and not line.startswith(" "):
            section = bool(_SECTION.match(text))
        starts = not code and not before and line.startswith("    ")
        if text and not section and not text.startswith(">>>"):
            if text.startswith("|") and text.endswith("|"):
                line, starts = "    " + line, not code
            elif not line.startswith("    "):
                code = False
            if starts:
                out += ["", "::", ""]
                code = True
        elif section:
            code = False
        if code and text and not line.startswith("    "):
            code = False
        out.append(line)
    lines[:] = out


def documented_in_the_library(app, what, name, obj, skip, options):
    """Skip public functions in the modules that define them: the page of the library has them."""
    module = getattr(obj, "__module__", "") or ""
    public = name in modelstock_jax.__all__ and what == "module"
    return True if public and module.startswith("modelstock_jax.") else None


def setup(app):
    """Register the docstring hook before that of napoleon."""
    app.connect("autodoc-skip-member", documented_in_the_library)
    app.connect("autodoc-process-docstring", blocks_as_code, priority=100)
