"""The configuration's JSON schema, with which editors complete keys and mark mistakes in a YAML file."""

import json
from pathlib import Path
from typing import Any

from ds_higgs.config.sections import Config

SCHEMA_FILE = Path(__file__).with_name("schema.json")  # shipped; a test holds that it is `render_schema()`


def build_schema() -> dict[str, Any]:
    """The schema of a whole configuration file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Config.model_json_schema()


def render_schema() -> str:
    """The text of SCHEMA_FILE."""
    return json.dumps(build_schema(), indent=2) + "\n"
