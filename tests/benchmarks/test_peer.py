"""Against a second, independent implementation in PyTorch, at the width of AiM-B."""

import dataclasses

import jax
import numpy as np
import pytest

from aim_jax.models import AiM, AiMConfig
from aim_jax.weights.convert import convert_aim, export_aim, official_shapes
from benchmarks.conversion import random_tensor

torch = pytest.importorskip("torch", reason="the peer is PyTorch: pip install torch")

B_WIDTH = AiMConfig(vocab_size=512, num_tokens=24, n_layer=2)  # the rest is AiM-B


@pytest.mark.parametrize(
    "config",
    [B_WIDTH, dataclasses.replace(B_WIDTH, adaln="group", num_groups=2, position_offset=1)],
    ids=["layer", "group"],
)
def test_logits_and_gradients_at_the_width_of_aim_b(config):
    from tests import torch_peer

    rng = np.random.default_rng(0)
    tensors = {k: random_tensor(k, s, rng) for k, s in official_shapes(config).items()}
    codes = rng.integers(0, config.vocab_size, (2, config.num_tokens))
    labels = np.array([7, config.num_classes])

    theirs = {
        k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in tensors.items()
    }
    expected = torch_peer.forward(
        theirs, torch.tensor(codes), torch.tensor(labels),
        n_layer=config.n_layer, d_state=config.d_state, n_heads=config.n_heads,
        num_groups=config.num_groups if config.adaln == "group" else None,
        offset=config.position_offset,
    )  # fmt: skip
    torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), torch.tensor(codes).flatten()
    ).backward()

    def loss(params):
        logits = AiM(config).apply({"params": params}, codes, labels)
        log_probs = jax.nn.log_softmax(logits)
        picked = log_probs[np.arange(2)[:, None], np.arange(config.num_tokens), codes]
        return -picked.mean(), logits

    with jax.default_matmul_precision("highest"):
        params = convert_aim(tensors, config)
        grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    expected = expected.detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    for key, ours in export_aim(grads, config).items():
        gradient = theirs[key].grad.numpy()
        assert np.abs(gradient).max() > 0, key
        error = np.abs(ours - gradient).max() / np.abs(gradient).max()
        assert error < 1e-4, f"{key}: {error:.2g}"
