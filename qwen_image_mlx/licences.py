"""The licences of released weights."""

from __future__ import annotations

from typing import NamedTuple


class Licence(NamedTuple):
    """The licence of released weights.

    Attributes:
        text: its name and, in short, what it does not allow.
        link: where its text is.
        key: its name on the hub's cards, if what is made from the weights stays under it; else "".
    """

    text: str
    link: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.link})"


APACHE = Licence("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")
