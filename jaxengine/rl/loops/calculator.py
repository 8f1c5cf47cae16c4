"""A calculator for text that a model wrote: arithmetic on numbers and nothing else, bounded in size."""

import ast
import math
import operator
import re

MAX_CHARACTERS = 200  # of an expression
MAX_BITS = 1024  # of any integer in the computation
DIGITS = 10  # significant digits of a result that is no integer

_ARITHMETIC = re.compile(r"[0-9eE.+\-*/%() ]*")  # is matched before parsing, because other text makes the parser warn

Number = int | float
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def calculate(expression: str) -> str:
    """The value of `expression` as text: numbers, parentheses, + - * / // % and **. "12+30" is "42", "7/2" is "3.5".

    Raises ValueError for other text, a division by zero, and numbers that are too large.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"an expression has at most {MAX_CHARACTERS} characters, got {len(expression)}")
    if not _ARITHMETIC.fullmatch(expression):
        raise ValueError(f"arithmetic on numbers only, got {expression!r:.80}")
    try:
        return _shown(_value(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, ZeroDivisionError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"no value: {getattr(error, 'msg', error)}") from error


def _value(node: ast.expr) -> Number:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) * math.log2(abs(left) + 2) > MAX_BITS:
            raise ValueError(f"{left}**{right} is too large")
        return _bounded(_BINARY[type(node.op)](left, right))
    raise ValueError(f"arithmetic on numbers only, got {ast.unparse(node)!r:.80}")


def _bounded(value: object) -> Number:
    """`value`, where it is a finite real number of bounded size; else raises ValueError. (-8)**0.5 is complex."""
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise ValueError(f"the value has more than {MAX_BITS} bits")
    elif not isinstance(value, float) or not math.isfinite(value):
        raise ValueError(f"the value {value} is no finite real number")
    return value


def _shown(value: Number) -> str:
    return str(int(value)) if isinstance(value, int) or value.is_integer() else f"{value:.{DIGITS}g}"
