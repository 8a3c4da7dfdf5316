"""A mutation that cosmic-ray does not have: a statement is left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cosmic_ray.operators.operator import Example, Operator
from parso.python.tree import Keyword
from parso.tree import NodeOrLeaf, search_ancestor

# Without an import or a name of the module nothing runs.
_KEPT = {"string", "strings", "import_name", "import_from", "global_stmt", "nonlocal_stmt"}


class RemoveStatement(Operator):
    """Leaves out a statement within a function or a class."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[tuple[Any, Any]]:
        if node.type != "simple_stmt" or search_ancestor(node, "funcdef", "classdef") is None:
            return
        statement = node.children[0]
        declares = statement.type == "expr_stmt" and statement.children[1].type == "annassign"
        if declares and "=" not in [child for child in statement.children[1].children if child.type == "operator"]:
            return
        if statement.type not in _KEPT and statement.get_code().strip() not in ("pass", "..."):
            yield statement.start_pos, statement.end_pos

    def mutate(self, node: NodeOrLeaf, index: int) -> NodeOrLeaf:
        statement = node.children[0]
        node.children[0] = Keyword("pass", statement.start_pos, statement.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("def f():\n    g()\n", "def f():\n    pass\n"),)


class Provider:
    """What cosmic-ray asks for the operators of others."""

    def __iter__(self) -> Iterator[str]:
        return iter(["RemoveStatement"])

    def __getitem__(self, name: str) -> type[Operator]:
        return {"RemoveStatement": RemoveStatement}[name]
