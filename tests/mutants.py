"""The mutants of a file: what it says, changed in one place.

`tests/mutation_score.py` runs them. A mutant changes one comparison, operator, number, truth value, condition or call, or
leaves out one statement or result. Not changed are texts (docstrings, messages, log lines, descriptions, what an error says),
types, decorators, `strict=` of zip, `assert`, and what is inside an f-string.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS: dict[type[ast.cmpop], ast.cmpop] = {
    ast.Lt: ast.LtE(),
    ast.LtE: ast.Lt(),
    ast.Gt: ast.GtE(),
    ast.GtE: ast.Gt(),
    ast.Eq: ast.NotEq(),
    ast.NotEq: ast.Eq(),
    ast.Is: ast.IsNot(),
    ast.IsNot: ast.Is(),
    ast.In: ast.NotIn(),
    ast.NotIn: ast.In(),
}
OPERATORS: dict[type[ast.operator], ast.operator] = {
    ast.Add: ast.Sub(),
    ast.Sub: ast.Add(),
    ast.Mult: ast.Div(),
    ast.Div: ast.Mult(),
    ast.FloorDiv: ast.Mult(),
    ast.Mod: ast.FloorDiv(),
    ast.Pow: ast.Mult(),
    ast.BitOr: ast.BitAnd(),
    ast.BitAnd: ast.BitOr(),
}
CALLS = {
    "min": "max",
    "any": "all",
    "floor": "ceil",
    "add_": "sub_",
    "mul_": "div_",
    "add": "sub",
    "mul": "div",
    "amax": "amin",
    "clamp_min": "clamp_max",
    "clamp_min_": "clamp_max_",
}
CALLS |= {new: old for old, new in CALLS.items()}
# Calls that only say something, and keywords whose values are texts or checks.
SAYS = ("debug", "info", "warning", "warn", "error", "exception", "log")
TEXTS = ("description", "strict", "title", "message")


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: from the checkout's root.
        function: the outermost function around the change, with its classes ("" for a class body or the module).
        first_line: of the function, with its decorators (0 without one).
        lines: first and last line of the change.
        original, mutated: the changed lines without indentation, before and after.
        source: the whole file with the change.
    """

    file: str
    function: str
    first_line: int
    lines: tuple[int, int]
    original: str
    mutated: str
    source: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What a mutant is known by when lines have moved."""
        return self.file, self.function, self.original, self.mutated


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a node is: the outermost function around it, and the classes around that."""

    function: str = ""
    first_line: int = 0
    classes: tuple[str, ...] = ()


def mutants_of(path: Path, root: Path) -> list[Mutant]:
    """All mutants of a file, from its first line to its last; those that do not compile are left out."""
    text = path.read_text(encoding="utf-8")
    lines = text.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found: dict[tuple[str, str, str, str], Mutant] = {}
    for place, node, new in _changes(ast.parse(text), _Place()):
        begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        source = (text.encode()[:begin] + new.encode() + text.encode()[end:]).decode()
        before = "".join(line.decode() for line in lines[node.lineno - 1 : node.end_lineno])
        after = source[len(b"".join(lines[: node.lineno - 1]).decode()) :]
        after = after[: len(after) - len(b"".join(lines[node.end_lineno :]).decode())]
        try:
            compile(source, str(path), "exec")
        except SyntaxError:
            continue
        names = str(path.relative_to(root)), place.function
        span = node.lineno, node.end_lineno
        mutant = Mutant(*names, place.first_line, span, " ".join(before.split()), " ".join(after.split()), source)
        found.setdefault(mutant.key, mutant)
    return list(found.values())


def _changes(node: ast.AST, place: _Place) -> Iterator[tuple[_Place, ast.expr | ast.stmt, str]]:
    """The node to replace and its new text, for a node and all below it."""
    if isinstance(node, ast.ClassDef):
        inside = _Place(place.function, place.first_line, (*place.classes, node.name))
        for child in node.body:
            yield from _changes(child, inside)
        return
    if isinstance(node, ast.FunctionDef):
        for default in (*node.args.defaults, *(value for value in node.args.kw_defaults if value)):
            yield from _changes(default, place)
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        inside = place if place.function else _Place(".".join((*place.classes, node.name)), first)
        for child in node.body:
            yield from _changes(child, inside)
        return
    if _is_left(node):
        return
    for old, new in _replacements(node):
        yield place, old, new
    for child in _below(node):
        yield from _changes(child, place)


def _is_left(node: ast.AST) -> bool:
    """Texts, types and checks of our own."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or _says(node.value)
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
    if isinstance(node, ast.keyword):
        return node.arg in TEXTS
    return isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert))


def _says(call: ast.expr) -> bool:
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in SAYS


def _below(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Raise):
        return
    annotation = getattr(node, "annotation", None)
    for child in ast.iter_child_nodes(node):
        if child is annotation and "Annotated" not in ast.dump(child):
            continue
        if isinstance(node, ast.UnaryOp) and isinstance(child, ast.Constant):
            continue  # -1 is one number
        yield child


def _replacements(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    if isinstance(node, ast.stmt):
        yield from _of_statement(node)
    elif isinstance(node, ast.expr):
        for new in _of_expression(node):
            yield node, f"({ast.unparse(new)})" if not isinstance(new, (ast.Constant, ast.Call)) else ast.unparse(new)
    elif isinstance(node, ast.comprehension):
        for condition in node.ifs:
            yield condition, "True"
            yield from _negated(condition)


def _of_statement(node: ast.stmt) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    if isinstance(node, ast.If):
        yield from _negated(node.test)
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield node, "return None"
    elif isinstance(node, (ast.Expr, ast.Raise)):
        yield node, "pass"
    elif isinstance(node, ast.Continue):
        yield node, "break"
    elif isinstance(node, ast.Break):
        yield node, "continue"
    elif isinstance(node, ast.Assign) and not any(isinstance(target, (ast.Name, ast.Tuple)) for target in node.targets):
        yield node, "pass"
    elif isinstance(node, ast.AugAssign):
        yield node, "pass"
        if type(node.op) in OPERATORS:
            yield node, ast.unparse(ast.AugAssign(node.target, OPERATORS[type(node.op)], node.value))


def _of_expression(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]], node.comparators)
    elif isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            ops = [*node.ops[:index], COMPARISONS[type(op)], *node.ops[index + 1 :]]
            yield ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.BinOp(node.left, OPERATORS[type(node.op)], node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for index in range(len(node.values)):
            left = [value for place, value in enumerate(node.values) if place != index]
            yield left[0] if len(left) == 1 else ast.BoolOp(node.op, left)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.IfExp) and list(_negated(node.test)):
        yield ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Constant):
        yield from (ast.Constant(value) for value in _of_value(node.value))
    elif isinstance(node, ast.Call):
        yield from _of_call(node)


def _negated(condition: ast.expr) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """A comparison is negated where it stands, or moved by its bound."""
    if not isinstance(condition, ast.Compare) and not (
        isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not)
    ):
        yield condition, f"(not ({ast.unparse(condition)}))"


def _of_value(value: object) -> Iterator[bool | int | float]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
        if value > 0:
            yield value - 1
    elif isinstance(value, float):
        yield value * 1.01 if value else 1.0


def _of_call(node: ast.Call) -> Iterator[ast.Call]:
    if isinstance(node.func, ast.Name) and node.func.id in CALLS:
        yield ast.Call(ast.Name(CALLS[node.func.id]), node.args, node.keywords)
    elif isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
        yield ast.Call(ast.Attribute(node.func.value, CALLS[node.func.attr]), node.args, node.keywords)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
