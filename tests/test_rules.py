"""Patterns of names, and which target each site gets."""

import pytest
from torch import nn

import normrewrite as nr
from normrewrite import rules
from normrewrite.sites import Site, find


def site(*names: str) -> Site:
    return Site(names, nn.BatchNorm1d(2), ())


@pytest.mark.parametrize(
    ("pattern", "names", "fits"),
    [
        ("layer1.0.bn1", ["layer1.0.bn1"], True),
        ("layer1.0.bn", ["layer1.0.bn1"], False),  # the whole name
        ("0.bn1", ["layer1.0.bn1"], False),
        ("layer?.*.bn1", ["layer1.0.bn1"], True),
        ("layer?.*.bn1", ["layer10.0.bn1"], False),
        ("layer[12].*", ["layer2.0.bn1"], True),
        ("layer[!12].*", ["layer2.0.bn1"], False),
        ("*", ["layer1.0.bn1"], True),
        ("*", [""], True),  # the model itself
        ("", [""], True),
        ("", ["bn"], False),
        ("LAYER1.*", ["layer1.0.bn1"], False),  # case counts on every system
        ("*.bn2", ["layer1.bn1", "layer1.bn2"], True),  # any name of a shared norm
        ("re:layer[12]\\.\\d+\\.bn1", ["layer1.12.bn1"], True),
        ("re:layer", ["layer1.0.bn1"], False),  # the whole name again
        ("re:.*(?<!0)\\.bn1", ["layer1.0.bn1"], False),
        ("re:a|b", ["b"], True),
        ("re:a|b", ["ab"], False),
        ("re:", [""], True),
        ("bn[0]", ["bn[0]"], True),  # a name itself, whatever it means in a pattern
        ("[red]x[/red]", ["[red]x[/red]"], True),
        ("re:b", ["re:b"], True),
        ("layer1.+", ["layer1.+"], True),  # no regular expression without re:
    ],
)
def test_matches(pattern: str, names: list[str], fits: bool) -> None:
    assert rules.matches(pattern, site(*names)) is fits


@pytest.mark.parametrize("pattern", ["re:(", "re:[", "re:*", "re:(?P<a>", "re:\\"])
def test_bad_expression(pattern: str) -> None:
    with pytest.raises(nr.NormRewriteError, match="Write re: and a Python regular expression"):
        rules.matches(pattern, site("bn"))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("stem.bn=keep", ("stem.bn", "keep")),
        ("layer1.*=topk:1%", ("layer1.*", "topk:1%")),
        ("re:.*(?=bn)bn=l1", ("re:.*(?=bn)bn", "l1")),
        ("=", None),
        ("", None),
        ("stem.bn", None),
        ("stem.bn=", None),
        ("=l1", None),
    ],
)
def test_parse_rule(text: str, parsed: tuple[str, str] | None) -> None:
    if parsed is not None:
        assert rules.parse_rule(text) == parsed
        return
    with pytest.raises(nr.NormRewriteError, match="write PATTERN=TARGET, as in --rule"):
        rules.parse_rule(text)


@pytest.mark.parametrize(
    ("given", "pairs"),
    [
        (None, []),
        ({}, []),
        ([], []),
        ({"a": "l1", "b": None}, [("a", "l1"), ("b", "keep")]),
        ([("a", "l1"), ("a", "linf")], [("a", "l1"), ("a", "linf")]),
        ((("a", "keep"),), [("a", "keep")]),
    ],
)
def test_as_rules(given: object, pairs: list[tuple[str, str]]) -> None:
    assert rules.as_rules(given) == pairs  # type: ignore[arg-type]


def network() -> nn.Module:
    def block() -> nn.Module:
        return nn.ModuleDict({"bn1": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4)})

    return nn.ModuleDict({"stem": nn.BatchNorm2d(4), "layer1": block(), "layer2": block()})


def test_must_match_names_the_option_and_some_sites() -> None:
    found = find(network())
    rules.must_match(["stem", "layer?.bn1", "re:.*2"], found, "--include")
    with pytest.raises(
        nr.NormRewriteError, match=r"--rule 'head' matches none of 5 sites \(stem, layer1.bn1, .*inspect"
    ):
        rules.must_match(["stem", "head"], found, "--rule")


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        ({}, "l1 l1 l1 l1 l1"),
        ({"stem": None}, "keep l1 l1 l1 l1"),
        ({"stem": "keep", "layer1.*": "linf"}, "keep linf linf l1 l1"),
        ({"layer1.*": "linf", "*.bn1": "range", "stem": "topk:3"}, "topk:3 linf linf range l1"),  # first match wins
        ({"*.bn1": "range", "layer1.*": "linf"}, "l1 range linf range l1"),
        ({"re:.*2.*": "topk:1%", "*": None}, "keep keep topk:1% topk:1% topk:1%"),
        ([("layer1.bn1", "linf"), ("layer1.bn1", "range")], "l1 linf l1 l1 l1"),
    ],
)
def test_first_match_wins(given: dict[str, str | None], targets: str) -> None:
    plan = nr.plan(network(), "l1", rules=given)
    assert " ".join(choice.target for choice in plan.choices) == targets
    assert all(choice.reason == "kept by a rule" for choice in plan.kept)


@pytest.mark.parametrize(
    ("include", "exclude", "rewritten"),
    [
        ("layer1.*", (), ["layer1.bn1", "layer1.bn2"]),
        (["stem", "*.bn2"], (), ["stem", "layer1.bn2", "layer2.bn2"]),
        ((), "re:layer.*", ["stem"]),
        ("layer1.*", "*.bn1", ["layer1.bn2"]),  # exclude is stronger
        ((), ["stem", "layer2.*"], ["layer1.bn1", "layer1.bn2"]),
    ],
)
def test_include_and_exclude(include: str | list[str], exclude: str | list[str], rewritten: list[str]) -> None:
    plan = nr.plan(network(), include=include, exclude=exclude)
    assert [choice.site.name for choice in plan.rewritten] == rewritten
    assert {choice.reason for choice in plan.kept} <= {"not in --include", "in --exclude"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rules": {"stem": "l3"}}, "no such target"),
        ({"rules": {"head": "linf"}}, "--rule 'head' matches none"),
        ({"include": "head"}, "--include 'head' matches none"),
        ({"exclude": ["stem", "head"]}, "--exclude 'head' matches none"),
        ({"rules": {"re:(": None}}, "Python regular expression"),
    ],
)
def test_plan_refuses(options: dict[str, object], said: str) -> None:
    with pytest.raises(nr.NormRewriteError, match=said):
        nr.plan(network(), **options)  # type: ignore[arg-type]
