"""The judge of text alignment, and joined sets of captioned images, on small images."""

import json

import numpy as np
import pytest
from PIL import Image

from aim_jax.data import open_images
from benchmarks import emoji_captions, text_alignment

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    """Two sets of 16x16 images: a coloured square, or a coloured bar, on white."""
    root = tmp_path_factory.mktemp("sets")
    shapes = {"square": (slice(4, 12), slice(4, 12)), "bar": (slice(2, 14), slice(6, 10))}
    for style, place in shapes.items():
        for split, names in (("train", ("red", "green", "blue")), ("validation", ("black",))):
            folder = root / style / split
            folder.mkdir(parents=True)
            lines = []
            for name in names:
                pixels = np.full((16, 16, 3), 255, np.uint8)
                pixels[place] = COLOURS[name]
                Image.fromarray(pixels).save(folder / f"{name}.png")
                entry = {"file_name": f"{name}.png", "text": f"a {name} thing", "base": name}
                lines.append(json.dumps(entry))
            (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {style: root / style for style in shapes}


def test_joined_captions_name_the_set(styles, tmp_path, monkeypatch):
    monkeypatch.setattr(
        emoji_captions, "is_left_out", lambda base, number: (base, number) == ("red", 1)
    )
    counts = [
        emoji_captions.join(styles, split, tmp_path / "both") for split in ("train", "validation")
    ]
    assert counts == [10, 4]
    source = open_images("captions", "train", tmp_path / "both")
    captions = set(source.captions)
    assert {"a red thing", "a red thing, square style", "a blue thing, bar style"} <= captions
    assert "a red thing, bar style" not in captions and len(captions) == 8
    (line,) = (tmp_path / "both" / "left_out.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["style"], entry["text"]) == ("bar", "a red thing")


def test_every_style_leaves_out_a_few_bases_of_its_own():
    bases = [f"thing {i}" for i in range(3000)]
    counts = [sum(emoji_captions.is_left_out(base, number) for base in bases) for number in (0, 1)]
    assert all(60 <= count <= 120 for count in counts)
    assert not any(all(emoji_captions.is_left_out(b, n) for n in (0, 1)) for b in bases)


def test_figures_count_neighbours_and_tones():
    tones = ["light", "medium-light", "dark"]
    captions = [f"a man: {tone} skin tone" for tone in tones] + [f"thing {i}" for i in range(7)]
    scores = np.zeros((3, 10))
    scores[0, 0] = 1.0  # right
    scores[1] = np.arange(10)  # the ninth of ten, and another tone is nearer
    scores[1, 0] = 20.0
    scores[2, 4], scores[2, 3] = 1.0, 2.0  # the second
    found = text_alignment.figures(scores, [captions[0], captions[1], captions[4]], captions)
    assert found["nearest"] == pytest.approx(1 / 3) and found["among 5"] == pytest.approx(2 / 3)
    assert (found["with a tone"], found["right tone"]) == (2, 0.5)
    row = found | {"right tone": None}
    assert "| x | 3 | 33.3% | 66.7% | 2 | None |" in text_alignment.table({"x": row})


def test_a_judge_learns_what_images_show(styles, tmp_path):
    pairs = text_alignment.read_pairs(styles)
    assert sum(pair.held_out for pair in pairs) == 2 and len(pairs) == 8
    captions = sorted({pair.caption for pair in pairs})
    images = np.stack([pair.image for pair in pairs])
    shown = [pair.caption for pair in pairs]
    params = text_alignment.opened_judge(tmp_path / "judge.npz", pairs, 60, 4)
    scores = text_alignment.scores_of(params, images, captions)
    assert text_alignment.figures(scores, shown, captions)["nearest"] == 1
    # The file is taken as it is.
    again = text_alignment.opened_judge(tmp_path / "judge.npz", pairs, 0, 4)
    np.testing.assert_array_equal(text_alignment.scores_of(again, images, captions), scores)
