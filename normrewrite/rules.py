"""Rules: which site gets which target, by name. First match wins."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

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
    if isinstance(rules, str):
        raise NormRewriteError(
            f"rules is the text {rules!r}; write a mapping, as in {{'layer1.*': 'linf', 'stem.bn': None}}."
        )
    pairs = rules.items() if isinstance(rules, Mapping) else rules or ()
    return [(pattern, KEEP if target is None else target) for pattern, target in pairs]


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
