"""Where tests keep compiled code."""

import os
import time

import compilation_cache
import jax


def test_a_folder_that_the_caller_chose_stays(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    compilation_cache.share_compiled_code()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path) and jax.config.jax_compilation_cache_dir == before


def test_another_processor_or_other_flags_have_another_folder(monkeypatch):
    here = compilation_cache.key()
    assert here == compilation_cache.key() and here.startswith("jaxlib-")
    with monkeypatch.context() as patched:
        patched.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
        assert compilation_cache.key() != here
    monkeypatch.setattr(compilation_cache, "processor", lambda: ["flags: avx"])
    assert compilation_cache.key() != here


def test_folders_that_nothing_used_for_long_are_removed(tmp_path):
    for name, age in (("old", compilation_cache.KEPT_SECONDS + 60), ("recent", 60)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    compilation_cache.claimed(tmp_path / "now")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["now", "recent"]
