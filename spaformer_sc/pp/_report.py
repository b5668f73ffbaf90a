"""What `sf.pp.check` returns."""

from __future__ import annotations

import textwrap
from dataclasses import astuple, dataclass, fields
from html import escape
from typing import Literal

import pandas as pd

Level = Literal["ok", "note", "warning", "error"]
COLOURS = {"ok": "#2e7d32", "note": "#546e7a", "warning": "#a85400", "error": "#c62828"}
"""White letters can be read on all of these, and these on a light and on a dark page."""
WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes
    ----------
    level
        ``"ok"``; ``"note"``, good to know; ``"warning"``, the result may suffer; ``"error"``, ``sf.tl.impute`` refuses.
    subject
        What it is about.
    finding
        What was found.
    advice
        What to do, where the finding does not end with it.
    """

    level: Level
    subject: str
    finding: str
    advice: str = ""


@dataclass(frozen=True, repr=False)
class CheckReport:
    """What was found; a table in a notebook, text elsewhere.

    Attributes
    ----------
    title
        The data.
    findings
        What was found, one after the other.
    """

    title: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether ``sf.tl.impute`` takes the data: there is no error."""
        return not any(finding.level == "error" for finding in self.findings)

    @property
    def table(self) -> pd.DataFrame:
        """The findings as a data frame, with columns level, subject, finding and advice."""
        columns = [field.name for field in fields(Finding)]
        return pd.DataFrame([astuple(finding) for finding in self.findings], columns=columns)

    @property
    def verdict(self) -> str:
        """One sentence on all of it."""
        found = []
        for level in ("error", "warning"):
            n = sum(finding.level == level for finding in self.findings)
            found += [f"{n} {level}{'s' if n > 1 else ''}"] if n else []
        told = f" ({', '.join(found)})" if found else ""
        return f"can be imputed{told}" if self.ok else f"cannot be imputed as it is{told}"

    def __repr__(self) -> str:
        lines, before = [f"{self.title}: {self.verdict}"], ""
        for finding in self.findings:
            subject = "" if finding.subject == before else finding.subject
            before = finding.subject
            head = f"  {finding.level:<8} {subject:<15} "
            blank = " " * len(head)
            lines += textwrap.wrap(finding.finding, WIDTH, initial_indent=head, subsequent_indent=blank)
            if finding.advice:
                lines += textwrap.wrap(
                    f"→ {finding.advice}", WIDTH, initial_indent=blank, subsequent_indent=f"{blank}  "
                )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cell = "text-align:left;vertical-align:top;padding:3px 8px;border-top:1px solid rgba(128,128,128,.4)"
        badge = "color:#fff;border-radius:3px;padding:1px 6px;background:"
        rows = []
        for finding in self.findings:
            advice = f"<br/><b>→</b> {escape(finding.advice)}" if finding.advice else ""
            rows.append(
                f'<tr style="background:none"><td style="{cell}">'
                f'<span style="{badge}{COLOURS[finding.level]}">{finding.level}</span></td>'
                f'<td style="{cell};white-space:nowrap">{escape(finding.subject)}</td>'
                f'<td style="{cell}">{escape(finding.finding)}{advice}</td></tr>'
            )
        title = f"<b>{escape(self.title)}</b>: {escape(self.verdict)}"
        return (
            f'<div style="color:inherit">{title}<table style="border-collapse:collapse;margin:6px 0;color:inherit">'
            f"{''.join(rows)}</table></div>"
        )
