"""JAX's persistent compilation cache."""

import jax

from aim_jax.utils.cache import cache_directory


def keep_compiled_programs() -> None:
    """Enable JAX's persistent compilation cache, so that a second process compiles little.

    Programs that take over half a second to compile are stored in `cache_directory`, which only the
    user can write, because they are code that runs. JAX_COMPILATION_CACHE_DIR sets another
    directory, which is not checked, and JAX_ENABLE_COMPILATION_CACHE=0 disables the cache. All
    programs of this library call this function.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_directory("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
