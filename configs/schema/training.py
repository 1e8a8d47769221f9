"""How a model is trained: optimizer, schedule, batch, precision, checkpoints, workers."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.schema.base import Config, Input, placement
from configs.schema.data import CorpusName, DataConfig
from configs.schema.model import ModelChoice, ModelConfig


class OptimConfig(Config):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "muon"] = "muon"
    """`muon`: Muon for the hidden matrices, AdamW for embeddings, norms and biases."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate of AdamW's parameters."""
    muon_learning_rate: Annotated[float, Field(gt=0)] = 0.02
    """Peak learning rate of Muon's matrices."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global L2 norm."""
    schedule: Literal["cosine", "linear", "wsd"] = "wsd"
    """`wsd`: warm-up, stable, linear decay."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.03
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the steps in which `wsd` decays."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Learning rate at the last step as a share of the peak."""


class TrainingConfig(Config):
    """One training run, whatever the objective."""

    steps: Annotated[int, Field(ge=1)]
    batch_rows: Annotated[int, Field(ge=1)] = 16
    """Rows in a global batch, over all workers and micro-batches."""
    micro_batch_rows: Annotated[int, Field(ge=1)] = 8
    """Rows one worker runs forward and backward at once; decides content, as sums are rounded in its order."""
    seed: int = 1
    optim: OptimConfig = OptimConfig()
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 autocast where the processor or GPU has it, fp32 elsewhere."""
    compile: Literal["auto", "on", "off"] = "off"
    """`torch.compile` of the model; `auto`: where a C++ toolchain or a GPU is there."""
    eval_every_steps: Annotated[int, Field(ge=1)] = 50
    eval_rows: Annotated[int, Field(ge=1)] = 64
    """Validation rows scored at each evaluation, over all corpora."""
    spike_nats: Annotated[float, Field(gt=0)] | None = 3.0
    """A step whose loss is this many nats per target above the median of the last 32 steps ends the run; null: none
    does."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights with this decay a step (0.99 looks back about 100 steps);
    evaluation and the published model use it. null: no average."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared logarithm of the softmax's normaliser, which keeps logits from drifting (PaLM: 1e-4). For
    models that predict the next token; not part of validation losses."""
    activation_checkpointing: bool = placement(False)
    """Layers keep their inputs alone and run again in the backward pass: a third more arithmetic, much less memory."""
    log_every_steps: Annotated[int, Field(ge=1)] = 5
    checkpoint_every_seconds: Annotated[float, Field(gt=0)] = placement(20.0)
    """Time between two durable checkpoints of a run, of which the newest two are kept until it ends."""
    checkpoint_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between two checkpoints that are kept: the artifact holds the model as it was then as well, below
    `checkpoints/`. null: none is."""
    workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 2
    """Data-parallel Ray Train workers; two numbers are the fewest and the most that the run goes on with as machines
    leave and come."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """Threads of a worker; decides content, as sums are rounded in their order."""
    sharding: Literal["none", "full"] = "none"
    """`full`: each worker holds its part of weights, gradients and optimizer state and gathers the weights of a layer
    when it runs (FSDP2), for models that do not fit a worker; `none`: each worker holds all. Decides content, as
    gradients are summed in another order."""
    use_gpu: bool = placement(False)
    max_failures: Annotated[int, Field(ge=0)] = placement(3)
    """Times that dead or hung workers are replaced before the stage fails."""
    hang_seconds: Annotated[int, Field(ge=1)] = placement(600)
    """A worker that the others have waited for this long is taken for hung."""
    price_per_hour: Annotated[float, Field(ge=0)] | None = placement(None)
    """What the machines cost an hour, in any currency; the cost of the run is then told before it starts."""

    @model_validator(mode="after")
    def _rows_divide(self) -> Self:
        if self.fewest_workers > self.most_workers:
            raise ValueError(f"workers {self.workers} must be the fewest and the most, in this order")
        for count in range(self.fewest_workers, self.most_workers + 1):
            if self.batch_rows % count:
                raise ValueError(f"batch_rows {self.batch_rows} must be a multiple of {count}, which workers allows")
        return self

    @property
    def fewest_workers(self) -> int:
        """Workers that the run needs."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """Workers that the run uses where there is room for them."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class LoraConfig(Config):
    """Low-rank adapters: the model's matrices stay as they are, and two thin factors beside each are trained."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Width of the factors."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """What the factors add is scaled by alpha / rank; alpha is twice the rank unless set."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the factors' inputs that training leaves out."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Linear layers that get adapters, by the last part of their names (`q_proj`, `v_proj`); all but the output layer
    unless set."""
    merge: bool = True
    """The artifact's model is the base with the adapters added in, and opens like any other; the adapters lie beside
    it. false: it holds the adapters alone."""

    @property
    def scale(self) -> float:
        """`alpha`, chosen or derived."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class PretrainConfig(Config):
    """Stage `pretrain`: a language model, from scratch or from one that stands.

    Decoders learn to predict the next token, encoders hidden tokens, encoder-decoders to restore hidden spans.
    """

    kind: Literal["pretrain"] = "pretrain"
    corpus: Input | Annotated[dict[CorpusName, Input], Field(min_length=1)]
    """A token corpus; or several by name, made with one tokenizer, which `data.mixture` gives weights to."""
    data: DataConfig = DataConfig()
    model: ModelChoice = ModelConfig()
    training: TrainingConfig

    @model_validator(mode="after")
    def _mixture_fits(self) -> Self:
        self.data.check_names(list(self.corpus) if isinstance(self.corpus, dict) else [], self.training.steps)
        return self


class FinetuneConfig(Config):
    """Stage `finetune`: supervised training on a dataset.

    `pairs`: prompts and completions of stage `instructions` or `prompts`, loss on the completion only. `classify`,
    `tag` and `seq2seq`: datasets of stage `examples` of the same task.
    """

    kind: Literal["finetune"] = "finetune"
    task: Literal["pairs", "classify", "tag", "seq2seq"] = "pairs"
    model: ModelChoice
    tokenizer: Input | None = None
    """Tokenizer of a model from scratch; a model that stands brings its own."""
    data: Input
    training: TrainingConfig
    lora: LoraConfig | None = None
    """Train adapters instead of the whole model, with AdamW whatever `training.optim.name` says."""
    chat: bool = True
    """Whether `pairs` are rendered as conversations; otherwise a completion follows its prompt as text."""
    generated_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest text that a `seq2seq` model writes when it is scored at the end."""

    @model_validator(mode="after")
    def _tokenizer_or_model(self) -> Self:
        if (self.model.start is None) != (self.tokenizer is not None):
            raise ValueError("a model from scratch needs a tokenizer, and one that stands brings its own")
        if self.task == "pairs" and self.model.start is None:
            raise ValueError("task pairs needs a model that stands: give model.from")
        if self.lora is not None and self.model.start is None:
            raise ValueError("lora needs a model that stands: give model.from, or leave lora out")
        return self
