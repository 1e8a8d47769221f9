"""Recipes, tasks and prompt templates from YAML: packaged ones by name, others by path, recipes with `--set` overrides,
validated with errors people can act on.

Guarantees: a key written twice in one mapping is refused; scalars follow YAML 1.2 (`on`, `off`, `yes` and `no` are
strings, `1e-3` is a number); whatever is wrong comes as one `ConfigError` that names the key path, what was received
and what is allowed, with a suggestion for a misspelt key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from configs.errors import ConfigError
from configs.schema.project import Recipe
from configs.schema.prompting import TASK_TEMPLATE, PromptTemplate
from configs.schema.serving import OF_ONE_MODEL, ServingConfig
from configs.schema.tasks import Task

_RECIPES, _TASKS, _TEMPLATES = "recipes", "tasks", "templates"
_Model = TypeVar("_Model", bound=BaseModel)


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with Ganymede."""
    return _packaged(_RECIPES)


def packaged_tasks() -> list[str]:
    """Names of the evaluation tasks that come with Ganymede."""
    return _packaged(_TASKS)


def packaged_templates() -> list[str]:
    """Names of the prompt templates that come with Ganymede."""
    return _packaged(_TEMPLATES)


def _packaged(folder: str) -> list[str]:
    found = resources.files("configs") / folder
    return sorted(Path(item.name).stem for item in found.iterdir() if item.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe called `name_or_path`, with `overrides` (`a.b=value`, later ones win) applied before validation.

    A string without a folder and without `.yaml` names a packaged recipe; anything else is a path.

    Raises:
        ConfigError: there is no such recipe, it is not YAML, an override does not apply, or a value is not allowed.
    """
    data = _mapping(name_or_path, _RECIPES, "keys name and stages")
    for override in overrides:
        _apply(data, override)
    return _validated(Recipe, data, name_or_path, "correct the recipe or the --set option")


def load_task(name_or_path: str) -> Task:
    """The evaluation task called `name_or_path`: a packaged one by name, any other by its path.

    Raises:
        ConfigError: there is no such task, it is not YAML, or a value is not allowed.
    """
    data = _mapping(name_or_path, _TASKS, "keys kind, data, prompt ...")
    return _validated(Task, data, name_or_path, "correct the task's file")


def load_template(name_or_path: str, task: Task | None = None) -> PromptTemplate:
    """The prompt template called `name_or_path`: a packaged one by name, any other by its path. Its name is the file's.

    `task` is the name of the one that the task at hand holds, where there is one.

    Raises:
        ConfigError: there is no such template, it is not YAML, or a value is not allowed.
    """
    if task is not None and name_or_path == TASK_TEMPLATE:
        return PromptTemplate.of_task(TASK_TEMPLATE, task)
    data = {"name": Path(name_or_path).stem, **_mapping(name_or_path, _TEMPLATES, "keys prompt ...")}
    return _validated(PromptTemplate, data, name_or_path, "correct the template's file")


def load_serving(path: str) -> ServingConfig:
    """The endpoint that a YAML file describes: `models`, and settings.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or a value is not allowed.
    """
    try:
        data = _parse(Path(path).read_text("utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path} cannot be read: {reason}", allowed="a YAML file with models") from error
    if not isinstance(data, dict) or not data.get("models"):
        raise ConfigError(
            f"{path} names no models", received=_shown(data),
            allowed="models: [{model: NAME@ALIAS, replicas_max: 4}, ...], and settings of all of them",
        )  # fmt: skip
    for key in sorted(OF_ONE_MODEL & data.keys()):
        raise ConfigError(
            f"{path}: {key} is of one model", allowed=f"{key} below one of models",
            next_step=f"move {key} into the entry of its model",
        )  # fmt: skip
    return _validated(ServingConfig, data, path, "correct the file")


def _mapping(name_or_path: str, folder: str, allowed: str) -> dict[str, Any]:
    data = _parse(_read(name_or_path, folder), name_or_path)
    if not isinstance(data, dict):
        raise ConfigError(
            f"{name_or_path}: a {folder.removesuffix('s')} is a mapping", received=_shown(data), allowed=allowed
        )
    return data


def _validated(model: type[_Model], data: dict[str, Any], label: str, next_step: str) -> _Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _explained(error, label, model, next_step) from error


def _read(name_or_path: str, folder: str) -> str:
    path = Path(name_or_path)
    what = folder.removesuffix("s")
    if path.suffix not in {".yaml", ".yml"} and path.name == name_or_path:
        known = _packaged(folder)
        if name_or_path not in known:
            raise ConfigError(
                f"there is no packaged {what} of this name{suggestion(name_or_path, known)}",
                received=name_or_path,
                allowed=f"one of {', '.join(known)}, or the path of a .yaml file",
            )
        return (resources.files("configs") / folder / f"{name_or_path}.yaml").read_text("utf-8")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"the {what} cannot be read: {reason}",
            received=name_or_path,
            allowed=f"a YAML file, or one of the packaged {folder}: {', '.join(_packaged(folder))}",
        ) from error


class _Loader(yaml.SafeLoader):
    """Safe YAML with 1.2 scalars and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(None, None, "a key must be a plain value", key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key!r} is written twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag in {"tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"}
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+0123456789."),
)


def _parse(text: str, label: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{label}, line {mark.line + 1}, column {mark.column + 1}" if mark else label
        raise ConfigError(f"{where}: {getattr(error, 'problem', None) or error}", allowed="YAML") from error


def _apply(data: dict[str, Any], override: str) -> None:
    """Sets one `a.b=value` in `data`; mappings that the recipe leaves to their defaults are made on the way."""
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path:
        raise ConfigError(
            "--set takes KEY=VALUE", received=override, allowed="e.g. --set stages.pretrain.training.steps=100"
        )
    node, rest, walked = data, path, ""
    while True:
        if walked == "stages" and _key_in(node, rest) is None:
            stage = rest.partition(".")[0]
            raise ConfigError(
                f"--set {path}: the recipe has no stage {stage!r}{suggestion(stage, node)}",
                received=override,
                allowed=f"stages {', '.join(node)}",
            )
        key = _key_in(node, rest) or rest.partition(".")[0]
        walked, rest = f"{walked}.{key}".lstrip("."), rest[len(key) + 1 :]
        if not rest:
            node[key] = _parse(text, f"--set {path}")
            return
        if node.get(key) is None:
            if walked.partition(".")[0] not in Recipe.model_fields:
                stages = data.get("stages")
                stage_named = isinstance(stages, dict) and walked in stages
                hint = f"; did you mean stages.{path}?" if stage_named else suggestion(walked, Recipe.model_fields)
                raise ConfigError(
                    f"--set {path}: a recipe has no key {walked!r}{hint}",
                    received=override,
                    allowed=f"keys {', '.join(Recipe.model_fields)}",
                )
            node[key] = {}
        if not isinstance(node[key], dict):
            raise ConfigError(
                f"--set {path}: {walked} is not a mapping, nothing can be set below it",
                received=override,
                allowed=f"--set {walked}=VALUE",
            )
        node = node[key]


def _key_in(node: dict[str, Any], rest: str) -> str | None:
    """The longest key of `node` that `rest` starts with; keys may themselves hold dots."""
    keys = [k for k in node if isinstance(k, str) and (rest == k or rest.startswith(f"{k}."))]
    return max(keys, key=len, default=None)


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the closest of `known`, or nothing if none is close."""
    close = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _explained(error: ValidationError, label: str, root: type[BaseModel], next_step: str) -> ConfigError:
    """One `ConfigError` for everything pydantic found in a `root`."""
    problems = [_problem(dict(item), root) for item in error.errors(include_url=False)]
    if len(problems) == 1:
        what, received, allowed = problems[0]
        return ConfigError(f"{label}: {what}", received=received, allowed=allowed, next_step=next_step)
    lines = []
    for what, received, allowed in problems:
        details = [f"received {received!r}"] if received is not None else []
        details += [f"allowed: {allowed}"] if allowed is not None else []
        lines.append(f"  - {'; '.join([what, *details])}")
    return ConfigError("\n".join([f"{label}: {len(problems)} problems", *lines]), next_step=next_step)


def _problem(item: dict[str, Any], root: type[BaseModel]) -> tuple[str, Any, str | None]:
    """What is wrong, what was received and what is allowed, for one pydantic error."""
    path, holder = _walk(item["loc"], root)
    kind, context = item["type"], item.get("ctx", {})
    key = ".".join(path) or f"the {(root.model_config.get('title') or root.__name__).lower()}"
    if kind == "extra_forbidden":
        known = sorted(field.alias or name for name, field in holder.model_fields.items()) if holder else []
        return f"{key}: unknown key{suggestion(path[-1], known)}", _shown(item["input"]), f"keys {', '.join(known)}"
    if kind == "missing":
        return f"{key} is missing", None, "a value; it has no default"
    if kind == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        return f"{key}: unknown kind of stage{suggestion(context['tag'], tags)}", context["tag"], ", ".join(tags)
    if kind == "value_error":
        return f"{key}: {context['error']}", None, None
    message = item["msg"].removeprefix("Input should be ").removeprefix("Value should have ")
    return key, _shown(item["input"]), message


def _walk(location: Sequence[int | str], root: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """The key path of a pydantic location, without the tags of unions, and the model that holds the last key."""
    path: list[str] = []
    at: Any = root
    holder: type[BaseModel] | None = None
    for part in location:
        if part == "[key]":
            continue
        members = [m for m in _members(at) if isinstance(m, type) and issubclass(m, BaseModel)]
        if len(members) > 1:
            at = next((m for m in members if m.model_fields["kind"].default == part), None)
            continue
        path.append(str(part))
        holder = members[0] if members else None
        if holder is not None:
            field = holder.model_fields.get(str(part))
            at = field.annotation if field else None
        else:
            at = next(iter(reversed(get_args(at))), None) if get_origin(at) in {dict, tuple} else None
    return path, holder


def _members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, `Annotated` unwrapped."""
    while hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    if get_origin(annotation) in {dict, tuple}:
        return []
    return [m for a in get_args(annotation) for m in _members(a)] or [annotation]


def _shown(value: Any) -> Any:
    """`value`, or a short description of a long mapping or list."""
    if isinstance(value, dict | list) and len(repr(value)) > 120:
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)} items"
    return value
