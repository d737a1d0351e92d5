"""Compares the library with golden vectors of the official implementation, array by array.

Example:
  python tests/parity.py tests/golden

The vectors come in folders: `config.json` and weights beside an `expected.npz` (an AiM or a
tokenizer), an `expected.npz` alone (both chained, with the weights of sibling folders), or bare
`.npz` files (sampling filters, operators). Kinds are told by what the files hold; sizes, seeds and
configurations are read from them.
"""

import argparse
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from safetensors.numpy import load_file

from aim_jax import ops
from aim_jax.models import AiM, AiMConfig, VQConfig, VQModel
from aim_jax.models.codebook import HISTORY_LENGTH, codebook_usage, unit, update_history
from aim_jax.models.layers import gated_rms_norm, rms_norm
from aim_jax.sampling.config import SamplingConfig
from aim_jax.sampling.engine import DECODERS, FORMS, Engine
from aim_jax.sampling.generate import generate_tokens, prepare_decoder
from aim_jax.sampling.logits import filter_logits, filter_top_k
from aim_jax.weights import convert

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # find tests/ from anywhere

from tests.teacher_forced import MODULES, teacher_forced_decode

EPILOG = """\
example:
  python tests/parity.py tests/golden
  python tests/parity.py tests/golden/aim_tiny_mlp --form dual --implementation native

Models run in float32 with the highest matmul precision, operators in float64. One line is printed
per array, or per group of gradients: name, largest error, allowed error, ok or MISS. Errors are
absolute; those marked "relative" are divided by the largest magnitude of the array.

allowed errors:
  * quantities with an entry in fp32_reference_errors (train logits, loss, gradients, guided logits;
    prequant, recon, decode_image): 4 x that entry;
  * other logits: 4 x the entry of the train logits, or that of the guided logits over cfg_scale
    (which guidance multiplies errors by), whichever is larger;
  * any other array of a model: 4 x the closest of these entries (train logits for an AiM; prequant
    before and recon after the quantizer), scaled to the magnitude of the array, and at least 1e-5
    of it. Gradients of an AiM without an entry: 4 times the relative error allowed for logits, and
    at least 2e-5;
  * gradients of a tokenizer and its entropy loss: 10 x that, for the softmax over codes multiplies
    distances by 100;
  * never less than two units in the last place of float32 at the array's largest magnitude;
  * codes, tokens, masks, usage: no difference. Only an argmax over all codes at all positions may
    pick another code, where our two logits differ by less than twice the error allowed for logits;
  * operators: 1e-10 relative. Probabilities of the sampling filters: 1e-6.

The exit status is 1 after any miss, an array left uncompared, or if nothing was compared.
"""

FACTOR = 4
FLOOR = 1e-5
ROUNDING = 2 * float(np.finfo(np.float32).eps)
FLOAT64 = 1e-10
POSITION_MODES = {"trainpos": 0, "official": 1}
WEIGHTS_NPZ = "weights_quantized.npz"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Golden(Mapping):
    """The arrays of an npz file; it remembers which were asked for."""

    def __init__(self, path: Path):
        with np.load(path) as file:
            self._arrays = {name: file[name] for name in file.files}
        self._unused = dict.fromkeys(self._arrays)
        self.name = path.name

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            raise KeyError(f"{self.name} has no array {name!r}")
        self._unused.pop(name, None)
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, name) -> bool:
        return name in self._arrays

    def scale(self, *names: str) -> float:
        """The largest magnitude among those of the arrays that there are; 1 if there are none."""
        return max((largest(self._arrays[n]) for n in names if n in self._arrays), default=1.0)

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose names start with the prefix, by the rest of their names."""
        return {name[len(prefix) :]: self[name] for name in self if name.startswith(prefix)}

    @property
    def unused(self) -> list[str]:
        """Names never asked for."""
        return list(self._unused)


def largest(x) -> float:
    """The largest magnitude; 0 of an empty array."""
    return float(np.max(np.abs(np.asarray(x, np.float64)), initial=0.0))


def largest_error(actual, expected) -> float:
    """The largest difference; infinite where the shapes differ, nan where a value is."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return largest(actual - expected) if actual.shape == expected.shape else np.inf


def say(line: str) -> None:
    """Prints a line at once, also into a pipe."""
    print(line, flush=True)


@dataclasses.dataclass
class Report:
    """Prints and counts comparisons.

    Attributes:
      write: where lines go.
      case: what is being compared.
      engine: what decodes.
      checks: number of comparisons. misses: names of those that failed.
    """

    write: Callable[[str], None] = say
    case: str = ""
    engine: Engine = MODULES
    checks: int = 0
    misses: list[str] = dataclasses.field(default_factory=list)

    def check(self, name: str, error: float, allowed: float, note: str = "") -> None:
        """One comparison; a nan is a miss."""
        ok = error <= allowed
        self.checks += 1
        if not ok:
            self.misses.append(f"{self.case} {name}")
        self._line(name, f"{error:.2e}", f"{allowed:.2e}", "ok" if ok else "MISS", note)

    def array(self, name: str, actual, expected, relative: float, scale: float = 0.0) -> None:
        """Absolute error of an array; `relative` of its largest magnitude, or of `scale`, is ok."""
        same = np.shape(actual) == np.shape(expected)
        note = "" if same else f"shape {np.shape(actual)}, expected {np.shape(expected)}"
        allowed = max(relative, ROUNDING) * max(largest(expected), scale)
        self.check(name, largest_error(actual, expected), allowed, note)

    def exact(self, name: str, actual, expected) -> None:
        """Number of entries that differ."""
        same = np.shape(actual) == np.shape(expected)
        count = float(np.sum(np.asarray(actual) != expected)) if same else np.inf
        self.check(name, count, 0, f"of {np.size(expected)} entries")

    def group(self, name: str, actual: Mapping, expected: Mapping, allowed: float) -> None:
        """The worst of several arrays, each with its error relative to its largest magnitude.

        An array that vanishes by cancellation has no scale of its own: its error is relative to the
        largest array of the group.
        """
        for key in sorted(expected.keys() - actual.keys()):
            self.failure(f"{name} {key}", "the library has no such array")
        scales = {key: largest(expected[key]) for key in expected.keys() & actual.keys()}
        if not scales:
            return
        top = max(scales.values()) or 1.0
        errors = {
            key: largest_error(actual[key], expected[key]) / (scale if scale > 1e-9 * top else top)
            for key, scale in scales.items()
        }
        worst = max(errors, key=lambda key: np.nan_to_num(errors[key], nan=np.inf))
        several = f", {len(errors)} arrays, worst {worst}" if len(errors) > 1 else ""
        self.check(name, errors[worst], allowed, "relative" + several)

    def failure(self, name: str, reason: str) -> None:
        """Something that could not be compared."""
        self.misses.append(f"{self.case} {name}")
        self._line(name, "-", "-", "MISS", reason)

    def note(self, text: str) -> None:
        """A line that is no comparison."""
        self.write(f"{self.case:30} {text}")

    def unused(self, golden: Golden) -> None:
        """Names arrays of a file that nothing was compared with."""
        for name in golden.unused:
            self.failure(name, "not recognised, so not compared")

    def _line(self, name, error, allowed, verdict, note):
        numbers = f"error {error:>8}  allowed {allowed:>8}  {verdict:4}"
        self.write(f"{self.case:30} {name:38} {numbers}  {note}".rstrip())


# AiM


def shifted(params: dict, rows: int) -> dict:
    """The parameters with position row j moved to row j + rows.

    It serves the other convention of `position_offset` with a function that is compiled already.
    """
    table = np.roll(np.asarray(params["position_embedding"]["embedding"]), rows, axis=0)
    return params | {"position_embedding": {"embedding": table}}


@functools.partial(jax.jit, static_argnames="config")
def training_pass(params, codes, labels, config: AiMConfig) -> dict:
    """Loss, gradients, and what lies on the way to them, by golden name."""
    apply = functools.partial(AiM(config).apply, mutable="intermediates")

    def loss(params):
        logits, state = apply({"params": params}, codes, labels)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, codes)
        return nll.mean(), (nll, logits, state["intermediates"])

    (value, (nll, logits, state)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    (start, _), _ = apply({"params": params}, labels, method="condition")
    index = jnp.arange(codes.shape[1] - 1)
    rest, _ = apply({"params": params}, codes[:, :-1], index, method="embed_codes")
    return {
        "loss": value,
        "gradients": grads,
        "train_logits": logits,
        "nll": nll,
        "logsumexp": jax.nn.logsumexp(logits, axis=-1),
        "embed_out": jnp.concatenate([start, rest], axis=1),
        "block_hidden": state["layers"]["hidden"][0],
        "block_residual": state["layers"]["residual"][0],
        "norm_f_out": state["norm_f_out"][0],
        "final_out": state["final_out"][0],
    }


@functools.partial(jax.jit, static_argnames="config")
def full_logits(params, codes, labels, config: AiMConfig) -> jax.Array:
    """Logits of whole sequences."""
    return AiM(config).apply({"params": params}, codes, labels)


def greedy_tokens(
    params, labels, cfg_scale, config: AiMConfig, engine: Engine = MODULES
) -> jax.Array:
    """Generation with top_k = 1: the most likely code at every step."""
    sampling, index = SamplingConfig(float(cfg_scale), top_k=1), jnp.arange(labels.shape[0])
    decoder = prepare_decoder(params, config, engine)
    return generate_tokens(decoder, labels, 0, index, sampling)


def smallest_margin(
    params, tokens, labels, cfg_scale, shift, config: AiMConfig, engine: Engine = MODULES
) -> float:
    """The smallest gap between the best and the second guided logit along given codes."""
    steps = teacher_forced_decode(params, tokens, labels, cfg_scale, shift, config, engine)
    top, _ = jax.lax.top_k(steps["guided"], 2)
    return float(jnp.min(top[..., 0] - top[..., 1]))


def guided_scale(golden: Golden) -> float:
    """The largest guided logit of either decode, which the reference error stands for."""
    return golden.scale(*(f"decode_{mode}_guided" for mode in POSITION_MODES))


def aim_errors(golden: Golden) -> dict[str, float]:
    """Relative errors allowed: train, guided and other logits, loss, gradients, other arrays."""
    reference = golden.get("fp32_reference_errors", ())
    names = ("logits", "guided") if len(reference) == 2 else ("logits", "loss", "grads", "guided")
    reference = dict(zip(names, np.asarray(reference).tolist(), strict=False))

    scales = {
        "logits": golden.scale("train_logits", "train_logits_at_positions"),
        "loss": golden.scale("loss"),
        "grads": 1.0,
        "guided": guided_scale(golden),
    }
    errors = {name: FACTOR * error / scales[name] for name, error in reference.items()}
    errors.setdefault("logits", FLOOR)
    errors.setdefault("loss", FLOOR / 10)
    errors["other"] = max(FLOOR, errors["logits"])
    errors.setdefault("grads", max(2 * FLOOR, FACTOR * errors["logits"]))
    errors.setdefault("guided", errors["other"])
    magnified = max(1.0, golden.scale("cfg_scale")) * scales["logits"]
    unguided = errors["guided"] * scales["guided"] / magnified
    errors["other logits"] = max(errors["logits"], unguided)
    return errors


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """Weights stored as int8 with a scale beside them, in float32."""
    golden = Golden(path)
    return {
        name: golden[name].astype(np.float32) * golden.get(f"{name}::scale", np.float32(1))
        for name in golden
        if not name.endswith("::scale")
    }


def load_aim(folder: Path) -> tuple[AiMConfig, dict]:
    """Configuration and parameters of an AiM folder."""
    config = convert.aim_config_from_official(json.loads((folder / "config.json").read_text()))
    if (folder / WEIGHTS_NPZ).is_file():
        tensors = dequantized(folder / WEIGHTS_NPZ)
    else:
        tensors, _ = convert.load_official(folder)
    return config, convert.convert_aim(tensors, config)


def compare_aim(folder: Path, report: Report) -> None:
    """An AiM: full sequence, loss, gradients, guided decode, greedy generation."""
    golden = Golden(folder / "expected.npz")
    config, params = load_aim(folder)
    model = Subject(golden, params, config, aim_errors(golden))
    if "codes" in golden:
        compare_full_sequence(folder, model, report)
    for mode in POSITION_MODES:
        if any(name.startswith(f"decode_{mode}_") for name in golden):
            compare_decode(mode, model, report)
    if any(name.startswith("greedy_tokens_") for name in golden):
        compare_greedy(model, report)
    report.unused(golden)


@dataclasses.dataclass
class Subject:
    """A model and what is expected of it."""

    golden: Golden
    params: dict
    config: AiMConfig
    errors: dict[str, float]

    def at(self, shift: int) -> AiMConfig:
        """The configuration with another position_offset."""
        return dataclasses.replace(self.config, position_offset=shift)

    def kept(self, name: str, x) -> np.ndarray:
        """The positions and codes of x (..., t, features) that the file holds of array `name`."""
        x, shape = np.asarray(x), self.golden[name].shape
        if "positions" in self.golden and x.ndim > 2 and x.shape[-2] != shape[-2]:
            x = x[..., self.golden["positions"], :]
        if "vocab_ids" in self.golden and x.ndim > 2 and x.shape[-1] != shape[-1]:
            x = x[..., self.golden["vocab_ids"]]
        return x

    def compare_argmax(self, name: str, logits, error: str, report: Report) -> None:
        """How far our logit of the expected code is below our largest one."""
        logits, codes = np.asarray(logits), self.golden[name]
        if logits.shape[:-1] != codes.shape:
            report.failure(name, f"shape {logits.shape[:-1]}, expected {codes.shape}")
            return
        ours = np.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
        shortfall = largest(logits.max(axis=-1) - ours)
        report.check(
            name, shortfall, 2 * self.errors[error] * largest(logits), "logit below the best"
        )


def compare_full_sequence(folder: Path, model: Subject, report: Report) -> None:
    """Training forward, loss and gradients."""
    golden, errors = model.golden, model.errors
    codes, labels = golden["codes"], golden["labels"]
    ours = training_pass(model.params, codes, labels, model.at(0))
    for name in golden:
        base = name.removesuffix("_at_positions")
        if base in ("nll", "logsumexp"):
            allowed = errors["logits"] * largest(ours["train_logits"])
            report.check(name, largest_error(ours[base], golden[name]), allowed)
        elif base in ours:
            allowed = errors[{"train_logits": "logits", "loss": "loss"}.get(base, "other")]
            report.array(name, model.kept(name, ours[base]), golden[name], allowed)
    if (name := "train_logits_positions_plus1") in golden:
        plus1 = training_pass(shifted(model.params, -1), codes, labels, model.at(0))
        actual = model.kept(name, plus1["train_logits"])
        report.array(name, actual, golden[name], errors["other logits"])
    if "argmax" in golden:
        model.compare_argmax("argmax", ours["train_logits"], "logits", report)

    grads = convert.export_aim(ours["gradients"], model.config)
    compare_gradients("grad", grads, golden, errors["grads"], report)
    rows = {"grad_row::": labels, "grad_rows_input_codes::": codes[0]}
    for prefix, ids in rows.items():
        expected = golden.under(prefix)
        actual = {name: grads[name][ids[: len(array)]] for name, array in expected.items()}
        report.group(prefix, actual, expected, errors["grads"])
    if (folder / "grads.safetensors").is_file():
        expected = load_file(folder / "grads.safetensors")
        report.group("grads.safetensors", grads, expected, errors["grads"])


def compare_gradients(prefix, grads, golden, allowed, report) -> None:
    """Arrays `<prefix>::<key>` and Euclidean norms `<prefix>norm::<key>`."""
    norms = {name: np.linalg.norm(np.asarray(g, np.float64)) for name, g in grads.items()}
    report.group(f"{prefix}::", grads, golden.under(f"{prefix}::"), allowed)
    report.group(f"{prefix}norm::", norms, golden.under(f"{prefix}norm::"), allowed)


def decode_inputs(golden: Golden) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, labels and guidance scale of the teacher-forced decode."""
    own = "decode_codes" in golden
    names = ("decode_codes", "decode_labels") if own else ("codes", "labels")
    return golden[names[0]], golden[names[1]], np.float32(golden["cfg_scale"])


def compare_decode(mode: str, model: Subject, report: Report) -> None:
    """Logits of every step, and the states after the last."""
    golden, errors, shift = model.golden, model.errors, POSITION_MODES[mode]
    inputs = (model.params, *decode_inputs(golden), shift)
    ours = teacher_forced_decode(*inputs, model.at(0), report.engine)
    for name in golden:
        if not name.startswith(f"decode_{mode}_"):
            continue
        what = name.removeprefix(f"decode_{mode}_")
        state = re.fullmatch(r"(conv|ssm)_state_layer(\d+)", what)
        if state:
            states, layer = ours[state[1]], int(state[2])
            report.array(name, states[layer], golden[name], errors["other"])
        elif what in ("guided", "cond", "uncond"):
            actual = model.kept(name, ours[what])
            if what == "guided":
                report.array(name, actual, golden[name], errors["guided"], guided_scale(golden))
            else:
                report.array(name, actual, golden[name], errors["other logits"])
        elif what == "guided_logsumexp":
            error = largest_error(jax.nn.logsumexp(ours["guided"], axis=-1), golden[name])
            report.check(name, error, errors["guided"] * guided_scale(golden))
        elif what == "guided_argmax":
            model.compare_argmax(name, ours["guided"], "guided", report)


def compare_greedy(model: Subject, report: Report) -> None:
    """Generated codes, and by how little the choice among them was ever decided."""
    golden, margins = model.golden, []
    _, labels, cfg_scale = decode_inputs(golden)
    for mode, shift in POSITION_MODES.items():
        if (name := f"greedy_tokens_{mode}") in golden:
            params = shifted(model.params, 1 - shift)
            tokens = greedy_tokens(params, labels, cfg_scale, model.at(1), report.engine)
            report.exact(name, tokens, golden[name])
            inputs = (golden[name], labels, cfg_scale, shift, model.at(0), report.engine)
            margins.append(smallest_margin(model.params, *inputs))
    if (name := "greedy_min_margin") in golden:
        error = largest_error(min(margins), golden[name])
        report.check(name, error, 2 * model.errors["guided"] * guided_scale(golden))


# Tokenizer


def nchw(x) -> np.ndarray:
    """Images or feature maps with the channels before height and width, as in the files."""
    return np.moveaxis(np.asarray(x), -1, 1)


@functools.partial(jax.jit, static_argnames="config")
def tokenizer_pass(params, images, config: VQConfig) -> dict:
    """A training step of the tokenizer, with entropy loss, and what lies on the way to it."""
    model = VQModel(dataclasses.replace(config, entropy_loss_ratio=1.0))

    def total(params):
        (recon, quantized), state = model.apply(
            {"params": params}, images, capture_intermediates=True, mutable="intermediates"
        )
        losses = quantized.vq_loss + quantized.commit_loss + 0.1 * quantized.entropy_loss
        loss = jnp.mean(jnp.square(recon - images)) + losses
        return loss, (recon, quantized, state["intermediates"])

    (loss, (recon, quantized, state)), grads = jax.value_and_grad(total, has_aux=True)(params)
    return {
        "encoder_out": state["encoder"]["__call__"][0],
        "prequant": state["quant_conv"]["__call__"][0],
        "indices": quantized.indices,
        "quant": quantized.quant,
        "recon": recon,
        "vq_loss": quantized.vq_loss,
        "commit_loss": quantized.commit_loss,
        "total_loss": loss,
        "gradients": grads,
    }


def quantize(params, prequant, config: VQConfig, ratio: float):
    """The quantizer alone, with its entropy loss times a ratio."""
    model = VQModel(dataclasses.replace(config, entropy_loss_ratio=ratio))
    return model.apply({"params": params}, prequant, method=lambda model, z: model.quantize(z))


@functools.partial(jax.jit, static_argnames="config")
def quantizer_gradients(params, prequant, config: VQConfig) -> dict:
    """Gradients of the three losses with respect to the encoder's vectors and the codebook."""

    def losses(prequant, codebook):
        replaced = params | {"quantize": {"embedding": codebook}}
        quantized = quantize(replaced, prequant, config, 1.0)
        return {
            name: getattr(quantized, name) for name in ("vq_loss", "commit_loss", "entropy_loss")
        }

    codebook = params["quantize"]["embedding"]
    return {"prequant": jax.jacrev(losses)(prequant, codebook)} | {
        "codebook": jax.jacrev(losses, argnums=1)(prequant, codebook)
    }


@functools.partial(jax.jit, static_argnames=("config", "grid"))
def decode_indices(params, indices, config: VQConfig, grid: tuple[int, int]):
    """Codebook vectors (b, h, w, c) and images of given codes."""
    apply = functools.partial(VQModel(config).apply, {"params": params})
    vectors = apply(indices, method=lambda model, i: model.quantize.lookup(i))
    images = apply(indices, grid, method="decode_tokens")
    return vectors.reshape(*indices.shape[:1], *grid, -1), images


@functools.partial(jax.jit, static_argnames="config")
def encode(params, images, config: VQConfig) -> tuple[jax.Array, jax.Array]:
    """Codes of images, and the vectors before quantization."""
    codes, state = VQModel(config).apply(
        {"params": params},
        images,
        method="encode_to_tokens",
        capture_intermediates=True,
        mutable="intermediates",
    )
    return codes, state["intermediates"]["quant_conv"]["__call__"][0]


def vq_errors(golden: Golden) -> dict[str, float]:
    """Relative error allowed for prequant, recon, decode_image; code space, pixels, gradients."""
    names = ("prequant", "recon", "decode_image")
    reference = golden.get("fp32_reference_errors", ())
    errors = dict.fromkeys(names, FLOOR)
    for name, error in zip(names, reference, strict=False):
        errors[name] = FACTOR * float(error) / golden.scale(name)
    errors["code space"] = max(FLOOR, errors["prequant"])
    errors["pixels"] = max(FLOOR, errors["recon"])
    errors["gradients"] = 10 * max(errors["code space"], errors["pixels"])
    return errors


def load_vq(folder: Path) -> tuple[VQConfig, dict, dict[str, np.ndarray]]:
    """Configuration, parameters and official tensors of a tokenizer folder."""
    config = convert.vq_config_from_official(json.loads((folder / "config.json").read_text()))
    if (folder / WEIGHTS_NPZ).is_file():
        tensors = dequantized(folder / WEIGHTS_NPZ)
    else:
        _, tensors = convert.load_official(folder)
    return config, convert.convert_vq(tensors, config), tensors


def compare_vq(folder: Path, report: Report) -> None:
    """A tokenizer: both directions, losses, codebook usage, gradients."""
    golden = Golden(folder / "expected.npz")
    config, params, tensors = load_vq(folder)
    errors = vq_errors(golden)
    if "images" in golden:
        compare_tokenizer_pass(golden, config, params, tensors, errors, report)
    if "decode_indices" in golden:
        indices = golden["decode_indices"]
        side = int(indices.shape[1] ** 0.5)
        grid = golden["decode_quant"].shape[2:] if "decode_quant" in golden else (side, side)
        ours = decode_indices(params, indices, config, tuple(grid))
        for name, allowed, actual in (
            ("decode_quant", errors["code space"], ours[0]),
            ("decode_image", errors["decode_image"], ours[1]),
        ):
            if name in golden:
                report.array(name, nchw(actual), golden[name], allowed)
    report.unused(golden)


def compare_tokenizer_pass(golden, config, params, tensors, errors, report) -> None:
    """Images through the tokenizer, as in a training step."""
    images = golden["images"].transpose(0, 2, 3, 1)
    prefix = "train_entropy_loss_ratio"
    ours = tokenizer_pass(params, images, config)
    for name, allowed in (
        ("encoder_out", errors["code space"]),
        ("prequant", errors["prequant"]),
        ("quant", errors["code space"]),
        ("recon", errors["recon"]),
    ):
        if name in golden:
            report.array(name, nchw(ours[name]), golden[name], allowed)
    if "indices" in golden:
        report.exact("indices", ours["indices"], golden["indices"])
    if (name := "distance_margin") in golden:
        allowed = errors["code space"]
        compare_margin(name, golden, ours["prequant"], params, config, allowed, report)

    for name in ("vq_loss", "commit_loss"):
        if f"train_{name}" in golden:
            expected = golden[f"train_{name}"]
            report.array(f"train_{name}", ours[name], expected, errors["code space"])
    for name, expected in golden.under(prefix).items():
        loss = quantize(params, ours["prequant"], config, float(name)).entropy_loss
        report.array(prefix + name, loss, expected, errors["gradients"])

    start = tensors.get(convert.USAGE_HISTORY, np.zeros(HISTORY_LENGTH)).astype(np.int32)
    history = update_history(jnp.asarray(start), ours["indices"])
    if (name := "train_codebook_usage") in golden:
        report.array(name, codebook_usage(history, config.n_embed), golden[name], 0)
    if (name := "train_codebook_used_tail") in golden:
        report.exact(name, history[-golden[name].size :], golden[name])

    names = [name for name in golden if re.fullmatch(r"grad_.*_wrt_(prequant|codebook)", name)]
    if names:
        grads = quantizer_gradients(params, ours["prequant"], config)
        for name in names:
            loss, argument = name.removeprefix("grad_").split("_wrt_")
            actual = grads[argument][loss]
            actual = nchw(actual) if argument == "prequant" else actual
            report.array(name, actual, golden[name], errors["gradients"])
    if (name := "e2e_total_loss") in golden:
        report.array(name, ours["total_loss"], golden[name], errors["pixels"])
    grads = convert.export_vq(ours["gradients"], config)
    compare_gradients("e2e_grad", grads, golden, errors["gradients"], report)


def compare_margin(name, golden, prequant, params, config, allowed, report, reduce=np.asarray):
    """Second-best minus best squared distance to the codebook, (b, t)."""
    z, codebook = jnp.asarray(prequant), jnp.asarray(params["quantize"]["embedding"])
    if config.l2_norm:
        z, codebook = unit(z), unit(codebook)
    z = np.asarray(z, np.float64).reshape(z.shape[0], -1, 1, z.shape[-1])
    distances = np.sort(np.sum(np.square(z - np.asarray(codebook, np.float64)), axis=-1), axis=-1)
    error = largest_error(reduce(distances[..., 1] - distances[..., 0]), golden[name])
    report.check(name, error, allowed * largest(distances))


# Tokenizer and AiM in one


def sibling(folder: Path, kind: str, preferred: str) -> Path:
    """The folder with the weights of one part: by name, or the only one of its kind."""
    if folder_kind(folder.parent / preferred) == kind:
        return folder.parent / preferred
    found = [path for path in sorted(folder.parent.iterdir()) if folder_kind(path) == kind]
    if len(found) != 1:
        raise ValueError(
            f"{folder.name} needs the weights of {preferred}, but there is no such folder beside "
            f"it, and {len(found)} others of its kind"
        )
    return found[0]


def compare_chain(folder: Path, report: Report) -> None:
    """Images to codes to logits; labels to codes to images."""
    golden = Golden(folder / "expected.npz")
    aim_folder = sibling(folder, "aim", "aim_tiny_adaln")
    vq_folder = sibling(folder, "vq", "vq_tiny")
    report.note(f"weights of {aim_folder.name} and {vq_folder.name}")
    aim_config, aim_params = load_aim(aim_folder)
    vq_config, vq_params, _ = load_vq(vq_folder)
    errors = aim_errors(Golden(aim_folder / "expected.npz"))
    errors |= vq_errors(Golden(vq_folder / "expected.npz"))
    model = Subject(golden, aim_params, aim_config, errors)
    labels = golden["labels"]

    if "images" in golden:
        images = golden["images"].transpose(0, 2, 3, 1)
        codes, prequant = encode(vq_params, images, vq_config)
        if "codes" in golden:
            report.exact("codes", codes, golden["codes"])
        if (name := "index_margin") in golden:
            allowed = errors["code space"]
            compare_margin(name, golden, prequant, vq_params, vq_config, allowed, report, np.min)
        logits = full_logits(aim_params, codes, labels, model.at(0))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, codes).mean()
        if (name := "train_logits") in golden:
            report.array(name, logits, golden[name], errors["other logits"])
        if (name := "loss") in golden:
            report.array(name, loss, golden[name], max(errors["loss"], FLOOR / 10))

    if "generated_tokens" in golden:
        cfg_scale, expected = np.float32(golden["cfg_scale"]), golden["generated_tokens"]
        tokens = greedy_tokens(aim_params, labels, cfg_scale, model.at(1))
        report.exact("generated_tokens", tokens, expected)
        if (name := "greedy_margin") in golden:
            margin = smallest_margin(aim_params, expected, labels, cfg_scale, 1, model.at(0))
            scale = max(1.0, float(cfg_scale)) * golden.scale("train_logits")
            allowed = 2 * errors["guided"] * scale
            report.check(name, largest_error(margin, golden[name]), allowed)
        if (name := "generated_images") in golden:
            side = int(tokens.shape[1] ** 0.5)
            _, images = decode_indices(vq_params, tokens, vq_config, (side, side))
            report.array(name, nchw(images), golden[name], max(FLOOR, errors["decode_image"]))
    report.unused(golden)


# Sampling filters


def compare_filter(path: Path, report: Report) -> None:
    """Which codes survive top-k and top-p, and their probabilities."""
    golden = Golden(path)
    logits, k, p = golden["logits"], golden["top_k"], golden["top_p"]
    temperature = golden.get("temperature", np.ones(k.shape))
    for variant, scale in (
        ("temperature_ignored", np.ones_like(temperature)),
        ("temperature_first", temperature),
    ):
        rows = (logits / scale[:, None, None].astype(np.float32)).reshape(-1, logits.shape[-1])
        settings = (np.repeat(setting, len(logits)) for setting in (k, p.astype(np.float32)))
        filtered = jax.jit(filter_logits)(rows, *settings)
        shape = (k.size, *logits.shape)
        if (name := f"keep_{variant}") in golden:
            report.exact(name, np.isfinite(filtered).reshape(shape), golden[name])
        if (name := f"probs_{variant}") in golden:
            probs = jax.nn.softmax(filtered, axis=-1).reshape(shape)
            report.check(name, largest_error(probs, golden[name]), 1e-6)
    if "ties_keep" in golden:
        keep = [np.isfinite(filter_top_k(golden["ties_logits"], k)) for k in golden["ties_top_k"]]
        report.exact("ties_keep", np.stack(keep), golden["ties_keep"])
    report.unused(golden)


# Operators: the golden files name arguments and order axes as the official kernels do.

ARGUMENTS = {"u": "x", "delta": "dt", "delta_bias": "dt_bias", "initial_states": "initial_state"}
OPERANDS = {"x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "state"}
OPERANDS |= {"weight", "bias"}


def mamba1_recurrence(x, dt, A, B, C, *, D=None, z=None, initial_state=None, dt_bias=None):
    """The sequential oracle in the layout of `selective_scan`: every channel is a head of one."""
    y, state = ops.recurrence(
        x[..., None], dt, A[:, None], B[:, :, None], C[:, :, None], D=D, dt_bias=dt_bias,
        z=None if z is None else z[..., None],
        initial_state=None if initial_state is None else initial_state[:, :, None],
    )  # fmt: skip
    return y[..., 0], state[:, :, 0]


def mamba2_recurrence(x, dt, A, B, C, **options):
    """The sequential oracle in the layout of `ssd_scan`: one decay per head."""
    return ops.recurrence(x, dt, A[:, None, None], B, C, **options)


def values_and_gradients(function, inputs: dict, *cotangents):
    """Outputs of function(**inputs), and the gradients by name for each tuple of cotangents.

    Inputs go by their official names; a cotangent that is None is zero.
    """

    @jax.jit
    def run(inputs, cotangents):
        def call(inputs):
            return function(**{ARGUMENTS.get(name, name): x for name, x in inputs.items()})

        outputs, pullback = jax.vjp(call, inputs)
        zeros = jax.tree.map(jnp.zeros_like, outputs)
        filled = [
            tuple(z if d is None else d for d, z in zip(pair, zeros, strict=True))
            for pair in cotangents
        ]
        return outputs, [pullback(pair)[0] for pair in filled]

    return run(inputs, cotangents)


def compare_outputs(outputs: Mapping, golden: Golden, report: Report, label: str = "") -> None:
    """Those of the outputs that the file has."""
    for name, actual in outputs.items():
        if name in golden:
            report.group(label + name, {name: actual}, {name: golden[name]}, FLOAT64)


def compare_scan(path: Path, report: Report) -> None:
    """A selective scan or an SSD scan, and the sequential oracle: outputs, states, gradients."""
    golden = Golden(path)
    mamba1 = "u" in golden
    scan, oracle = (
        (ops.selective_scan, mamba1_recurrence) if mamba1 else (ops.ssd_scan, mamba2_recurrence)
    )
    state = "last_state" if mamba1 else "final_state"

    def swap(name, array):
        """Positions before channels, or back: only Mamba-1 sequences have them the other way."""
        sequence = mamba1 and array.ndim == 3 and "state" not in name
        return np.swapaxes(array, 1, 2) if sequence else array

    inputs = {
        name: swap(name, golden[name]) for name in golden if ARGUMENTS.get(name, name) in OPERANDS
    }
    d_out = swap("out", golden["cotangent_out"]) if "cotangent_out" in golden else None
    cotangents = (d_out, None), (d_out, golden.get(f"cotangent_{state}"))
    for label, function in (
        (scan.__name__, functools.partial(scan, chunk_size=16)),
        ("recurrence", oracle),
    ):
        outputs, gradients = values_and_gradients(function, inputs, *cotangents)
        outputs = dict(zip(("out", state), outputs, strict=True))
        if "out_no_z" in golden:
            rest = {name: array for name, array in inputs.items() if name != "z"}
            (outputs["out_no_z"], _), _ = values_and_gradients(function, rest)
        outputs = {name: swap(name, array) for name, array in outputs.items()}
        compare_outputs(outputs, golden, report, f"{label}: ")
        for which, ours in zip(("grad_out_only", "grad_out_and_state"), gradients, strict=True):
            ours = {name: swap(name, array) for name, array in ours.items()}
            report.group(f"{label}: {which}", ours, golden.under(f"{which}__"), FLOAT64)
    report.unused(golden)


def compare_step(path: Path, report: Report) -> None:
    """One decode step of either mixer: output, state, gradients."""
    golden = Golden(path)
    step = ops.selective_scan_step if golden["x"].ndim == 2 else ops.ssd_step
    inputs = {name: golden[name] for name in golden if name in OPERANDS}
    cotangents = golden.get("cotangent_out"), golden.get("cotangent_new_state")
    outputs, (gradients,) = values_and_gradients(step, inputs, cotangents)
    outputs = dict(zip(("out", "new_state"), outputs, strict=True))
    compare_outputs(outputs, golden, report, f"{step.__name__}: ")
    report.group(f"{step.__name__}: grad", gradients, golden.under("grad__"), FLOAT64)
    report.unused(golden)


def compare_conv(path: Path, report: Report) -> None:
    """The causal convolution: outputs with and without a state, states, gradients, one step."""
    golden = Golden(path)

    def swap(array):
        """Positions or taps before channels, or back."""
        return np.swapaxes(array, -1, -2) if np.ndim(array) > 1 else array

    inputs = {name: swap(golden[name]) for name in golden if ARGUMENTS.get(name, name) in OPERANDS}
    d_out = swap(golden["cotangent_out"]) if "cotangent_out" in golden else None
    linear = functools.partial(ops.causal_conv1d, activation=None)
    for start, final in (("zero", "final_states_zero_init"), ("with", "final_states")):
        given = {k: v for k, v in inputs.items() if start == "with" or k != "initial_states"}
        (silu, state), (gradients,) = values_and_gradients(ops.causal_conv1d, given, (d_out, None))
        (plain, _), _ = values_and_gradients(linear, given)
        outputs = {f"out_{start}_init_silu": silu, f"out_{start}_init_linear": plain, final: state}
        compare_outputs({k: swap(v) for k, v in outputs.items()}, golden, report)
        gradients = {name: swap(array) for name, array in gradients.items()}
        which = f"grad_{start}_init_silu"
        report.group(which, gradients, golden.under(f"{which}__"), FLOAT64)
    if "update_state" in golden:
        # The official window has one input more, the oldest, which no later output needs.
        window, now = golden["update_state"], golden["update_x"][:, None]
        step = {k: v for k, v in inputs.items() if k in ("weight", "bias")}
        y, state = ops.causal_conv1d(now, **step, initial_state=swap(window[:, :, 1:]))
        after = np.concatenate([window[:, :, 1:2], swap(state)], axis=2)
        compare_outputs({"update_out_silu": y[:, 0], "update_new_state": after}, golden, report)
    report.unused(golden)


def compare_norms(path: Path, report: Report) -> None:
    """RMSNorm after the residual sum, and RMSNorm with a gate in both orders."""
    golden = Golden(path)

    def add_rmsnorm(x, residual, weight):
        return rms_norm(x + residual, weight), x + residual

    inputs = {name: golden[name] for name in ("x", "residual", "weight")}
    cotangents = golden.get("cotangent_out"), golden.get("cotangent_residual")
    (y, total), (gradients,) = values_and_gradients(add_rmsnorm, inputs, cotangents)
    compare_outputs({"add_rmsnorm_out": y, "add_rmsnorm_residual": total}, golden, report)
    report.group("grad_add_rmsnorm", gradients, golden.under("grad_add_rmsnorm__"), FLOAT64)
    if (name := "add_layernorm_out") in golden:
        params = {"scale": golden["weight"], "bias": golden["bias"]}
        norm = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)
        compare_outputs({name: norm.apply({"params": params}, total)}, golden, report)

    for name in golden:
        kind = re.fullmatch(r"gated_(gate_then_norm|norm_then_gate)_(nogroup|group(\d+))_out", name)
        if not kind:
            continue
        options = {
            "group_size": int(kind[3]) if kind[3] else None,
            "norm_before_gate": kind[1] == "norm_then_gate",
        }

        def gated(x, z, weight, options=options):
            return (gated_rms_norm(x, z, weight, **options),)

        inputs = {"x": golden["x"], "z": golden["gate_z"], "weight": golden["weight"]}
        outputs, (gradients,) = values_and_gradients(gated, inputs, cotangents[:1])
        compare_outputs({name: outputs[0]}, golden, report)
        which = f"grad_{name.removesuffix('_out')}"
        report.group(which, gradients, golden.under(f"{which}__"), FLOAT64)
    report.unused(golden)


# Finding out what there is to compare

NPZ_KINDS = (
    (compare_filter, {"logits", "top_k", "top_p"}),
    (compare_scan, {"u", "delta", "A"}),
    (compare_scan, {"x", "dt", "A", "final_state"}),
    (compare_step, {"x", "dt", "A", "state", "new_state"}),
    (compare_conv, {"x", "weight", "bias", "out_zero_init_silu"}),
    (compare_norms, {"x", "residual", "weight"}),
)
FOLDER_KINDS = {"aim": compare_aim, "vq": compare_vq, "chain": compare_chain}


def folder_kind(folder: Path) -> str | None:
    """ "aim", "vq" or "chain" of a folder with an expected.npz, or None."""
    if not (folder / "expected.npz").is_file():
        return None
    if not (folder / "config.json").is_file():
        return "chain"
    return "vq" if "ch_mult" in json.loads((folder / "config.json").read_text()) else "aim"


def cases(root: Path) -> Iterator[tuple[Path, Callable[[Path, Report], None] | None]]:
    """Everything comparable at or below a path, with its comparison; None where it is not known."""
    if root.is_file():
        with np.load(root) as file:
            names = set(file.files)
        yield root, next((compare for compare, needed in NPZ_KINDS if needed <= names), None)
        return
    kind = folder_kind(root)
    if kind:
        yield root, FOLDER_KINDS[kind]
    elif any(root.glob("*.safetensors")):
        yield root, None
    for file in sorted(root.glob("*.npz")):
        if not (kind and file.name in ("expected.npz", WEIGHTS_NPZ)):
            yield from cases(file)
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        yield from cases(folder)


def run(root: Path, *write: Callable[[str], None], engine: Engine = MODULES) -> Report:
    """Compares everything at or below a path; `engine` decodes."""
    report = Report(*write, engine=engine)
    for path, compare in cases(root):
        report.case = str(path.relative_to(root)) if path != root else root.name
        if compare is None:
            report.failure("", "not recognised: none of the kinds that parity.py compares")
            continue
        if path.is_dir():
            for file in sorted(f for f in path.iterdir() if f.suffix in PICKLES):
                report.note(f"{file.name} is not read: a pickle of the weights that are")
        double = path.suffix == ".npz" and compare is not compare_filter
        try:
            with jax.default_matmul_precision("highest"), jax.enable_x64(double):
                compare(path, report)
        except (KeyError, ValueError, FileNotFoundError) as error:
            report.failure("", str(error.args[0] if isinstance(error, KeyError) else error))
    return report


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, help="golden vectors, or folders of them, at any depth"
    )
    parser.add_argument("--form", choices=FORMS, default="recurrent", help="of the decodes")
    parser.add_argument("--implementation", choices=DECODERS, default="xla", help="of the decodes")
    args = parser.parse_args(arguments)
    root = args.folder
    if not root.exists():
        parser.error(f"{root}: no such file or folder")
    report = run(root.resolve(), engine=Engine(args.form, args.implementation))
    print(f"{report.checks} comparisons, {len(report.misses)} misses")
    if not report.checks:
        print(f"{root}: nothing was compared; expected folders with an expected.npz, or .npz files")
    return 1 if report.misses or not report.checks else 0


if __name__ == "__main__":
    sys.exit(main())
