"""What MkDocs needs beside its plugins: ```math fences as MathML, and the fields of a recipe as tables."""

from __future__ import annotations

import ast
from html import escape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parent.parent


def on_config(config: Any) -> Any:
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": _math})
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    return (
        markdown.replace("<!-- fields -->", "\n".join(_sections()))
        if "<!-- fields -->" in markdown
        else markdown
    )


def _math(source: str, *_: Any, **__: Any) -> str:
    return f'<p style="overflow: auto hidden; padding: .3em 0">{convert(source, display="block")}</p>'


def _sections() -> list[str]:
    """A table for each section of jaxrl/config.py: key, default and docstring of every field, and what it may be."""
    tree = ast.parse((ROOT / "jaxrl/config.py").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    lines = []
    for section in classes["Recipe"].body:
        if isinstance(section, ast.AnnAssign) and isinstance(section.target, ast.Name):
            name, kind = section.target.id, ast.unparse(section.annotation)
            lines += [f"## [{name}]", "", "| key | default | |", "|---|---|---|"]
            lines += [
                f"| {_code(key)} | {_code(value)} | {text} |" for key, value, text in _fields(classes[kind])
            ]
            lines.append("")
    return lines


def _fields(section: ast.ClassDef) -> list[tuple[str, str, str]]:
    found = []
    for field, text in zip(section.body, section.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            key, value = ast.unparse(field.target), ast.unparse(field.value or ast.Constant(""))
            words, kind = (
                escape(" ".join(str(text.value.value).split()), quote=False),
                ast.unparse(field.annotation),
            )
            choices = kind.removeprefix("Literal[").removesuffix("]").replace("'", "")
            found.append((key, value, words if choices == kind else f"{words}<br>One of: {choices}."))
    return found


def _code(text: str) -> str:
    return f'<span style="white-space: nowrap"><code>{escape(text, quote=False)}</code></span>'
