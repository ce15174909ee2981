#!/usr/bin/env python3
"""A stand-in for ``gcloud`` that remembers what was created, for scripts that have to be idempotent.

Put on the PATH under that name. State lies in ``gcloud.json`` beside it: ``made`` (what exists), ``granted``
(resource, role, member), ``changes`` (every command that changed something, in order), and ``fail_at``: the
number of the change that ends with 1 and changes nothing.
"""

import json
import sys
from pathlib import Path
from typing import Any

STATE = Path(__file__).parent / "gcloud.json"
_CREATING = ("create", "create-oidc", "enable")
PROJECT_NUMBER = "123456789012"


def main(argv: list[str]) -> int:
    """Answer one command; the exit code is gcloud's: 1 where something is not there."""
    state: dict[str, Any] = {"made": [], "granted": [], "changes": [], "fail_at": 0}
    state |= json.loads(STATE.read_text()) if STATE.exists() else {}
    words, flags = _split(argv)
    if words[-1] in ("projects", "list") or "describe" in words or "get-iam-policy" in words:
        return _answer(words, flags, state)
    state["fail_at"] -= 1
    if state["fail_at"] != 0:
        state["changes"].append(argv)
        _change(words, flags, state)
    STATE.write_text(json.dumps(state, indent=1))
    return 1 if state["fail_at"] == 0 else 0


def _split(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words of a command, and its flags; one that is followed by another flag has no value."""
    first = next((n for n, word in enumerate(argv) if word.startswith("--")), len(argv))
    flags: dict[str, str] = {}
    for n, word in enumerate(argv[first:], first):
        if word.startswith("--"):
            has_value = n + 1 < len(argv) and not argv[n + 1].startswith("--")
            flags[word] = argv[n + 1] if has_value else ""
    return argv[:first], flags


def _thing(words: list[str], flags: dict[str, str]) -> str:
    """What a command is about: kind and name, with the region or pool that holds it."""
    verb = next(n for n, word in enumerate(words) if word in (*_CREATING, "describe"))
    kind, name = words[:verb], words[verb + 1]
    if kind == ["iam", "service-accounts"]:
        name = name.partition("@")[0]
    inside = flags.get("--region", ""), flags.get("--workload-identity-pool", "")
    return " ".join([*kind, name, *filter(None, inside)])


def _answer(words: list[str], flags: dict[str, str], state: dict[str, Any]) -> int:
    told: list[str] = []
    if words == ["services", "list"]:
        told = state.get("enabled", [])
    elif "get-iam-policy" in words:
        told = [f"{role},{member}" for on, role, member in state["granted"] if on == words[-1]]
    elif words[:2] == ["projects", "describe"]:
        told = [PROJECT_NUMBER]
    elif _thing(words, flags) not in state["made"]:
        sys.exit(f"ERROR: {_thing(words, flags)} was not found")
    elif words[:2] == ["storage", "buckets"]:
        told = [state.get("access", "True,enforced")]
    sys.stdout.writelines(f"{line}\n" for line in told)
    return 0


def _change(words: list[str], flags: dict[str, str], state: dict[str, Any]) -> None:
    if words[:2] == ["services", "enable"]:
        state["enabled"] = sorted({*state.get("enabled", []), *words[2:]})
    elif "add-iam-policy-binding" in words:
        state["granted"].append([words[-1], flags["--role"], flags["--member"]])
    else:
        thing = _thing(words, flags)
        if thing in state["made"]:
            sys.exit(f"ERROR: {thing} already exists")
        state["made"].append(thing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
