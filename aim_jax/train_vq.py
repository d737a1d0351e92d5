"""Training of the VQ tokenizer: reconstruction, codebook, commitment loss (arXiv 2406.06525)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from aim_jax import loop
from aim_jax.checkpoint import (
    Pretrained,
    claim_workdir,
    has_checkpoint,
    load_pretrained,
    save_model,
)
from aim_jax.config import describe_data, image_spec
from aim_jax.data import check_images, image_batches, open_images
from aim_jax.loop import Stage, TrainState
from aim_jax.metrics import codebook_use, psnr
from aim_jax.models.adapt import VQ_SHAPE, check_same
from aim_jax.models.vq import (
    HISTORY_LENGTH,
    VQConfig,
    VQModel,
    codebook_usage,
    init_params,
    update_history,
)
from aim_jax.monitor import say
from aim_jax.optim import accumulated_grads, apply_gradients, make_optimizer
from aim_jax.pictures import make_grid, save_png
from aim_jax.sampling import to_uint8
from aim_jax.sharding import (
    axis_rules,
    batch_share,
    check_batch,
    create_sharded,
    make_mesh,
    to_host,
)


def create_train_state(
    config: VQConfig, optimizer: optax.GradientTransformation, seed: int, ema: bool = False
) -> TrainState:
    """A fresh state, with an empty history of codes."""
    rng = jax.random.PRNGKey(seed)
    params = init_params(config, jax.random.fold_in(rng, 1))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        rng=rng,
        history=jnp.zeros(HISTORY_LENGTH, jnp.int32),
    )


def reconstruction_loss(recon: jax.Array, images: jax.Array, l1: float, l2: float) -> jax.Array:
    """l1 mean(|recon - images|) + l2 mean((recon - images)^2)."""
    error = recon - images
    return l1 * jnp.mean(jnp.abs(error)) + l2 * jnp.mean(jnp.square(error))


def loss_fn(params, batch: dict, rng: jax.Array, config: VQConfig, l1: float, l2: float):
    """Reconstruction + codebook + commitment (+ entropy) loss of a batch of `images`."""
    recon, quantized = VQModel(config).apply(
        {"params": params}, batch["images"], train=True, rngs={"dropout": rng}
    )
    rec_loss = reconstruction_loss(recon, batch["images"], l1, l2)
    loss = rec_loss + quantized.vq_loss + quantized.commit_loss + quantized.entropy_loss
    metrics = {"loss": loss, "rec_loss": rec_loss, "vq_loss": quantized.vq_loss}
    return loss, (metrics, quantized.indices)


def train_step(
    state: TrainState,
    batch: dict,
    *,
    config: VQConfig,
    optimizer: optax.GradientTransformation,
    l1: float,
    l2: float,
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> tuple[TrainState, dict]:
    """One optimizer step on a batch of `images` (b, H, W, c) in [-1, 1]."""
    rng = jax.random.fold_in(state.rng, state.step)
    loss = lambda params, part, key: loss_fn(params, part, key, config, l1, l2)  # noqa: E731
    grads, metrics, indices = accumulated_grads(loss, state.params, batch, rng, accumulate)
    history = update_history(state.history, indices)
    metrics["codebook_usage"] = codebook_usage(history, config.n_embed)
    state, report = apply_gradients(state, grads, optimizer, ema_decay)
    return state.replace(history=history), metrics | report


def eval_step(params, batch: dict, *, config: VQConfig) -> dict:
    """Sums over the real examples of a padded batch: squared error, PSNR, code counts.

    PSNR is that of the 8-bit pictures, in dB, per picture.
    """
    recon, quantized = VQModel(config).apply({"params": params}, batch["images"])
    weights = batch["weights"]
    l2 = jnp.mean(jnp.square(recon - batch["images"]), axis=(1, 2, 3))
    ones = jnp.broadcast_to(weights[:, None], quantized.indices.shape)
    return {
        "val_rec_l2": jnp.sum(l2 * weights),
        "val_psnr": jnp.sum(psnr(to_uint8(recon), to_uint8(batch["images"])) * weights),
        "count": jnp.sum(weights),
        "codes": jnp.zeros(config.n_embed).at[quantized.indices].add(ones),
    }


def open_start(name_or_path: str, config: VQConfig) -> dict:
    """Parameters of a trained tokenizer of the same shape.

    Raises:
      FileNotFoundError, ValueError: no such model, it holds no tokenizer, or one of another shape.
    """
    start = load_pretrained(name_or_path, as_stored=True)
    if start.vq_params is None:
        raise ValueError(f"config.init={name_or_path!r} holds no tokenizer.")
    check_same(start.vq_config, config, VQ_SHAPE)
    say(f"weights of {name_or_path}")
    return start.vq_params


def train(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains as the configuration says, and leaves checkpoints, metrics, pictures and a model.

    Args:
      config: see `aim_jax.config.vq_defaults`.
      workdir: of this run alone; an interrupted run in it is continued.

    Raises:
      ValueError, FileNotFoundError: a configuration, data set or workdir that does not fit, before
        any work starts.
    """
    workdir = Path(workdir)
    model_config = VQConfig(**config.model)
    spec = image_spec(config.data)
    sources = {
        split: open_images(config.data.name, split, config.data.dir or None)
        for split in ("train", "validation")
    }
    for source in sources.values():
        check_images(source, spec)
    check_fit(model_config, config.data)
    mesh = make_mesh(config.mesh.data, config.mesh.model, config.mesh.slices)
    check_batch(config.batch_size, config.accumulate, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    fresh = config.init and not has_checkpoint(workdir)
    start = open_start(config.init, model_config) if fresh else None
    claim_workdir(workdir, config)

    rules = axis_rules(mesh)
    state = create_sharded(
        lambda: create_train_state(model_config, optimizer, config.seed, config.ema_decay > 0),
        mesh,
        rules,
    )
    if start is not None:
        state = state.with_params(start)
    say(
        f"VQ-f{model_config.downsampling} with "
        f"{sum(x.size for x in jax.tree.leaves(state.params)):,} parameters; "
        f"{len(sources['train'])} training and {len(sources['validation'])} validation images; "
        f"{mesh.size} {jax.devices()[0].platform} device(s)"
    )

    share = batch_share(mesh)

    def batches(split):
        return image_batches(
            sources[split], spec, config.batch_size, seed=config.seed, train=split == "train",
            shard_index=share[0], shard_count=share[1],
            workers=config.data.workers if split == "train" else 0,
        )  # fmt: skip

    step = jax.jit(
        lambda state, batch: train_step(
            state, batch, config=model_config, optimizer=optimizer,
            l1=config.loss.l1, l2=config.loss.l2,
            accumulate=config.accumulate, ema_decay=config.ema_decay,
        ),
        donate_argnums=0,
    )  # fmt: skip
    evaluation = jax.jit(lambda params, batch: eval_step(params, batch, config=model_config))

    def evaluate(state):
        one = lambda batch: evaluation(state.eval_params, batch)  # noqa: E731
        means = loop.weighted_means(one, batches("validation"), config.batch_size // share[1], mesh)
        use = codebook_use(means.pop("codes"))
        return means | {f"val_{name}": value for name, value in use.items()}

    pictures = next(iter(batches("validation")))["images"][: config.sample.images]
    reconstruct = jax.jit(lambda p, x: to_uint8(VQModel(model_config).apply({"params": p}, x)[0]))

    def sample(state, path):
        pairs = np.concatenate(
            [np.asarray(to_uint8(pictures)), to_host(reconstruct(state.eval_params, pictures))]
        )
        if jax.process_index() == 0:
            save_png(make_grid(pairs, len(pictures), ["original", "decoded"]), path)

    def export(state):
        model = Pretrained(
            name=str(workdir),
            vq_config=model_config,
            vq_params=state.eval_params,
            class_names=tuple(sources["train"].class_names),
            info={
                "data": describe_data(config.data),
                "vq_steps": int(state.step),
            },
        )
        save_model(workdir / "model", model, config.export_dtype)

    stage = Stage(step, batches("train"), evaluate, sample, export)
    return loop.run(config, workdir, mesh, state, stage)


def check_fit(model: VQConfig, data: ConfigDict) -> None:
    """Raises ValueError where the tokenizer's shape and the pictures disagree."""
    if data.channels not in (model.in_channels, model.out_channels):
        raise ValueError(
            f"config.data.channels={data.channels}, but config.model has in_channels="
            f"{model.in_channels} and out_channels={model.out_channels}; make the three equal."
        )
    if data.image_size % model.downsampling:
        raise ValueError(
            f"config.data.image_size={data.image_size} is not a multiple of the tokenizer's "
            f"downsampling {model.downsampling}."
        )
