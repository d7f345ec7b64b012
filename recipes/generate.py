"""Write the recipes of this folder, and the configuration's JSON schema: `python recipes/generate.py`."""

from pathlib import Path

from ds_higgs.commands.init import start_command
from ds_higgs.commands.recipes.goals import CARDS, GOALS
from ds_higgs.commands.recipes.recipe import Places, render
from ds_higgs.config.schema import SCHEMA_FILE, render_schema

FOLDER = Path(__file__).parent
NAMES = [f"{goal}_{card}.yaml" for goal in GOALS for card in CARDS]


def render_recipe(name: str) -> str:
    """The text of one file, for typical data of its goal."""
    goal_name, _, card_name = name.removesuffix(".yaml").partition("_")
    goal, card = GOALS[goal_name], CARDS[card_name]
    hours = goal.typical_samples * goal.typical_seconds / 3600
    opening = [
        start_command(card, f"recipes/{name}"),
        "",
        f"For {goal.data}, on {card.name}; steps are reckoned for {goal.typical_samples:,} samples, {hours:.1f} h.",
        "A place to start from, not a proven recipe. `ds-higgs init` writes one for your data and machine.",
    ]
    schema = "../ds_higgs/config/schema.json"
    return render(goal, card, Places(), num_samples=goal.typical_samples, opening=opening, schema=schema)


if __name__ == "__main__":
    SCHEMA_FILE.write_text(render_schema(), encoding="utf-8")
    for file_name in NAMES:
        (FOLDER / file_name).write_text(render_recipe(file_name), encoding="utf-8")
