"""Every op with and without jit, against the recurrence or a formula in NumPy."""

import functools

import chex
import numpy as np
from absl.testing import parameterized

from aim_jax.ops import causal_conv1d, cross_entropy, recurrence, selective_scan, ssd_scan

b, l, h, p, n, e, w, v = 2, 7, 4, 3, 5, 6, 4, 11


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


class OpsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(3, 7, 16)
    def test_ssd_scan(self, chunk_size):
        x, dt, state = normal(b, l, h, p), normal(b, l, h), normal(b, h, p, n)
        A, B, C = -np.exp(normal(h)), normal(b, l, 2, n), normal(b, l, 2, n)
        scan = self.variant(functools.partial(ssd_scan, chunk_size=chunk_size))
        found = scan(x, dt, A, B, C, initial_state=state)
        expected = recurrence(x, dt, A[:, None, None], B, C, initial_state=state)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(3, 7, 16)
    def test_selective_scan(self, chunk_size):
        x, dt, state = normal(b, l, e), normal(b, l, e), normal(b, e, n)
        A, B, C = -np.exp(normal(e, n)), normal(b, l, n), normal(b, l, n)
        scan = self.variant(functools.partial(selective_scan, chunk_size=chunk_size))
        found = scan(x, dt, A, B, C, initial_state=state)
        y, last = recurrence(
            x[..., None], dt, A[:, None], B[:, :, None], C[:, :, None],
            initial_state=state[:, :, None],
        )  # fmt: skip
        chex.assert_trees_all_close(found, (y[..., 0], last[:, :, 0]), rtol=1e-5, atol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_causal_conv1d(self):
        x, weight, bias, state = normal(b, l, e), normal(w, e), normal(e), normal(b, w - 1, e)
        found, last = self.variant(causal_conv1d)(x, weight, bias, initial_state=state)
        padded = np.concatenate([state, x], axis=1)
        sums = bias + sum(padded[:, i : i + l] * weight[i] for i in range(w))
        expected = sums / (1 + np.exp(-sums))  # SiLU
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_equal(last, padded[:, -(w - 1) :])

    @chex.variants(with_jit=True, without_jit=True)
    def test_cross_entropy(self):
        logits, labels = normal(b, l, v), np.arange(b * l).reshape(b, l) % v
        found = self.variant(cross_entropy)(logits, labels)
        log_sum = np.log(np.exp(logits).sum(axis=-1))
        expected = log_sum - np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
