"""Sphinx: `make docs` builds docs/build/html from these pages and the docstrings."""

import fastrnn

project, author, release = "fastrnn", "fastrnn contributors", fastrnn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["build", "notes"]
html_theme, html_title = "pydata_sphinx_theme", "fastrnn"
html_theme_options = {"show_prev_next": False, "secondary_sidebar_items": ["page-toc"]}
default_role = "code"  # of `this` in a docstring
autodoc_typehints, autodoc_member_order = "none", "bysource"
napoleon_use_rtype = False
myst_heading_anchors = 4
suppress_warnings = ["myst.xref_missing"]  # links to files beside docs/, which tests/test_docs.py follows


def literal_blocks(app, what, name, obj, options, lines):
    """Marks the indented blocks and the tables of a docstring as literal for reStructuredText."""
    marked, inside = [], False
    for k, line in enumerate(lines):
        table = line.startswith("|")
        literal = table or line.startswith("    ")
        if literal and not inside and (k == 0 or not lines[k - 1].strip()):
            inside = True
            if not marked[-2:-1] or not marked[-2].startswith((":", ".")):  # a field or a directive goes on
                marked += ["::", ""]
        inside = inside and (literal or not line.strip())
        marked.append("    " + line if table else line)
    lines[:] = marked


def setup(app):
    app.connect("autodoc-process-docstring", literal_blocks, priority=900)
