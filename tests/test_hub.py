# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Models by name, in a Hugging Face cache that the tests lay out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mrv1 import LLM, Engine, ModelRunner, SamplingParams
from mrv1.errors import ConfigError, InvalidArgumentError
from mrv1.hub import find_model, hub_cache
from serving_tools import LLAMA

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
ROOT = Path(__file__).resolve().parent.parent
VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two snapshots of org/tiny, whose files are links to blobs as in a real one."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home" / "hub" / "models--org--tiny"
    blobs = home / "blobs"
    blobs.mkdir(parents=True)
    for commit in (COMMIT, OTHER):
        (home / "snapshots" / commit).mkdir(parents=True)
        for number, source in enumerate(sorted(LLAMA.iterdir())):
            blob = blobs / f"blob{number}"
            blob.write_bytes(source.read_bytes())
            (home / "snapshots" / commit / source.name).symlink_to(f"../../blobs/blob{number}")
    for ref, commit in (("main", COMMIT), ("refs/pr/1", OTHER), ("v1.0", OTHER)):
        (home / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (home / "refs" / ref).write_text(commit)
    return home


def test_revisions(cache: Path) -> None:
    snapshots = cache / "snapshots"
    assert find_model("org/tiny") == snapshots / COMMIT
    assert find_model("org/tiny", "main") == snapshots / COMMIT
    for revision in (OTHER, "v1.0", "refs/pr/1"):
        assert find_model("org/tiny", revision) == snapshots / OTHER


def test_a_path_that_exists_wins(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert find_model("org/tiny") == Path("org/tiny")
    assert find_model(cache / "snapshots" / OTHER) == cache / "snapshots" / OTHER
    # An object that is a path is no name.
    assert find_model(Path("org/other")) == Path("org/other")
    with pytest.raises(InvalidArgumentError, match="revision = 'main'.*None where the model is a"):
        find_model("org/tiny", "main")


@pytest.mark.parametrize(
    "revision", ["", "/", "../main", "a/../../b", "a\0b", 3, b"main", ["main"]], ids=repr
)
def test_what_is_no_revision(cache: Path, revision: Any) -> None:
    assert cache.is_dir()
    with pytest.raises(InvalidArgumentError, match="revision = .*a branch, a tag or a commit"):
        find_model("org/tiny", revision)


def test_errors_say_where_and_what_there_is(cache: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find_model("org/unknown")
    assert str(cache.parent / "models--org--unknown") in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        find_model("org/tiny", "v2")
    message = str(caught.value)
    assert "'v2'" in message and str(cache / "refs" / "v2") in message
    assert f"{COMMIT} (main), {OTHER} (refs/pr/1, v1.0)" in message
    # Half a download: the branch is known, its files are not there.
    (cache / "refs" / "new").write_text("a" * 40)
    with pytest.raises(ConfigError, match=f"there is no .*snapshots/{'a' * 40}"):
        find_model("org/tiny", "new")
    for content in (b"", b"\xff", b"../..", b"x" * 5000):
        (cache / "refs" / "bad").write_bytes(content)
        with pytest.raises(ConfigError):
            find_model("org/tiny", "bad")
    (cache.parent / "models--bare" / "refs").mkdir(parents=True)
    with pytest.raises(ConfigError, match="snapshots there are: none"):
        find_model("bare")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub_cache() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert hub_cache() == Path("/xdg/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "~/home")
    assert hub_cache() == tmp_path / "home" / "hub"
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", "$HOME/old")
    assert hub_cache() == tmp_path / "old"
    monkeypatch.setenv("HF_HUB_CACHE", "/cache")
    assert hub_cache() == Path("/cache")
    monkeypatch.setenv("HF_HUB_CACHE", "")
    assert hub_cache() == tmp_path / "old"


def test_every_way_in_takes_a_name(cache: Path, device: str) -> None:
    options: dict[str, Any] = {
        "device": device,
        "dtype": "float32",
        "num_kv_blocks": 16,
        "num_threads": 1,
    }
    params = SamplingParams(temperature=0, max_tokens=4)
    with LLM(LLAMA, **options) as llm:
        expected = llm.generate("abc", params)[0].token_ids
    with LLM("org/tiny", revision="v1.0", **options) as llm:
        assert llm.generate("abc", params)[0].token_ids == expected
    with Engine("org/tiny", revision=OTHER, **options) as engine:
        assert engine.tokenizer.encode("abc")
    with ModelRunner("org/tiny", **options) as runner:
        assert runner.model.max_model_len > 0
    for kind in (LLM, Engine, ModelRunner):
        with pytest.raises(ConfigError, match="'v2'.*snapshots there are"):
            kind("org/tiny", revision="v2", **options)
    command = [sys.executable, "-m", "mrv1", "generate", "--model", "org/tiny", "--device", device]
    given = ["--temperature", "0", "--max-tokens", "4", "abc"]
    done = subprocess.run(
        [*command, "--revision", "v1.0", *given],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    failed = subprocess.run(
        [*command, "--revision", "v2", *given],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert failed.returncode == 1 and "snapshots there are" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert cache.is_dir()
