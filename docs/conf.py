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
myst_enable_extensions = ["dollarmath", "html_image"]
nb_execution_mode = "off"

html_theme = "sphinx_book_theme"
html_title = "modelstock_jax"
html_theme_options = {"show_toc_level": 2, "navbar_persistent": []}
html_sidebars = {"**": ["navbar-logo.html", "search-button-field.html", "sbt-sidebar-nav.html"]}
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
napoleon_custom_sections = [("Returned values", "params_style")]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Page -> title, folders of modelstock_jax, text. api/library.md is written by hand.
API_PAGES = {
    "merging": (
        "Merging",
        ["merging"],
        "The algebra of every merge: cosines, ratios, rules, merge units. The public functions are "
        "on the page [Library](library.md).",
    ),
    "files": (
        "File merges",
        ["checkpoint_merge", "tensor_files"],
        "`modelstock merge`, and the safetensors files that it reads and writes; without JAX.",
    ),
    "models": (
        "Models",
        ["models"],
        "CLIP, SigLIP, ViT, DINOv2, ConvNeXt and ResNet as functions of trees of arrays; "
        "checkpoints, tokenizers, zero-shot heads.",
    ),
    "data": (
        "Data",
        ["data", "data/glyphs"],
        "Datasets, preprocessing, the loader, and the resize on the device.",
    ),
    "training": (
        "Training",
        ["training"],
        "The train step of all replicas, the merge during training, sharding, checkpoints.",
    ),
    "runs": (
        "Runs",
        ["experiment", "reporting", ""],
        "Complete runs, their results, tables, figures and model cards.",
    ),
}

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Examples?|Note):$")


def api_page(name):
    """Return the text of a page: a section per module."""
    title, folders, text = API_PAGES[name]
    parts = [f"# {title}\n\n{text}\n"]
    for folder in folders:
        for file in sorted((ROOT / "modelstock_jax" / folder).glob("[!_]*.py")):
            module = ".".join([*folder.split("/"), file.stem]).lstrip(".")
            directive = f".. automodule:: modelstock_jax.{module}\n   :members:"
            parts.append(f"## {module}\n\n```{{eval-rst}}\n{directive}\n```\n")
    return "\n".join(parts)


def write_api_pages(app):
    """Write the pages next to api/library.md; git ignores them."""
    for name in API_PAGES:
        path, text = Path(app.confdir, "api", f"{name}.md"), api_page(name)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def markdown_to_rst(app, what, name, obj, options, lines):
    """Convert a docstring: `name` is code, and indented blocks and tables are shown as they are.

    Sections such as Args, whose entries are indented too, are left to napoleon.
    """
    blocks, section, code, doctest = [], False, False, False
    for number, line in enumerate(lines):
        text = line.strip()
        if text and not line.startswith(" "):
            section = bool(_SECTION.match(text))
        is_table = text.startswith("|") and text.endswith("|")
        is_indented = line.startswith("    ") and not section
        doctest = text.startswith(">>>") or (doctest and bool(text))
        after_blank = not number or not lines[number - 1].strip()
        if not text:
            is_code = code
        else:
            is_code = not doctest and (is_table or (is_indented and (code or after_blank)))
        if is_code and not code:
            blocks.append("\n::\n\n")
        code = is_code
        plain = code or doctest
        blocks.append(("    " * (code and is_table) + line if plain else _escape(line)) + "\n")
    lines[:] = _literals(_several_returns("".join(blocks))).split("\n")


def _escape(line):
    """Escape what is markup in reStructuredText but not in Markdown, outside of code."""
    parts = re.split(r"(`[^`]*`)", line)
    parts[::2] = [re.sub(r"[*|]|(?<=\w)_(?=\W|$)", r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def _several_returns(text):
    """Give a Returns section of several `name: meaning` the form of Args."""
    section = re.search(r"^Returns:\n((?:  .*\n|\n)+)", text, re.MULTILINE)
    if section and len(re.findall(r"^  \w+: ", section[1], re.MULTILINE)) > 1:
        return re.sub("^Returns:$", "Returned values:", text, count=1, flags=re.MULTILINE)
    return text


def _literals(text):
    """Write `name` as code; a plural s after it needs a separator."""
    code = r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)(?=(\w?))"
    return re.sub(code, lambda match: f"``{match[1]}``" + "\\ " * bool(match[2]), text)


def skip_member(app, what, name, obj, skip, options):
    """Skip names of the library in their modules (its page has them), and inherited methods."""
    module = getattr(obj, "__module__", None) or "modelstock_jax"
    is_public = what == "module" and name in modelstock_jax.__all__
    return True if is_public or not module.startswith("modelstock_jax") else None


def redirect_to_the_index(app, exception):
    """Write index.html: the first page is in docs/."""
    page = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n'
    if exception is None and app.builder.format == "html":
        Path(app.outdir, "index.html").write_text(page)


def setup(app):
    """Register the hooks; that of docstrings runs before napoleon's."""
    app.connect("config-inited", lambda app, config: write_api_pages(app))
    app.connect("build-finished", redirect_to_the_index)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=100)
