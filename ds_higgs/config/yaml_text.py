"""Reads YAML as plain settings; what YAML would drop, run or repeat without a word is refused, with its line."""

from typing import Any

import yaml

from ds_higgs.errors import UserError

_CORE = "tag:yaml.org,2002:"
_TEXT = f"{_CORE}str"
_COLLECTIONS: dict[type[yaml.Node], str] = {yaml.MappingNode: f"{_CORE}map", yaml.SequenceNode: f"{_CORE}seq"}
MAX_VALUES = 100_000  # aliases of aliases can stand for more than a machine holds
MAX_DIGITS = 64


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without dates: `2026-11-21` is the text that it is, such as a folder's name."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_CORE}timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, source: str) -> Any:
    """The value that `text` stands for: None, texts, numbers, booleans, lists and mappings.

    Args:
        source: where the text comes from, for messages.

    Raises:
        yaml.YAMLError: it is no YAML.
        UserError: a key is repeated in one mapping, an alias holds itself or stands for too much, a tag asks for
            another kind of value, or a number cannot be read; naming the line.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _Check(loader, source).count_values(node)
        return loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{source}: the YAML is nested too deeply") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{source}: holds a number that cannot be read: {error}") from None
    finally:
        loader.dispose()


class _Check:
    """Goes through the nodes of a document."""

    def __init__(self, loader: _Loader, source: str):
        self._loader = loader
        self._source = source
        self._counted: dict[yaml.Node, int] = {}
        self._open: set[yaml.Node] = set()

    def count_values(self, node: yaml.Node) -> int:
        """How many values `node` stands for, aliases followed."""
        if node in self._open:
            raise UserError(f"{self._at(node)}: holds itself, by an alias")
        if node not in self._counted:
            self._check_tag(node)
            self._open.add(node)
            self._counted[node] = 1 + sum(self.count_values(child) for child in self._children(node))
            self._open.remove(node)
        if self._counted[node] > MAX_VALUES:
            raise UserError(f"{self._at(node)}: stands for more than {MAX_VALUES:,} values, by aliases of aliases")
        return self._counted[node]

    def _children(self, node: yaml.Node) -> list[yaml.Node]:
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
            return [child for pair in node.value for child in pair]
        return node.value if isinstance(node, yaml.SequenceNode) else []

    def _check_keys(self, mapping: yaml.MappingNode) -> None:
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in mapping.value:
            if isinstance(key, yaml.ScalarNode):
                earlier = first.setdefault((key.tag, key.value), key)
                if earlier is not key:
                    raise UserError(
                        f"{self._at(key)}: {_clipped(key.value)} is there already, in line {_line(earlier)}; "
                        "expected every section once, and every key once in its section"
                    )

    def _check_tag(self, node: yaml.Node) -> None:
        """Refuse what an explicit tag makes of a node, and numbers that no key takes."""
        if isinstance(node, yaml.ScalarNode):
            plain = self._loader.resolve(yaml.ScalarNode, node.value, (True, False))
            expected = node.tag in (_TEXT, plain)
        else:
            expected = node.tag == _COLLECTIONS[type(node)]
        if not expected:
            raise UserError(
                f"{self._at(node)}: the tag {node.tag.replace(_CORE, '!!')} cannot be used here; expected a plain value"
            )
        if node.tag == f"{_CORE}int" and len(node.value) > MAX_DIGITS:
            raise UserError(f"{self._at(node)}: a number of {len(node.value)} digits, expected at most {MAX_DIGITS}")

    def _at(self, node: yaml.Node) -> str:
        return f"{self._source}:{_line(node)}"


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _clipped(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."
