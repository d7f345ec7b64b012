"""`ds-higgs init`: a commented configuration from the data and the machine; makes manifests where there are none."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ds_higgs.commands.init_facts import DataFacts, look_at, look_at_gpus
from ds_higgs.commands.manifest import describe_made, make_manifests
from ds_higgs.commands.recipes.goals import CARDS, GOALS, Card, Goal, find_card
from ds_higgs.commands.recipes.recipe import Places, render
from ds_higgs.config.file import load_config
from ds_higgs.config.schema import SCHEMA_FILE
from ds_higgs.data.chatml import parse_sample
from ds_higgs.data.manifest import read_manifest
from ds_higgs.data.problems import BadSampleError
from ds_higgs.errors import UserError
from ds_higgs.files import write_atomically


@dataclass(frozen=True)
class InitOptions:
    """What the user says; the rest is looked up.

    card: one of CARDS; None: this machine. validation: a manifest; share: to hold out of recordings.
    """

    goal: str
    base: str
    card: str | None = None
    validation: Path | None = None
    share: float = 0.05


def make_config(source: Path, out: Path, options: InitOptions) -> Iterator[str]:
    """Write a configuration for `source` (a manifest, or recordings) to `out`; lines on what was found and made.

    Raises:
        UserError: the source cannot be used, or a file to be written is there already.
    """
    _refuse_existing(out)
    train, validation = source, options.validation
    if not _is_manifest(source):
        train, validation = out.parent / "train.json", out.parent / "val.json"
        _refuse_existing(train, validation)
        made = make_manifests(source, train, share=options.share, validation=validation)
        yield from describe_made(source, made)
    facts = look_at(train)
    yield from facts.describe()
    goal = GOALS[options.goal]
    card = CARDS[options.card] if options.card else find_card(*look_at_gpus())
    places = Places(
        train=str(train),
        validation=None if validation is None else str(validation),
        output=str(out.parent / "run"),
        base=options.base,
    )
    opening = _opening(goal, card, facts, out)
    text = render(goal, card, places, num_samples=facts.num_samples, opening=opening, schema=str(SCHEMA_FILE))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text.encode())
    load_config(out, {})
    yield f"{out}: for {goal.name} on {card.name}; next: {start_command(card, out)}"


def start_command(card: Card, config: Path | str) -> str:
    """How a training with `config` is started on such a machine."""
    if card.num_gpus > 1:
        return f"deepspeed --num_gpus {card.num_gpus} --module ds_higgs train -c {config}"
    return f"ds-higgs train -c {config}"


def _opening(goal: Goal, card: Card, facts: DataFacts, out: Path) -> list[str]:
    lines = [
        f"{goal.name}, on {card.name}:  {start_command(card, out)}",
        "",
        "A place to start from, not a proven recipe. Found:",
        *(f"  {line}" for line in facts.describe()),
    ]
    hint = _goal_hint(goal, facts)
    return [*lines, f"  {hint}"] if hint else lines


def _goal_hint(goal: Goal, facts: DataFacts) -> str | None:
    """Where the data does not look like the goal."""
    if goal.name == "voice" and facts.speakers > 1:
        return f"{facts.speakers} speakers: the goal `voice` is meant for {goal.data}"
    if goal.name == "language" and facts.hours < 25:
        return f"{facts.hours:.1f} h: the goal `language` is meant for {goal.data}"
    return None


def _is_manifest(source: Path) -> bool:
    """Whether `source` is a manifest of ChatML samples already, by its first one."""
    if source.suffix not in (".json", ".jsonl") or not source.is_file():
        return False
    first = next(iter(read_manifest(source)), None)
    try:
        parse_sample(None if first is None else first.data)
    except BadSampleError:
        return False
    return True


def _refuse_existing(*files: Path) -> None:
    for file in files:
        if file.exists():
            raise UserError(f"{file}: exists already, and is left as it is; expected a new name (-o)")
