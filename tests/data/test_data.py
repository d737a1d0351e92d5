"""Image sources, preprocessing and resumable batches."""

import gzip
import io
import os
import pickle
import struct
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from aim_jax.data import (
    ArrayImages,
    ImageSpec,
    check_images,
    decode_image,
    image_batches,
    imagenet,
    open_images,
    preprocess,
)
from aim_jax.data.loader import EpochOrder


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_images(rng, *shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)


def numbered_source(count, size=4):
    """Pictures that tell their own index, with that index as label."""
    labels = np.arange(count)
    images = np.broadcast_to(labels[:, None, None, None], (count, size, size, 1)).astype(np.uint8)
    return ArrayImages("numbered", "train", [str(i) for i in labels], images, labels)


def pixels(source):
    return np.stack([example["image"] for example in source])


def labels_of(source):
    return [example["label"] for example in source]


def write_idx(path, array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_fashion_mnist(root, rng, train=100, test=20):
    root.mkdir(exist_ok=True)
    made = {}
    for prefix, count in (("train", train), ("t10k", test)):
        images, labels = random_images(rng, count, 28, 28), np.arange(count, dtype=np.uint8) % 10
        write_idx(root / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(root / f"{prefix}-labels-idx1-ubyte.gz", labels)
        made[prefix] = images[..., None], labels
    return made


def write_cifar10(root, rng, per_batch=20):
    root.mkdir(parents=True, exist_ok=True)
    made = []
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        images = random_images(rng, per_batch, 32, 32, 3)
        labels = np.arange(per_batch, dtype=np.uint8) % 10
        planes = images.transpose(0, 3, 1, 2).reshape(per_batch, -1)
        (root / f"{name}.bin").write_bytes(np.hstack([labels[:, None], planes]).tobytes())
        made.append((images, labels))
    return made


def test_fashion_mnist_files(tmp_path, rng):
    made = write_fashion_mnist(tmp_path, rng)
    train, held_out, test = (
        open_images("fashion_mnist", split, tmp_path) for split in ("train", "validation", "test")
    )
    np.testing.assert_array_equal(pixels(train), made["train"][0][:98])
    np.testing.assert_array_equal(pixels(held_out), made["train"][0][98:])
    np.testing.assert_array_equal(pixels(test), made["t10k"][0])
    assert labels_of(held_out) == made["train"][1][98:].tolist()
    assert (train.class_names[0], train.class_names[9]) == ("T-shirt/top", "Ankle boot")
    assert (train.name, train.split) == ("fashion_mnist", "train")


def test_cifar10_files(tmp_path, rng):
    *batches, test_batch = write_cifar10(tmp_path, rng)
    images, labels = (np.concatenate(part) for part in zip(*batches, strict=True))
    train, held_out, test = (
        open_images("cifar10", split, tmp_path) for split in ("train", "validation", "test")
    )
    np.testing.assert_array_equal(np.concatenate([pixels(train), pixels(held_out)]), images)
    assert labels_of(train) + labels_of(held_out) == labels.tolist()
    np.testing.assert_array_equal(pixels(test), test_batch[0])
    assert len(held_out) == 2
    assert train.class_names[5] == "dog"


def test_missing_files_are_named(tmp_path, rng):
    write_fashion_mnist(tmp_path / "fashion", rng)
    (tmp_path / "fashion" / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"is missing train-labels-idx1-ubyte\.gz"):
        open_images("fashion_mnist", "train", tmp_path / "fashion")
    write_cifar10(tmp_path / "cifar", rng)
    (tmp_path / "cifar" / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"is missing data_batch_3\.bin"):
        open_images("cifar10", "validation", tmp_path / "cifar")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_images("cifar10", "train", tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="no known layout for 'cifar10'"):
        open_images("cifar10", "train", tmp_path / "other")


def test_damaged_files_are_named(tmp_path, rng):
    write_fashion_mnist(tmp_path / "fashion", rng)
    file = tmp_path / "fashion" / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:500])
    with pytest.raises(ValueError, match=f"cannot unpack {file}"):
        open_images("fashion_mnist", "train", tmp_path / "fashion")
    file.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(ValueError, match="not a complete idx file"):
        open_images("fashion_mnist", "train", tmp_path / "fashion")
    write_cifar10(tmp_path / "cifar", rng)
    file = tmp_path / "cifar" / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"data_batch_2\.bin is damaged"):
        open_images("cifar10", "train", tmp_path / "cifar")


def test_label_out_of_range(tmp_path, rng):
    write_cifar10(tmp_path, rng)
    file = tmp_path / "data_batch_1.bin"
    data = bytearray(file.read_bytes())
    data[3073] = 10
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"out of range: 10 \(example 1\); expected 0 to 9"):
        open_images("cifar10", "train", tmp_path)
    source = ArrayImages("mine", "train", ["a"], random_images(rng, 2, 4, 4, 3), [0, 1])
    with pytest.raises(ValueError, match=r"mine: 1 labels are out of range: 1 \(example 1\)"):
        check_images(source)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        open_images("cifar10", "dev")
    with pytest.raises(ValueError, match="unknown dataset 'no_such_data'"):
        open_images("no_such_data", "train")
    with pytest.raises(ValueError, match="needs its directory"):
        open_images("folder", "train")


def write_folder(root, rng, classes, count, suffix=".png", size=(6, 8)):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(random_images(rng, *size, 3)).save(root / name / f"{i:03d}{suffix}")


def names_of(source):
    return [str(Path(path).parent.name + "/" + Path(path).name) for path in source.paths]


def test_class_folders_are_split_the_same_way_each_time(tmp_path, rng):
    write_folder(tmp_path, rng, ["dog", "cat"], 40)
    (tmp_path / "dog" / "notes.txt").write_text("not a picture")
    train, held_out = (open_images("folder", s, tmp_path) for s in ("train", "validation"))
    assert train.class_names == ("cat", "dog")
    assert len(held_out) == 4
    assert sorted(held_out.labels) == [0, 0, 1, 1]
    assert set(names_of(train)).isdisjoint(names_of(held_out))
    assert len(train) + len(held_out) == 80
    assert names_of(open_images("folder", "validation", tmp_path)) == names_of(held_out)
    # Adding a picture to one class leaves the other class as it was.
    Image.new("RGB", (4, 4)).save(tmp_path / "dog" / "new.png")
    again = names_of(open_images("folder", "validation", tmp_path))
    assert again[:2] == names_of(held_out)[:2]
    with Image.open(train.paths[0]) as image:
        np.testing.assert_array_equal(train[0]["image"], np.asarray(image))
    check_images(train)
    with pytest.raises(ValueError, match="no test split"):
        open_images("folder", "test", tmp_path)


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_split_folders(tmp_path, rng, validation):
    for split, count in (("train", 3), (validation, 2), ("test", 1)):
        write_folder(tmp_path / split, rng, ["a", "b"], count, ".jpg")
    sizes = [len(open_images("pets", s, tmp_path)) for s in ("train", "validation", "test")]
    assert sizes == [6, 4, 2]
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "c")
    with pytest.raises(ValueError, match="only one of them has b, c"):
        open_images("pets", "test", tmp_path)


def test_folder_without_classes_or_pictures(tmp_path, rng):
    with pytest.raises(ValueError, match="no class folders"):
        open_images("folder", "train", tmp_path)
    write_folder(tmp_path, rng, ["cat"], 3)
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match=f"hold no images: {tmp_path / 'dog'}"):
        open_images("folder", "train", tmp_path)


def test_corrupt_pictures_are_named(tmp_path, rng):
    write_folder(tmp_path, rng, ["cat"], 12, ".jpg", size=(64, 64))
    source = open_images("folder", "train", tmp_path)
    broken, cut = Path(source.paths[4]), Path(source.paths[7])
    broken.write_bytes(b"no picture at all")
    cut.write_bytes(cut.read_bytes()[:-500])
    with pytest.raises(ValueError, match=rf"2 of 11 images(.|\n)*{broken}(.|\n)*{cut}"):
        check_images(source)
    with pytest.raises(ValueError, match=f"cannot read the image {broken}"):
        source[4]
    # Beyond the limit only headers are read.
    with pytest.raises(ValueError, match="1 of 11 images"):
        check_images(source, decode_limit=1)


def test_sixteen_bit_pictures_are_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    for i in range(2):
        Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "cat" / f"{i}.png")
    with pytest.raises(ValueError, match="not 8 bits per channel"):
        check_images(open_images("folder", "train", tmp_path))


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)]
)
def test_picture_modes(tmp_path, mode, channels):
    (tmp_path / "cat").mkdir()
    Image.new(mode, (5, 4)).save(tmp_path / "cat" / "0.png")
    assert open_images("folder", "train", tmp_path)[0]["image"].shape == (4, 5, channels)


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Fifty pictures of one grey each."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 4, 3)),
            "label": tfds.features.ClassLabel(names=["dark", "light"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(50), "test": self._generate_examples(5)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": Image.new("RGB", (4, 4), (i, i, i)), "label": int(i >= 25)}


@pytest.fixture(scope="module")
def tiny_tfds(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    builder = TinyPictures(data_dir=str(root), file_format="array_record")
    builder.download_and_prepare()
    return root


def test_tfds_array_record(tiny_tfds):
    sources = [open_images("tiny_pictures", s, tiny_tfds) for s in ("train", "validation", "test")]
    assert [len(source) for source in sources] == [49, 1, 5]
    greys = [int(example["image"][0, 0, 0]) for source in sources[:2] for example in source]
    assert sorted(greys) == list(range(50))
    assert [example["label"] for s in sources[:2] for example in s] == [g >= 25 for g in greys]
    assert sources[0].class_names == ("dark", "light")
    # The second reading is served from memory.
    np.testing.assert_array_equal(pixels(sources[0])[:, 0, 0, 0], greys[:49])
    check_images(sources[0], ImageSpec(4, fit="pad"))
    folder = tiny_tfds / "tiny_pictures" / "1.0.0"
    assert len(open_images("tiny_pictures", "test", folder)) == 5
    with pytest.raises(ValueError, match="'tiny_pictures', not 'cifar10'"):
        open_images("cifar10", "train", folder)


class TinyCaptions(TinyPictures):
    """Pictures with captions in several features, and a name."""

    def _info(self):
        text = tfds.features.Text()
        features = {
            "image": tfds.features.Image(shape=(4, 4, 3)),
            "caption": text,
            "captions": tfds.features.Sequence({"id": np.int64, "text": text}),
            "image_name": text,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, count):
        for i in range(count):
            several = [{"id": j, "text": f"{i} {j}"} for j in range(i % 3)]
            caption = b"caf\xe9" if i == 1 else f"grey {i}"
            image = Image.new("RGB", (4, 4), (i, i, i))
            yield i, {"image": image, "caption": caption, "captions": several, "image_name": "x"}


def test_tfds_features_that_hold_text(tmp_path):
    builder = TinyCaptions(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    source = open_images("tiny_captions:caption", "train", tmp_path)
    assert len(source) == 48 and source.class_names == ("image",)
    lines = source.summary.splitlines()
    assert lines[0] == "train: 48 images of tiny_captions:caption with captions in caption"
    assert any("1 captions that are not UTF-8 text, ignored: number " in line for line in lines)
    for _ in range(2):  # the second reading is served from memory
        for example in source:
            assert example["caption"] == f"grey {example['image'][0, 0, 0]}"
            assert example["label"] == 0
    several = open_images("tiny_captions/1.0.0:captions/text", "test", tmp_path)
    assert sorted(several.captions) == ["1 0", "2 0", "4 0"]
    assert "2 images without a caption" in several.summary
    assert "1 further captions" in several.summary
    with pytest.raises(ValueError, match="has caption, captions/text, image_name"):
        open_images("tiny_captions:title", "train", tmp_path)
    with pytest.raises(ValueError, match="choose one of its text features"):
        open_images("tiny_captions", "train", tmp_path)


def test_fields_of_class_folders_are_refused(picture_folder):
    with pytest.raises(ValueError, match="the name captions:prompt"):
        open_images("folder:prompt", "train", picture_folder)


JPEG = io.BytesIO()
Image.new("RGB", (5, 4), (9, 9, 9)).save(JPEG, "JPEG")


def grey_jpeg(value):
    """A small JPEG file of one grey, which it keeps exactly."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(file, "JPEG", quality=95)
    return file.getvalue()


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def imagenet_files(tmp_path_factory):
    """ImageNet's layout in small: tar files, and the same as folders. Greys are classes mod 250."""
    root = tmp_path_factory.mktemp("imagenet")
    tars, in_folders = root / "tars", root / "folders"
    tars.mkdir()
    jpegs = [grey_jpeg(value) for value in range(250)]
    # Inside the tar neither the classes nor their pictures are in order.
    with tarfile.open(tars / "ILSVRC2012_img_train.tar", "w") as outer:
        for label in reversed(range(1000)):
            wordnet_id, inner = imagenet.wordnet_ids()[label], io.BytesIO()
            (in_folders / "train" / wordnet_id).mkdir(parents=True)
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for number in (7, 10) if label % 500 == 0 else (3,):
                    name = f"{wordnet_id}_{number}.JPEG"
                    add(archive, name, jpegs[label % 250])
                    (in_folders / "train" / wordnet_id / name).write_bytes(jpegs[label % 250])
            add(outer, f"{wordnet_id}.tar", inner.getvalue())
    (in_folders / "val").mkdir()
    with tarfile.open(tars / "ILSVRC2012_img_val.tar", "w") as archive:
        for number in (3, 1, 50000, 2):
            name = f"ILSVRC2012_val_{number:08d}.JPEG"
            add(archive, name, jpegs[number % 250])
            (in_folders / "val" / name).write_bytes(jpegs[number % 250])
    return tars, in_folders


def examples_of(source):
    return [(example["label"], example["image"].tobytes()) for example in source]


def test_imagenet_tars_equal_its_folders(imagenet_files):
    tars, in_folders = imagenet_files
    for split, size in (("train", 1002), ("validation", 4)):
        packed, loose = (open_images("imagenet2012", split, root) for root in (tars, in_folders))
        assert len(packed) == len(loose) == size
        assert examples_of(packed) == examples_of(loose)
        assert packed.class_names == loose.class_names
        assert packed.class_names[:2] == ("tench", "goldfish") and len(packed.class_names) == 1000
        check_images(packed, ImageSpec(8))
    train = open_images("imagenet2012", "train", tars)
    assert [e["label"] for e in train] == sorted([*range(1000), 0, 500])
    assert [int(e["image"][0, 0, 0]) for e in train] == [e["label"] % 250 for e in train]


def test_imagenet_validation_labels(imagenet_files):
    """The first three known from the devkit's ground truth: sea snake, alp, shetland sheepdog."""
    assert len(imagenet.wordnet_ids()) == 1000 and len(imagenet.validation_ids()) == 50_000
    assert list(imagenet.wordnet_ids()) == sorted(imagenet.wordnet_ids())
    assert set(Counter(imagenet.validation_ids()).values()) == {50}
    for root in imagenet_files:
        held_out = open_images("imagenet2012", "validation", root)
        names = [held_out.class_names[example["label"]] for example in held_out]
        assert names[:3] == ["sea snake", "alp", "shetland sheepdog"]


def test_the_index_of_a_tar_is_made_once(imagenet_files, monkeypatch):
    tars, _ = imagenet_files
    first = open_images("imagenet2012", "validation", tars)
    with monkeypatch.context() as patch:
        patch.setattr(imagenet, "_members", None)
        again = open_images("imagenet2012", "validation", tars)
    assert examples_of(again) == examples_of(first)
    assert pickle.loads(pickle.dumps(again))[3]["label"] == first[3]["label"]
    tar = tars / "ILSVRC2012_img_val.tar"
    os.utime(tar, (1, 1))  # another file
    monkeypatch.setattr(imagenet, "_members", lambda tar: iter([]))
    assert len(open_images("imagenet2012", "validation", tars)) == 0
    index = tar.with_name(tar.name + ".index.npz")
    index.write_bytes(index.read_bytes()[:-30])
    with pytest.raises(ValueError, match=f"{index} is damaged .*: remove it"):
        open_images("imagenet2012", "validation", tars)
    index.unlink()


def test_bad_imagenet_files_are_named(imagenet_files, tmp_path):
    tars, _ = imagenet_files
    with pytest.raises(FileNotFoundError, match=r"has no train .*: expected ILSVRC2012_img_tr"):
        open_images("imagenet2012", "train", tmp_path)
    with pytest.raises(ValueError, match="no labels for its test images"):
        open_images("imagenet2012", "test", tmp_path)
    cut = tmp_path / "ILSVRC2012_img_train.tar"
    whole = (tars / cut.name).read_bytes()
    cut.write_bytes(whole[:-20480])
    with pytest.raises(ValueError, match=f"{cut} is truncated"):
        open_images("imagenet2012", "train", tmp_path)
    cut.write_bytes(b"no tar" * 500 + bytes(1024))
    with pytest.raises(ValueError, match=f"cannot read {cut}"):
        open_images("imagenet2012", "train", tmp_path)
    with tarfile.open(cut, "w") as archive:
        add(archive, "n01440764/n01440764_1.JPEG", JPEG.getvalue())
    with pytest.raises(ValueError, match=rf"{cut} holds no images of the classes .*\(1000\)"):
        open_images("imagenet2012", "train", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [cut.name]
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00050001.JPEG").write_bytes(JPEG.getvalue())
    with pytest.raises(ValueError, match=r"50001.JPEG' in .* is not a validation image"):
        open_images("imagenet2012", "validation", tmp_path)


class NoTensorFlow:
    """An import hook for a machine without TensorFlow."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_tfds_needs_no_tensorflow_to_prepare_these(tmp_path, rng, monkeypatch):
    write_fashion_mnist(tmp_path / "files", rng)
    write_cifar10(tmp_path / "cifar-10-batches-bin", rng)
    with tarfile.open(tmp_path / "files" / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")

    def download(self, urls):
        if isinstance(urls, dict):
            return {key: [download(self, url) for url in group] for key, group in urls.items()}
        return tmp_path / "files" / urls.rpartition("/")[2]

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    monkeypatch.setattr(sys, "meta_path", [NoTensorFlow(), *sys.meta_path])
    real_builder = tfds.builder
    monkeypatch.setattr(
        tfds, "builder", lambda name, **kw: real_builder(name, data_dir=tmp_path / "tfds", **kw)
    )
    for name, plain in (("fashion_mnist", "files"), ("cifar10", "cifar-10-batches-bin")):
        prepared, original = (
            [(e["label"], e["image"].tobytes()) for e in open_images(name, "test", data_dir)]
            for data_dir in (None, tmp_path / plain)
        )
        assert sorted(prepared) == sorted(original)
        assert len(open_images(name, "train", tmp_path / "tfds")) == 98
        assert len(open_images(name, "validation", tmp_path / "tfds")) == 2
        names = [
            open_images(name, "test", d).class_names for d in (tmp_path / "tfds", tmp_path / plain)
        ]
        assert names[0] == names[1]


def test_tfds_failures_say_what_to_do(tmp_path, monkeypatch):
    def fail(self, urls):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.download.DownloadManager, "download", fail)
    real_builder = tfds.builder
    monkeypatch.setattr(
        tfds, "builder", lambda name, **kw: real_builder(name, data_dir=tmp_path, **kw)
    )
    with pytest.raises(FileNotFoundError, match=r"no route to host\nPass a data_dir"):
        open_images("cifar10", "train")


def test_values_and_identity(rng):
    image = random_images(rng, 6, 6, 3)
    image[0, 0] = 0, 255, 128
    out = preprocess(image, ImageSpec(6))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, image / 127.5 - 1.0, atol=1e-6)
    np.testing.assert_allclose(out[0, 0], [-1.0, 1.0, 128 / 127.5 - 1.0], atol=1e-6)


def test_pad_centres_on_black(rng):
    image = random_images(rng, 28, 28, 1)
    out = preprocess(image, ImageSpec(32, 1, "pad"))
    np.testing.assert_allclose(out[2:30, 2:30], image / 127.5 - 1.0, atol=1e-6)
    assert out.shape == (32, 32, 1)
    out[2:30, 2:30] = -1
    assert (out == -1).all()


def test_pad_refuses_larger_pictures(rng, tmp_path):
    source = ArrayImages("mine", "train", ["a"], random_images(rng, 3, 9, 7, 1), [0, 0, 0])
    spec = ImageSpec(8, 1, "pad")
    with pytest.raises(ValueError, match="9x7 does not fit into 8x8"):
        image_batches(source, spec, 1, train=True)
    with pytest.raises(ValueError, match="9x7 does not fit into 8x8"):
        check_images(source, spec)
    write_folder(tmp_path, rng, ["cat"], 3, size=(8, 8))
    Image.new("RGB", (10, 4)).save(tmp_path / "cat" / "wide.png")
    folder = [open_images("folder", s, tmp_path) for s in ("train", "validation")]
    odd = next(s for s in folder if any("wide" in path for path in s.paths))
    with pytest.raises(ValueError, match=r"wide\.png: 4x10 does not fit into 8x8"):
        check_images(odd, spec)


def test_resize_takes_the_centre(rng):
    # A wide picture of flat thirds: the centre square shows the middle one alone.
    image = np.repeat(np.array([0, 100, 200], np.uint8), 12)[None, :, None]
    out = preprocess(np.broadcast_to(image, (12, 36, 1)), ImageSpec(6, 1))
    np.testing.assert_allclose(out[:, 1:-1], 100 / 127.5 - 1.0, atol=0.02)
    # Shrinking averages: a fine checkerboard turns grey instead of aliasing to black or white.
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    np.testing.assert_allclose(preprocess(board, ImageSpec(8, 1)), 0.0, atol=0.05)
    # resize_size leaves a margin to crop.
    image = random_images(rng, 20, 20, 3)
    np.testing.assert_array_equal(
        preprocess(image, ImageSpec(16, resize_size=20)),
        preprocess(image[2:18, 2:18], ImageSpec(16)),
    )


def test_channels(rng):
    colour, grey = random_images(rng, 5, 5, 3), random_images(rng, 5, 5, 1)
    luma = np.asarray(Image.fromarray(colour).convert("L"))[..., None]
    np.testing.assert_array_equal(
        preprocess(colour, ImageSpec(5, 1)), preprocess(luma, ImageSpec(5, 1))
    )
    out = preprocess(grey, ImageSpec(5, 3))
    assert out.shape == (5, 5, 3)
    np.testing.assert_array_equal(out[..., 0], out[..., 2])


def test_random_crop_and_flip(rng):
    image = random_images(rng, 10, 10, 1)
    spec = ImageSpec(8, 1, resize_size=10, random_crop=True, random_flip=True)
    windows = {}
    for top in range(3):
        for left in range(3):
            crop = preprocess(image[top : top + 8, left : left + 8], ImageSpec(8, 1))
            windows[crop.tobytes()] = top, left, False
            windows[np.ascontiguousarray(crop[:, ::-1]).tobytes()] = top, left, True
    seen = {windows[preprocess(image, spec, rng).tobytes()] for _ in range(300)}
    assert len(seen) == 18
    # Without a generator there is nothing random.
    assert windows[preprocess(image, spec).tobytes()] == (1, 1, False)


def test_random_crop_draws_its_scale(rng):
    # One bright column: its width in the result tells the scale.
    image = random_images(rng, 40, 40, 1)
    spec = ImageSpec(8, 1, random_crop=True)
    out = [preprocess(image, spec, rng) for _ in range(30)]
    assert all(o.shape == (8, 8, 1) for o in out)
    assert len({o.tobytes() for o in out}) > 5


def test_bad_specs_and_pictures():
    with pytest.raises(ValueError, match="channels must be 1 or 3"):
        ImageSpec(8, 4)
    with pytest.raises(ValueError, match="'resize' or 'pad'"):
        ImageSpec(8, fit="squeeze")
    with pytest.raises(ValueError, match="smaller than image_size"):
        ImageSpec(8, resize_size=6)
    with pytest.raises(ValueError, match="fit='pad' takes neither"):
        ImageSpec(8, fit="pad", random_crop=True)
    with pytest.raises(ValueError, match="expected a uint8 image"):
        preprocess(np.zeros((8, 8, 3), np.float32), ImageSpec(8))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def drawn(batches):
    return np.concatenate([batch["labels"] for batch in batches]).tolist()


def test_evaluation_is_one_pass_in_order():
    source = numbered_source(10)
    batches = list(image_batches(source, ImageSpec(4, 1, random_flip=True), 4, train=False))
    assert [len(b["labels"]) for b in batches] == [4, 4, 2]
    assert drawn(batches) == list(range(10))
    assert batches[0]["images"].dtype == np.float32
    assert batches[0]["labels"].dtype == np.int32
    for batch in batches:
        expected = batch["labels"] / 127.5 - 1.0
        np.testing.assert_allclose(batch["images"][:, 0, 0, 0], expected, atol=1e-6)


def test_training_shuffles_every_epoch_anew():
    iterator = image_batches(numbered_source(12), ImageSpec(4, 1), 5, seed=3, train=True)
    batches = take(iterator, 12)
    assert all(batch["images"].shape == (5, 4, 4, 1) for batch in batches)
    epochs = np.reshape(drawn(batches), (5, 12)).tolist()
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    other = image_batches(numbered_source(12), ImageSpec(4, 1), 5, seed=4, train=True)
    assert drawn(take(other, 12)) != drawn(batches)


def orders(size, seed, epochs, index=0):
    """The orders of whole epochs of one of several sets of equal size."""
    order = EpochOrder(index * size, size, (seed, index))
    return np.reshape([order(i) for i in range(epochs * size)], (epochs, size))


def test_epochs_are_independent_of_each_other_and_of_those_of_other_seeds():
    epochs = np.concatenate([orders(40, seed, 4) for seed in range(4)])
    other_set = orders(40, 0, 4, index=1) - 40
    assert len({tuple(epoch) for epoch in [*epochs, *other_set]}) == 20


def test_orders_of_epochs_are_random():
    """Correlations of examples at small distances, and of epochs, in standard deviations."""
    size = 50_000
    ranks = (orders(size, 0, 2) - (size - 1) / 2) / np.sqrt((size**2 - 1) / 12)
    lags = [1, 2, 3, 4, 5, 8, 16, 64]
    within = [np.sum(epoch[lag:] * epoch[:-lag]) for epoch in ranks for lag in lags]
    deviations = np.array([*within, np.sum(ranks[0] * ranks[1])]) / size**0.5
    assert np.max(np.abs(deviations)) < 4


def test_the_order_does_not_change_between_versions():
    """Resumed runs rely on it."""
    assert orders(8, 0, 2).tolist() == [[0, 3, 7, 5, 1, 2, 6, 4], [4, 7, 6, 1, 2, 0, 5, 3]]


def test_a_state_of_another_order_is_refused(noise_source):
    iterator = image_batches(noise_source, AUGMENTED, 3, seed=7, train=True)
    with pytest.raises(ValueError, match="another version of aim_jax, which shuffles"):
        iterator.set_state({"next_index": 4})
    one_pass = image_batches(noise_source, AUGMENTED, 3, train=False)
    one_pass.set_state({"next_index": 1})


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


AUGMENTED = ImageSpec(4, 1, resize_size=6, random_crop=True, random_flip=True)


@pytest.fixture
def noise_source(rng):
    return ArrayImages(
        "noise", "train", ["a", "b"], random_images(rng, 11, 6, 6, 1), np.arange(11) % 2
    )


def test_resume_is_exact(noise_source):
    make = lambda: image_batches(noise_source, AUGMENTED, 3, seed=7, train=True)  # noqa: E731
    iterator = make()
    take(iterator, 5)
    state = iterator.get_state()
    ahead = take(iterator, 6)
    resumed = make()
    next(resumed)
    resumed.set_state(state)
    assert_same(ahead, take(resumed, 6))
    iterator.set_state(state)
    assert_same(ahead, take(iterator, 6))


def test_resume_through_orbax(noise_source, tmp_path):
    make = lambda: image_batches(noise_source, AUGMENTED, 3, seed=7, train=True)  # noqa: E731
    iterator = make()
    take(iterator, 4)
    with ocp.CheckpointManager(tmp_path) as manager:
        save = ocp.args.JsonSave(iterator.get_state())
        manager.save(4, args=ocp.args.Composite(data=save))
        manager.wait_until_finished()
        ahead = take(iterator, 3)
        resumed = make()
        restore = ocp.args.Composite(data=ocp.args.JsonRestore())
        resumed.set_state(manager.restore(4, args=restore)["data"])
    assert_same(ahead, take(resumed, 3))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_have_the_batches_of_one(noise_source, count):
    """In order, without overlap or loss, and with the same augmentation."""
    make = lambda train, index, count: image_batches(  # noqa: E731
        noise_source, AUGMENTED, 4, seed=1, train=train, shard_index=index, shard_count=count
    )

    def joined(parts):
        return [
            {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
            for batches in zip(*parts, strict=True)
        ]

    parts = [take(make(True, i, count), 10) for i in range(count)]
    assert_same(joined(parts), take(make(True, 0, 1), 10))
    # All run equally many steps, even where one of them has nothing left.
    parts = [list(make(False, i, count)) for i in range(count)]
    assert_same(joined(parts), list(make(False, 0, 1)))


def test_bad_batches():
    source, spec = numbered_source(4), ImageSpec(4, 1)
    with pytest.raises(ValueError, match="batch_size 3 is not a positive multiple"):
        image_batches(source, spec, 3, train=True, shard_count=2)
    with pytest.raises(ValueError, match="shard_index 2"):
        image_batches(source, spec, 4, train=True, shard_index=2, shard_count=2)
    with pytest.raises(ValueError, match="seed must be"):
        image_batches(source, spec, 4, train=True, seed=-1)
    with pytest.raises(ValueError, match="no examples"):
        image_batches(numbered_source(0), spec, 4, train=True)


def test_pictures_are_as_viewers_show_them(tmp_path):
    """Turned as the camera noted, white where transparent; as stored where ImageNet is read."""
    lying = Image.new("RGB", (6, 4), "red")
    lying.getexif()[274] = 6  # orientation: a quarter turn
    lying.save(tmp_path / "phone.png", exif=lying.getexif())
    assert decode_image(tmp_path / "phone.png", "phone").shape == (6, 4, 3)
    assert decode_image(tmp_path / "phone.png", "phone", as_stored=True).shape == (4, 6, 3)
    turned = struct.pack(">HHIHH", 274, 3, 1, 6, 0)
    resolution = struct.pack(">HHI4s", 282, 2, 4, b"300")  # text, which should be a fraction
    notes = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + turned + resolution + bytes(4)
    lying.save(tmp_path / "damaged.jpg", exif=notes)
    assert decode_image(tmp_path / "damaged.jpg", "damaged").shape == (6, 4, 3)
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.all(decode_image(tmp_path / "clear.png", "clear") == 255)
    red = decode_image(tmp_path / "clear.png", "clear", as_stored=True)
    assert red[0, 0].tolist() == [255, 0, 0]
    Image.new("LA", (2, 2), (9, 255)).save(tmp_path / "grey.png")
    assert np.array_equal(decode_image(tmp_path / "grey.png", "grey"), np.full((2, 2, 1), 9))


def test_an_error_while_reading_names_the_picture(tmp_path, rng):
    write_folder(tmp_path, rng, ["cat"], 6)
    source = open_images("folder", "train", tmp_path)
    Path(source.paths[3]).write_bytes(b"")
    with pytest.raises(ValueError, match=f"cannot read the image {source.paths[3]}"):
        list(image_batches(source, ImageSpec(4), 2, train=False))


def test_workers_give_the_same_batches(noise_source):
    make = lambda **more: image_batches(noise_source, AUGMENTED, 3, seed=5, train=True, **more)  # noqa: E731
    iterator = make(workers=1)
    batches = [{k: np.array(v) for k, v in b.items()} for b in take(iterator, 4)]
    assert_same(batches, take(make(), 4))
    state, other = iterator.get_state(), make()
    ahead = take(iterator, 2)
    other.set_state(state)  # on a machine with other cores
    assert_same(ahead, take(other, 2))
    iterator.set_state(other.get_state())
    assert_same(take(iterator, 2), take(other, 2))
    iterator.close()
