"""Evaluation: class-balanced samples or reconstructions, scored against a reference, reported."""

import dataclasses
import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from aim_jax.checkpoint import Pretrained, write_json
from aim_jax.config import image_spec
from aim_jax.data import ImageSpec, fingerprint, open_images
from aim_jax.data.images import FolderImages, images_in
from aim_jax.metrics import (
    Gaussian,
    codebook_use,
    density_coverage,
    frechet_distance,
    kernel_distance,
    precision_recall,
    psnr,
    ssim,
)
from aim_jax.metrics.distribution import nearest
from aim_jax.metrics.features import FeatureExtractor, FeatureSet
from aim_jax.metrics.image_sets import ImageParts, ImageSet, NpzImages, SourceImages
from aim_jax.metrics.inception import NUM_FEATURES, NUM_SPATIAL
from aim_jax.metrics.reconstruction import WINDOW
from aim_jax.models.vq import VQModel
from aim_jax.monitor import Progress, say
from aim_jax.pictures import make_grid, save_png, to_rgb
from aim_jax.sampling import check_settings, decode_images, generate
from aim_jax.sharding import make_mesh

SETTINGS = ("cfg_scale", "temperature", "top_k", "top_p")


class Reference(NamedTuple):
    """What samples are compared with.

    Attributes:
      name: for the report. features: see `FeatureSet`.
      images: where the kept features come from.
    """

    name: str
    features: FeatureSet
    images: ImageSet


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
    """The settings of a series of samples; the model's own where the configuration has none."""
    settings = {name: config.sample[name] for name in SETTINGS}
    settings = {k: model.sampling[k] if v is None else v for k, v in settings.items()}
    return settings | {"cfg_schedule": config.sample.cfg_schedule}


def identity_of(model: Pretrained) -> list[str]:
    """Changes when a model's configuration or weights do."""
    return [
        fingerprint(model.aim_config, model.aim_params),
        fingerprint(model.vq_config, model.vq_params),
    ]


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
    labels = balanced_labels(config.num_samples, model.aim_config.num_classes)
    given = {k: settings[k] for k in SETTINGS}
    check_settings(
        labels, model.aim_config.num_classes, **given,
        schedule=settings["cfg_schedule"], interval=(0, 1),
    )  # fmt: skip
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
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("samples")
        if jax.process_index() == 0:
            parts.join(len(numbers), labels=labels)
    return file


def open_set(
    name: str, model: Pretrained | None, config: ConfigDict, like: ImageSet | None = None
) -> ImageSet:
    """An npz file of images, or NAME:SPLIT of a data set or of a folder of class folders.

    The split is "train" by default; "train+validation" is both of them. Of a folder without a split
    all pictures are taken, and it may be one without class folders.

    Args:
      like: images whose size pictures are fitted to where neither model nor configuration says it.

    Raises:
      ValueError: no such data set, or nothing says how its pictures are to be fitted.
      FileNotFoundError: no such file.
    """
    if name.endswith(".npz"):
        return NpzImages(name)
    name, _, split = name.partition(":")
    if model is not None and "data" in model.info:
        spec = image_spec(ConfigDict(model.info["data"]))
    elif config.data.image_size:
        spec = image_spec(config.data)
    elif like is not None:
        spec = ImageSpec(like.shape[1], like.shape[3])
    else:
        raise ValueError(
            f"the pictures of {name!r} need a size: give --config.data.image_size, or a "
            "--checkpoint that says how its pictures were fitted."
        )
    where = config.data.dir or None
    if where is None and Path(name).is_dir():
        if not split:
            files = images_in(Path(name))
            if not files:
                raise ValueError(f"{name}: no pictures in this folder.")
            flat = FolderImages(Path(name).name, "all", ("",), files, [0] * len(files))
            return SourceImages([flat], spec)
        name, where = "folder", name
    splits = (split or "train").split("+")
    return SourceImages([open_images(name, split, where) for split in splits], spec)


def open_reference(
    name: str,
    extract: FeatureExtractor,
    model: Pretrained | None,
    config: ConfigDict,
    cache: Path,
    like: ImageSet | None = None,
) -> Reference:
    """Statistics of a reference, computed once and then read from `cache`.

    Args:
      name: see `open_set`; or a reference file of the ADM evaluator, whose statistics (`mu`,
        `sigma`, `mu_s`, `sigma_s`) are taken as they are, and images (`arr_0`) for the rest.
    """
    keep = config.neighbour_images
    if name.endswith(".npz"):
        images = NpzImages(name)
        with np.load(name, allow_pickle=False) as file:
            statistics = {k: file[k] for k in ("mu", "sigma", "mu_s", "sigma_s") if k in file}
        if statistics:
            _check_statistics(name, statistics)
            found = extract.of_cached(images, keep, cache)
            spatial = None
            if {"mu_s", "sigma_s"} <= set(statistics):
                spatial = Gaussian(statistics["mu_s"], statistics["sigma_s"])
            pool = Gaussian(statistics["mu"], statistics["sigma"])
            return Reference(
                Path(name).name, found._replace(count=0, pool=pool, spatial=spatial), images
            )
    images = open_set(name, model, config, like)
    return Reference(images.name, extract.of_cached(images, keep, cache), images)


def _check_statistics(name: str, statistics: dict) -> None:
    """Raises ValueError unless they are means and covariances of the two kinds of features."""
    sizes = {"": NUM_FEATURES, "_s": NUM_SPATIAL}
    expected = {f"mu{s}": (n,) for s, n in sizes.items()}
    expected |= {f"sigma{s}": (n, n) for s, n in sizes.items()}
    wrong = {k: v.shape for k, v in statistics.items() if v.shape != expected[k]}
    if wrong or not {"mu", "sigma"} <= set(statistics):
        raise ValueError(
            f"{name}: expected mu ({NUM_FEATURES},) and sigma of the features of the Inception of "
            f"2015, found { {k: v.shape for k, v in statistics.items()} }."
        )
    broken = [k for k, v in statistics.items() if not np.all(np.isfinite(v))]
    if broken:
        raise ValueError(f"{name}: {', '.join(broken)} are not finite; the file is damaged.")


def check_alike(made: ImageSet, reference: ImageSet) -> None:
    """Raises ValueError where two sets of images have another resolution."""
    if made.shape[1:3] != reference.shape[1:3]:
        raise ValueError(
            f"{made.name} has images of {made.shape[1]} x {made.shape[2]}, the reference "
            f"{reference.name} of {reference.shape[1]} x {reference.shape[2]}; features of other "
            "sizes are not comparable. Give a reference of the same size."
        )


def score(made: FeatureSet, reference: FeatureSet) -> tuple[dict, list[str]]:
    """Metrics of generated images, and what a reader must know about them.

    Returns:
      fid, sfid, kid, precision, recall, density, coverage and, where there are logits, inception
      scores; those with a deviation as [mean, deviation].
    """
    found: dict = {"fid": frechet_distance(made.pool, reference.pool)}
    if reference.spatial is not None:
        found["sfid"] = frechet_distance(made.spatial, reference.spatial)
    if made.inception_score is not None:
        found["inception_score"] = list(made.inception_score)
    found["kid"] = list(kernel_distance(reference.features, made.features))
    found |= precision_recall(reference.features, made.features)
    found |= density_coverage(reference.features, made.features)
    notes = []
    counts = {"samples": made.count, "the reference": reference.count or len(reference.features)}
    for what, count in counts.items():
        if count <= NUM_FEATURES and not (what == "the reference" and not reference.count):
            notes.append(
                f"{count} images in {what} for {NUM_FEATURES} features: the covariance is singular "
                "and FID and sFID are biased upwards. Take more images, or look at KID."
            )
    if made.count < 10_000:
        notes.append(
            f"FID of {made.count} samples is larger than that of 50,000 of the same model; compare "
            "it with that of equally many samples alone."
        )
    if made.inception_score is None:
        notes.append(
            "No Inception Score: the weights lack the last layer (softmax). The files of "
            "pytorch-fid, torch-fidelity and TensorFlow have it."
        )
    if reference.spatial is None:
        notes.append("No sFID: the reference has no mu_s and sigma_s.")
    return found, notes


def reconstruct(model: Pretrained, images: ImageSet, config: ConfigDict, out: Path):
    """Encodes and decodes a set of pictures with the tokenizer.

    Returns:
      A file with the reconstructions (arr_0), and psnr, ssim, usage and perplexity.
    """
    vq_config = model.vq_config
    _, height, width, channels = images.shape
    if height != width or height % vq_config.downsampling or channels != vq_config.in_channels:
        raise ValueError(
            f"{images.name} has images of {height} x {width} x {channels}; the tokenizer takes "
            f"squares of a multiple of {vq_config.downsampling} pixels and {vq_config.in_channels} "
            "channel(s)."
        )
    vq, size = VQModel(model.vq_config), config.batch_size
    encode = jax.jit(lambda p, x: vq.apply({"params": p}, x, method="encode_to_tokens"))
    identity = {"tokenizer": fingerprint(model.vq_config, model.vq_params), "of": images.identity,
                "batch_size": size}  # fmt: skip
    file, counts = out / "reconstructions.npz", np.zeros(vq_config.n_embed, np.int64)
    parts = ImageParts(out / "reconstruction_parts", file, identity)
    measured = {"psnr": psnr} | ({"ssim": ssim} if height >= WINDOW else {})
    sums, progress, done = np.zeros(len(measured)), Progress("reconstructing"), 0
    model = on_local_devices(model)
    for i, batch in enumerate(images.batches(size)):
        filled = np.resize(batch, (size, *batch.shape[1:]))
        tokens = encode(model.vq_params, filled.astype(np.float32) / 127.5 - 1)
        back = np.asarray(decode_images(model.vq_params, tokens, config=model.vq_config))
        back = back[: len(batch)]
        parts.add(i, back)
        counts += np.bincount(np.asarray(tokens)[: len(batch)].ravel(), minlength=len(counts))
        sums += [float(np.sum(metric(batch, back))) for metric in measured.values()]
        done += len(batch)
        progress(done, len(images))
    parts.join(i + 1)
    found = dict(zip(measured, (sums / done).tolist(), strict=True))
    return file, found | codebook_use(counts)


def neighbours_picture(made: NpzImages, features: FeatureSet, reference: Reference, path: Path):
    """Writes generated images, each beside its nearest reference images in feature space."""
    count, k = min(12, len(made)), min(5, len(reference.features.features))
    index = np.linspace(0, len(features.features) - 1, count).astype(int)
    near = nearest(features.features[index], reference.features.features, k)
    pictures = to_rgb(reference.images.take(reference.features.indices[near].ravel()))
    pictures = pictures.reshape(count, k, *pictures.shape[1:])
    shown = to_rgb(made.take(features.indices[index]))
    rows = np.concatenate([shown[:, None], pictures], axis=1)
    return save_png(make_grid(rows.reshape(-1, *rows.shape[2:]), k + 1), path)


def provenance() -> dict:
    """Versions and hardware, for reports."""
    root = Path(__file__).parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "aim_jax": metadata.version("aim_jax"),
        "commit": commit,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpus": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def write_report(out: Path, report: dict) -> None:
    """report.json and report.md."""
    write_json(out / "report.json", report)
    lines = [f"# {report['title']}", "", "| metric | value |", "|---|---|"]
    for name, value in report["metrics"].items():
        text = f"{value[0]:.5g} ± {value[1]:.2g}" if isinstance(value, list) else f"{value:.5g}"
        lines.append(f"| {name} | {text} |")
    lines += [""] + [f"- {note}" for note in report["notes"]]
    for section in ("settings", "environment"):
        lines += ["", f"| {section} | |", "|---|---|"]
        lines += [f"| {k} | {v} |" for k, v in report[section].items()]
    partial = out / ".report.md.partial"
    partial.write_text("\n".join(lines) + "\n")
    os.replace(partial, out / "report.md")


def _wait_for_the_first() -> None:
    """Keeps processes that have nothing to score; one that ends is taken for lost."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("scored")


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
      samples: an npz file to score instead of drawing; "" draws.
      reference: see `open_reference`.
      inception_params: see `aim_jax.convert.inception.load_inception`.
      config: see `aim_jax.config.eval_defaults`.
      out, cache: directories for the results, and for statistics of references.
      reconstructions: scores the tokenizer.

    Returns:
      The report; None on all processes but the first.
    """
    if config.stage != "eval" or config.batch_size < 1 or config.num_samples < 2:
        raise ValueError(
            f"the configuration is of stage {config.stage!r}, expected one for evaluation such as "
            "configs/eval.py, with a batch_size of 1 and num_samples of 2 at least."
        )
    needed = [] if samples else ["vq_params"] if reconstructions else ["aim_params", "vq_params"]
    if any(getattr(model, part) is None for part in needed):
        raise ValueError(f"{model.name} lacks the tokenizer or the AiM that this needs.")
    extract, extra = FeatureExtractor(inception_params), {}
    given = NpzImages(samples) if samples else None
    target = open_set(reference, model, config, given)
    if given is not None:
        check_alike(given, target)
    out.mkdir(parents=True, exist_ok=True)
    if reconstructions:
        if jax.process_index():
            return _wait_for_the_first()
        file, extra = reconstruct(model, target, config, out)
    else:
        file = Path(samples) if samples else sample_npz(model, config, out)
    if jax.process_index():
        return _wait_for_the_first()
    made = NpzImages(file)
    check_alike(made, target)
    ref = open_reference(reference, extract, model, config, cache, made)
    features = extract.of(made, config.neighbour_images)
    metrics, notes = score(features, ref.features)
    if reconstructions:
        metrics = {"rfid": metrics["fid"]} | extra
        notes = [note for note in notes if "Inception Score" not in note]
        if "ssim" not in extra:
            notes.append(f"No SSIM: its windows of {WINDOW} pixels are larger than the pictures.")
    settings = {"scored": made.name, "images": len(made), "reference": ref.name}
    settings["reference images"] = ref.features.count or "as in the file"
    settings["images compared one by one"] = config.neighbour_images
    settings["network"] = f"Inception 2015, weights {extract.identity[:12]}"
    if model is not None:
        settings["model"] = model.name
        if not samples and not reconstructions:
            settings |= sampling_settings(model, config) | {"seed": config.seed}
    report = {
        "title": f"Evaluation of {model.name if model is not None else made.name}",
        "metrics": metrics, "notes": notes, "settings": settings, "environment": provenance(),
    }  # fmt: skip
    write_report(out, report)
    shown = made.take(np.arange(min(100, len(made))))
    save_png(make_grid(shown, 10), out / "images.png")
    if not reconstructions:
        neighbours_picture(made, features, ref, out / "neighbours.png")
    for note in notes:
        say(f"note: {note}")
    _wait_for_the_first()
    return report
