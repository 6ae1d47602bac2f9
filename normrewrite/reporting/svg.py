"""Elements of SVG as text, everything escaped: names come from the model, and may hold anything.

>>> tag("circle", cx=3, cy=4.25, r=1)
Markup('<circle cx="3" cy="4.25" r="1"/>')
"""

from collections.abc import Iterable

from markupsafe import Markup, escape

Value = str | float | None


def tag(name: str, *content: str, **attributes: Value) -> Markup:
    """One element. Content that is no Markup is escaped; an attribute's `_` stands for `-`, and a trailing one for nothing."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = Markup("").join(escape(part) for part in content)
    return Markup(f"<{name}{pairs}>{inner}</{name}>" if content else f"<{name}{pairs}/>")


def picture(width: float, height: float, label: str, content: Iterable[Markup], **attributes: Value) -> Markup:
    """A drawing of its own size in CSS pixels, that shrinks where there is less room; `label` for those who don't see it."""
    return tag(
        "svg",
        *content,
        viewBox=f"0 0 {_number(width)} {_number(height)}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
        **attributes,
    )


def path(*steps: str | float) -> str:
    """`path("M", 1, 2.5, "L", 3, 4)` -> `M 1 2.5 L 3 4`."""
    return " ".join(_number(step) for step in steps)


def _number(value: Value) -> str:
    return str(value) if not isinstance(value, float) else f"{value:.2f}".rstrip("0").rstrip(".")
