"""A refusal: why a norm stays as it is, as a type of its own, so that no text is ever taken for a norm.

>>> print(Refusal.of("has no running statistics"))
has no running statistics
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """The reason in words, which `str()` gives."""

    reason: str

    def __str__(self) -> str:
        return self.reason

    @classmethod
    def of(cls, reason: "Refusal | str | None") -> "Refusal | None":
        """A reason as a pass of a user's may give it: a text, too; none, or an empty one, is no refusal."""
        return reason if isinstance(reason, Refusal) else cls(reason) if reason else None
