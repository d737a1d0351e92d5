"""Evaluation of samples of all classes or captions, or reconstructions, against a reference."""

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
from aim_jax.evaluation.prompts import Prompts, open_prompts
from aim_jax.evaluation.reconstruction import WINDOW, codebook_use, psnr, ssim
from aim_jax.evaluation.references import (
    check_alike,
    open_reference,
    open_set,
    open_target,
    stored_statistics,
)
from aim_jax.evaluation.report import check_out, provenance, write_report
from aim_jax.models.inception import NUM_FEATURES
from aim_jax.parallel.ownership import NO_CLAIM, Claim, owned
from aim_jax.parallel.processes import wait_for_all
from aim_jax.parallel.sharding import make_mesh
from aim_jax.sampling.config import SETTINGS, SamplingConfig
from aim_jax.sampling.generate import generate
from aim_jax.sampling.images import decode_images
from aim_jax.utils.checks import check_arguments, check_integer
from aim_jax.utils.images import make_grid, save_png, to_rgb
from aim_jax.utils.logging import Progress, reminding, say
from aim_jax.weights.fingerprints import parameter_fingerprints
from aim_jax.weights.pretrained import Pretrained
from aim_jax.weights.tokenizer import local_encoder

# Minimum number of images in a set: density uses the fifth neighbour of each image.
FEWEST = 6
STATISTICS_ALONE = (
    "The reference holds statistics without images: KID, precision, recall, density, coverage and "
    "nearest neighbours are left out. Its images must have had the size of the samples, and must "
    "have been interpolated as here; clean-fid interpolates with antialiasing, which changes FID."
)
NOTHING_TO_SCORE = "there is nothing to score: give a model or samples."


def on_local_devices(model: Pretrained) -> Pretrained:
    """Replicate the parameters of a model on every device of this process."""
    everywhere = NamedSharding(make_mesh(devices=jax.local_devices()), PartitionSpec())
    parts = {k: jax.device_put(getattr(model, k), everywhere) for k in ("aim_params", "vq_params")}
    return dataclasses.replace(model, **parts)


def sampling_settings(model: Pretrained, config: ConfigDict) -> dict:
    """Return the sampling settings of a configuration, with the model's defaults where unset.

    Raises:
      ValueError: if a setting is out of range.
    """
    names = (*SETTINGS, "cfg_schedule")
    overrides = {name: config.sample[name] for name in names}
    sampling = SamplingConfig(**model.sampling).updated(overrides)
    settings = {name: getattr(sampling, name) for name in names}
    # Only a model can set it. Left out where it changes nothing, as in the settings of older files.
    if sampling.cfg_interval != SamplingConfig().cfg_interval:
        settings["cfg_interval"] = list(sampling.cfg_interval)
    return settings


def size_of_samples(model: Pretrained) -> tuple[int, int]:
    """Return height and width of the images that a model generates."""
    aim_config, _ = model.aim()
    vq_config, _ = model.vq()
    side = math.isqrt(aim_config.num_tokens) * vq_config.downsampling
    return side, side


def identity_of(model: Pretrained) -> list[str]:
    """Return fingerprints of AiM and its tokenizers, which change with settings and weights."""
    text = [] if model.text is None else [model.text.fingerprint]
    return [fingerprint(*model.aim()), fingerprint(*model.vq()), *text]


def sample_npz(
    model: Pretrained,
    config: ConfigDict,
    out: Path,
    claim: Claim = NO_CLAIM,
    prompts: Prompts | None = None,
) -> Path:
    """Sample `config.num_samples` images into out/samples.npz.

    The file holds arr_0 uint8 (n, H, W, 3), and labels int32 (n,) or captions as text (n,). Grey
    images are stored as RGB, because other evaluators accept nothing else.

    All processes must call this; they share the directory and divide the batches. Batches of an
    interrupted run are kept in out/parts and are not sampled again. `claim` is the ownership of the
    directory. Without `prompts`, those of `open_prompts` are used.

    Returns:
      The path of the file.

    Raises:
      ValueError: if the directory holds samples with other settings, or a setting is out of range.
      OwnershipError: if the ownership was lost.
    """
    settings = sampling_settings(model, config)
    size = config.batch_size
    prompts = prompts or open_prompts(model, config)
    labels = prompts.labels
    identity = (
        settings
        | prompts.settings
        | {
            "model": identity_of(model),
            "num_samples": config.num_samples,
            "seed": config.seed,
            "batch_size": size,
        }
    )
    file = out / "samples.npz"
    parts = ImageParts(out / "parts", file, identity)
    numbers = range(-(-len(labels) // size))
    if not file.exists():
        model = on_local_devices(model)
        share = [i for i in numbers[jax.process_index() :: jax.process_count()] if i not in parts]
        progress = Progress("sampling")
        for done, i in enumerate(share, start=1):
            batch = labels[i * size : (i + 1) * size]
            # The last part is padded with extra images, which are dropped.
            with reminding(f"sampling batch {done} of {len(share)}"):
                samples = generate(
                    model, np.resize(batch, size), config.seed, first_index=i * size, **settings
                )
                claim.check()
                parts.add(i, to_rgb(np.asarray(samples.images)[: len(batch)]))
            progress(min(done * size, len(labels)), min(len(share) * size, len(labels)))
        wait_for_all("samples")
        if jax.process_index() == 0:
            claim.check()
            parts.join(len(numbers), **{"captions" if prompts.name else "labels": labels})
        wait_for_all("the file of the samples")
    return file


def notes_on_covariances(made: FeatureSet, reference: FeatureSet) -> list[str]:
    """Return notes for the report where a set has too few images for a regular covariance."""
    counts = {"samples": made.count}
    if reference.count:  # 0 for files that hold statistics alone
        counts["the reference"] = reference.count
    return [
        f"{count} images in {name} for {NUM_FEATURES} features: the covariance is singular, and "
        "FID and sFID are biased upwards. Use more images, or compare KID."
        for name, count in counts.items()
        if count <= NUM_FEATURES
    ]


def notes_on_labels(images: NpzImages) -> list[str]:
    """Return notes for the report on the class balance of images from an npz file."""
    labels = images.labels()
    if labels is None:
        return [f"{images.name} has no labels, so it is unknown whether its classes are balanced."]
    counts = np.unique(labels, return_counts=True)[1]
    if counts.max() - counts.min() <= 1:
        return []
    return [
        f"{images.name} has from {counts.min()} to {counts.max()} images per class: FID compares "
        "it with a reference of different class proportions."
    ]


def score(made: FeatureSet, reference: FeatureSet) -> tuple[dict, list[str]]:
    """Compute the metrics of generated images, and notes on them for the report.

    Args:
      made: features of the generated images.
      reference: features of the reference images.

    Returns:
      The metrics fid, and where they are available sfid, inception_score, kid, precision, recall,
      density and coverage. kid and inception_score are [mean, standard deviation]. Then the notes.
    """
    notes = notes_on_covariances(made, reference)
    with reminding("computing FID"):
        metrics: dict = {"fid": frechet_distance(made.pool, reference.pool)}
    if made.spatial is not None and reference.spatial is not None:
        with reminding("computing sFID"):
            metrics["sfid"] = frechet_distance(made.spatial, reference.spatial)
    if made.inception_score is not None:
        metrics["inception_score"] = list(made.inception_score)
    if len(reference.features):
        progress = Progress("computing KID", "subsets")
        metrics["kid"] = list(kernel_distance(reference.features, made.features, progress=progress))
        with reminding("computing precision and recall"):
            metrics |= precision_recall(reference.features, made.features)
        with reminding("computing density and coverage"):
            metrics |= density_coverage(reference.features, made.features)
    else:
        notes.append(STATISTICS_ALONE)
    if made.count < 10_000:
        notes.append(
            f"FID of {made.count} samples is larger than FID of 50,000 samples of the same model; "
            "compare it only with FID of equally many samples."
        )
    fewest = min(len(reference.features), len(made.features))
    if 0 < fewest < KERNEL_SUBSET:
        notes.append(
            f"KID uses subsets of {fewest} images instead of {KERNEL_SUBSET}: it is still "
            "unbiased, but its standard deviation is different."
        )
    if made.inception_score is None:
        notes.append(
            "No Inception Score: the weights lack the last layer (softmax). The files of "
            "pytorch-fid, torch-fidelity and TensorFlow have it."
        )
    if reference.spatial is None:
        notes.append("No sFID: the reference has no mu_s and sigma_s.")
    return metrics, notes


def reconstruct(
    model: Pretrained, images: ImageSet, config: ConfigDict, out: Path, claim: Claim = NO_CLAIM
) -> tuple[Path, dict[str, float]]:
    """Encode and decode a set of images with the tokenizer.

    Args:
      model: with a tokenizer.
      images: the images to reconstruct.
      config: `config.batch_size` is used.
      out: directory for the file of reconstructions.
      claim: ownership of the directory.

    Returns:
      The path of an npz file with the reconstructions (arr_0), and the metrics psnr, usage and
      perplexity, and ssim where the images are large enough.

    Raises:
      ValueError: if the tokenizer does not accept the images.
      OwnershipError: if the ownership was lost.
    """
    vq_config, _ = model.vq()
    _, height, width, channels = images.shape
    if height != width or height % vq_config.downsampling or channels != vq_config.in_channels:
        raise ValueError(
            f"{images.name} has images of {height} x {width} x {channels}; the tokenizer expects "
            f"square images with a side that is a multiple of {vq_config.downsampling} pixels and "
            f"{vq_config.in_channels} channel(s)."
        )
    model = on_local_devices(dataclasses.replace(model, aim_params=None))
    _, vq_params = model.vq()
    encode, devices = local_encoder(model)
    size = -(-config.batch_size // devices) * devices
    identity = {"tokenizer": fingerprint(vq_config, vq_params), "of": images.identity}
    file = out / "reconstructions.npz"
    counts = np.zeros(vq_config.n_embed, np.int64)
    parts = ImageParts(out / "reconstruction_parts", file, identity)
    functions = {"psnr": psnr} | ({"ssim": ssim} if height >= WINDOW else {})
    sums = np.zeros(len(functions))
    progress = Progress("reconstructing")
    done = 0
    rank = jax.process_index()
    processes = jax.process_count()
    total = -(-len(images) // size)
    numbers = range(rank, total, processes)
    for i, batch in zip(numbers, images.batches(size, rank, processes), strict=True):
        padded = np.resize(batch, (size, *batch.shape[1:]))
        tokens = encode(padded.astype(np.float32) / 127.5 - 1)
        reconstructed = np.asarray(decode_images(vq_params, tokens, config=vq_config))
        reconstructed = reconstructed[: len(batch)]
        claim.check()
        parts.add(i, reconstructed)
        counts += np.bincount(np.asarray(tokens)[: len(batch)].ravel(), minlength=len(counts))
        sums += [float(np.sum(metric(batch, reconstructed))) for metric in functions.values()]
        done += len(batch)
        progress(min(done * processes, len(images)), len(images))
    # These sums also wait for the other processes, so all parts exist afterwards.
    counts = sum_over_processes(counts)
    sums = sum_over_processes(sums)
    if rank == 0:
        claim.check()
        parts.join(total)
    metrics = dict(zip(functions, (sums / len(images)).tolist(), strict=True))
    wait_for_all("reconstructions")
    return file, metrics | codebook_use(counts)


def neighbours_image(
    made: ImageSet,
    features: FeatureSet,
    reference: ImageSet,
    reference_features: FeatureSet,
    path: Path,
) -> Path:
    """Write a grid of generated images beside their nearest reference images in feature space."""
    count = min(12, len(made))
    k = min(5, len(reference_features.features))
    index = np.linspace(0, len(features.features) - 1, count).astype(int)
    near = nearest(features.features[index], reference_features.features, k)
    neighbours = to_rgb(reference.take(reference_features.indices[near].ravel()))
    neighbours = neighbours.reshape(count, k, *neighbours.shape[1:])
    generated = to_rgb(made.take(features.indices[index]))
    rows = np.concatenate([generated[:, None], neighbours], axis=1)
    names = [f"image {i}" for i in features.indices[index]]
    return save_png(make_grid(rows.reshape(-1, *rows.shape[2:]), k + 1, names), path)


def check_enough(config: ConfigDict, counts: dict[str, int]) -> None:
    """Check that every set has enough images for metrics of nearest neighbours.

    Raises:
      ValueError: if a count, or `config.neighbour_images`, is below `FEWEST`.
    """
    for name, count in (counts | {"config.neighbour_images": config.neighbour_images}).items():
        if count < FEWEST:
            raise ValueError(f"{name}: {count} images; expected {FEWEST} or more.")


def _images_to_score(
    samples: ImageSet | None,
    model: Pretrained | None,
    target: ImageSet | None,
    config: ConfigDict,
    out: Path,
    reconstructions: bool,
    claim: Claim,
    prompts: Prompts | None,
) -> tuple[ImageSet, dict[str, float]]:
    """Return the images to score, and metrics that were computed while they were made."""
    if samples is not None:
        return samples, {}
    if model is None:
        raise ValueError(NOTHING_TO_SCORE)
    if reconstructions and target is not None:
        file, measured = reconstruct(model, target, config, out, claim)
        return NpzImages(file), measured
    return NpzImages(sample_npz(model, config, out, claim, prompts)), {}


def _origin(model: Pretrained | None, given: bool, reconstructions: bool) -> dict[str, str]:
    """Return fingerprints of the parts that made the scored images; {} for images given as files.

    `aim_jax.weights.publish.check_report` compares them with the published model.
    """
    if model is None or given:
        return {}
    used = dataclasses.replace(model, aim_params=None) if reconstructions else model
    return parameter_fingerprints(used)


@check_arguments
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
    """Generate samples or reconstructions, score them, and write report and images into `out`.

    All processes must call this.

    Args:
      model: generates the samples, or reconstructs the reference images; None if `samples` are
        scored without a model.
      samples: existing images to score, see `open_set`; "" generates them.
      reference: see `open_reference`.
      inception_params: see `aim_jax.weights.convert.inception.load_inception`.
      config: see `aim_jax.configs.defaults.eval_defaults`.
      out: directory for the results.
      cache: directory for the statistics of references.
      reconstructions: score the tokenizer instead of samples.

    Returns:
      The report; None on all processes but the first.

    Raises:
      ValueError: if the configuration, the model, the samples and the reference do not fit
        together, or there are too few images.
      OwnershipError: if another run uses `out`.
    """
    with owned(out) as claim:
        return _evaluate(
            model, samples, reference, inception_params, config, out, cache, reconstructions, claim
        )


def _evaluate(
    model: Pretrained | None,
    samples: str,
    reference: str,
    inception_params: dict,
    config: ConfigDict,
    out: Path,
    cache: Path,
    reconstructions: bool,
    claim: Claim,
) -> dict | None:
    """Evaluate into a directory that this run owns."""
    for name in ("num_samples", "batch_size", "seed", "neighbour_images"):
        check_integer(f"config.{name}", config.get(name))
    if config.stage != "eval" or config.batch_size < 1 or config.num_samples < 2:
        raise ValueError(
            f"the configuration has stage {config.stage!r}, batch_size {config.batch_size} and "
            f"num_samples {config.num_samples}; expected a configuration for evaluation such as "
            "--config eval, with batch_size of at least 1 and num_samples of at least 2."
        )
    if samples and reconstructions:
        raise ValueError(
            "reconstructions are made from the reference images; omit either samples or "
            "reconstructions."
        )
    needed = ["vq_params"] if reconstructions else [] if samples else ["aim_params", "vq_params"]
    if model is not None and any(getattr(model, part) is None for part in needed):
        raise ValueError(
            f"{model.name} lacks a required part: "
            f"{'a tokenizer' if reconstructions else 'an AiM and a tokenizer'}."
        )
    extract = FeatureExtractor(inception_params)
    sample_set = open_set(samples, None, config) if samples else None
    target = open_target(reference, model, config, sample_set)
    if reconstructions and target is None:
        raise ValueError(
            f"{reference} holds statistics without images, so there is nothing to reconstruct; "
            "pass a reference with images."
        )
    prompts = None
    if model is not None and not (samples or reconstructions):
        prompts = open_prompts(model, config, reference)
    source = model if sample_set is None else sample_set
    if source is None:
        raise ValueError(NOTHING_TO_SCORE)
    scored = source.name
    title = f"{'Reconstructions by' if reconstructions else 'Evaluation of'} {scored}"
    check_out(out, title)
    label_notes = notes_on_labels(sample_set) if isinstance(sample_set, NpzImages) else []
    if not reconstructions:
        stored_statistics(reference)
        size = size_of_samples(source) if isinstance(source, Pretrained) else source.shape[1:3]
        counts = {"samples": config.num_samples if sample_set is None else len(sample_set)}
        if target is not None:
            check_alike(scored, size, target)
            counts["the reference"] = len(target)
        check_enough(config, counts)
    out.mkdir(parents=True, exist_ok=True)
    made, extra = _images_to_score(
        sample_set, model, target, config, out, reconstructions, claim, prompts
    )
    if target is not None:
        check_alike(made.name, made.shape[1:3], target)
    # Reconstructions are compared with the reconstructed images, not with stored statistics.
    ref = open_reference(
        reference, extract, model, config, cache, sample_set, only_images=reconstructions
    )
    # Images of an npz file are scored once, so their features are kept only until the report is
    # written.
    feature_cache = out / ".features" if isinstance(made, NpzImages) else cache
    features = extract.of_cached(made, config.neighbour_images, feature_cache)
    if features is None or ref.features is None:  # on all processes but the first
        # A process that ends before the others would count as lost.
        wait_for_all("the report")
        return None
    if not reconstructions:
        metrics, notes = score(features, ref.features)
    else:
        with reminding("computing rFID"):
            metrics = {"rfid": frechet_distance(features.pool, ref.features.pool)} | extra
        notes = notes_on_covariances(features, ref.features)
        if "ssim" not in extra:
            notes.append(f"No SSIM: its windows of {WINDOW} pixels are larger than the images.")
    settings = {"scored": made.name, "images": len(made), "reference": ref.name}
    settings["reference images"] = ref.features.count or "as in the file"
    for role, images in {"scored images": made, "reference": ref.images}.items():
        if images is None:
            continue
        _, height, width, channels = images.shape
        settings[f"{role}, read as"] = f"{height} x {width}, {'grey' if channels == 1 else 'RGB'}"
        if images.fitted:
            settings[f"{role}, fitted"] = images.fitted
    if not reconstructions and ref.images is not None:
        compared = f"{len(features.features)} and {len(ref.features.features)}"
        settings["images compared one by one"] = compared
    settings["network"] = f"Inception 2015, weights {extract.identity[:12]}"
    if model is not None:
        settings["model"] = model.name
        if not samples and not reconstructions:
            settings |= sampling_settings(model, config) | {"seed": config.seed}
            if prompts and prompts.name:
                settings["captions"] = prompts.name
    report = {
        "title": title, "metrics": metrics, "notes": notes + label_notes,
        "settings": settings, "environment": provenance(),
        "parameters": _origin(model, bool(samples), reconstructions),
    }  # fmt: skip
    claim.check()
    write_report(out, report)
    preview = made.take(np.arange(min(100, len(made))))
    save_png(make_grid(preview, 10), out / "images.png")
    if not reconstructions and ref.images is not None:
        neighbours_image(made, features, ref.images, ref.features, out / "neighbours.png")
    shutil.rmtree(out / ".features", ignore_errors=True)
    for note in report["notes"]:
        say(f"note: {note}")
    wait_for_all("the report")
    return report
