import subprocess
import sys

from pydantic import TypeAdapter

from configs.schema.project import StageConfig
from infra.stages import STAGES


def test_every_kind_that_a_recipe_can_name_has_a_stage_of_that_kind() -> None:
    kinds = TypeAdapter(StageConfig).json_schema()["discriminator"]["mapping"]
    assert set(STAGES) == set(kinds)
    for kind, stage in STAGES.items():
        assert stage.kind == kind


def test_a_recipe_of_corpora_alone_loads_neither_torch_nor_transformers() -> None:
    code = "import sys; from infra.stages import STAGES; STAGES['tokenizer'], STAGES['corpus']; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "mlflow", "pandas"} & set(done.stdout.split())
