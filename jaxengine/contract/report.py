"""The results of a verification as text, as a notebook's table and as JSON."""

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
    """All checks of one model on one machine. True if every one held."""

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
        parts = self.contract.parts
        model, kernels = parts["model"], parts["kernels"]["name"]
        steps = "every compiled step gives the base step's bits"
        if self.refused:
            steps = f"steps refused on this machine: {', '.join(self.refused)}"
        return [
            f"{model['architecture']}, {model['dtype']}, kernels {kernels} on {parts['device']['kind']}, "
            f"jax {parts['jax']}, jaxlib {parts['jaxlib']}, contract {self.contract.digest}",
            steps,
        ]

    def _verdict(self) -> str:
        failed = sorted({check.axis for check in self.checks if not check.holds})
        if failed:
            return f"the contract FAILS on {', '.join(failed)}"
        return f"the contract holds: {len(self.checks)} checks"

    def _repr_html_(self) -> str:
        rows = "".join(map(_html_row, self.checks))
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


def _html_row(check: Check) -> str:
    color = f"background:hsl({120 if check.holds else 0},80%,85%)"
    mark = _html_cell(MARKS[check.holds], color)
    return (
        f"<tr>{_html_cell(check.axis)}{_html_cell(check.what)}{mark}"
        f"{_html_cell(f'{check.seconds:.1f} s')}{_html_cell(check.found)}</tr>"
    )


def _html_cell(text: str, style: str = "") -> str:
    return f"<td style='text-align:left;{style}'>{html.escape(text)}</td>"
