"""Where compiled code is kept, of users and of these tests."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from jaxengine.base import compiled_code, machine

# What a process compiled itself: JAX announces each program that it does not find in its cache.
ONE_CALL = """
import jax, sys
from jaxengine import LLM, SamplingParams
missed = []
jax.monitoring.register_event_listener(lambda name, **_: missed.append(name) if name.endswith("cache_misses") else None)
llm = LLM("calc", progress=False, max_model_len=64, max_num_seqs=2, num_pages=8, compilation_cache={keep})
(output,) = llm.generate("1+1=", SamplingParams(max_tokens=2, seed=1))
print(len(missed), output.outputs[0].token_ids, output.outputs[0].token_logprobs.tobytes().hex())
print(jax.config.jax_compilation_cache_dir, file=sys.stderr)
"""


def test_what_takes_a_moment_to_compile_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ["jax_compilation_cache_dir", "jax_compilation_cache_max_size"]
    names += ["jax_persistent_cache_min_compile_time_secs"]
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", compiled_code.DEFAULT_SECONDS)
    try:
        assert compiled_code.keep() == Path(jax.config.jax_compilation_cache_dir)
        assert jax.config.jax_persistent_cache_min_compile_time_secs == compiled_code.LEAST_SECONDS
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_a_folder_that_the_caller_chose_stays(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        assert compiled_code.keep() is None and jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_another_processor_or_other_flags_have_another_folder(monkeypatch):
    here = compiled_code._key()
    assert here == compiled_code._key() and here.startswith("jaxlib-")
    with monkeypatch.context() as patched:
        patched.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
        assert compiled_code._key() != here
    with monkeypatch.context() as patched:
        patched.setattr(machine, "num_threads", lambda: 77)
        assert compiled_code._key() != here
    monkeypatch.setattr(machine, "_cpu_info", lambda: {"flags": "avx"})
    assert compiled_code._key() != here


def test_folders_that_nothing_used_for_long_are_removed(tmp_path):
    for name, age in (("old", compiled_code.KEPT_SECONDS + 60), ("recent", 60)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    compiled_code._claimed(tmp_path / "now")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["now", "recent"]


def test_without_a_place_to_write_everything_is_compiled(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert compiled_code.keep() is None and "not kept" in caplog.text and not jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.slow
def test_a_second_process_compiles_no_step(tmp_path):
    """Two at once do each other no harm; the bits are those of a process that keeps nothing.

    Here all is kept: on a fast machine much of a small model compiles in less than LEAST_SECONDS.
    """

    def run(keep: bool = True) -> tuple[int, str, str]:
        env = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
        env |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONWARNINGS": "error::UserWarning"}
        env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        done = subprocess.run(
            [sys.executable, "-c", ONE_CALL.format(keep=keep)], env=env, capture_output=True, text=True, check=True
        )
        count, answer = done.stdout.split(" ", 1)
        return int(count), answer, done.stderr

    with ThreadPoolExecutor() as threads:
        (first, expected, folder), (second, beside, _) = threads.map(run, (True, True))
    again, answer, _ = run()
    assert first + second > 0 == again and str(tmp_path) in folder
    fresh, alone, none = run(keep=False)
    assert none.strip().endswith("None") and fresh == 0 and {expected, beside, answer, alone} == {expected}
