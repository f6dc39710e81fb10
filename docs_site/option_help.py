"""A griffe extension: an option's help text is its docstring in the API reference."""

import ast
from typing import Any

import griffe

__all__ = ["OptionHelp"]


class OptionHelp(griffe.Extension):
    """Documents attributes such as `steps: int = option(40, "number of steps")` by the help text in their declaration."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        """Give an option without a docstring its help text, and show its default as its value."""
        call = getattr(node, "value", None)
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "option"):
            return
        default, *texts = call.args
        attr.value = ast.unparse(default)
        if attr.docstring is None and texts and isinstance(texts[0], ast.Constant):
            attr.docstring = griffe.Docstring(str(texts[0].value), parent=attr, lineno=attr.lineno)
