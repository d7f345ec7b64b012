"""Every file in recipes/ is what is generated, loads, fits its card by the estimate, and trains on the tiny base."""

import json
import math
import sys

import pytest
import yaml

from ds_higgs.commands.recipes.goals import CARDS, GOALS
from ds_higgs.commands.recipes.recipe import plan
from ds_higgs.config.file import load_config
from ds_higgs.config.schema import SCHEMA_FILE, render_schema
from ds_higgs.sizing.inputs import BatchShape
from ds_higgs.sizing.memory import GIB
from ds_higgs.training.memory_plan import build_estimator
from tests.support import launching
from tests.support.launching import ROOT

FOLDER = ROOT / "recipes"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
# A target of 20 s and a reference of 10 s at 25 frames a second, and their texts.
POSITIONS = 30 * 25 + 150


def generator():
    sys.path.insert(0, str(FOLDER))
    try:
        import generate

        return generate
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("generate", None)


def test_files_are_as_generated():
    made = generator()
    assert sorted(made.NAMES) == RECIPES
    for name in RECIPES:
        assert (FOLDER / name).read_text(encoding="utf-8") == made.render_recipe(name), "run recipes/generate.py"
    assert SCHEMA_FILE.read_text(encoding="utf-8") == render_schema(), "run recipes/generate.py"


def test_the_schema_knows_the_keys_and_the_recipes_name_it():
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    sections = {name: schema["$defs"][name.capitalize() + "Config"]["properties"] for name in schema["properties"]}
    for name in RECIPES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        [line] = [line for line in text.splitlines() if "$schema=" in line]
        assert (FOLDER / line.partition("$schema=")[2]).resolve() == SCHEMA_FILE
        for section, keys in yaml.safe_load(text).items():
            assert set(keys) <= set(sections[section])


@pytest.mark.parametrize("name", RECIPES)
def test_it_fits_its_card_by_the_estimate(name):
    config = load_config(FOLDER / name, {})
    card = CARDS[name.removesuffix(".yaml").partition("_")[2]]
    estimator = build_estimator(config, world_size=card.num_gpus)
    assert estimator.fits(BatchShape.typical(1, POSITIONS), checkpoint_every=1, memory_bytes=card.gib * GIB)


@pytest.mark.parametrize("goal", GOALS.values(), ids=list(GOALS))
def test_numbers_follow_from_the_data(goal):
    numbers = plan(goal, num_samples=1000)
    assert numbers.samples_per_step == goal.samples_per_step
    assert numbers.steps_per_epoch == math.ceil(1000 / goal.samples_per_step)
    assert numbers.warmup_steps == max(1, round(0.03 * numbers.total_steps))
    assert plan(goal, num_samples=3).samples_per_step == 3


@pytest.mark.slow
def test_each_trains_for_two_steps(tiny_base, example_dir, tmp_path):
    two = json.loads((example_dir / "train.json").read_text(encoding="utf-8"))[:2]
    (tmp_path / "two.json").write_text(json.dumps(two))
    arguments = [tiny_base, tmp_path / "two.json", example_dir, tmp_path]
    done = launching.run_ranks(1, "-m", "tests.integration.workers.recipes", *arguments)
    assert done.returncode == 0, done.stdout[-4000:]
    for name in RECIPES:
        lines = (tmp_path / name.removesuffix(".yaml") / "metrics.jsonl").read_text().splitlines()
        steps = [line for line in map(json.loads, lines) if line["event"] == "step"]
        assert [step["step"] for step in steps] == [1, 2], name
        assert all(math.isfinite(step["loss"]) for step in steps)
