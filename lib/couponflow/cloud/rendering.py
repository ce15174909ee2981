"""Deploy files as plain trees: YAML read strictly, placeholders filled from an environment.

A placeholder is a dotted name in braces, such as ``gs://{buckets.code}/x``. Texts are filled after the YAML
is read, so a value can never add a key or a line; a value of an alphabet wider than names, paths and
addresses is refused all the same. A text that is one placeholder takes the value with its type (a count
stays a number, a cluster a whole tree); ``{name!s}`` takes it as text. Pure but for ``read_text``.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from couponflow.errors import ConfigError

#: What a placeholder may stand for: a text, a number, or a tree that was rendered before.
Values = Mapping[str, Any]

_PLACEHOLDER = re.compile(r"\{([^{}]*?)(!s)?\}")
_SAFE_TEXT = re.compile(r"[A-Za-z0-9_./@:-]*", re.ASCII)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong in a spec: where, what, and what to do next."""

    file: str
    field: str
    problem: str
    next_step: str

    def __str__(self) -> str:
        return f"{self.file}: {self.field}: {self.problem}; {self.next_step}"


@dataclass(frozen=True)
class Place:
    """Where in which file a part of a spec lies; findings about the part are made here."""

    file: str
    path: str = ""

    def at(self, field: str) -> "Place":
        """A place below this one; ``field`` is a name, or an index such as ``[0]``."""
        dot = "." if self.path and not field.startswith("[") else ""
        return Place(self.file, f"{self.path}{dot}{field}")

    def finding(self, field: str, problem: str, next_step: str) -> Finding:
        """A finding about a field below this place; an empty ``field`` is the place itself."""
        return Finding(self.file, (self.at(field) if field else self).path or "the file", problem, next_step)


def read_text(path: Path) -> str:
    """The text of a deploy file.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"deploy file {path}: cannot be read ({error}); restore it") from error


def parse(text: str, place: Place) -> tuple[dict[str, Any], list[Finding]]:
    """A YAML document as a tree; a key that stands twice in one mapping is an error, not the last one's."""
    import yaml

    try:
        tree = yaml.load(text, Loader=_strict_loader())
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        return {}, [place.finding("", f"not valid YAML ({reason})", "correct that line")]
    if not isinstance(tree, dict):
        return {}, [place.finding("", "no mapping at the top", "write field: value lines")]
    return tree, []


@cache
def _strict_loader() -> Any:
    """PyYAML's safe loader, which in addition refuses a key that stands twice."""
    import yaml

    class Strict(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML carries no types
        def compose_mapping_node(self, anchor: str | None) -> Any:
            node = super().compose_mapping_node(
                anchor
            )  # merged keys (<<) are not in it yet: those may repeat
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"{key.value!r} stands twice", key.start_mark
                    )
                seen.add(str(key.value))
            return node

    return Strict


def fill(tree: Any, values: Values, place: Place) -> tuple[Any, list[Finding]]:
    """A copy of a tree with all placeholders filled, and what could not be filled."""
    findings: list[Finding] = []

    def walk(node: Any, at: Place) -> Any:
        if isinstance(node, dict):
            for key in node:
                if isinstance(key, str) and re.search("[{}]", key):
                    findings.append(at.finding(key, "a brace in a name", "placeholders stand in values only"))
            return {key: walk(value, at.at(str(key))) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value, at.at(f"[{number}]")) for number, value in enumerate(node)]
        if not isinstance(node, str):
            return node
        filled, wrong = _fill_text(node, values, at)
        findings.extend(wrong)
        return filled

    return walk(tree, place), findings


def _fill_text(text: str, values: Values, at: Place) -> tuple[Any, list[Finding]]:
    wrong = list(_refused(text, values, at))
    if wrong:
        return text, wrong
    whole = _PLACEHOLDER.fullmatch(text)
    if whole and not whole[2]:
        return values[whole[1]], []
    return _PLACEHOLDER.sub(lambda match: str(values[match[1]]), text), []


def _refused(text: str, values: Values, at: Place) -> Iterator[Finding]:
    """What stands against filling a text."""
    if re.search("[{}]", _PLACEHOLDER.sub("", text)):
        yield at.finding("", f"a single brace in {text!r}", "write placeholders as {name}")
        return
    for match in _PLACEHOLDER.finditer(text):
        name = match[1]
        if name not in values:
            near = difflib.get_close_matches(name, values, n=1)
            hint = f"did you mean {{{near[0]}}}?" if near else "placeholders are the names under [cloud]"
            yield at.finding("", f"unknown placeholder {{{name}}}", hint)
            continue
        value = values[name]
        if isinstance(value, str) and not _SAFE_TEXT.fullmatch(value):
            yield at.finding(
                "",
                f"{{{name}}} is {value!r}",
                "take letters, digits and _./@:- only, so that a value stays one value",
            )
        elif not isinstance(value, str | int) and match[0] != text:
            yield at.finding("", f"{{{name}}} is a whole tree", "let it stand alone")
