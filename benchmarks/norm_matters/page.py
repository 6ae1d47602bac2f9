"""docs/paper.md from the results: a table of verdicts, then each claim with its setup, arms, checks and picture.

>>> page.write(page.PAGE, {"cpu": results_of("cpu"), "gpu": results_of("gpu")})
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import figure
from benchmarks.norm_matters.claim import Claim
from benchmarks.norm_matters.claims import CLAIMS
from benchmarks.norm_matters.judge import complete, verdict
from benchmarks.norm_matters.run import Arms, Budget, ByArm, Run
from benchmarks.norm_matters.runner import Results
from benchmarks.stamp import markdown

PAGE = Path(__file__).resolve().parents[2] / "docs" / "paper.md"
INTRO = (Path(__file__).parent / "intro.md").read_text()
TALL = {"weight_decay": 6.4, "half": 4.6}  # inches


def summary(budget: Budget, results: Results, names: Iterable[str]) -> str:
    """A line a claim, for the terminal."""
    return "\n".join(
        f"{CLAIMS[name].number}. {CLAIMS[name].says}: {_verdict(CLAIMS[name], budget, results)}" for name in names
    )


def write(path: Path, results: Mapping[Any, Results]) -> Path:
    """The page, and a picture beside it for every claim and budget that has all its runs."""
    for claim in CLAIMS.values():
        for budget, of_budget in results.items():
            arms = claim.arms(budget)
            if complete(arms, of_budget.by_arm(arms)):
                _draw(claim, of_budget.by_arm(arms), path.parent / _picture(path, claim.name, budget))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(path, results))
    return path


def _draw(claim: Claim, by_arm: ByArm, path: Path) -> None:
    figure.save(lambda canvas: claim.draw(canvas, by_arm), path, TALL.get(claim.name, figure.HEIGHT))


def text(path: Path, results: Mapping[Any, Results]) -> str:
    head = ["", "claim", "paper", *(f"{budget} budget" for budget in results)]
    lines = [_line(claim, results) for claim in CLAIMS.values()]
    sections = [_section(path, claim, results) for claim in CLAIMS.values()]
    return "\n\n".join([INTRO.strip(), markdown(head, lines), *sections]) + "\n"


def _line(claim: Claim, results: Mapping[Any, Results]) -> list[str]:
    verdicts = (f"**{_verdict(claim, budget, of_budget)}**" for budget, of_budget in results.items())
    return [str(claim.number), f"[{claim.says}](#{claim.number}-{claim.name})", claim.paper, *verdicts]


def _verdict(claim: Claim, budget: Budget, results: Results) -> str:
    arms = claim.arms(budget)
    by_arm = results.by_arm(arms)
    word, checks = verdict(budget, arms, by_arm, claim.rules)
    claimed = [check for check in checks if check.claimed]
    if word == "not run":
        done, wanted = sum(map(len, by_arm.values())), sum(map(len, arms.values()))
        return f"{word} ({done} of {wanted} runs)" if done else word
    held = sum(check.holds for check in claimed)
    return f"{word} ({held} of {len(claimed)} checks)" if word == "not reproduced" else word


def _section(path: Path, claim: Claim, results: Mapping[Any, Results]) -> str:
    parts = [f"## {claim.number} {claim.name}", f"**{claim.says}.** Paper: {claim.paper}.", claim.notes]
    return "\n\n".join([*parts, *(_part(path, claim, budget, of_budget) for budget, of_budget in results.items())])


def _part(path: Path, claim: Claim, budget: Budget, results: Results) -> str:
    """One budget's part of a section."""
    arms = claim.arms(budget)
    by_arm = results.by_arm(arms)
    parts = [f"`python -m benchmarks.norm_matters --budget {budget} --only {claim.name}`: {_setup(arms)}"]
    parts.append(f"**{budget} budget: {_verdict(claim, budget, results)}.**")
    if any(by_arm.values()):
        parts.append(markdown(*claim.rows(by_arm)))
    if complete(arms, by_arm):
        _, checks = verdict(budget, arms, by_arm, claim.rules)
        parts.append("\n".join(f"- {check}{'' if check.claimed else ' (not of the paper)'}" for check in checks))
        parts.append(f"![{claim.says}]({_picture(path, claim.name, budget)})")
        parts += [f"Remark: {claim.remarks[budget]}"] if budget in claim.remarks else []
        parts.append(_where(by_arm))
    return "\n\n".join(parts)


def _setup(arms: Arms) -> str:
    """What the runs are, in a sentence."""
    runs = [run for each in arms.values() for run in each]
    run, seeds = runs[0], max(map(len, arms.values()))
    return f"{run.network}, {_task(run)}{_recipe(run)}, {seeds} seed{'s' * (seeds > 1)}, {len(runs)} runs."


def _task(run: Run) -> str:
    task = run.task
    train = f"{task.train:,} images to train on, " if task.train else ""
    return f"{task.source} at {task.side} × {task.side}, {train}{task.test:,} to test with"


def _recipe(run: Run) -> str:
    options = {name: value for name, value in run.recipe.items() if name not in ("rule", "precision", "accumulator")}
    return ", " + ", ".join(f"{name} {value}" for name, value in options.items()) if options else ""


def _where(by_arm: Mapping[str, list[dict[str, Any]]]) -> str:
    records = [record for each in by_arm.values() for record in each]
    machines = sorted({record["stamp"].get("gpu", record["stamp"]["machine"]) for record in records})
    dates = sorted({record["stamp"]["date"] for record in records})
    torches = sorted({record["stamp"]["torch"] for record in records})
    minutes = sum(record["seconds"] for record in records) / 60
    return f"{', '.join(machines)}, torch {', '.join(torches)}, {' to '.join(dates)}, {minutes:.0f} minutes in all."


def _picture(path: Path, name: str, budget: Budget) -> str:
    return f"{path.stem}/{budget}_{name}.svg"
