"""Rules: which site gets which target, by name. First match wins."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from normrewrite.errors import NormRewriteError
from normrewrite.sites import Site

KEEP = "keep"
Rules = Sequence[tuple[str, str]]


def matches(pattern: str, site: Site) -> bool:
    """Whether a dotted name, glob (`layer?.*.bn1`) or `re:` regular expression (whole name) fits any name of the site.

    A name itself always does, whatever its characters mean in a glob.
    """
    if pattern in site.names:
        return True
    if pattern.startswith("re:"):
        return any(_compiled(pattern).fullmatch(name) for name in site.names)
    return any(fnmatchcase(name, pattern) for name in site.names)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise NormRewriteError(f"pattern {pattern!r}: {error}. Write re: and a Python regular expression.") from error


def as_rules(rules: Mapping[str, str | None] | Rules | None) -> list[tuple[str, str]]:
    """`{"layer1.*": "linf", "stem.bn": None}` or pairs -> pairs; None means keep."""
    items: Any = rules.items() if isinstance(rules, Mapping) else () if rules is None else rules
    pairs = list(items) if isinstance(items, Iterable) and not isinstance(items, str) else [items]
    if not all(map(_is_rule, pairs)):
        raise NormRewriteError(
            f"rules is {rules!r}; write a mapping of patterns to targets, as in {{'layer1.*': 'linf', 'stem.bn': None}}."
        )
    return [(pattern, KEEP if target is None else target) for pattern, target in pairs]


def _is_rule(pair: Any) -> bool:
    """(pattern, target); whether there is such a target is for others to say."""
    whole = isinstance(pair, tuple | list) and len(pair) == 2
    return whole and isinstance(pair[0], str) and isinstance(pair[1], str | None)


def as_names(texts: Any, option: str) -> list[str]:
    """A text, or several."""
    names = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str) else [texts]
    if not all(isinstance(name, str) for name in names):
        raise NormRewriteError(f"{option} is {texts!r}; needed is a text or a sequence of them.")
    return names


def parse_rule(text: str) -> tuple[str, str]:
    """`PATTERN=TARGET` of the command line; a pattern may hold `=` itself."""
    pattern, equals, target = text.rpartition("=")
    if not equals or not pattern or not target:
        raise NormRewriteError(
            f"rule {text!r}: write PATTERN=TARGET, as in --rule 'layer1.*=linf' or --rule 'stem.bn=keep'."
        )
    return pattern, target


def must_match(patterns: Iterable[str], sites: Sequence[Site], option: str) -> None:
    """Raises where a pattern fits no site: a typing error would otherwise rewrite the wrong set in silence."""
    for pattern in patterns:
        if not any(matches(pattern, site) for site in sites):
            some = ", ".join(site.label for site in sites[:3])
            raise NormRewriteError(
                f"{option} {pattern!r} matches none of {len(sites)} sites ({some}, ...). "
                "See `normrewrite inspect` for their names."
            )
