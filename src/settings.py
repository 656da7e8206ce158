"""Settings dataclasses <-> command-line flags (tyro) <-> flat YAML recipes; flags beat files."""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from .console import UserError, say

T = TypeVar("T")
STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)


def parse(cls: type[T], argv: list[str] | None, *, prog: str, description: str, of_data: str = "") -> T:
    """An instance from flags; `--config FILE` gives a recipe (or a run's config.yaml), turned into flags before them.

    `of_data` names a recipe that the first of the settings' data folders may hold, where src.prepare put it: it is read before all others.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if of_data and (recipe := _first_folder(_words(cls, argv), cls().data) / of_data).exists():
        say(f"settings of the data set: {recipe}")
        argv = ["--config", str(recipe), *argv]
    settings = tyro.cli(cls, args=_words(cls, argv), prog=prog, config=STYLE, description=description + " `--config FILE` reads settings from YAML first.")
    if getattr(settings, "data", None) == () and cls().data:
        raise UserError("--data names no folder")
    return settings


def _first_folder(words: list[str], usual: tuple[Path, ...]) -> Path:
    """The first data folder that the flags name, ahead of their being read as a whole: what they must fit is in that folder's recipe."""
    for word, value in reversed([*zip(words, [*words[1:], "--"])]):
        if word.startswith("--data="):
            return Path(word.removeprefix("--data="))
        if word == "--data" and not value.startswith("--"):
            return Path(value)
    return usual[0]


def _words(cls: type[T], argv: list[str]) -> list[str]:
    """The flags, after those that the recipes among them stand for."""
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    defaults = flatten(cls())
    recipe: dict[str, Any] = {}
    while "--config" in argv:
        place = argv.index("--config")
        if place + 1 >= len(argv):
            raise UserError("--config needs a file")
        recipe |= read_recipe(argv[place + 1], defaults)
        del argv[place : place + 2]
    for key in (key for key, value in defaults.items() if isinstance(value, bool)):  # tyro knows only the flag that changes the default
        for flag, value in ((key.replace("_", "-"), True), ("no-" + key.replace("_", "-"), False)):
            if "--" + flag in argv:
                argv.remove("--" + flag)
                recipe[key] = value
    given = {word.split("=")[0] for word in argv}
    words: list[str] = []
    for key, value in recipe.items():
        flag = "--" + key.replace("_", "-")
        if flag in given or value == defaults[key]:
            continue
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    return words + argv


def read_recipe(file: str | Path, known: dict[str, Any]) -> dict[str, Any]:
    """A flat YAML mapping `setting: value`, or the `settings` of a run's config.yaml; unknown keys are refused."""
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not a readable YAML file: {error}") from error
    values = values.get("settings", values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a mapping `setting: value`")
    unknown = sorted(map(str, set(values) - set(known)))
    if unknown:
        raise UserError(f"{file}: unknown setting(s) {', '.join(unknown)}; --help lists them all")
    empty = [key for key, value in values.items() if value == "" != known[key]]
    if empty:
        raise UserError(f"{file}: {empty[0]} is empty; give it a value, or delete the line")
    return values


def flatten(settings: Any) -> dict[str, Any]:
    """Nested dataclasses -> one flat dict of plain values that YAML can hold and `parse` can read."""
    flat: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            flat |= flatten(value)
        elif isinstance(value, (list, tuple)):
            flat[field.name] = [str(item) if isinstance(item, Path) else item for item in value]
        else:
            flat[field.name] = str(value) if isinstance(value, Path) else value
    return flat
