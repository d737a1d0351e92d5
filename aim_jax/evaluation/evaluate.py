"""Evaluation: class-balanced samples or reconstructions, scored against a reference, reported."""

import dataclasses
import math
import shutil
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from aim_jax.data import fingerprint
from aim_jax.evaluation.distribution import (
    KERNEL_SUBSET,
    density_coverage,
    frechet_distance,
    kernel_distance,
    nearest,
    precision_recall,
)
from aim_jax.evaluation.feature_sets import FeatureSet
from aim_jax.evaluation.features import FeatureExtractor, sum_over_processes
from aim_jax.evaluation.image_sets import ImageParts, ImageSet, NpzImages
from aim_jax.evaluation.reconstruction import WINDOW, codebook_use, psnr, ssim
from aim_jax.evaluation.references import (
    check_alike,
    open_reference,
    open_set,
    stored_statistics,
)
from aim_jax.evaluation.report import check_out, provenance, write_report
from aim_jax.models.inception import NUM_FEATURES
from aim_jax.parallel.processes import wait_for_all
from aim_jax.parallel.sharding import make_mesh
from aim_jax.sampling.config import SETTINGS, SamplingConfig
from aim_jax.sampling.generate import decode_images, generate
from aim_jax.utils.images import make_grid, save_png, to_rgb
from aim_jax.utils.logging import Progress, say
from aim_jax.weights.pretrained import Pretrained
from aim_jax.weights.tokenizer import local_encoder

# Images of a set, of which the density looks at the fifth neighbour of each.
FEWEST = 6
NOTHING_TO_SCORE = "there is nothing to score: give a model, or samples."


def on_local_devices(model: Pretrained) -> Pretrained:
    """The model with its parameters on every device of this process."""
    everywhere = NamedSharding(make_mesh(devices=jax.local_devices()), PartitionSpec())
    parts = {k: jax.device_put(getattr(model, k), everywhere) for k in ("aim_params", "vq_params")}
    return dataclasses.replace(model, **parts)


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """`count` labels, class after class in turn; so every part of the series is balanced too.

    The Inception Score is a mean over parts of the series, which would else hold few classes each.
    """
    return (np.arange(count) % num_classes).astype(np.int32)


def sampling_settings(model: Pretrained, config: ConfigDict) -> dict:
    """The settings of a series of samples; the model's own where the configuration has none.

    Raises:
      ValueError: a setting is out of range.
    """
    names = (*SETTINGS, "cfg_schedule")
    given = {name: config.sample[name] for name in names}
    sampling = SamplingConfig(**model.sampling).updated(given)
    return {name: getattr(sampling, name) for name in names}


def size_of_samples(model: Pretrained) -> tuple[int, int]:
    """Height and width of what a model draws."""
    aim_config, _ = model.aim()
    vq_config, _ = model.vq()
    side = math.isqrt(aim_config.num_tokens) * vq_config.downsampling
    return side, side


def identity_of(model: Pretrained) -> list[str]:
    """Changes when a model's configuration or weights do."""
    return [fingerprint(*model.aim()), fingerprint(*model.vq())]


def sample_npz(model: Pretrained, config: ConfigDict, out: Path) -> Path:
    """Samples `config.num_samples` images into out/samples.npz.

    arr_0 is uint8 (n, H, W, 3), grey images too, because other evaluators take nothing else; labels
    int32 (n,).

    All processes call this and draw in turns; they share the directory. What an interrupted run has
    drawn is in out/parts and is not drawn again.

    Raises:
      ValueError: the directory holds a series of other settings, or a setting is out of range.
    """
    settings, size = sampling_settings(model, config), config.batch_size
    labels = balanced_labels(config.num_samples, model.aim()[0].num_classes)
    identity = settings | {
        "model": identity_of(model),
        "num_samples": config.num_samples,
        "seed": config.seed,
        "batch_size": size,
    }
    file = out / "samples.npz"
    parts = ImageParts(out / "parts", file, identity)
    numbers = range(-(-len(labels) // size))
    if not file.exists():
        model = on_local_devices(model)
        mine = [i for i in numbers[jax.process_index() :: jax.process_count()] if i not in parts]
        progress = Progress("sampling")
        for done, i in enumerate(mine, start=1):
            batch = labels[i * size : (i + 1) * size]
            # The last part is filled up with images beyond the series, which are dropped.
            drawn = generate(
                model, np.resize(batch, size), config.seed, first_index=i * size, **settings
            )
            parts.add(i, to_rgb(np.asarray(drawn.images)[: len(batch)]))
            progress(min(done * size, len(labels)), min(len(mine) * size, len(labels)))
        wait_for_all("samples")
        if jax.process_index() == 0:
            parts.join(len(numbers), labels=labels)
        wait_for_all("the file of the samples")
    return file


def notes_on_covariances(made: FeatureSet, reference: FeatureSet) -> list[str]:
    """What a reader must know of distances between covariances of few images."""
    counts = {"samples": made.count}
    if reference.count:  # files of statistics alone do not say it
        counts["the reference"] = reference.count
    return [
        f"{count} images in {what} for {NUM_FEATURES} features: the covariance is singular, and "
        "FID and sFID are biased upwards. Take more images, or look at KID."
        for what, count in counts.items()
        if count <= NUM_FEATURES
    ]


def notes_on_labels(images: NpzImages) -> list[str]:
    """What a reader must know of the classes of images that were made elsewhere."""
    labels = images.labels()
    if labels is None:
        return [f"{images.name} has no labels: whether its classes are balanced is not known."]
    counts = np.unique(labels, return_counts=True)[1]
    if counts.max() - counts.min() <= 1:
        return []
    return [
        f"{images.name} has from {counts.min()} to {counts.max()} images of a class: FID compares "
        "with a reference that has other shares."
    ]


def score(made: FeatureSet, reference: FeatureSet) -> tuple[dict, list[str]]:
    """Metrics of generated images, and what a reader must know about them.

    Returns:
      fid, sfid, kid, precision, recall, density, coverage and, where there are logits, inception
      scores; those with a deviation as [mean, deviation].
    """
    found: dict = {"fid": frechet_distance(made.pool, reference.pool)}
    notes = notes_on_covariances(made, reference)
    if made.spatial is not None and reference.spatial is not None:
        found["sfid"] = frechet_distance(made.spatial, reference.spatial)
    if made.inception_score is not None:
        found["inception_score"] = list(made.inception_score)
    found["kid"] = list(kernel_distance(reference.features, made.features))
    found |= precision_recall(reference.features, made.features)
    found |= density_coverage(reference.features, made.features)
    if made.count < 10_000:
        notes.append(
            f"FID of {made.count} samples is larger than that of 50,000 of the same model; compare "
            "it with that of equally many samples alone."
        )
    fewest = min(len(reference.features), len(made.features))
    if fewest < KERNEL_SUBSET:
        notes.append(
            f"KID was taken of subsets of {fewest} images, not of {KERNEL_SUBSET}: it is unbiased "
            "all the same, but its deviation is another one."
        )
    if made.inception_score is None:
        notes.append(
            "No Inception Score: the weights lack the last layer (softmax). The files of "
            "pytorch-fid, torch-fidelity and TensorFlow have it."
        )
    if reference.spatial is None:
        notes.append("No sFID: the reference has no mu_s and sigma_s.")
    return found, notes


def reconstruct(
    model: Pretrained, images: ImageSet, config: ConfigDict, out: Path
) -> tuple[Path, dict[str, float]]:
    """Encodes and decodes a set of pictures with the tokenizer.

    Returns:
      A file with the reconstructions (arr_0), and psnr, ssim, usage and perplexity.
    """
    vq_config, _ = model.vq()
    _, height, width, channels = images.shape
    if height != width or height % vq_config.downsampling or channels != vq_config.in_channels:
        raise ValueError(
            f"{images.name} has images of {height} x {width} x {channels}; the tokenizer takes "
            f"squares of a multiple of {vq_config.downsampling} pixels and {vq_config.in_channels} "
            "channel(s)."
        )
    model = on_local_devices(dataclasses.replace(model, aim_params=None))
    _, vq_params = model.vq()
    encode, devices = local_encoder(model)
    size = -(-config.batch_size // devices) * devices
    identity = {"tokenizer": fingerprint(vq_config, vq_params), "of": images.identity}
    file, counts = out / "reconstructions.npz", np.zeros(vq_config.n_embed, np.int64)
    parts = ImageParts(out / "reconstruction_parts", file, identity)
    measured = {"psnr": psnr} | ({"ssim": ssim} if height >= WINDOW else {})
    sums, progress, done = np.zeros(len(measured)), Progress("reconstructing"), 0
    rank, processes, total = jax.process_index(), jax.process_count(), -(-len(images) // size)
    numbers = range(rank, total, processes)
    for i, batch in zip(numbers, images.batches(size, rank, processes), strict=True):
        filled = np.resize(batch, (size, *batch.shape[1:]))
        tokens = encode(filled.astype(np.float32) / 127.5 - 1)
        back = np.asarray(decode_images(vq_params, tokens, config=vq_config))
        back = back[: len(batch)]
        parts.add(i, back)
        counts += np.bincount(np.asarray(tokens)[: len(batch)].ravel(), minlength=len(counts))
        sums += [float(np.sum(metric(batch, back))) for metric in measured.values()]
        done += len(batch)
        progress(min(done * processes, len(images)), len(images))
    # Also the moment from which on all parts are there.
    counts, sums = sum_over_processes(counts), sum_over_processes(sums)
    if rank == 0:
        parts.join(total)
    found = dict(zip(measured, (sums / len(images)).tolist(), strict=True))
    wait_for_all("reconstructions")
    return file, found | codebook_use(counts)


def neighbours_picture(
    made: ImageSet,
    features: FeatureSet,
    reference: ImageSet,
    reference_features: FeatureSet,
    path: Path,
) -> Path:
    """Writes generated images, each beside its nearest reference images in feature space."""
    count, k = min(12, len(made)), min(5, len(reference_features.features))
    index = np.linspace(0, len(features.features) - 1, count).astype(int)
    near = nearest(features.features[index], reference_features.features, k)
    pictures = to_rgb(reference.take(reference_features.indices[near].ravel()))
    pictures = pictures.reshape(count, k, *pictures.shape[1:])
    shown = to_rgb(made.take(features.indices[index]))
    rows = np.concatenate([shown[:, None], pictures], axis=1)
    names = [f"image {i}" for i in features.indices[index]]
    return save_png(make_grid(rows.reshape(-1, *rows.shape[2:]), k + 1, names), path)


def check_enough(config: ConfigDict, counts: dict[str, int]) -> None:
    """Raises ValueError where there are too few images for metrics of neighbours."""
    for what, count in (counts | {"config.neighbour_images": config.neighbour_images}).items():
        if count < FEWEST:
            raise ValueError(f"{what}: {count} images; expected {FEWEST} or more.")


def _images_to_score(
    given: ImageSet | None,
    model: Pretrained | None,
    target: ImageSet,
    config: ConfigDict,
    out: Path,
    reconstructions: bool,
) -> tuple[ImageSet, dict[str, float]]:
    """The images that are scored, and what else was measured while they were made."""
    if given is not None:
        return given, {}
    if model is None:
        raise ValueError(NOTHING_TO_SCORE)
    if reconstructions:
        file, measured = reconstruct(model, target, config, out)
        return NpzImages(file), measured
    return NpzImages(sample_npz(model, config, out)), {}


def evaluate(
    model: Pretrained | None,
    samples: str,
    reference: str,
    inception_params: dict,
    config: ConfigDict,
    out: Path,
    cache: Path,
    reconstructions: bool = False,
) -> dict | None:
    """Makes what is to be scored, scores it, and writes the report and pictures into `out`.

    Args:
      model: what draws the samples, or reconstructs the reference's pictures.
      samples: what to score instead of drawing, see `open_set`; "" draws.
      reference: see `open_reference`.
      inception_params: see `aim_jax.weights.convert.inception.load_inception`.
      config: see `aim_jax.configs.defaults.eval_defaults`.
      out, cache: directories for the results, and for statistics of references.
      reconstructions: scores the tokenizer.

    Returns:
      The report; None on all processes but the first.
    """
    if config.stage != "eval" or config.batch_size < 1 or config.num_samples < 2:
        raise ValueError(
            f"the configuration is of stage {config.stage!r}, expected one for evaluation such as "
            "--config eval, with a batch_size of 1 and num_samples of 2 at least."
        )
    if samples and reconstructions:
        raise ValueError("reconstructions are made of the reference, not scored from samples.")
    needed = ["vq_params"] if reconstructions else [] if samples else ["aim_params", "vq_params"]
    if model is not None and any(getattr(model, part) is None for part in needed):
        raise ValueError(f"{model.name} lacks the tokenizer or the AiM that this needs.")
    extract = FeatureExtractor(inception_params)
    given = open_set(samples, None, config) if samples else None
    target = open_set(reference, model, config, given)
    source = model if given is None else given
    if source is None:
        raise ValueError(NOTHING_TO_SCORE)
    scored = source.name
    title = f"{'Reconstructions by' if reconstructions else 'Evaluation of'} {scored}"
    check_out(out, title)
    notes_on_given = notes_on_labels(given) if isinstance(given, NpzImages) else []
    if not reconstructions:
        stored_statistics(reference)
        size = size_of_samples(source) if isinstance(source, Pretrained) else source.shape[1:3]
        check_alike(scored, size, target)
        check_enough(config, {
            "samples": config.num_samples if given is None else len(given),
            "the reference": len(target),
        })  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    made, extra = _images_to_score(given, model, target, config, out, reconstructions)
    check_alike(made.name, made.shape[1:3], target)
    # Reconstructions are compared with what was reconstructed: the images, not whole data sets.
    ref = open_reference(
        reference, extract, model, config, cache, given, only_images=reconstructions
    )
    # What is made is scored once; its features are kept until the report is written.
    kept = out / ".features" if isinstance(made, NpzImages) else cache
    features = extract.of_cached(made, config.neighbour_images, kept)
    if features is None or ref.features is None:  # on all processes but the first
        # A process that ends before the others is taken for lost.
        wait_for_all("the report")
        return None
    if not reconstructions:
        metrics, notes = score(features, ref.features)
    else:
        metrics = {"rfid": frechet_distance(features.pool, ref.features.pool)} | extra
        notes = notes_on_covariances(features, ref.features)
        if "ssim" not in extra:
            notes.append(f"No SSIM: its windows of {WINDOW} pixels are larger than the pictures.")
    settings = {"scored": made.name, "images": len(made), "reference": ref.name}
    settings["reference images"] = ref.features.count or "as in the file"
    for what, images in {"scored images": made, "reference": ref.images}.items():
        if images.fitted:
            settings[f"{what}, fitted"] = images.fitted
    if not reconstructions:
        compared = f"{len(features.features)} and {len(ref.features.features)}"
        settings["images compared one by one"] = compared
    settings["network"] = f"Inception 2015, weights {extract.identity[:12]}"
    if model is not None:
        settings["model"] = model.name
        if not samples and not reconstructions:
            settings |= sampling_settings(model, config) | {"seed": config.seed}
    report = {
        "title": title, "metrics": metrics, "notes": notes + notes_on_given,
        "settings": settings, "environment": provenance(),
    }  # fmt: skip
    write_report(out, report)
    shown = made.take(np.arange(min(100, len(made))))
    save_png(make_grid(shown, 10), out / "images.png")
    if not reconstructions:
        neighbours_picture(made, features, ref.images, ref.features, out / "neighbours.png")
    shutil.rmtree(out / ".features", ignore_errors=True)
    for note in report["notes"]:
        say(f"note: {note}")
    wait_for_all("the report")
    return report
