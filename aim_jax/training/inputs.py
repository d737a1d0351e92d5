"""Training tokens of AiM, from token caches or from images encoded on the fly."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from aim_jax.data import (
    ImageSource,
    TokenCache,
    check_alike,
    check_images,
    identity_of,
    image_batches,
    open_images,
    token_batches,
)
from aim_jax.data.captions import NAME as CAPTIONED
from aim_jax.data.features import CaptionTable, FeatureFile, FeatureRows
from aim_jax.data.loader import Prefetched
from aim_jax.data.preprocessing import image_spec
from aim_jax.data.text import TEXT_TOKENIZER_FILE, TextTokenizer
from aim_jax.models.config import VQConfig
from aim_jax.models.vq import VQModel
from aim_jax.parallel.sharding import joined, micro_batches
from aim_jax.weights.pretrained import Pretrained
from aim_jax.weights.tokenizer import tokenizer_fingerprint


def parse_codes(text: str) -> list[tuple[Path, float]]:
    """Parse "codes/a,codes/b:0.5" into directories and the sampling weights of their examples.

    Raises:
      ValueError: A weight is not a positive number.
    """

    def parse(item: str) -> tuple[Path, float]:
        path, _, weight = item.strip().partition(":")
        try:
            number = float(weight or 1)
        except ValueError:
            number = 0
        if not path or not 0 < number < math.inf:
            raise ValueError(
                f"config.codes={text!r}: expected DIRECTORY or DIRECTORY:WEIGHT with a positive "
                f"number, got {item!r}"
            )
        return Path(path), number

    return [parse(item) for item in text.split(",")]


class Captions(NamedTuple):
    """Encoder of the captions of a run, and the captions of its data.

    Attributes:
      encoder: The text tokenizer, or the features of another encoder.
      train: Training captions of each source. Tokens are (n, max_caption), -1 on the left of short
        ones; int16 if that suffices.
      validation: Validation captions.
      validation_texts: The same as text.
    """

    encoder: TextTokenizer | FeatureFile
    train: list[CaptionTable]
    validation: CaptionTable
    validation_texts: Sequence[str]

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprint of the encoder, for `claim_workdir`."""
        name = "text_tokenizer" if isinstance(self.encoder, TextTokenizer) else "caption_features"
        return {name: self.encoder.fingerprint}


def open_captions(
    config: ConfigDict,
    train: Sequence[ImageSource | TokenCache],
    validation: ImageSource | TokenCache,
) -> Captions | None:
    """Encode the captions of the data of a text model; None for other models.

    Raises:
      ValueError: There are no captions, or the text tokenizer or the features are missing or of
        another size than the model.
      OSError: The text tokenizer or the features cannot be read.
    """
    if config.model.condition != "text":
        return None
    texts = captions_of(validation)
    length = config.model.max_caption
    if config.model.caption_features:
        file = open_features(config)
        rows = [FeatureRows(file, captions_of(source), length) for source in train]
        return Captions(file, list(rows), FeatureRows(file, texts, length), texts)
    tokenizer = open_text_tokenizer(config.text_tokenizer)
    if config.model.caption_vocab != tokenizer.vocab_size:
        raise ValueError(
            f"config.model.caption_vocab={config.model.caption_vocab}, but the text tokenizer has "
            f"{tokenizer.vocab_size} tokens; set it to {tokenizer.vocab_size}."
        )
    kind = np.int16 if tokenizer.vocab_size <= 2**15 else np.int32

    def encode(captions: Sequence[str]) -> np.ndarray:
        return tokenizer.encode(captions, length).astype(kind)

    tables: list[CaptionTable] = [encode(captions_of(source)) for source in train]
    return Captions(tokenizer, tables, encode(texts), texts)


def open_features(config: ConfigDict) -> FeatureFile:
    """Open the features of captions of a run.

    Raises:
      ValueError: No file is named, or its features are of another width than the model's.
      OSError: It cannot be read.
    """
    if not config.caption_features:
        raise ValueError(
            f"config.model.caption_features={config.model.caption_features}, but "
            "config.caption_features is empty: name the file of the features, or set the number to "
            "0 and use config.text_tokenizer."
        )
    file = FeatureFile(config.caption_features)
    if file.width != config.model.caption_features:
        raise ValueError(
            f"config.model.caption_features={config.model.caption_features}, but the features in "
            f"{file.path} have {file.width} values; set it to {file.width}."
        )
    return file


def open_text_tokenizer(path: str) -> TextTokenizer:
    """Load the text tokenizer in a file, or in a model directory.

    Raises:
      ValueError: No path is given, or the file is damaged.
      OSError: The file cannot be read.
    """
    if not path:
        raise ValueError(
            "config.text_tokenizer is empty: train one with aim-jax train_text_tokenizer, and name "
            "its file."
        )
    file = Path(path)
    return TextTokenizer.load(file / TEXT_TOKENIZER_FILE if file.is_dir() else file)


def captions_of(source: ImageSource | TokenCache) -> Sequence[str]:
    """Return the captions of a source of images or a token cache.

    Raises:
      ValueError: It has none.
    """
    if isinstance(source, TokenCache):
        return source.captions()
    if source.captions is None:
        raise ValueError(
            f"{source.name} has no captions: for a folder of captioned images, set "
            f"config.data.name={CAPTIONED} (--data_name {CAPTIONED})"
        )
    return source.captions


def example_captions(captions: Sequence[str], count: int) -> list[str]:
    """Return up to `count` different captions, evenly spaced; empty ones do not count."""
    different = list(dict.fromkeys(caption for caption in captions if caption))
    chosen = np.linspace(0, len(different) - 1, min(count, len(different))).astype(int)
    return [different[index] for index in chosen]


class CodeData:
    """Training tokens from one or several token caches, and validation tokens from the first.

    Attributes:
      summary: Lines about the data as understood.
      identity: What the data are, for `claim_workdir`.
      class_names: Names of the classes; empty for a text model.
      captions: Those of a text model, or None. Batches have them as the entries of
        `caption_entries`.
      unigram_entropy: Nats per token of the marginal distribution of the first cache's tokens: the
        loss of a model that ignores class, position and context.
    """

    def __init__(self, config: ConfigDict, tokenizer: Pretrained, share: tuple[int, int]):
        expected = tokenizer_fingerprint(tokenizer)
        paths, self._weights = zip(*parse_codes(config.codes), strict=True)
        self._train = [TokenCache.open(path / "train", expected) for path in paths]
        self._validation = TokenCache.open(paths[0] / "validation", expected)
        check_alike([*self._train, self._validation])
        self.captions = open_captions(config, self._train, self._validation)
        self._config = config
        self._share = share
        first = self._train[0]
        self.class_names = () if self.captions else first.class_names
        self.num_tokens = first.num_tokens
        self.vocab_size = first.vocab_size
        self.train_size = sum(len(cache) for cache in self._train)
        self.validation_size = len(self._validation)
        self.summary = [cache.summary for cache in (*self._train, self._validation)]
        self.identity = {
            "class_names": list(first.class_names),
            "train": [cache.fingerprint() for cache in self._train],
            "validation": self._validation.fingerprint(),
        } | (self.captions.identity if self.captions else {})
        self.unigram_entropy = unigram_entropy(first)

    def encode(self, batch: dict, after: Any = None) -> dict:
        """Return the batch unchanged, because it already holds tokens."""
        return batch

    def train_batches(self) -> Prefetched:
        """Return endless shuffled batches of this process."""
        captions = None if self.captions is None else self.captions.train
        return self._batches(self._train, captions, weights=self._weights, train=True)

    def validation_batches(self) -> Prefetched:
        """Return one pass over this process's share of the validation tokens."""
        captions: list[CaptionTable] | None = None
        if self.captions is not None:
            captions = [self.captions.validation]
        return self._batches([self._validation], captions, train=False)

    def _batches(
        self,
        caches: Sequence[TokenCache],
        captions: Sequence[CaptionTable] | None,
        train: bool,
        weights: Sequence[float] | None = None,
    ) -> Prefetched:
        return token_batches(
            caches, self._config.batch_size, weights=weights, captions=captions,
            seed=self._config.seed, train=train, shard_index=self._share[0],
            shard_count=self._share[1],
        )  # fmt: skip


def unigram_entropy(cache: TokenCache) -> float:
    """Return the entropy, in nats per token, of the tokens of up to 16,384 evenly spaced images."""
    codes, _ = cache.take(np.linspace(0, len(cache) - 1, min(2**14, len(cache))).astype(int))
    frequency = np.bincount(codes.ravel(), minlength=cache.vocab_size)
    p = frequency[frequency > 0] / frequency.sum()
    return float(-(p * np.log(p)).sum())


class EncodedImages:
    """Training and validation images, encoded by the frozen tokenizer as they are needed."""

    unigram_entropy = None

    def __init__(self, config: ConfigDict, tokenizer: Pretrained, share: tuple[int, int]):
        data = config.data
        vq, self._params = tokenizer.vq()
        check_images_fit(vq, data)
        self._config = config
        self._spec = image_spec(data)
        self._share = share
        self._train, self._validation = (
            open_images(data.name, split, data.dir or None) for split in ("train", "validation")
        )
        for source in (self._train, self._validation):
            check_images(source, self._spec)
        self.captions = open_captions(config, [self._train], self._validation)
        self.class_names = () if self.captions else self._train.class_names
        self.num_tokens = (data.image_size // vq.downsampling) ** 2
        self.vocab_size = vq.n_embed
        self.train_size = len(self._train)
        self.validation_size = len(self._validation)
        self.summary = [self._train.summary, self._validation.summary]
        self.identity = identity_of([self._train, self._validation])
        self.identity |= self.captions.identity if self.captions else {}

        def encode(params: dict, images: jax.Array) -> jax.Array:
            def encode_part(part: jax.Array) -> jax.Array:
                return VQModel(vq).apply({"params": params}, part, method="encode_to_tokens")

            return joined(jax.lax.map(encode_part, micro_batches(images, config.accumulate)))

        self._encode = jax.jit(encode)

    def encode(self, batch: dict, after: Any = None) -> dict:
        """Return the batch with `codes` in place of `images`.

        Args:
          batch: `images` (b, H, W, c), and other arrays that are passed through.
          after: Results of the previous step. Encoding waits for them if one process has several
            CPU devices.
        """
        # CPU devices of one process share its threads. Two programs at the same time may deadlock:
        # this one waits for threads that an all-reduce of the previous step holds.
        shared_threads = jax.default_backend() == "cpu" and jax.local_device_count() > 1
        if shared_threads:
            jax.block_until_ready(after)
        codes = self._encode(self._params, batch["images"])
        if shared_threads:
            jax.block_until_ready(codes)
        return {k: v for k, v in batch.items() if k != "images"} | {"codes": codes}

    def train_batches(self) -> Prefetched:
        """Return endless shuffled batches of this process."""
        captions = None if self.captions is None else self.captions.train[0]
        return self._batches(self._train, captions, train=True)

    def validation_batches(self) -> Prefetched:
        """Return one pass over this process's share of the validation images."""
        captions = None if self.captions is None else self.captions.validation
        return self._batches(self._validation, captions, train=False)

    def _batches(
        self, source: ImageSource, captions: CaptionTable | None, train: bool
    ) -> Prefetched:
        return image_batches(
            source, self._spec, self._config.batch_size, seed=self._config.seed, train=train,
            shard_index=self._share[0], shard_count=self._share[1],
            workers=self._config.data.workers if train else 0, captions=captions,
        )  # fmt: skip


def open_codes(
    config: ConfigDict, tokenizer: Pretrained, share: tuple[int, int]
) -> CodeData | EncodedImages:
    """Open the data that a configuration names: token caches, or images to encode on the fly.

    Args:
      share: Index of this process's part of every batch, and the number of parts; see
        `batch_share`.
    """
    return (CodeData if config.codes else EncodedImages)(config, tokenizer, share)


def check_images_fit(model: VQConfig, data: ConfigDict) -> None:
    """Raise ValueError where a tokenizer and the images disagree in channels or size."""
    if {model.in_channels, model.out_channels} != {data.channels}:
        raise ValueError(
            f"config.data.channels={data.channels}, but the tokenizer has in_channels="
            f"{model.in_channels} and out_channels={model.out_channels}; make the three equal."
        )
    if data.image_size % model.downsampling:
        raise ValueError(
            f"config.data.image_size={data.image_size} is not a multiple of the tokenizer's "
            f"downsampling {model.downsampling}."
        )
