"""Options stand once: what click takes, what functions in Python take and what histories tell are the fields of a class."""

import ast
import inspect
import warnings
from collections.abc import Callable
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.api.advise import advise
from normrewrite.api.bench import bench
from normrewrite.api.build import build
from normrewrite.api.export import ExportCall
from normrewrite.api.finetune import FinetuneCall
from normrewrite.cli import app
from normrewrite.cli.fields import parameters
from normrewrite.cli.jobs import JOBS, Job
from normrewrite.commands import words
from normrewrite.commands.source import Source
from normrewrite.norms import GAINS
from normrewrite.options.convert import Convert, Gain, PlanOptions
from normrewrite.options.export import Export, ExportOptions
from normrewrite.options.fields import choices, flag_of, listed, option, options, quiet, takes
from normrewrite.options.finetune import Finetune, RecipeOptions
from normrewrite.options.groups import Source as Named
from normrewrite.training.recipe import Recipe
from tests.conftest import ROOT

PRINTED = {"as_json", "quiet", "help"}
PYTHON: dict[str, Callable[..., Any]] = {
    **{name: getattr(nr, name) for name in ("convert", "convert_", "plan", "export", "finetune", "finetune_")},
    **{
        name: getattr(nr, name)
        for name in ("calibrate", "calibrate_", "verify", "update_norms", "reestimate_", "correct_biases_")
    },
    "advise": advise,
    "bench": bench,
    "build": build,
}
CALLED = sorted(PYTHON.keys() - {"convert", "convert_", "plan", "export", "correct_biases_"})


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_click_takes_the_fields_of_a_class(job: Job) -> None:
    command = app.commands[job.name]
    taken = {parameter.name: parameter for parameter in command.params if parameter.name not in PRINTED}
    known = {each.name: each for each, _ in listed(job.options)}
    assert list(taken) == list(known) and known.keys() == {each.name for each in fields(job.options)}
    least = [value for each in known.values() if each.default is MISSING for value in _given(taken[each.name])]
    values = command.make_context(job.name, least).params
    for name, each in known.items():
        assert each.default is MISSING or values[name] == each.default
        if name in choices(job.options):
            kind = taken[name].type
            assert isinstance(kind, click.Choice) and tuple(kind.choices) == choices(job.options)[name]
        if isinstance(taken[name], click.Option):
            assert flag_of(each) in taken[name].opts and taken[name].multiple == isinstance(each.default, tuple)


def _given(parameter: click.Parameter) -> list[str]:
    return ["file"] if isinstance(parameter, click.Argument) else [parameter.opts[0], "file"]


def test_no_default_of_an_option_is_written_anywhere_else() -> None:
    """A parameter of its name in the rooms that hand options on has none."""
    names = {each.name for job in JOBS for each, _ in listed(job.options)}
    where = [path for room in ("cli", "commands", "api") for path in (ROOT / "normrewrite" / room).glob("*.py")]
    again = [
        f"{path.name}: {function.name}({name})"
        for path in [*where, ROOT / "normrewrite" / "training" / "recipe.py"]
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for name in _with_default(function) & names
    ]
    assert again == ["plan.py: require(expect)"]  # which Python programs call


def _with_default(function: ast.FunctionDef) -> set[str]:
    given = function.args
    places = [*given.posonlyargs, *given.args][-len(given.defaults) :] if given.defaults else []
    named = [name for name, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is not None]
    return {argument.arg for argument in [*places, *named]}


@pytest.mark.parametrize("name", PYTHON)
def test_python_shows_what_it_takes(name: str) -> None:
    shown = inspect.signature(PYTHON[name]).parameters
    assert all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in shown.values())
    assert all(each.annotation is not inspect.Parameter.empty for each in shown.values()) and "options" not in shown
    with pytest.raises(nr.NormRewriteError, match=r"no option 'optoin'\..* Options: \w+"):
        PYTHON[name](optoin=1)


@pytest.mark.parametrize(
    ("command", "names", "shared"),
    [
        (Convert, ("plan", "convert", "convert_"), {"to", "rules", *(each.name for each in fields(PlanOptions))}),
        (Export, ("export",), {each.name for each in fields(ExportOptions)}),
        (Finetune, ("finetune", "finetune_"), {each.name for each in fields(Recipe)}),
    ],
)
def test_the_command_s_options_are_python_s(command: type, names: tuple[str, ...], shared: set[str]) -> None:
    for name in names:
        shown = inspect.signature(PYTHON[name]).parameters
        assert shared <= shown.keys()
        known = {each.name: each for each, _ in listed(command)}
        for option_name in shared & known.keys() - {"to", "rules"}:
            assert shown[option_name].default == known[option_name].default


def test_python_s_positions_are_as_ever() -> None:
    places = {
        name: [
            each.name for each in inspect.signature(PYTHON[name]).parameters.values() if each.kind != each.KEYWORD_ONLY
        ]
        for name in PYTHON
    }
    assert places["convert"] == places["convert_"] == places["plan"] == ["model", "to"]
    assert places["export"] == ["model", "example_inputs", "path"] and places["build"] == ["model", "output"]
    assert places["verify"] == ["a", "b", "inputs", "labels"] and places["bench"] == ["a", "b", "inputs"]
    assert places["calibrate"] == places["calibrate_"] == ["twin", "data"]
    assert places["reestimate_"] == ["model", "data"] and places["correct_biases_"] == ["model", "original", "data"]
    assert places["finetune"] == places["finetune_"] == places["advise"] == places["update_norms"] == ["model", "data"]


def test_a_planted_option_is_in_help_in_python_and_in_the_history(tmp_path: Path) -> None:
    @options
    class Shared:
        colour: str = option("The colour of the nodes.", default="red")

    @options
    class Convert(Named, Shared):
        """Paint."""

    @options
    class Call(Shared):
        model: str = field(kw_only=False)

    @takes(Call)
    def paint(options: Call) -> str:
        return f"{options.model} {options.colour}"

    command = click.Command("paint", params=parameters(Convert))
    text = command.get_help(click.Context(command))
    assert "--colour TEXT" in text and "The colour of the nodes.  [default: red]" in text
    assert inspect.signature(paint).parameters["colour"].default == "red"
    assert paint("twin") == "twin red" and paint("twin", colour="blue") == "twin blue"
    asked = Convert(model=_file(tmp_path), colour="blue")
    assert words.step(Source.of(asked), asked)["command"] == ["convert", "model.pt", "--colour", "blue"]
    asked = Convert(model=asked.model, colour="red")
    assert words.step(Source.of(asked), asked)["command"] == ["convert", "model.pt"]


def test_the_words_of_a_command_leave_out_where_it_writes(tmp_path: Path) -> None:
    asked = Convert(
        model=_file(tmp_path),
        to="l1",
        rules=("a=b",),
        dry_run=True,
        expect=3,
        force=True,
        output=tmp_path / "x.pt",
        mean=[0.5, 0.25],
        allow=("a:b",),
        trust=True,
    )
    told = ["convert", "model.pt", "--allow", "a:b", "--trust", "--to", "l1", "--rule", "a=b", "--mean", "0.5,0.25"]
    assert words.step(Source.of(asked), asked)["command"] == told


def _file(folder: Path) -> Path:
    torch.save({"weight": torch.zeros(2)}, folder / "model.pt")
    return folder / "model.pt"


@pytest.mark.parametrize("name", CALLED)
def test_a_callback_s_former_name_is_taken_with_a_warning(name: str) -> None:
    assert inspect.signature(PYTHON[name]).parameters["progress"].default is quiet
    with pytest.warns(DeprecationWarning, match="each= is called progress= now") as caught, pytest.raises(TypeError):
        PYTHON[name](each=print)  # without the rest
    assert caught[0].filename == __file__
    with pytest.raises(TypeError, match="former name of progress"):
        PYTHON[name](each=print, progress=print)


def test_both_names_of_a_callback_are_called(net: nn.Module) -> None:
    x, seen = torch.randn(4, 3, 5, 5), list[int]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        nr.verify(net, net, x, batch_size=2, each=seen.append)  # type: ignore[call-arg]
    nr.verify(net, net, x, batch_size=2, progress=seen.append)
    assert seen == [2, 2, 2, 2]


def test_words_that_help_does_not_wait_for_are_the_project_s() -> None:
    assert get_args(Gain) == GAINS


def test_every_choice_of_a_training_is_the_recipe_s() -> None:
    names = {each.name for each in fields(RecipeOptions)}
    assert names == {each.name for each in fields(Recipe)}
    assert names < {each.name for each in fields(Finetune)} and names < {each.name for each in fields(FinetuneCall)}
    assert {each.name for each in fields(ExportOptions)} < {each.name for each in fields(ExportCall)}


def test_options_are_frozen(net: nn.Module) -> None:
    given = ExportCall(net, Tensor(), "x.onnx")
    with pytest.raises(AttributeError):
        given.opset = 21  # type: ignore[misc]


@pytest.mark.parametrize("function", [nr.convert, nr.plan, nr.finetune, nr.calibrate])
def test_a_keyword_that_there_is_not_is_python_s_error_and_ours(function: Any, net: nn.Module) -> None:
    for kind in (nr.NormRewriteError, TypeError):
        with pytest.raises(kind, match="there is no option 'includ'"):
            function(net, "l1", includ="x")
