"""What MkDocs needs beside its plugins: ```math fences as MathML, and the fields of a recipe as tables."""

from __future__ import annotations

import ast
import inspect
from html import escape
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

from latex2mathml.converter import convert

from jaxrl import config

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

FIELDS = "<!-- fields -->"


def on_config(settings: MkDocsConfig) -> MkDocsConfig:
    fences = settings.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": _math})
    return settings


def on_page_markdown(markdown: str, **_: object) -> str:
    return markdown.replace(FIELDS, "\n".join(_sections())) if FIELDS in markdown else markdown


def _math(source: str, *_: object, **__: object) -> str:
    return f'<p style="overflow: auto hidden; padding: .3em 0">{convert(source, display="block")}</p>'


def _sections() -> list[str]:
    """A table for each section of a recipe: key, default and docstring of every field, and its type or choices."""
    lines = []
    for name, section in (get_type_hints(config.Recipe) | {"stages": config.StageEntry}).items():
        title = f"[[{name}]]" if name == "stages" else f"[{name}]"
        lines += [f"## {title}", "", "| key | default | |", "|---|---|---|", *_rows(section), ""]
    return lines


def _rows(section: type) -> list[str]:
    """A row for each field, from the source: the docstring of a field is the string that follows it."""
    (tree,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    types, rows = get_type_hints(section), []
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            key, default = ast.unparse(field.target), ast.unparse(field.value or ast.Constant(""))
            words = escape(" ".join(str(ast.literal_eval(text.value)).split()), quote=False)
            if get_origin(types[key]) is Literal:
                words += f"<br>One of: {', '.join(get_args(types[key]))}."
            rows.append(f"| {_code(key)} | {_code(default)} | {words} |")
    return rows


def _code(text: str) -> str:
    return f'<span style="white-space: nowrap"><code>{escape(text, quote=False)}</code></span>'
