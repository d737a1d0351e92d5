"""Training of the VQ tokenizer (arXiv 2406.06525, section 2.1); its losses are in `vq_loss`."""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import parameter_overview
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from aim_jax.data import check_images, image_batches, open_images
from aim_jax.data.preprocessing import describe_data, image_spec
from aim_jax.evaluation.features import FeatureExtractor
from aim_jax.models.codebook import (
    HISTORY_LENGTH,
    codebook_usage,
    restart_dead_codes,
    unit,
    update_history,
)
from aim_jax.models.config import VQConfig
from aim_jax.models.lpips import MIN_SIDE
from aim_jax.models.patchgan import PatchGAN
from aim_jax.models.vq import ENCODER, VQModel, encoder_params, init_params
from aim_jax.parallel.sharding import (
    axis_rules,
    batch_share,
    check_batch,
    constrain,
    create_sharded,
    joined,
    make_mesh,
    micro_batches,
    replicate,
    sharded_jit,
    shardings,
)
from aim_jax.training import loop
from aim_jax.training.checkpoint import claim_workdir, has_checkpoint
from aim_jax.training.held_out import HeldOut
from aim_jax.training.inputs import check_pictures_fit
from aim_jax.training.loop import Every, Stage
from aim_jax.training.losses import LossConfig, gradients
from aim_jax.training.optimizer import accumulated_grads, apply_gradients, make_optimizer
from aim_jax.training.state import Discriminator, TrainState
from aim_jax.utils.logging import say
from aim_jax.utils.parameters import parameter_table
from aim_jax.utils.random import random_key
from aim_jax.weights.adapt import VQ_SHAPE, check_same
from aim_jax.weights.convert.inception import load_inception
from aim_jax.weights.convert.lpips import EXPECTED, load_lpips
from aim_jax.weights.pretrained import Pretrained, load_pretrained, save_model


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a tokenizer is trained.

    Attributes:
      model: of the tokenizer.
      optimizer: of the tokenizer, and another one like it of the discriminator.
      losses: see `vq_loss`.
      discriminator: trained if losses.adversarial is not 0.
      accumulate: micro-batches per step.
      ema_decay: of the averaged copy of the parameters; 0: none.
      restart_codes: steps between new beginnings of codes out of use; 0: never.
      decoder_only: whether the encoder and the codebook, and so the codes, stay as they are.
    """

    model: VQConfig
    optimizer: optax.GradientTransformation
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)
    discriminator: PatchGAN = dataclasses.field(default_factory=PatchGAN)
    accumulate: int = 1
    ema_decay: float = 0.0
    restart_codes: int = 0
    decoder_only: bool = False


def create_train_state(recipe: Recipe, seed: int, image_size: int, parts: int = 1) -> TrainState:
    """A fresh state, with an empty history of codes; parameters are boxed with logical axes.

    Args:
      parts: devices that an axis is to be split over with FSDP.
    """
    key = random_key(seed)
    params = name_axes(init_params(recipe.model, jax.random.fold_in(key, 1)), parts)
    adversary = None
    if recipe.losses.adversarial:
        pictures = jnp.zeros((1, image_size, image_size, recipe.model.out_channels))
        found = recipe.discriminator.init(jax.random.fold_in(key, 2), pictures)["params"]
        found = name_axes(found, parts)
        adversary = Discriminator(found, recipe.optimizer.init(found))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=recipe.optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if recipe.ema_decay else None,
        rng=jax.random.key_data(key),
        history=jnp.zeros(HISTORY_LENGTH, jnp.int32),
        discriminator=adversary,
    )


def name_axes(params: Any, parts: int) -> Any:
    """Boxes parameters: the output channels of kernels are what FSDP splits, if `parts` divides."""

    def box(leaf: jax.Array) -> Any:
        if leaf.ndim < 2 or leaf.shape[-1] % parts:
            return leaf
        return nn.LogicallyPartitioned(leaf, (None,) * (leaf.ndim - 1) + ("embed",))

    return jax.tree.map(box, params)


def train_step(
    state: TrainState, batch: dict, lpips_params: dict | None, *, recipe: Recipe
) -> tuple[TrainState, dict]:
    """One step of tokenizer and discriminator on a batch of `images` (b, H, W, c) in [-1, 1]."""
    rng, optimizer = state.step_key(), recipe.optimizer
    # With FSDP the kernels are gathered here, and their gradients are split again below.
    params = {"vq": jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), state.params)}
    if state.discriminator is not None:
        params["discriminator"] = state.discriminator.params
    grad_fn = functools.partial(
        gradients, model=recipe.model, losses=recipe.losses, discriminator=recipe.discriminator,
        lpips_params=lpips_params, step=state.step, decoder_only=recipe.decoder_only,
    )  # fmt: skip
    grads, metrics, indices = accumulated_grads(grad_fn, params, batch, rng, recipe.accumulate)
    assert state.history is not None
    history = update_history(state.history, indices)
    metrics["codebook_usage"] = codebook_usage(history, recipe.model.n_embed)
    encode_with = state.params
    state, report = apply_gradients(state, grads["vq"], optimizer, recipe.ema_decay)
    if state.discriminator is not None:
        adversary = state.discriminator
        updates, opt_state = optimizer.update(
            grads["discriminator"], adversary.opt_state, adversary.params
        )
        new = Discriminator(optax.apply_updates(adversary.params, updates), opt_state)
        # Until its start its optimizer stands still as well: warmup, moments, the usual norm.
        started = state.step > recipe.losses.adversarial_start
        new = jax.tree.map(lambda new, old: jnp.where(started, new, old), new, adversary)
        state = state.replace(discriminator=new)
        # Its optimizer guards itself; a run whose discriminator stands still has to end as well.
        bad = jnp.maximum(report["skipped_in_a_row"], new.opt_state.in_a_row)
        report |= {"skipped": report["skipped"] + new.opt_state.skipped, "skipped_in_a_row": bad}
    state = state.replace(history=history)
    if recipe.restart_codes:
        # Only once the whole history is of this run.
        known = state.step >= math.ceil(HISTORY_LENGTH / indices.size)
        state = jax.lax.cond(
            known & (state.step % recipe.restart_codes == 0),
            lambda state: restart(state, batch["images"], encode_with, rng, recipe),
            lambda state: state,
            state,
        )
    return state, metrics | report


def restart(
    state: TrainState, images: jax.Array, params: Any, key: jax.Array, recipe: Recipe
) -> TrainState:
    """The state with codes that are out of use begun anew from what `images` are encoded to."""
    config = recipe.model

    def encode(part):
        return VQModel(config).apply({"params": params}, part, method="prequant")

    vectors = joined(jax.lax.map(encode, micro_batches(images, recipe.accumulate)))
    vectors = vectors.reshape(-1, config.embed_dim)
    vectors = unit(vectors) if config.l2_norm else vectors

    def mend(params):
        book = restart_dead_codes(params["quantize"]["embedding"], state.history, vectors, key)
        return params | {"quantize": {"embedding": book}}

    ema = None if state.ema is None else mend(state.ema)
    return state.replace(params=mend(state.params), ema=ema)


def open_start(
    name_or_path: str, config: VQConfig, decoder_only: bool = False, export_dtype: str = "float32"
) -> dict:
    """Parameters of a trained tokenizer of the same shape.

    Raises:
      FileNotFoundError, ValueError: no such model, it holds no tokenizer, or one of another shape;
        with `decoder_only` also where its codes would change by how they are computed or stored.
    """
    start = load_pretrained(name_or_path, as_stored=True)
    if start.vq_params is None or start.vq_config is None:
        raise ValueError(f"config.init={name_or_path!r} holds no tokenizer.")
    check_same(start.vq_config, config, VQ_SHAPE)
    if decoder_only:
        check_codes_stay(start, config, export_dtype)
    say(f"weights of {name_or_path}")
    return start.vq_params


def check_codes_stay(start: Pretrained, config: VQConfig, export_dtype: str) -> None:
    """Raises ValueError where the encoder of `start` would be rounded in another way."""
    vq_config, vq_params = start.vq()
    theirs = vq_config.compute_dtype
    if theirs != config.compute_dtype:
        raise ValueError(
            f"config.decoder_only=True keeps the codes, but {start.name} encodes in {theirs}; set "
            f"config.model.compute_dtype={theirs}."
        )
    stored = {x.dtype for x in jax.tree.leaves(encoder_params(vq_params))}
    narrow = [x for x in stored if jnp.promote_types(x, export_dtype) != jnp.dtype(export_dtype)]
    if narrow:
        raise ValueError(
            f"config.decoder_only=True keeps the codes, but {start.name} is stored in {narrow[0]}; "
            f"set config.export_dtype={narrow[0]}."
        )


class Setup:
    """What a configuration means on the devices of this run.

    Attributes:
      recipe: see `Recipe`. mesh, rules: devices, and what is sharded over which of their axes.
      new_state: makes a fresh, boxed TrainState.
      train_step: jitted (state, batch, lpips_params) -> (state, metrics); consumes the state.

    Raises:
      ValueError: tokenizer, losses, pictures, batch and mesh do not fit together.
    """

    def __init__(self, config: ConfigDict):
        model = VQConfig(**config.model)
        check_pictures_fit(model, config.data)
        check_decoder_only(config)
        self.mesh = make_mesh(config.mesh.data, config.mesh.model, config.mesh.slices)
        check_mesh(config, self.mesh)
        optimizer = make_optimizer(
            config.optimizer, config.steps, ENCODER if config.decoder_only else ()
        )
        self.recipe = Recipe(
            model, optimizer, LossConfig(**config.loss), PatchGAN(**config.discriminator),
            config.accumulate, config.ema_decay, config.restart_codes, config.decoder_only,
        )  # fmt: skip
        self.recipe.losses.check_size(config.data.image_size, self.recipe.discriminator)
        self.rules = axis_rules(self.mesh, config.mesh.fsdp)
        self.new_state = functools.partial(
            create_train_state, self.recipe, config.seed, config.data.image_size,
            self.mesh.shape["data"],
        )  # fmt: skip
        placed = shardings(jax.eval_shape(self.new_state), self.mesh, self.rules)
        self.train_step = sharded_jit(
            functools.partial(train_step, recipe=self.recipe), self.mesh, self.rules,
            donate_argnums=0, out_shardings=(placed, None),
        )  # fmt: skip


def train(config: ConfigDict, workdir: str | Path, callbacks: Sequence[Every] = ()) -> TrainState:
    """Trains as the configuration says, and leaves checkpoints, metrics, images and a model.

    Args:
      config: see `aim_jax.configs.defaults.vq_defaults`.
      workdir: of this run alone; an interrupted run in it resumes.
      callbacks: called after those of the configuration.

    Raises:
      ValueError, FileNotFoundError: a configuration, data set or workdir that does not fit, before
        any work starts.
    """
    workdir = Path(workdir)
    loop.check_reports(config)
    setup, spec = Setup(config), image_spec(config.data)
    mesh, recipe, share = setup.mesh, setup.recipe, batch_share(setup.mesh)
    sources = {
        split: open_images(config.data.name, split, config.data.dir or None)
        for split in ("train", "validation")
    }
    for source in sources.values():
        check_images(source, spec)
    lpips_params = open_lpips(config.lpips, recipe.losses, config.data.image_size)
    lpips_params = replicate(lpips_params, mesh)
    extract = FeatureExtractor(load_inception(config.inception)) if config.inception else None
    fresh = config.init and not has_checkpoint(workdir)
    start = None
    if fresh:
        start = open_start(config.init, recipe.model, config.decoder_only, config.export_dtype)
    claim_workdir(workdir, config)

    state = create_sharded(setup.new_state, mesh, setup.rules)
    if start is not None:
        state = state.with_params(start)
    say(
        f"VQ-f{recipe.model.downsampling} with "
        f"{parameter_overview.count_parameters(state.params):,} parameters; "
        f"{len(sources['train'])} training and {len(sources['validation'])} validation images; "
        f"{mesh.size} {jax.devices()[0].platform} device(s)"
    )
    say(parameter_table(state.params))

    def batches(split, part=share[0]):
        return image_batches(
            sources[split], spec, config.batch_size, seed=config.seed, train=split == "train",
            shard_index=part, shard_count=share[1],
            workers=config.data.workers if split == "train" else 0,
        )  # fmt: skip

    held_out = HeldOut(
        config, recipe.model, mesh, functools.partial(batches, "validation"),
        len(sources["validation"]), lpips_params, extract,
    )  # fmt: skip

    def export(state):
        model = Pretrained(
            name=str(workdir),
            vq_config=recipe.model,
            vq_params=state.eval_params,
            class_names=tuple(sources["train"].class_names),
            info={"data": describe_data(config.data), "vq_steps": int(state.step)},
        )
        save_model(workdir / "model", model, config.export_dtype)

    reports = loop.run_callbacks(
        config,
        evaluate=lambda state: held_out.measure(state.eval_params),
        sample=lambda state, path: held_out.draw(state.eval_params, path),
        export=export,
    )
    stage = Stage(
        train_step=lambda state, batch: setup.train_step(state, batch, lpips_params),
        batches=batches("train"),
        callbacks=[*reports, *callbacks],
        export=export,
    )
    return loop.run(config, workdir, mesh, state, stage)


def open_lpips(path: str, losses: LossConfig, image_size: int) -> dict | None:
    """Weights of the perceptual loss from `path`, or else from the file that AIM_JAX_LPIPS names.

    Returns:
      None where no file is named, or the pictures are too small for it, and the losses need none.

    Raises:
      FileNotFoundError, ValueError: they need one and there is none, or it is not LPIPS.
    """
    path = path or os.environ.get("AIM_JAX_LPIPS", "")
    if path and image_size >= MIN_SIDE:
        return load_lpips(path)
    if losses.perceptual:
        raise ValueError(
            f"config.loss.perceptual={losses.perceptual} needs the weights of LPIPS: set "
            f"config.lpips or AIM_JAX_LPIPS to {EXPECTED}. The documentation's page Training a "
            "tokenizer says where they are. Without them set config.loss.perceptual=0."
        )
    return None


def check_mesh(config: ConfigDict, mesh: Mesh) -> None:
    """Raises ValueError where the batch or the tokenizer does not fit the mesh."""
    check_batch(config.batch_size, config.accumulate, mesh)
    if mesh.shape["model"] > 1:
        raise ValueError(
            f"config.mesh.model={mesh.shape['model']}: tokenizers are split over the batch, and "
            "with config.mesh.fsdp=True their parameters too; leave config.mesh.model at 1."
        )


def check_decoder_only(config: ConfigDict) -> None:
    """Raises ValueError where the encoder is to stay, but there is none, or codes would change."""
    if config.decoder_only and not config.init:
        raise ValueError(
            "config.decoder_only=True keeps the encoder and codebook of a trained tokenizer; name "
            "one in config.init."
        )
    if config.decoder_only and config.restart_codes:
        raise ValueError(
            "config.decoder_only=True keeps the codebook; set config.restart_codes to 0."
        )
