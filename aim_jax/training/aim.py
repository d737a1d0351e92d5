"""Training of AiM: next-token prediction for a class or a caption (arXiv 2408.12245, section 3)."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics as clu_metrics
from clu import parameter_overview
from flax import linen as nn
from ml_collections import ConfigDict

from aim_jax.data.features import FeatureFile
from aim_jax.data.text import TextTokenizer
from aim_jax.models.aim import AiM, init_params
from aim_jax.models.captions import condition_of, condition_shapes
from aim_jax.models.config import AiMConfig
from aim_jax.models.lora import WHOLE, LoRA, init_adapters, merge
from aim_jax.parallel.ownership import Claim, owned
from aim_jax.parallel.sharding import (
    axis_rules,
    batch_sharding,
    batch_share,
    check_batch,
    create_sharded,
    from_host,
    make_mesh,
    replicate,
    sharded_jit,
    shardings,
    summed,
    to_host,
)
from aim_jax.perf.flops import training_flops
from aim_jax.sampling.conditions import as_condition
from aim_jax.sampling.config import SETTINGS, SamplingConfig
from aim_jax.sampling.generate import generate
from aim_jax.sampling.grids import caption
from aim_jax.training import loop
from aim_jax.training.checkpoint import claim_workdir, has_checkpoint
from aim_jax.training.inputs import CodeData, EncodedImages, example_captions, open_codes
from aim_jax.training.loop import Every, Stage
from aim_jax.training.optimizer import accumulated_grads, apply_gradients, make_optimizer
from aim_jax.training.state import TrainState
from aim_jax.utils.checks import check_arguments
from aim_jax.utils.endings import closing_all
from aim_jax.utils.images import make_grid, save_png
from aim_jax.utils.logging import reminding, say
from aim_jax.utils.parameters import parameter_table
from aim_jax.utils.random import random_key
from aim_jax.weights.adapt import adapt_aim
from aim_jax.weights.adapters import Origin, save_adapters
from aim_jax.weights.directories import save_model
from aim_jax.weights.load import load_pretrained
from aim_jax.weights.pretrained import Pretrained
from aim_jax.weights.tokenizer import open_tokenizer


def create_train_state(
    config: AiMConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    ema: bool = False,
    adapters: LoRA | None = None,
) -> TrainState:
    """Create a fresh state; parameters and their copies are boxed with their logical axes.

    With adapters, its parameters are these alone.
    """
    key = random_key(seed)
    own_key = jax.random.fold_in(key, 1)
    if adapters is None:
        params = init_params(config, own_key)
    else:
        params = init_adapters(config, adapters, own_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        rng=jax.random.key_data(key),
    )


def loss_fn(
    params: Any, batch: dict, rng: jax.Array, config: AiMConfig
) -> tuple[jax.Array, tuple[dict, None]]:
    """Return the mean cross entropy in nats per token, with dropout of conditions and tokens.

    With `text_loss_weight`, the cross entropy of the captions is added: the mean over images of the
    nats per token of their captions. The metric "loss" is that of the images' tokens alone.
    """
    apply = functools.partial(
        AiM(config).apply, {"params": params}, batch["codes"], condition_of(batch), train=True,
        rngs={"dropout": rng},
    )  # fmt: skip
    if not config.text_loss_weight:
        loss = apply(method="cross_entropy").mean()
        return loss, ({"loss": loss}, None)
    loss, caption_loss = (nats.mean() for nats in apply(method="cross_entropies"))
    total = loss + config.text_loss_weight * caption_loss
    return total, ({"loss": loss, "caption_loss": caption_loss}, None)


def train_step(
    state: TrainState,
    batch: dict,
    base: dict | None = None,
    *,
    config: AiMConfig,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    scale: float = 1.0,
) -> tuple[TrainState, dict]:
    """Run one optimizer step on a batch of `codes` (b, t) and its condition.

    The condition is `labels` (b,), or `captions` for a text model; see `condition_of`. With `base`,
    the state holds adapters of these parameters, whose products are scaled by `scale`.
    """
    rng = state.step_key()

    def loss(params: Any, batch: dict, rng: jax.Array) -> tuple[jax.Array, tuple[dict, None]]:
        whole = params if base is None else merge(base, params, scale)
        return loss_fn(whole, batch, rng, config)

    grad_fn = jax.grad(loss, has_aux=True)
    grads, metrics, _ = accumulated_grads(grad_fn, state.params, batch, rng, accumulate)
    state, report = apply_gradients(state, grads, optimizer, ema_decay)
    return state, metrics | report


# Metrics of held-out images; val_loss is in nats per token.
EvalMetrics = clu_metrics.Collection.create(
    val_loss=clu_metrics.Average.from_output("val_loss"),
)


def eval_step(
    params: Any, batch: dict, *, config: AiMConfig, accumulate: int = 1
) -> clu_metrics.Collection:
    """Return the `EvalMetrics` of the real examples of a padded batch."""

    def measure(part):
        codes = part["codes"]
        condition = condition_of(part)
        nats = AiM(config).apply({"params": params}, codes, condition, method="cross_entropy")
        return EvalMetrics.single_from_model_output(
            val_loss=nats.mean(axis=-1), mask=part["weights"]
        )

    return summed(measure, batch, accumulate)


def with_remat(model: AiMConfig, platform: str) -> AiMConfig:
    """Return the model with its rematerialization chosen, if that is "auto".

    A CPU takes longer to store what a loop over layers saves, gigabytes whose pages the system
    prepares in every step, than to compute it again: "dots". XLA on CPU joins the recomputation of
    an unrolled loop with the forward pass, so nothing is gained there: "none", as on accelerators.
    """
    if model.remat != "auto":
        return model
    in_loop = model.scan_unroll < model.n_layer
    return dataclasses.replace(model, remat="dots" if platform == "cpu" and in_loop else "none")


class Setup:
    """The model, optimizer and jitted steps of a configuration on a mesh.

    The mesh may consist of devices that are not attached.

    Attributes:
      model: AiMConfig.
      trained: The same model as `train_step` computes it, with its rematerialization chosen.
      optimizer: optax transformation.
      mesh: The devices.
      rules: The mesh axes that each logical axis is sharded over.
      new_state: Creates a fresh, boxed TrainState.
      adapters: LoRA, or None if all parameters are trained.
      train_step: Jitted (state, batch) -> (state, metrics); donates the state. With adapters,
        (state, batch, base).
      eval_step: Jitted (params, padded batch) -> `EvalMetrics`.
      merged: Jitted (base, adapters) -> params.

    Raises:
      ValueError: Model, optimizer, batch and mesh do not fit together.
    """

    def __init__(self, config: ConfigDict, devices: Sequence[jax.Device] | None = None):
        self.mesh = make_mesh(config.mesh.data, config.mesh.model, config.mesh.slices, devices)
        self.model = AiMConfig(**config.model)
        self.trained = with_remat(self.model, self.mesh.devices.flat[0].platform)
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        self.rules = axis_rules(self.mesh, config.mesh.fsdp)
        check_batch(config.batch_size, config.accumulate, self.mesh)
        lora = LoRA(**config.lora)
        self.adapters = lora if lora.rank else None
        scale = lora.scale if self.adapters else 1.0
        self.new_state = lambda: create_train_state(
            self.model, self.optimizer, config.seed, config.ema_decay > 0, self.adapters
        )
        self._batch = jax.ShapeDtypeStruct((config.batch_size, self.model.num_tokens), jnp.int32)
        abstract = jax.eval_shape(self.new_state)
        self._state = nn.unbox(abstract)
        self._shardings = shardings(abstract, self.mesh, self.rules)
        whole = jax.eval_shape(lambda: init_params(self.model, jax.random.key(0)))
        self._base = nn.unbox(whole)
        self._base_shardings = shardings(whole, self.mesh, self.rules)
        self.merged = sharded_jit(
            lambda base, adapters: merge(base, adapters, scale),
            self.mesh, self.rules, out_shardings=self._base_shardings,
        )  # fmt: skip
        self.train_step = sharded_jit(
            lambda state, batch, base=None: train_step(
                state, batch, base, config=self.trained, optimizer=self.optimizer,
                accumulate=config.accumulate, ema_decay=config.ema_decay, scale=scale,
            ),
            self.mesh, self.rules, donate_argnums=0, out_shardings=(self._shardings, None),
        )  # fmt: skip
        self.eval_step = sharded_jit(
            lambda params, batch: eval_step(
                params, batch, config=self.model, accumulate=config.accumulate
            ),
            self.mesh, self.rules,
        )  # fmt: skip

    def place(self, params: dict) -> dict:
        """Return the parameters of a whole model, given as host arrays, on the mesh in float32."""
        return jax.tree.map(
            lambda x, sharding: from_host(np.asarray(x, np.float32), sharding),
            params, self._base_shardings,
        )  # fmt: skip

    def abstract_arguments(self) -> tuple[Any, ...]:
        """Return shapes, dtypes and shardings of the arguments of `train_step`."""

        def placed(x: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> Any:
            return x.update(sharding=sharding)

        state = jax.tree.map(placed, self._state, self._shardings)
        sharding = batch_sharding(self.mesh)
        batch = {"codes": self._batch, **condition_shapes(self.model, self._batch.shape[0])}
        batch = {name: placed(x, sharding) for name, x in batch.items()}
        if self.adapters is None:
            return state, batch
        return state, batch, jax.tree.map(placed, self._base, self._base_shardings)


@check_arguments
def train(config: ConfigDict, workdir: str | Path, callbacks: Sequence[Every] = ()) -> TrainState:
    """Train an AiM, and write checkpoints, metrics, samples and a model directory to the workdir.

    Args:
      config: Configuration; see `aim_jax.configs.defaults.aim_defaults`.
      workdir: Directory of this run alone; an interrupted run in it resumes.
      callbacks: Called after those of the configuration.

    Raises:
      ValueError, FileNotFoundError: A configuration, cache or workdir does not fit. Raised before
        any work starts.
      OwnershipError: Another run uses the workdir.
    """
    loop.check_reports(config)
    with owned(workdir) as claim:
        return _train(config, Path(workdir), callbacks, claim)


def _train(
    config: ConfigDict, workdir: Path, callbacks: Sequence[Every], claim: Claim
) -> TrainState:
    """Train in a workdir that this run owns."""
    settings = SamplingConfig(**{name: config.sample[name] for name in SETTINGS})
    setup = Setup(config)
    mesh = setup.mesh
    model_config = setup.model
    share = batch_share(mesh)
    tokenizer = open_tokenizer(config.tokenizer)
    tokenizer = dataclasses.replace(tokenizer, vq_params=replicate(tokenizer.vq_params, mesh))
    data = open_codes(config, tokenizer, share)
    for line in data.summary:
        say(line)
    check_fit(model_config, tokenizer, data)
    text = data.captions.encoder if data.captions else None
    adapters = setup.adapters
    if adapters and not config.init:
        raise ValueError(
            f"config.lora.rank={adapters.rank}, but config.init names no model to adapt; set it to "
            "a trained model."
        )
    start = None
    origin = None
    identity = data.identity
    if config.init and (adapters or not has_checkpoint(workdir)):
        trained = load_pretrained(config.init, as_stored=True)
        start = adapted_start(trained, model_config, text)
        if adapters:
            origin = Origin.of(trained, tokenizer)
            identity = identity | {"base": origin.base_fingerprint}
        del trained
    claim_workdir(workdir, config, identity)

    with reminding("creating the parameters, with compilation"):
        state = create_sharded(setup.new_state, mesh, setup.rules)
    base = None
    if start is not None and origin is not None:
        base = setup.place(start)
        if WHOLE in start:
            state = state.with_params(to_host(state.params) | {WHOLE: start[WHOLE]})
    elif start is not None:
        state = state.with_params(start)
    del start

    def whole(params: Any) -> Any:
        return params if base is None else setup.merged(base, params)

    say(
        f"AiM with {parameter_overview.count_parameters(state.params):,} parameters; "
        f"{data.train_size} training and {data.validation_size} validation images of "
        f"{model_config.num_tokens} tokens; {mesh.size} {jax.devices()[0].platform} device(s)"
    )
    say(parameter_table(state.params))
    if data.unigram_entropy is not None:
        say(f"unigram entropy of the tokens: {data.unigram_entropy:.3f} nats per token")

    def evaluate(state):
        batches = data.validation_batches()
        params = whole(state.eval_params)
        step = lambda batch: setup.eval_step(params, data.encode(batch))  # noqa: E731
        return loop.weighted_means(step, batches, config.batch_size // share[1], mesh)

    def as_model(state: TrainState, params: Any) -> Pretrained:
        return Pretrained(
            name=str(workdir),
            aim_config=model_config,
            aim_params=params,
            vq_config=tokenizer.vq_config,
            vq_params=tokenizer.vq_params,
            class_names=data.class_names,
            sampling=settings.numbers(),
            text=text,
            info={
                **tokenizer.info,
                **data_section(tokenizer, model_config.num_tokens),
                "aim_steps": int(state.step),
                "seed": config.seed,
            },
        )

    def sample(state, path):
        model = as_model(state, whole(state.eval_params))
        labels: list[int] | list[str]
        if data.captions:
            labels = example_captions(data.captions.validation_texts, config.sample.classes) or [""]
        else:
            labels = list(range(min(config.sample.classes, model_config.num_classes)))
        condition = jax.tree.map(
            lambda rows: np.repeat(rows, config.sample.per_class, axis=0),
            as_condition(model, labels),
        )
        images = to_host(generate(model, condition, config.seed).images)
        names = [caption(model, label) for label in labels]
        if jax.process_index() == 0:
            save_png(make_grid(images, config.sample.per_class, names), path)

    def export(state):
        model = as_model(state, state.eval_params)
        if adapters is None or origin is None:
            save_model(workdir / "model", model, config.export_dtype)
        else:
            save_adapters(workdir / "model", model, adapters, origin)

    def encode_and_step(state, batch):
        batch = data.encode(batch, after=state)
        return setup.train_step(state, batch, *([] if base is None else [base]))

    batches = data.train_batches()
    with closing_all() as at_end:
        at_end(batches.close)  # ends its processes
        stage = Stage(
            train_step=encode_and_step,
            batches=batches,
            callbacks=[*loop.run_callbacks(config, evaluate, sample, export), *callbacks],
            export=export,
            flops=training_flops(model_config),
        )
        return loop.run(config, workdir, mesh, state, stage, claim)


def data_section(tokenizer: Pretrained, num_tokens: int) -> dict:
    """Return the data section of a model with a number of tokens, for its info.

    It is that of its tokenizer, but the images are larger or smaller if there are more tokens or
    fewer.
    """
    data = tokenizer.info.get("data")
    side = math.isqrt(num_tokens) * tokenizer.vq()[0].downsampling
    if data is None or data["image_size"] == side:
        return {}
    return {"data": data | {"image_size": side, "resize_size": 0}}


def adapted_start(
    start: Pretrained, config: AiMConfig, text: TextTokenizer | FeatureFile | None = None
) -> dict:
    """Return the parameters of a trained AiM, adapted to the model to train; log the changes.

    Args:
      start: The trained model of config.init, with parameters as stored.
      config: The model to train.
      text: Its text tokenizer; features of captions say nothing about a model.

    Raises:
      ValueError: It holds no AiM, an AiM of another shape, or one of another text tokenizer.
    """
    if start.aim_params is None or start.aim_config is None:
        raise ValueError(f"config.init={start.name!r} holds no AiM; name a model that has one.")
    params, changes = adapt_aim(start.aim_params, start.aim_config, config)
    if start.text != (None if isinstance(text, FeatureFile) else text):
        raise ValueError(
            f"config.init={start.name!r} has another text tokenizer; set config.text_tokenizer "
            "to its directory."
        )
    say("\n  ".join([f"weights of {start.name}", *changes]))
    return params


def check_fit(model: AiMConfig, tokenizer: Pretrained, data: CodeData | EncodedImages) -> None:
    """Raise ValueError where model, tokenizer and data disagree in a size."""
    for name, value, expected, owner in (
        ("vocab_size", model.vocab_size, tokenizer.vq()[0].n_embed, "the tokenizer's codebook"),
        ("vocab_size", model.vocab_size, data.vocab_size, "the data"),
        ("num_tokens", model.num_tokens, data.num_tokens, "the data"),
        ("num_classes", model.num_classes, len(data.class_names), "the data"),
    ):
        if value != expected:
            raise ValueError(
                f"config.model.{name}={value}, but {owner} has {expected}; set it to {expected}."
            )
