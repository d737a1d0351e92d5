"""Decoding along given tokens, with every engine: the logits and the final caches.

The benchmarks use it too, on machines without the packages of the conversion.
"""

import functools

import jax
import jax.numpy as jnp

from aim_jax import ops
from aim_jax.models import AiM, AiMConfig
from aim_jax.sampling.decoder import ModuleDecoder
from aim_jax.sampling.engine import Engine
from aim_jax.sampling.logits import apply_cfg
from aim_jax.sampling.token_loop import make_decoder

MODULES = Engine(form="recurrent", implementation="xla")


@functools.partial(jax.jit, static_argnames=("config", "engine", "platform"))
def teacher_forced_decode(
    params,
    codes,
    labels,
    cfg_scale,
    shift,
    config: AiMConfig,
    engine: Engine = MODULES,
    platform: str = "cpu",
) -> dict:
    """Steps through given codes with guidance; code j takes position row j + shift.

    The decoder is that of `platform`, wherever it runs.

    Returns:
      guided, cond, uncond: logits (b, t, v). conv: the last inputs of the convolutions, oldest
      first, (n_layer, 2 b, channels, w). ssm: states after the last step, (n_layer, 2 b, ...).
    """
    apply = functools.partial(AiM(config).apply, {"params": params})
    null, t = jnp.full_like(labels, config.num_classes), codes.shape[1]
    start, modulation = apply(jnp.concatenate([labels, null]), method="condition")
    rest = apply(jnp.tile(codes[:, :-1], (2, 1)), jnp.arange(t - 1) + shift, method="embed_codes")
    inputs = jnp.concatenate([start, rest], axis=1).swapaxes(0, 1)
    decoder = make_decoder(params, config, engine, platform)

    def step(caches, x_position):
        x, position = x_position
        logits, new = decoder.step(x[:, None], modulation, caches[1], position)
        cond, uncond = jnp.split(logits, 2)
        return (caches[1], new), (apply_cfg(cond, uncond, cfg_scale), cond, uncond)

    caches = decoder.grow(decoder.start(start[:, :0], modulation, 1), t)
    (before, after), logits = jax.lax.scan(step, (caches, caches), (inputs, jnp.arange(t)))
    guided, cond, uncond = (x.swapaxes(0, 1) for x in logits)
    states = (
        module_states(before, after)
        if isinstance(decoder, ModuleDecoder)
        else fused_states(after, t)
    )
    return {"guided": guided, "cond": cond, "uncond": uncond, **states}


def module_states(before, after) -> dict:
    """The convolutions' inputs and the states of all layers, from the caches of the modules."""
    before, after = (jax.tree.map(lambda *x: jnp.stack(x), *caches) for caches in (before, after))
    # A cache holds the last w - 1 inputs; the oldest of the w is the oldest in the cache before.
    windows = [
        jnp.concatenate([old[:, :, :1], new], axis=2).swapaxes(2, 3)
        for name, old, new in zip(after._fields, before, after, strict=True)
        if name.startswith("conv_")
    ]
    state = after.ssm_state
    if isinstance(state, ops.DualCache):
        state = state_of(state.inputs, state.B, state.log_decay)
    return {"conv": jnp.concatenate(windows, axis=2), "ssm": state}


def fused_states(caches, length: int) -> dict:
    """The same from the caches of the fused kernels after `length` tokens."""
    ring, *rest = caches
    conv = jnp.roll(ring, -(length % ring.shape[2]), axis=2).swapaxes(2, 3)
    return {"conv": conv, "ssm": rest[0] if len(rest) == 1 else state_of(*rest)}


def state_of(inputs, B, log_decay) -> jax.Array:
    """The state that a full dual cache stands for, layers first."""
    B = jnp.repeat(B, inputs.shape[3] // B.shape[3], axis=3)
    return jnp.einsum("LbTh,LbThp,LbThn->Lbhpn", jnp.exp(log_decay), inputs, B)
