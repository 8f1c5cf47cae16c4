"""What a verification found, as text, as a notebook's table and as JSON."""

import dataclasses
import html
from collections.abc import Sequence
from typing import Any

from jaxengine.coordinate import Contract

MARKS = {True: "holds", False: "FAILS"}


@dataclasses.dataclass(frozen=True)
class Check:
    """One axis of the contract: what was changed, whether every bit stayed, and the figures or the first difference."""

    axis: str
    what: str
    holds: bool
    found: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Verification:
    """All checks of one model on one machine. True where every one held."""

    contract: Contract
    refused: list[str]  # compiled steps that are not used here, because they round differently
    checks: Sequence[Check]

    @property
    def holds(self) -> bool:
        return bool(self.checks) and all(check.holds for check in self.checks)

    def __bool__(self) -> bool:
        return self.holds

    def __str__(self) -> str:
        wide = max((len(check.what) for check in self.checks), default=0)
        lines = [
            f"{check.axis:<6}{check.what:<{wide}}  {MARKS[check.holds]}  {check.seconds:6.1f} s  {check.found}"
            for check in self.checks
        ]
        return "\n".join([*self._head(), *lines, self._verdict()])

    def _head(self) -> list[str]:
        parts, refused = self.contract.parts, ", ".join(self.refused)
        model, kernels = parts["model"], parts["kernels"]["name"]
        return [
            f"{model['architecture']}, {model['dtype']}, kernels {kernels} on {parts['device']['kind']}, jax {parts['jax']}, "
            f"jaxlib {parts['jaxlib']}, contract {self.contract.digest}",
            f"steps refused on this machine: {refused}"
            if refused
            else "every compiled step gives the base step's bits",
        ]

    def _verdict(self) -> str:
        failed = sorted({check.axis for check in self.checks if not check.holds})
        return (
            f"the contract FAILS on {', '.join(failed)}" if failed else f"the contract holds: {len(self.checks)} checks"
        )

    def _repr_html_(self) -> str:
        cell = lambda text, style="": f"<td style='text-align:left;{style}'>{html.escape(text)}</td>"
        color = lambda check: f"background:hsl({120 if check.holds else 0},80%,85%)"
        rows = "".join(
            f"<tr>{cell(c.axis)}{cell(c.what)}{cell(MARKS[c.holds], color(c))}{cell(f'{c.seconds:.1f} s')}{cell(c.found)}</tr>"
            for c in self.checks
        )
        head = "".join(f"<div>{html.escape(line)}</div>" for line in self._head())
        return f"<div>{head}<table>{rows}</table><b>{html.escape(self._verdict())}</b></div>"

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json.dumps."""
        return {
            "holds": self.holds,
            "digest": self.contract.digest,
            "contract": self.contract.parts,
            "refused": self.refused,
            "checks": [dataclasses.asdict(check) for check in self.checks],
        }
