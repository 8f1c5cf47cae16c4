"""The model's chat template, rendered as the untrusted program that it is.

A template may do what Jinja's immutable sandbox and Hugging Face's helpers allow (`raise_exception`, `strftime_now`, `tojson`,
`namespace`, `range`, `dict`, loop controls, `{% generation %}`), less the filters and methods that no chat template needs, and sees
plain JSON values only. Bounded are
- its own length, and with it the time to compile it;
- every string and container, nested ones counted in full, and the rendered text: 1,000,000 + 4 x what was given, in characters and
  elements, checked before `*`, `~`, `join`, `replace`, padding and formatting make a value; whole numbers: 4,096 bits;
- all that is produced on the way: 64 x that; loop turns, calls, filters and outputs: a million;
- the time: five seconds of a monotonic clock, looked at on each of those, and on every operation between values. The clock stops nothing
  within one operation: the bounds on sizes keep each of them short.
"""

import functools
import json
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.filters import do_indent, make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from jaxengine.text.template_code import BoundedCode, Generation

MAX_TEMPLATE_CHARACTERS = 65_536
MAX_CHARACTERS, GROWTH, WORK = 1_000_000, 4, 64
MAX_STEPS = 1_000_000
MAX_SECONDS = 5.0
MAX_INTEGER_BITS = 4_096
MAX_PADDING = 99  # of a format's width, an indentation, a separator

_FILTERS = """abs attr capitalize count d default dictsort e escape first float groupby int items last length list lower map max min
reject rejectattr reverse safe select selectattr sort string title truncate unique upper wordcount""".split()
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        """capitalize casefold center count endswith find format index isalnum isalpha isascii isdecimal isdigit isidentifier
    islower isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust
    rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill""".split()
    ),
    dict: frozenset(["copy", "get", "items", "keys", "values"]),
    list: frozenset(["copy", "count", "index"]),
    tuple: frozenset(["count", "index"]),
    int: frozenset(),
    float: frozenset(),
    bytes: frozenset(),
    type: frozenset(),
}
_WIDE = r"[#0\- +]*(?:\*|\d{3,}|\d*\.(?:\*|\d{3,}))"  # the width of a %-format: three digits and more, or given as an argument


def render(source: str, variables: Mapping[str, Any], given: int) -> str:
    """The text that the template makes of `variables`, plain JSON values of `given` characters in all. Raises ValueError."""
    code = _compiled(source)
    environment = _Environment(given)
    try:
        return environment.concat(
            Template.from_code(environment, code, environment.make_globals(None)).generate(variables)
        )
    except _Refusal as error:
        raise ValueError(f"the chat template refused the messages: {error}") from None
    except SecurityError as error:
        raise ValueError(f"the chat template was stopped: {error}") from None
    except Exception as error:  # a template is somebody else's program: it may raise anything
        raise ValueError(f"the chat template failed, {type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> types.CodeType:
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise ValueError(f"a chat template may have at most {MAX_TEMPLATE_CHARACTERS} characters, got {len(source)}")
    try:
        environment = _Environment(0)
        return environment.compile(environment.parse(source))
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid, line {error.lineno}: {error.message}") from None
    except (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"the chat template cannot be compiled, {type(error).__name__}: {error}") from None


class _Refusal(TemplateError):
    """The template called raise_exception."""


class _Namespace(Namespace):
    """Jinja's, with no private attributes, and no text form through which its values could be multiplied."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "namespace"


class _Formatter(SandboxedFormatter):
    """`str.format` with bounded widths."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"\d{3}", format_spec):
            raise SecurityError(f"a width above {MAX_PADDING} in a format: {format_spec!r:.40}")
        return self._env.made(super().format_field(value, format_spec))  # type: ignore[attr-defined]


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of one rendering; it carries what is left of the bounds."""

    code_generator_class = BoundedCode
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self, given: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, Generation])
        self._limit = MAX_CHARACTERS + GROWTH * given
        self._work = WORK * self._limit
        self._steps = MAX_STEPS
        self._deadline = time.monotonic() + MAX_SECONDS
        self.finalize = self._output
        filters = {name: self.filters[name] for name in _FILTERS} | {
            "format": self._format,
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
            "tojson": self._tojson,
            "trim": self._trim,
        }
        self.filters = {name: self._bounded(function) for name, function in filters.items()}
        self.tests = {name: self._bounded(function) for name, function in self.tests.items()}
        self.globals = {
            "range": self.globals["range"],
            "dict": lambda *args, **items: dict(*args, **items),
            "namespace": _namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        if value.__name__ != "format":
            raise SecurityError(f"access to attribute {value.__name__!r} of a string is unsafe")
        return lambda *args, **fields: _Formatter(self).vformat(value.__self__, args, fields)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._step()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            args = (list(args[0]),) if obj.__name__ == "join" and len(args) == 1 else args
            self._check(_growth(obj.__name__, owner, args))
        elif getattr(obj, "catch_varargs", False) or getattr(obj, "catch_kwargs", False):
            self.made([*args, *kwargs.values()])  # a macro sees them as one tuple and one dict
        return self.made(super().call(context, obj, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._step()  # a key may be a tuple of any size
        return super().getitem(obj, argument)

    def compared(self, value: Any) -> Any:
        self._step()  # what was compared may have been of any size
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._step()
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    self._check(self._size(value) * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str):
            wide = re.search(("[%)]" if "%(" in left else "%") + _WIDE, left)
            self._check(float("inf") if wide else left.count("%") * (10 * self._size(right) + 1_500))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int):
            _check_bits(result.bit_length())
        return self.made(result)

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._step()
            yield value

    def joined(self, values: Iterable[Any]) -> str:
        return self.concat(map(str, values))

    def concat(self, parts: Iterable[str]) -> str:
        pieces, size = [], 0
        for part in parts:
            size += len(part)
            self._check(size)
            pieces.append(part)
        return self.made("".join(pieces))

    def made(self, value: Any) -> Any:
        """`value`, which an operation has just made, charged; a generator is charged when it runs."""
        if isinstance(value, types.GeneratorType):
            return self.counted(value)
        if isinstance(value, str | list | tuple | dict | set):
            self._check(self._size(value))
            self._work -= len(value)
            if self._work < 0:
                raise SecurityError(f"it made more than {WORK * self._limit} characters and elements")
        return value

    def _step(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise SecurityError(f"it took more than {MAX_STEPS} loop turns, calls and outputs")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it ran for more than {MAX_SECONDS} seconds")

    def _check(self, size: float) -> None:
        if size > self._limit:
            raise SecurityError(f"it makes a value of more than {self._limit} characters or elements")

    def _size(self, value: Any, known: dict[int, int] | None = None) -> int:
        """Characters and elements, as often as a text form would show them: `[x, x]` counts x twice, yet looks at it once."""
        if not isinstance(value, list | tuple | dict | set):
            return len(value) if isinstance(value, str) else 1
        known = {} if known is None else known
        if id(value) not in known:
            inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            known[id(value)] = 1 + sum(len(item) if type(item) is str else self._size(item, known) for item in inner)
        return known[id(value)]

    @pass_context
    def _output(self, context: Any, value: Any) -> Any:
        # As it takes the context, Jinja evaluates no constant expression while compiling, where nothing is bounded.
        self._step()
        return self.made(value)

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._step()
            return self.made(function(*args, **kwargs))

        return bounded

    def _format(self, value: Any, *args: Any, **fields: Any) -> str:
        return self.call_binop(None, "%", str(value), fields or args)

    def _indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        padding = width if isinstance(width, int) else len(width)
        self._check(len(str(value)) + padding * (1 + len(str(value).splitlines())))
        return do_indent(str(value), width, first, blank)

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        values = value if attribute is None else map(make_attrgetter(self, attribute), value)
        texts = [str(item) for item in values]
        self._check(_growth("join", str(d), (texts,)))
        return str(d).join(texts)

    def _replace(self, value: Any, old: str, new: str, count: int = -1) -> str:
        self._check(_growth("replace", str(value), (str(old), str(new))))
        return str(value).replace(str(old), str(new), count)

    def _trim(self, value: Any, chars: str | None = None) -> str:
        self._check(_growth("strip", str(value), (chars,)))
        return str(value).strip(chars)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers' own: no HTML escapes. Noncharacters stay themselves, for they are what guards a special token's spelling."""
        padding = indent if isinstance(indent, int) else len(indent or "")
        if max(padding, *map(len, separators or [""])) > MAX_PADDING:
            raise SecurityError(f"tojson with an indentation or separator of more than {MAX_PADDING} characters")
        encoder = json.JSONEncoder(ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
        text = self.concat(encoder.iterencode(value)) if indent is not None else encoder.encode(value)
        return (
            re.sub("[^\x00-\x7f\ufdd0-\ufdef]", lambda found: json.dumps(found[0])[1:-1], text)
            if ensure_ascii
            else text
        )


def _growth(method: str, text: str, args: tuple[Any, ...]) -> float:
    """The size of what the string method makes, or its time in the same unit, where these are not the size of `text`."""
    strings = [value for value in args if isinstance(value, str)]
    if method == "replace" and len(strings) == 2:
        return len(text) + text.count(strings[0]) * len(strings[1])
    if method == "join" and args:
        return len(text) * len(args[0]) + sum(len(item) for item in args[0] if isinstance(item, str))
    if method in ("center", "ljust", "rjust", "zfill"):
        return max((value for value in args if isinstance(value, int)), default=0)
    if method in ("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip") and strings:
        return len(text) * len(strings[0]) / WORK  # these search in time quadratic in the worst case
    return 0


def _check_bits(bits: int) -> None:
    if bits > MAX_INTEGER_BITS:
        raise SecurityError(f"it makes a whole number of more than {MAX_INTEGER_BITS} bits")


def _namespace(*args: Any, **attributes: Any) -> _Namespace:
    space = _Namespace()
    for name, value in dict(*args, **attributes).items():
        space[name] = value
    return space


def _raise_exception(message: Any) -> None:
    raise _Refusal(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > MAX_PADDING:
        raise SecurityError(f"strftime_now with a format of more than {MAX_PADDING} characters")
    return datetime.now().strftime(format)
