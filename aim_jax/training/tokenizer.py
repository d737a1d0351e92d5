"""Training of the VQ tokenizer (arXiv 2406.06525, section 2.1); its losses are in `losses`."""

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

from aim_jax.data import check_images, identity_of, image_batches, open_images
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
from aim_jax.parallel.ownership import Claim, owned
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
from aim_jax.sampling.engine import native_kernels
from aim_jax.training import loop
from aim_jax.training.checkpoint import claim_workdir, has_checkpoint
from aim_jax.training.held_out import HeldOut
from aim_jax.training.inputs import check_images_fit
from aim_jax.training.loop import Every, Stage
from aim_jax.training.losses import LossConfig, gradients
from aim_jax.training.optimizer import accumulated_grads, apply_gradients, make_optimizer
from aim_jax.training.state import Discriminator, TrainState
from aim_jax.utils.checks import check_arguments
from aim_jax.utils.endings import closing_all
from aim_jax.utils.logging import reminding, say
from aim_jax.utils.parameters import parameter_table
from aim_jax.utils.random import random_key
from aim_jax.weights.adapt import VQ_SHAPE, check_same
from aim_jax.weights.directories import save_model
from aim_jax.weights.load import load_pretrained
from aim_jax.weights.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of a tokenizer's training step.

    Attributes:
      model: Configuration of the tokenizer.
      optimizer: Optimizer of the tokenizer; the discriminator has a separate one like it.
      losses: Weights of the losses.
      discriminator: Trained if losses.adversarial is not 0.
      accumulate: Micro-batches per step.
      ema_decay: Decay of the averaged copy of the parameters; 0 keeps no copy.
      restart_codes: Steps between resets of dead codes; 0 disables them.
      decoder_only: Keep the encoder and the codebook, and therefore the tokens, unchanged.
      implementation: Of the tokenizer's ops; see `VQModel`.
    """

    model: VQConfig
    optimizer: optax.GradientTransformation
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)
    discriminator: PatchGAN = dataclasses.field(default_factory=PatchGAN)
    accumulate: int = 1
    ema_decay: float = 0.0
    restart_codes: int = 0
    decoder_only: bool = False
    implementation: str = "xla"


def create_train_state(recipe: Recipe, seed: int, image_size: int, parts: int = 1) -> TrainState:
    """Create a fresh state with an empty token history; parameters are boxed with logical axes.

    Args:
      recipe: Settings of the training step.
      seed: Seed of the parameters and of the run's randomness.
      image_size: Side of the images in pixels.
      parts: Number of devices that FSDP splits an axis over.
    """
    key = random_key(seed)
    params = name_axes(init_params(recipe.model, jax.random.fold_in(key, 1)), parts)
    adversary = None
    if recipe.losses.adversarial:
        shape = (1, image_size, image_size, recipe.model.out_channels)
        images = jnp.zeros(shape, jnp.float32)
        adversary_params = recipe.discriminator.init(jax.random.fold_in(key, 2), images)["params"]
        adversary_params = name_axes(adversary_params, parts)
        adversary = Discriminator(adversary_params, recipe.optimizer.init(adversary_params))
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
    """Box parameters so that FSDP splits output channels of kernels that `parts` divides."""

    def box(leaf: jax.Array) -> Any:
        if leaf.ndim < 2 or leaf.shape[-1] % parts:
            return leaf
        return nn.LogicallyPartitioned(leaf, (None,) * (leaf.ndim - 1) + ("embed",))

    return jax.tree.map(box, params)


def train_step(
    state: TrainState, batch: dict, lpips_params: dict | None, *, recipe: Recipe
) -> tuple[TrainState, dict]:
    """Run one step of tokenizer and discriminator on `images` (b, H, W, c) in [-1, 1]."""
    rng = state.step_key()
    optimizer = recipe.optimizer
    # With FSDP the kernels are gathered here, and their gradients are sharded again below.
    params = {"vq": jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), state.params)}
    if state.discriminator is not None:
        params["discriminator"] = state.discriminator.params
    grad_fn = functools.partial(
        gradients, model=recipe.model, losses=recipe.losses, discriminator=recipe.discriminator,
        lpips_params=lpips_params, step=state.step, decoder_only=recipe.decoder_only,
        implementation=recipe.implementation,
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
        # Before adversarial_start its optimizer does not move: warm-up, moments and usual norm.
        started = state.step > recipe.losses.adversarial_start
        new = jax.tree.map(lambda new, old: jnp.where(started, new, old), new, adversary)
        state = state.replace(discriminator=new)
        # This optimizer skips bad steps too; a run whose discriminator is stuck must end as well.
        bad = jnp.maximum(report["skipped_in_a_row"], new.opt_state.in_a_row)
        report |= {"skipped": report["skipped"] + new.opt_state.skipped, "skipped_in_a_row": bad}
    state = state.replace(history=history)
    if recipe.restart_codes:
        # Only once the complete history comes from this run.
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
    """Replace dead codebook entries by encoder outputs of `images`; return the new state."""
    config = recipe.model

    def encode(part):
        return VQModel(config).apply({"params": params}, part, method="prequant")

    vectors = joined(jax.lax.map(encode, micro_batches(images, recipe.accumulate)))
    vectors = vectors.reshape(-1, config.embed_dim)
    vectors = unit(vectors) if config.l2_norm else vectors

    def reset(params):
        book = restart_dead_codes(params["quantize"]["embedding"], state.history, vectors, key)
        return params | {"quantize": {"embedding": book}}

    ema = None if state.ema is None else reset(state.ema)
    return state.replace(params=reset(state.params), ema=ema)


def open_start(
    name_or_path: str, config: VQConfig, decoder_only: bool = False, export_dtype: str = "float32"
) -> dict:
    """Load the parameters of a trained tokenizer of the same shape.

    Raises:
      FileNotFoundError, ValueError: There is no such model, it holds no tokenizer, or a tokenizer
        of another shape. With `decoder_only`, also if its tokens would change by another compute or
        storage dtype.
    """
    start = load_pretrained(name_or_path, as_stored=True)
    if start.vq_params is None or start.vq_config is None:
        raise ValueError(
            f"config.init={name_or_path!r} holds no tokenizer; name a model that has one."
        )
    check_same(start.vq_config, config, VQ_SHAPE)
    if decoder_only:
        check_codes_stay(start, config, export_dtype)
    say(f"weights of {name_or_path}")
    return start.vq_params


def check_codes_stay(start: Pretrained, config: VQConfig, export_dtype: str) -> None:
    """Raise ValueError if the encoder of `start` would be rounded differently."""
    vq_config, vq_params = start.vq()
    compute_dtype = vq_config.compute_dtype
    if compute_dtype != config.compute_dtype:
        raise ValueError(
            f"config.decoder_only=True keeps the tokens, but {start.name} encodes in "
            f"{compute_dtype}; set config.model.compute_dtype={compute_dtype}."
        )
    dtypes = {x.dtype for x in jax.tree.leaves(encoder_params(vq_params))}
    narrow = [x for x in dtypes if jnp.promote_types(x, export_dtype) != jnp.dtype(export_dtype)]
    if narrow:
        raise ValueError(
            f"config.decoder_only=True keeps the tokens, but {start.name} is stored in "
            f"{narrow[0]}; set config.export_dtype={narrow[0]}."
        )


def choose_implementation(mesh: Mesh, dtype: str) -> str:
    """Return the implementation of the tokenizer's ops: "native" on one CPU device in float32.

    XLA does not split the native kernels over devices; they use all cores from one.
    """
    fits = mesh.size == 1 and mesh.devices.item().platform == "cpu" and dtype == "float32"
    return "native" if fits and native_kernels() else "xla"


class Setup:
    """The recipe and jitted training step of a configuration on the devices of this run.

    Attributes:
      recipe: Settings of the training step.
      mesh: The devices.
      rules: The mesh axes that each logical axis is sharded over.
      new_state: Creates a fresh, boxed TrainState.
      train_step: Jitted (state, batch, lpips_params) -> (state, metrics); donates the state.

    Raises:
      ValueError: Tokenizer, losses, images, batch and mesh do not fit together.
    """

    def __init__(self, config: ConfigDict):
        model = VQConfig(**config.model)
        check_images_fit(model, config.data)
        check_decoder_only(config)
        self.mesh = make_mesh(config.mesh.data, config.mesh.model, config.mesh.slices)
        check_mesh(config, self.mesh)
        optimizer = make_optimizer(
            config.optimizer, config.steps, ENCODER if config.decoder_only else ()
        )
        implementation = choose_implementation(self.mesh, model.compute_dtype)
        discriminator = PatchGAN(**config.discriminator, implementation=implementation)
        self.recipe = Recipe(
            model, optimizer, LossConfig(**config.loss), discriminator, config.accumulate,
            config.ema_decay, config.restart_codes, config.decoder_only, implementation,
        )  # fmt: skip
        self.recipe.losses.check_size(config.data.image_size, self.recipe.discriminator)
        self.rules = axis_rules(self.mesh, config.mesh.fsdp)
        self.new_state = functools.partial(
            create_train_state, self.recipe, config.seed, config.data.image_size,
            self.mesh.shape["data"],
        )  # fmt: skip
        state_shardings = shardings(jax.eval_shape(self.new_state), self.mesh, self.rules)
        self.train_step = sharded_jit(
            functools.partial(train_step, recipe=self.recipe), self.mesh, self.rules,
            donate_argnums=0, out_shardings=(state_shardings, None),
        )  # fmt: skip


@check_arguments
def train(config: ConfigDict, workdir: str | Path, callbacks: Sequence[Every] = ()) -> TrainState:
    """Train a tokenizer, and write checkpoints, metrics, images and a model directory to workdir.

    Args:
      config: Configuration; see `aim_jax.configs.defaults.vq_defaults`.
      workdir: Directory of this run alone; an interrupted run in it resumes.
      callbacks: Called after those of the configuration.

    Raises:
      ValueError, FileNotFoundError: A configuration, dataset or workdir does not fit. Raised before
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
    setup = Setup(config)
    spec = image_spec(config.data)
    mesh = setup.mesh
    recipe = setup.recipe
    share = batch_share(mesh)
    sources = {
        split: open_images(config.data.name, split, config.data.dir or None)
        for split in ("train", "validation")
    }
    for source in sources.values():
        say(source.summary)
        check_images(source, spec)
    lpips_params = open_lpips(config.lpips, recipe.losses, config.data.image_size)
    lpips_params = replicate(lpips_params, mesh)
    extract = open_inception(config.inception)
    fresh = config.init and not has_checkpoint(workdir)
    start = None
    if fresh:
        start = open_start(config.init, recipe.model, config.decoder_only, config.export_dtype)
    claim_workdir(workdir, config, identity_of(sources.values()))

    with reminding("creating the parameters, with compilation"):
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
    train_batches = batches("train")
    with closing_all() as at_end:
        at_end(train_batches.close)  # ends its processes
        stage = Stage(
            train_step=lambda state, batch: setup.train_step(state, batch, lpips_params),
            batches=train_batches,
            callbacks=[*reports, *callbacks],
            export=export,
        )
        return loop.run(config, workdir, mesh, state, stage, claim)


def open_inception(path: str) -> FeatureExtractor | None:
    """Return the extractor with the Inception network of a file, or None if no file is named."""
    if not path:
        return None
    from aim_jax.weights.convert.inception import load_inception

    return FeatureExtractor(load_inception(path))


def open_lpips(path: str, losses: LossConfig, image_size: int) -> dict | None:
    """Load the weights of LPIPS from `path`, or else from the file that AIM_JAX_LPIPS names.

    Returns:
      The weights; or None if no file is named or the images are too small for LPIPS, and the losses
      need none.

    Raises:
      FileNotFoundError, ValueError: The losses need LPIPS and no file is named, or the file is
        missing or not LPIPS.
    """
    from aim_jax.weights.convert.lpips import EXPECTED, load_lpips

    path = path or os.environ.get("AIM_JAX_LPIPS", "")
    if path and image_size >= MIN_SIDE:
        return load_lpips(path)
    if losses.perceptual:
        raise ValueError(
            f"config.loss.perceptual={losses.perceptual} needs the weights of LPIPS: set "
            f"config.lpips or AIM_JAX_LPIPS to {EXPECTED}. The page Training a tokenizer of the "
            "documentation says where to get them. Without them set config.loss.perceptual=0."
        )
    return None


def check_mesh(config: ConfigDict, mesh: Mesh) -> None:
    """Raise ValueError if the batch or the tokenizer does not fit the mesh."""
    check_batch(config.batch_size, config.accumulate, mesh)
    if mesh.shape["model"] > 1:
        raise ValueError(
            f"config.mesh.model={mesh.shape['model']}: tokenizers are split over the batch only "
            "(with config.mesh.fsdp=True, their parameters too); set config.mesh.model=1."
        )


def check_decoder_only(config: ConfigDict) -> None:
    """Raise ValueError if config.decoder_only is set without init, or with restart_codes."""
    if config.decoder_only and not config.init:
        raise ValueError(
            "config.decoder_only=True keeps the encoder and codebook of a trained tokenizer; name "
            "one in config.init."
        )
    if config.decoder_only and config.restart_codes:
        raise ValueError(
            "config.decoder_only=True keeps the codebook; set config.restart_codes to 0."
        )
