"""The outcome of a group of checks: figures, findings and one sentence. Importable without MLX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

# From the best to the worst; a group's verdict is that of its worst finding.
VERDICTS = ("ok", "odd", "slow", "lost", "wrong")
SELF_TESTS = "QWEN_IMAGE_DOCTOR_"  # prefix of the variables of self-tests
FALSIFY = "QWEN_IMAGE_DOCTOR_FALSIFY"  # a self-test: results of the check with this name are multiplied by 1.01
CRASH = "QWEN_IMAGE_DOCTOR_CRASH"  # a self-test: the process of this group kills itself
HANG = "QWEN_IMAGE_DOCTOR_HANG"  # a self-test: the process of this group never ends


class Finding(NamedTuple):
    """A fault or a warning.

    Attributes:
        verdict: one of `VERDICTS`.
        sentence: the fault, and the cure.
    """

    verdict: str
    sentence: str


@dataclass
class Outcome:
    """The outcome of one group.

    Attributes:
        summary: one sentence, used without findings.
        figures: measured values by name, nested as is useful. A name ends with its unit: `_s`, `_gbs` (10^9 bytes a
            second), `_gflops`, `_bytes`, `_error` (relative), `_ratio`.
        findings: faults and warnings.
    """

    summary: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def find(self, verdict: str, sentence: str) -> None:
        """Adds a finding."""
        self.findings.append(Finding(verdict, sentence))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: verdict, sentence, findings, figures."""
        worst = max(self.findings, key=lambda found: VERDICTS.index(found.verdict), default=None)
        return {
            "verdict": worst.verdict if worst else "ok",
            "sentence": worst.sentence if worst else self.summary,
            "findings": [found._asdict() for found in self.findings],
            "figures": self.figures,
        }


def amount(nbytes: float) -> str:
    """Bytes in words."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
