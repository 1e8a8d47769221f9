"""Prompt templates in MLflow's prompt registry.

MLflow keeps a text with `{{field}}` for people to read and compare; the whole template stands beside it in a tag, from
which it is read again. A template that is registered already under its name, by content, is not registered twice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from actors.store.mlflow_runs import open_client
from configs.errors import ConfigError, TrackingError
from configs.schema.prompting import PromptTemplate

_DIGEST, _TEMPLATE = "ganymede.digest", "ganymede.template"
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
_URI = re.compile(r"prompts:/([^/]+)/(\d+)")


@dataclass(frozen=True)
class RegisteredPrompt:
    """A version in the registry."""

    name: str
    version: int
    digest: str
    new: bool
    """Whether it was made now."""

    @property
    def uri(self) -> str:
        """What MLflow and `fetch_prompt` call it."""
        return f"prompts:/{self.name}/{self.version}"


def register_prompt(template: PromptTemplate, uri: str) -> RegisteredPrompt:
    """Registers a template at the tracking server or store `uri`, under its name.

    Raises `TrackingError` if the registry refuses it.
    """
    from mlflow.exceptions import MlflowException

    client = open_client(uri)
    try:
        if client.get_prompt(template.name) is not None:
            for version in client.search_prompt_versions(template.name, max_results=1000):
                if version.tags.get(_DIGEST) == template.digest:
                    return RegisteredPrompt(template.name, int(version.version), template.digest, new=False)
        made = client.register_prompt(
            template.name,
            _for_people(template),
            commit_message=template.description or None,
            tags={_DIGEST: template.digest, _TEMPLATE: template.model_dump_json()},
        )
    except MlflowException as error:
        raise TrackingError(f"MLflow does not take the prompt {template.name}: {error.message}") from error
    return RegisteredPrompt(template.name, int(made.version), template.digest, new=True)


def fetch_prompt(prompt_uri: str, uri: str) -> PromptTemplate:
    """The template of `prompts:/NAME/VERSION`.

    Raises `ConfigError` for another address, or a prompt that was registered by other means; `TrackingError` if there
    is none.
    """
    from mlflow.exceptions import MlflowException

    match = _URI.fullmatch(prompt_uri)
    if match is None:
        raise ConfigError("no address of a prompt", received=prompt_uri, allowed="prompts:/NAME/VERSION")
    try:
        found = open_client(uri).get_prompt_version(match[1], match[2])
    except MlflowException as error:
        raise TrackingError(f"MLflow does not give {prompt_uri}: {error.message}") from error
    if found is None or _TEMPLATE not in found.tags:
        raise ConfigError(
            f"{prompt_uri} holds no template of this kind", received="none" if found is None else "a plain prompt",
            allowed="one that ganymede prompt register made",
        )  # fmt: skip
    return PromptTemplate.model_validate_json(found.tags[_TEMPLATE])


def _for_people(template: PromptTemplate) -> str:
    """The prompt without examples, fields in MLflow's double braces."""
    parts = [part for part in (template.system, template.instruction, template.prompt) if part]

    def doubled(found: re.Match[str]) -> str:
        return found[0][0] if found[1] is None else f"{{{{{found[1]}}}}}"

    return _FIELD.sub(doubled, template.separator.join(parts))
