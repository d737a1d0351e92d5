"""The benchmarks: their PyTorch peers compute what the library computes; their sums are right."""

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_jax.sampling.config import SamplingConfig
from aim_jax.sampling.engine import Engine
from benchmarks import decode_cpu, decode_gpu, footprints, scale, traffic

RESULTS = {
    "copy": [{"GB/s": 10.0}, {"GB/s": 12.5}, {"GB/s": 20.0}],
    "ours:recurrent/1": [{"ms": ms, "bytes": 5e8} for ms in (50.0, 90.0, 40.0)],
    "ours:recurrent/8": [{"ms": 100.0, "bytes": 1e9, "whole_s": 26.0}],
    "official/1": [{"ms": 110.0}, {"ms": 111.0}, {"ms": 112.0}],
    "official/8": [{"ms": 525.0}],
    "tuned/8": [{"error": "no torch"}],
    "vq": [{"ms": 2000.0}],
    "vq_torch": [{"ms": 2500.0}],
    "vq_torch_nhwc": [{"ms": 1500.0}],
}


def test_last_line_of_decode_cpu():
    line = decode_cpu.last_line(decode_cpu.ratios(RESULTS, "recurrent"))
    assert line == "official_1 2.22 official_8 5.25 tuned_8 nan bandwidth 0.80 tokenizer 0.75"
    assert all(math.isnan(x) for x in decode_cpu.ratios({}, "recurrent").values())
    rows = {line.split()[0]: line for line in decode_cpu.table(RESULTS, 256)[1:]}
    assert "40.0 - 90.0" in rows["ours:recurrent/1"] and "~12.8" in rows["ours:recurrent/1"]
    assert " 26.0 " in rows["ours:recurrent/8"] and "tuned/8" not in rows


def test_steps_are_timed_without_what_happens_once_per_image():
    args = decode_cpu.parse(["--whole", "30"])
    result = decode_cpu.timed_decoding(lambda steps: 2.0 + 0.1 * steps, 8, True, args)
    assert result["ms"] == pytest.approx(100) and result["start_s"] == pytest.approx(2)
    assert result["whole_s"] == pytest.approx(27.6)
    args.whole = 20
    assert "whole_s" not in decode_cpu.timed_decoding(lambda steps: 2 + 0.1 * steps, 8, True, args)
    with pytest.raises(RuntimeError, match="busy"):
        decode_cpu.timed_decoding(lambda steps: 5 - 0.1 * steps, 8, True, args)


def test_bytes_per_step_of_aim_b():
    config, recurrent = decode_cpu.PRESETS["B"], Engine(form="recurrent")
    one, eight = (traffic.bytes_per_step(config, images, recurrent) for images in (1, 8))
    state = 24 * 1536 * 128 * 4 * 2 * 2  # layers, channels, states, bytes, rows, read and write
    ring = 24 * 4 * (1536 + 2 * 128) * 4 * 2 * 2
    logits = 2 * 16384 * 4 * 2  # rows, codes, bytes, written and read
    assert eight - one == 7 * (state + ring + logits)
    weights = 147_622_080  # less modulation, class and position tables
    weights -= 24 * 769 * 3 * 768 + 769 * 2 * 768 + 1001 * 768 + 257 * 768
    assert one == 4 * weights + state + ring + logits
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    moved = 2 * weights + state + ring // 2 + logits
    assert traffic.bytes_per_step(half, 1, recurrent) == moved
    rounded = Engine(form="dual", cache_dtype="bfloat16")
    tokens = 24 * ((1536 + 128) * 2 + 24 * 4) * 2  # layers, inputs and B, decays, rows
    moved = 4 * weights + ring + logits + 128.5 * tokens
    assert traffic.bytes_per_step(config, 1, rounded) == moved


def test_rates_are_drawn_beside_their_floor(tmp_path):
    args = decode_cpu.parse(["--ours", "recurrent", "--plot", str(tmp_path / "rates.png")])
    decode_cpu.plot_rates(RESULTS, args)
    assert args.plot.stat().st_size > 10_000


@pytest.fixture(scope="module")
def peers():
    pytest.importorskip("torch", reason="the peers are PyTorch: pip install torch")
    from benchmarks import peers

    return peers


@pytest.mark.parametrize(
    "shape", [{}, {"adaln": "group", "num_groups": 2, "position_offset": 1}], ids=["layer", "group"]
)
def test_aim_peers_agree_with_the_library(peers, shape):
    config = dataclasses.replace(peers.SIZES["tiny"], **shape)
    assert max(peers.check_aim(config).values()) < peers.TOLERANCE


def test_tokenizer_and_sampler_peers_agree_with_the_library(peers):
    assert max(peers.check_vq(peers.VQ_SIZES["tiny"], side=4).values()) < peers.TOLERANCE
    assert max(peers.check_sampler(vocab=512, top_k=50).values()) < peers.TOLERANCE


def test_peers_generate(peers):
    config = peers.SIZES["tiny"]
    labels = peers.with_null([3, 8], config.num_classes)
    weights = peers.as_torch(peers.random_weights(config))
    official, tuned = (
        peers.generate(peer(weights, config, labels), 5, top_k=1)
        for peer in (peers.OfficialAiM, peers.TunedAiM)
    )
    assert official.shape == (2, 5) and (official == tuned).all()


def test_llamagen_peer_steps_as_it_reads(peers):
    config = peers.SMALL_LLAMAGEN
    peer = peers.LlamaGen(config, peers.with_null([1, 2], config.num_classes))
    assert max(peers.check_cached(peer, config.vocab_size, 4).values()) < peers.TOLERANCE


# Floors in images/s on an A100, 2.0 TB/s: float32 state, bfloat16 state, bfloat16 dual cache. They
# were worked out by hand from rounded MB, so that the last digit may be off by one.
A100_FLOORS = """
B  | 28/32/34    | 76/120/161 | 93/170/267 | 97/183/300 | 99/190/320 | 100/194/331
L  | 9/10/11     | 27/42/55   | 35/62/98   | 36/68/112  | 37/71/121  | 38/73/127
XL | 4.4/4.8/5.1 | 16/23/29   | 22/39/59   | 24/44/71   | 25/47/80   | 25/48/85
1B | 2.6/2.8/2.9 | 11/15/18   | 16/27/40   | 17/32/51   | 18/34/58   | 19/36/63
"""


def test_floors_of_decoding_on_a_gpu(capsys):
    assert decode_gpu.main(["--floors", "--images", "1,8,32,64,128,256"]) == 0
    printed = capsys.readouterr().out
    floors = {tuple(words[:2]): words[2:] for words in map(str.split, printed.splitlines()[2:])}
    engines = ("recurrent", "recurrent_bf16", "dual_bf16")
    for row in A100_FLOORS.strip().splitlines():
        model, *cells = (cell.strip() for cell in row.split("|"))
        for column, cell in enumerate(cells):
            for engine, expected in zip(engines, cell.split("/"), strict=True):
                digit = 0.1 if "." in expected else 1
                found = float(floors[model, engine][column])
                assert abs(found - float(expected)) <= digit, (model, engine, column)
    assert floors["B", "xla"] == floors["B", "recurrent"]


def test_decode_gpu_times_and_compares(tmp_path, capsys, monkeypatch):
    """All of it that needs no GPU, with tiny models and the modules as engine."""
    monkeypatch.setenv("XLA_FLAGS", "")
    out = tmp_path / "rates.json"
    tiny = ["--tiny", "--images", "2", "--engines", "recurrent", "--repeats", "1"]
    assert decode_gpu.main([*tiny, "--bandwidth", "10", "--out", str(out)]) == 0
    everything = json.loads(out.read_text())
    (row,) = everything["results"]
    assert everything["GB/s"] == 10 and everything["machine"]["device"]
    assert row["images/s"] == pytest.approx(2 / row["tokens_s"][0])
    assert row["attained"] == pytest.approx(row["images/s"] / row["floor"])
    assert row["ms"] == pytest.approx(1e3 * row["tokens_s"][0] / 4)
    assert row["pictures/s"] == pytest.approx(2 / row["pictures_s"][0])
    assert decode_gpu.main([*tiny, "--check"]) == 0
    assert "100.0% of tokens the same ok" in capsys.readouterr().out
    monkeypatch.setitem(decode_gpu.TOLERANCE, "bfloat16", 1e-9)
    assert decode_gpu.main([*tiny, "--check"]) == 1
    with pytest.raises(SystemExit):
        decode_gpu.main(["--engines", "fast"])
    assert "fast: expected some of recurrent, recurrent_bf16" in capsys.readouterr().err


def test_what_does_not_fit_is_skipped(monkeypatch, capsys):
    def out_of_memory(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(decode_gpu, "time_images", out_of_memory)
    models = lambda config, vq: types.SimpleNamespace(aim_config=config)  # noqa: E731
    monkeypatch.setattr(decode_gpu, "Models", models)
    args = decode_gpu.parse(["--models", "B", "--images", "64", "--engines", "xla"])
    (row,) = decode_gpu.measure(args, 2e12)
    assert "images/s" not in row
    assert "skipped: does not fit into the device's memory" in capsys.readouterr().out


def test_table_of_footprints():
    """The reports of aim-jax compile become rows, whether it fits or not."""
    fits = {
        "arguments": 2**30, "temporaries": 2**31, "outputs": 0, "capacity": 2**34, "fits": True,
        "seconds": 0.5, "images_per_second": 4096.0, "mfu": 0.25, "hours": 10.0, "accumulate": 4,
    }  # fmt: skip
    refused = {"refused": "Used 20G of 16G", "accumulate": 8}
    one = {"topology": "v5e-16", "devices": 16, "kind": "TPU v5 lite"}
    reports = {
        "aim_b v5e-16": one | {"training": fits},
        "aim_1b v5e-16": one | {"training": refused},
        "choice remat=full": one | {"training": fits | {"fits": False}},
    }
    text = footprints.table(reports)
    row = "| aim_b | 3.0 of 16.0 | 4 | 0.50 | 4096 | 25% | 10 h, 160 |"
    assert f"| v5e-16 (16 x TPU v5 lite) {row}" in text
    assert "| aim_1b | does not fit: Used 20G of 16G |" in text
    assert "| remat=full | **3.0 of 16.0** | 4 |" in text
    names = [name for name, *_ in footprints.jobs()]
    assert len(names) == len(set(names)) == 7 * 4 + len(footprints.CHOICES)


def test_growth_is_fitted_and_drawn(tmp_path):
    x = [1, 2, 4]
    assert scale.slope(x, [3 * n**2 for n in x]) == pytest.approx(2)
    rows = [{"x": n, "seconds": n, "bytes": 1e9 * n} for n in x]
    results = {"series": {"tokens": rows}, "sent": {"data": [(2, 1e6), (4, 2e6)]}}
    scale.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_peer_transformer_is_causal_and_decodes_from_its_cache():
    """Of benchmarks/against_transformer.py: full pass, cached pass and greedy samples agree."""
    from benchmarks import transformer

    config = transformer.TransformerConfig(32, 3, 16, d_model=64, n_layer=2, n_head=2)
    params = transformer.init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x * 3, params)  # far from uniform logits
    assert config.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    model = transformer.Transformer(config)
    codes = jax.random.randint(jax.random.key(1), (2, 16), 0, 32)
    labels = jnp.array([0, 2])
    logits = model.apply({"params": params}, codes, labels)
    assert logits.shape == (2, 16, 32)
    changed = model.apply({"params": params}, codes.at[:, 7].add(1) % 32, labels)
    np.testing.assert_allclose(changed[:, :8], logits[:, :8], rtol=1e-5)
    assert np.abs(changed[:, 8:] - logits[:, 8:]).max() > 1e-3
    nats = model.apply({"params": params}, codes, labels, method="cross_entropy")
    expected = -np.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], -1)[..., 0]
    np.testing.assert_allclose(nats, expected, rtol=1e-4)
    drawn = transformer.generate_tokens(
        params, labels, 0, jnp.arange(2), SamplingConfig(3.0, top_k=1), config=config
    )
    null = model.apply({"params": params}, drawn, jnp.full((2,), 3))
    guided = null + 3.0 * (model.apply({"params": params}, drawn, labels) - null)
    np.testing.assert_array_equal(drawn, jnp.argmax(guided, axis=-1))


def test_peer_transformer_has_as_many_parameters():
    from aim_jax.models import PRESETS, AiMConfig
    from benchmarks.against_transformer import matching_transformer

    peer = matching_transformer(PRESETS["B"], 147_622_080)
    assert (peer.n_layer, peer.vocab_size, peer.d_model % 32) == (12, 16384, 0)
    with pytest.raises(ValueError, match="within 5 %"):
        matching_transformer(AiMConfig(n_layer=48, vocab_size=16384), 100_000)
