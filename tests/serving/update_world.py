"""A real endpoint of one replica, and two versions of a model for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs.schema.serving import ServingConfig
from infra.deploy import Endpoint, serve_model, stop_serving
from infra.local import quiet_environment, ray_session
from infra.platform import free_ports
from serving.calls import ServedModel
from tests.serving.conftest import make_model, served


@pytest.fixture(scope="module")
def versions(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ServedModel, ServedModel]:
    other = make_model(tmp_path_factory.mktemp("second-model"), seed=8)
    return served(model_folder), replace(served(other), digest="cd" * 32, ref="model/tiny-finetune@4", version=4)


@pytest.fixture(scope="module")
def config() -> ServingConfig:
    (port,) = free_ports(1)
    return ServingConfig(port=port, replicas_max=1, cpus_per_replica=0.5, precision="fp32")


@pytest.fixture(scope="module")
def endpoint(
    versions: tuple[ServedModel, ServedModel], config: ServingConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    quiet_environment()
    home = tmp_path_factory.mktemp("home")
    (home / "logs").mkdir()
    with ray_session(home):
        yield serve_model(versions[0], config, say=lambda _: None)
        stop_serving()
