"""From a start and a dataset or a corpus to a published model, in one process without Ray."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer, pipeline

from actors.store.artifacts import ArtifactStore
from actors.store.tracker import NoTracker
from actors.text import CONTRACT, Text, make_contract
from configs.errors import ConfigError
from configs.schema.model import ModelConfig
from configs.schema.training import FinetuneConfig, OptimConfig, PretrainConfig, TrainingConfig
from pipelines.corpus.tokenizer import save_tokenizer, train_tokenizer
from pipelines.evaluation.writing import text_scores, write_texts
from pipelines.stage import StageContext
from pipelines.stages.pretrain import assemble_pretraining
from pipelines.training.denoising import Denoising
from pipelines.training.examples import Framing, encode_examples
from pipelines.training.masked import MaskedLanguageModel
from pipelines.training.masks import mask_ids
from pipelines.training.models import Head, load_model
from pipelines.training.objectives import CausalLanguageModel
from pipelines.training.parallel import Ranks
from pipelines.training.publication import Publication, write_model
from pipelines.training.start import Start
from pipelines.training.supervised import assemble_examples, make_model
from pipelines.training.worker import Task, read_failure, run
from tests.pipelines.corpus.corpus_files import write_text_corpus

CPU = torch.device("cpu")
TRAINING = TrainingConfig(
    steps=60, batch_rows=8, micro_batch_rows=8, workers=1, eval_every_steps=30, eval_rows=16,
    optim=OptimConfig(name="adamw", learning_rate=0.003),
)  # fmt: skip
PRETRAINING = PretrainConfig(corpus="corpus", training=TRAINING)
WORDS = ["good", "bad"]
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "classify": [{"text": f"film {i} is {WORDS[i % 2]}", "label": WORDS[i % 2]} for i in range(24)],
    "tag": [{"words": ["film", WORDS[i % 2], str(i)], "tags": ["O", "B-W", "O"]} for i in range(24)],
    "seq2seq": [{"prompt": f"say {WORDS[i % 2]}", "completion": WORDS[i % 2]} for i in range(24)],
}
LABELS = {"classify": ["bad", "good"], "tag": ["O", "B-W", "I-W"], "seq2seq": []}
TEXTS = ["the good film and the bad film are long, and the long film is good. " * 6] * 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with mask tokens, a corpus made with it, and a dataset of each task."""
    folder = tmp_path_factory.mktemp("world")
    texts = [*TEXTS, *(str(record) for records in EXAMPLES.values() for record in records)]
    tokenizer = train_tokenizer(texts, 320, masks=4)
    save_tokenizer(tokenizer, folder)
    (folder / CONTRACT).write_text(make_contract(folder).model_dump_json())
    write_text_corpus(folder, {"train": TEXTS, "validation": TEXTS}, tokenizer)
    for task, records in EXAMPLES.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def scratch(architecture: Any, **dials: Any) -> Start:
    shape = {"hidden_size": 32, "layers": 1, "heads": 2, "context_length": 32}
    return Start(ModelConfig(architecture=architecture, **{**shape, **dials}), None, None)


def train(world: Path, work: Path, start: Start, task: Any) -> tuple[dict[str, Any], Path]:
    work.mkdir()
    framing = Framing.load(world, classified=task != "seq2seq")
    for split in ("train", "heldout"):
        encode_examples(
            world / f"{task}.jsonl", work / f"{split}.safetensors", framing,
            task=task, labels=LABELS[task], row_tokens=start.context_length,
        )  # fmt: skip
    config = FinetuneConfig(task=task, model=start.config, tokenizer="tokenizer", data="data", training=TRAINING)
    make = functools.partial(
        make_model, start, config, task, LABELS[task], vocab_size=Text.load(world).vocab_size, end=framing.end
    )
    assemble = functools.partial(assemble_examples, make, work, config, task, LABELS[task], pad=framing.end)
    job = Task(work, TRAINING, assemble)
    run(job, Ranks(), CPU)
    failure = read_failure(work)
    if failure is not None:
        raise failure
    return publish(job, world, task, framing), work / "out"


def publish(job: Task, text_from: Path, head: Head, framing: Framing | None = None) -> dict[str, Any]:
    (job.work / "out").mkdir()
    context = StageContext(
        name="finetune", work=job.work, out=job.work / "out", run=NoTracker().run("k", "n"),
        progress=lambda progress: None, check_lease=lambda: None, store=ArtifactStore(job.work / "store"),
        home=job.work, acted={},
    )  # fmt: skip
    publication = Publication("Tiny", head, text_from, eos_token_ids=(0,), pad_token_id=0, facts={}, framing=framing)
    return write_model(publication, job.assemble()[0], job.config, context)


def served_ids(folder: Path, text: str) -> list[int]:
    """What engine and endpoint read, which is what `transformers` reads."""
    ids = list(Text.load(folder).encode_input(text).token_ids)
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == ids
    return ids


def test_a_classifier_opens_in_transformers_and_gives_the_names_of_its_classes(world: Path, tmp_path: Path) -> None:
    summary, out = train(world, tmp_path / "work", scratch("bert"), "classify")
    assert summary["validation_accuracy"] == summary["validation_macro_f1"] == 1.0
    card = (out / "README.md").read_text()
    contract = json.loads((out / CONTRACT).read_text())["hash"]
    assert "pipeline_tag: text-classification" in card
    for row in (f"Text contract | `{contract}`", "Longest input | 32 tokens", "Validation accuracy | 1.0000"):
        assert f"| {row} |" in card
    assert "## Limits" in card
    assert len(card.splitlines()) < 50  # one page
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    framing = Framing.load(out, classified=True)
    for record in EXAMPLES["classify"][:4]:
        ids, _ = framing.frame(framing.encode(record["text"]), 32)
        assert served_ids(out, record["text"]) == ids
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids])).logits.argmax())
        assert model.config.id2label[best] == record["label"]


def test_a_tagger_finds_its_spans(world: Path, tmp_path: Path) -> None:
    summary, out = train(world, tmp_path / "work", scratch("modernbert"), "tag")
    assert summary["validation_span_f1"] == 1.0
    assert AutoModelForTokenClassification.from_pretrained(out).config.label2id == {"O": 0, "B-W": 1, "I-W": 2}


def test_a_model_that_writes_texts_writes_each_for_its_own_source(world: Path, tmp_path: Path) -> None:
    summary, out = train(world, tmp_path / "work", scratch("bart"), "seq2seq")
    assert summary["validation_accuracy"] == 1.0
    text, framing = Text.load(out), Framing.load(out, classified=False)
    prompts = ["say good", "say bad", "say good"]
    sources = [framing.frame(framing.encode(prompt), 32)[0] for prompt in prompts]
    assert [served_ids(out, prompt) for prompt in prompts] == sources
    ids = write_texts(load_model(out, "seq2seq"), sources, pad=0, max_new_tokens=8, progress=lambda done: None)
    written = [text.decode(line) for line in ids]
    assert written == ["good", "bad", "good"]
    scores, signatures = text_scores(["good", "bad", "good"], written)
    assert scores["rouge_1"] == scores["rouge_l"] == 100.0
    assert "version:" in signatures["bleu"]


def test_pretraining_takes_the_objective_of_its_family_and_goes_on_from_a_folder(world: Path, tmp_path: Path) -> None:
    masks = mask_ids(world)
    kinds: dict[str, Any] = {"lstm": CausalLanguageModel, "roberta": MaskedLanguageModel, "t5": Denoising}
    for architecture, kind in kinds.items():
        start = scratch(architecture)
        assemble = functools.partial(
            assemble_pretraining, {"": world}, start, PRETRAINING, tmp_path, head=start.language_head, masks=masks
        )
        work = tmp_path / architecture
        work.mkdir()
        job = Task(work, TRAINING.model_copy(update={"steps": 2, "eval_every_steps": 2}), assemble)
        run(job, Ranks(), CPU)
        assert read_failure(work) is None
        publish(job, world, start.language_head)

        again = Start.find(ModelConfig.model_validate({"from": str(work / "out")}), {})
        assert (again.language_head, again.context_length) == (start.language_head, 32)
        model, objective = assemble_pretraining(
            {"": world}, again, PRETRAINING, tmp_path, head=again.language_head, masks=masks
        )
        assert type(objective) is kind
        kept = load_model(work / "out", start.language_head)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept.parameters(), strict=True))


def test_an_encoder_of_ours_fills_masks_in_a_plain_pipeline(world: Path, tmp_path: Path) -> None:
    start = scratch("bert")
    assemble = functools.partial(
        assemble_pretraining, {"": world}, start, PRETRAINING, tmp_path, head=start.language_head, masks=mask_ids(world)
    )
    job = Task(tmp_path, TRAINING, assemble)
    run(job, Ranks(), CPU)
    summary = publish(job, world, "masked")
    assert summary["validation_loss"] < 0.8 * summary["first_loss"]
    guesses = pipeline("fill-mask", model=str(tmp_path / "out"))("the good <|mask|> and the bad film are long", top_k=5)
    text = Text.load(world)
    ids = [*text.encode("the good "), mask_ids(world)[0], *text.encode(" and the bad film are long")]
    with torch.no_grad():
        logits = load_model(tmp_path / "out", "masked").eval()(input_ids=torch.tensor([ids])).logits[0]
    best = logits[ids.index(mask_ids(world)[0])].topk(5).indices.tolist()
    assert [guess["token"] for guess in guesses] == best


def test_an_architecture_without_the_head_is_refused_by_name(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a ganymede_lstm model cannot be trained this way.*allowed: causal"):
        train(world, tmp_path / "work", scratch("lstm"), "classify")
