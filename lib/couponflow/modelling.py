"""The sections of the config that shape a model: network, training, boosted trees, calibrator."""

from typing import Literal

from pydantic import Field, model_validator

from couponflow.values import Section, Widths


class ModelConfig(Section):
    """One network; a copy travels inside the bundle and is what scoring reads.

    Every encoder gets the same step inputs, candidate, aggregates and head; a field that names encoders is
    used by those.
    """

    encoder: Literal["mean_pool", "static", "din", "gru", "gru_att", "dien"] = Field(
        default="dien",
        description="How a history becomes one vector: its mean; an MLP of the mean; attention of the "
        "candidate on the steps; the last GRU state; two GRUs and attention; DIEN.",
    )
    item_dim: int = Field(default=4, ge=1, le=512, description="Width of the item embedding.")
    category_dim: int = Field(default=8, ge=1, le=512, description="Width of the category embedding.")
    shop_dim: int = Field(default=4, ge=1, le=512, description="Width of the shop embedding.")
    type_dim: int = Field(default=2, ge=1, le=64, description="Width of the event type embedding.")
    gap_dim: int = Field(default=4, ge=1, le=64, description="Width of the time-gap bucket embedding.")
    position_dim: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Width of an embedding of a step's place, counted from the newest event; 0: none.",
    )
    hidden_dim: int = Field(
        default=16, ge=1, le=1024, description="Width H of the recurrent layers; gru, gru_att, dien."
    )
    attention: Literal["mlp", "bilinear"] = Field(
        default="mlp", description="How a step is scored against the candidate; din, gru_att, dien."
    )
    normalise: Literal["softmax", "sigmoid", "sum"] = Field(
        default="softmax",
        description="From scores to attention weights. softmax: they sum to 1; sigmoid: each step for "
        "itself; sum: the score is the weight, which dien refuses because it multiplies gates.",
    )
    attention_dims: Widths = Field(default=(80, 40), description="Hidden widths of the attention MLP.")
    attention_activation: Literal["sigmoid", "prelu", "dice"] = Field(
        default="sigmoid", description="Hidden units of the attention MLP."
    )
    auxiliary_dims: Widths = Field(default=(100, 50), description="Hidden widths of the auxiliary MLP.")
    head_dims: Widths = Field(default=(32,), description="Hidden widths of the head.")
    cell: Literal["augru_paper", "augru_official", "agru", "aigru", "gru"] = Field(
        default="augru_paper", description="How attention enters the second recurrent layer; dien."
    )
    auxiliary_scorer: Literal["mlp", "dot"] = Field(
        default="mlp", description="How a state is scored against the next behaviour."
    )
    auxiliary_weight: float = Field(
        default=1.0,
        ge=0.0,
        le=10.0,
        description="Weight alpha of the auxiliary loss on the first GRU; 0 switches it off.",
    )
    mba_weight: float = Field(
        default=0.0,
        ge=0.0,
        le=10.0,
        description="Weight of the mini-batch aware regularisation of embeddings, which shrinks rare ids "
        "more; 0: off.",
    )
    final_norm: bool = Field(
        default=True, description="LayerNorm on the interest vector; gru, gru_att, dien."
    )
    match_features: bool = Field(
        default=False,
        description="Give the head the product of interest and candidate and the greatest attention score; "
        "din, gru_att, dien.",
    )
    dropout: float = Field(default=0.5, ge=0.0, lt=1.0, description="Dropout in the head.")
    wide_skip: bool = Field(
        default=True, description="Add a linear term of the aggregates to the logit (wide and deep)."
    )

    @model_validator(mode="after")
    def _gates_are_bounded(self) -> "ModelConfig":
        if self.encoder == "dien" and self.cell != "gru" and self.normalise == "sum":
            raise ValueError(
                "normalise = 'sum' lets raw scores multiply the gates of cell "
                f"{self.cell!r}, which diverges; use softmax or sigmoid"
            )
        return self


class TrainingConfig(Section):
    """Used by train."""

    num_ranks: int = Field(default=2, ge=1, le=1024, description="Horovod processes.")
    launcher: Literal["processes", "spark"] = Field(
        default="processes",
        description="What starts ranks. processes: on this machine; spark: each as a task of a Spark "
        "application, which has a slot for every rank and no dynamic allocation.",
    )
    batch_size: int = Field(default=128, ge=1, description="Rows per step over all ranks together.")
    max_epochs: int = Field(
        default=8, ge=1, le=1000, description="Upper bound of passes over the training rows."
    )
    patience: int = Field(
        default=3, ge=1, description="Epochs without a better validation log loss before stopping."
    )
    learning_rate: float = Field(default=1e-3, gt=0.0, le=1.0, description="Adam step size.")
    lr_scaling: Literal["none", "linear", "sqrt"] = Field(
        default="none",
        description="Factor of learning_rate by the number of ranks. batch_size is that of all ranks, so "
        "ranks alone need none; who raises batch_size with them takes their number, or its square root.",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Steps over which the learning rate rises from 0; 0 starts at its full."
    )
    plateau_epochs: int = Field(
        default=2,
        ge=0,
        description="Epochs without a better validation log loss after which the learning rate is halved; "
        "0 never halves it. Below patience, or training stops first.",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0.0,
        description="Decoupled weight decay on matrices; embeddings and biases have none.",
    )
    clip_norm: float = Field(default=5.0, gt=0.0, description="Upper bound of the gradient's global norm.")
    seed: int = Field(default=0, ge=0, description="Initialisation, shuffling and dropout.")
    warm_start: bool = Field(
        default=True,
        description="Start a network's linear term of the aggregates at the logistic model of the training "
        "rows; off starts it at 0. Needs model.wide_skip.",
    )
    shuffle_rows: int = Field(default=20_000, ge=1, description="Rows held in memory for shuffling.")
    logistic_c: float = Field(
        default=0.1, gt=0.0, description="Inverse L2 strength of the logistic champion."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where a network trains: auto takes a GPU where there is one. The ranks of a machine "
        "take its GPUs in turn.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Of a network's matrix products while it trains; bf16 is for a GPU. Gates, softmax, "
        "losses, weights and validation stay in fp32.",
    )
    gradient_compression: Literal["none", "fp16"] = Field(
        default="none",
        description="Precision in which ranks exchange gradients: fp16 halves the bytes and rounds them.",
    )
    start_timeout_seconds: int = Field(
        default=120, ge=1, description="Seconds Horovod waits for its ranks to start."
    )
    stall_seconds: float = Field(
        default=300.0,
        gt=0.0,
        description="Seconds. When a rank makes no step for so long, all ranks are killed (exit code 5).",
    )
    checkpoint_steps: int = Field(
        default=1000,
        ge=0,
        description="Steps of an epoch between two checkpoints; 0 writes them at the end of epochs only.",
    )


class BoostingConfig(Section):
    """Used by train of the boosted trees."""

    max_trees: int = Field(
        default=500, ge=1, le=100_000, description="Upper bound of trees; validation log loss stops earlier."
    )
    patience: int = Field(
        default=20, ge=1, description="Trees without a better validation log loss before stopping."
    )
    learning_rate: float = Field(
        default=0.05, gt=0.0, le=1.0, description="Share of each tree that is added. Lower needs more trees."
    )
    max_leaves: int = Field(default=8, ge=2, le=1024, description="Leaves of a tree. Higher fits finer.")
    min_leaf_rows: int = Field(
        default=20, ge=1, description="Rows a leaf needs. Higher ignores what few rows show."
    )
    l2: float = Field(default=1.0, ge=0.0, description="L2 penalty on the values of leaves.")


class CalibrationConfig(Section):
    """Used by train and ``couponflow models recalibrate``: from a model's logits to probabilities."""

    method: Literal["platt", "temperature", "isotonic", "none"] = Field(
        default="platt",
        description="The map fitted on validation rows. temperature cannot move the base rate, isotonic "
        "needs isotonic_positives, none only undoes sampled negatives.",
    )
    by: Literal["none", "campaign_type"] = Field(
        default="none",
        description="campaign_type: an intercept per type, from 200 positives on a slope too. platt only.",
    )
    prior: Literal["none", "latest_matured"] = Field(
        default="none",
        description="latest_matured: move each campaign type to the conversion rate of its latest campaign "
        "whose labels are final.",
    )
    isotonic_positives: int = Field(
        default=1000, ge=2, description="Positives below which method isotonic is refused."
    )

    @property
    def needs_types(self) -> bool:
        """Whether a calibrator is fitted with the campaign type of each row."""
        return self.by != "none" or self.prior != "none"

    @model_validator(mode="after")
    def _fits_together(self) -> "CalibrationConfig":
        if self.by != "none" and self.method != "platt":
            raise ValueError("by = 'campaign_type' needs method = 'platt'; set one of them")
        return self
