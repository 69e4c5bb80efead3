"""What is built for users: the wheel and the source distribution hold the whole library."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FILES = ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
PROGRAM = """
import pathlib
import jax.numpy as jnp
import memcache_jax as mc
from memcache_jax.kernels import bank_read
for module in (mc, bank_read):
    print(pathlib.Path(module.__file__).absolute())
x = jnp.ones((1, 5, 1, 4))
y = mc.memory_caching(x, x, x, x, memory=mc.memories.LinearAttention(), aggregation=mc.GRM(),
                      segmentation=mc.Constant(2))
print(y.shape)
"""

LAYER_ALONE = """
import builtins, importlib, pkgutil

real = builtins.__import__
needed = {"absl", "grain", "matplotlib", "ml_collections", "optax", "orbax", "tqdm"}
needed |= {"aiohttp", "jinja2"}
with_extras = ("memcache_jax.training", "memcache_jax.serving.http")

def without_extra(name, names=None, *rest):
    ours = (names or {}).get("__name__", "").startswith("memcache_jax")
    if ours and name.split(".")[0] in needed:  # Flax has some of them
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
    return real(name, names, *rest)

builtins.__import__ = without_extra
import jax, jax.numpy as jnp
import memcache_jax as mc
from flax import nnx

for module in pkgutil.walk_packages(mc.__path__, "memcache_jax.", onerror=lambda name: None):
    if not module.name.startswith(with_extras):
        importlib.import_module(module.name)
config = mc.nn.LanguageModelConfig(vocab_size=9, num_layers=1, features=8, num_heads=2)
model = mc.nn.LanguageModel(config, rngs=nnx.Rngs(0))
print(mc.generate(model, jnp.array([[1, 2]]), max_new_tokens=5, temperature=0).shape)
try:
    import memcache_jax.training
except ModuleNotFoundError as e:
    print(e)
"""


def run(*command, cwd, **environment):
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel, the source distribution, and the wheel made of the latter."""
    source = tmp_path_factory.mktemp("source")
    for name in ("memcache_jax", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--wheel", "--outdir=direct", ".", cwd=source)
    run(*build, "--outdir=dist", ".", cwd=source)  # the source distribution, and a wheel from it
    return source


def wheel_files(folder):
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_has_every_file_and_nothing_else(built):
    files = wheel_files(built / "direct")
    expected = {"memcache_jax/py.typed": (ROOT / "memcache_jax/py.typed").read_bytes()}
    for folder, _, names in os.walk(ROOT / "memcache_jax", followlinks=True):
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            expected[path.relative_to(ROOT).as_posix()] = path.read_bytes()
    assert {k: v for k, v in files.items() if ".dist-info/" not in k} == expected
    assert "memcache_jax/kernels/bank_read/api.py" in expected


def test_a_copy_without_the_link_makes_the_same_wheel(built, tmp_path):
    for name in ("memcache_jax", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "memcache_jax/kernels").unlink()
    (tmp_path / "memcache_jax/kernels").write_text("../kernels")  # as zip and Windows have it
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--wheel", "--outdir=dist", ".", cwd=tmp_path)
    assert wheel_files(tmp_path / "dist") == wheel_files(built / "direct")


def test_the_source_distribution_makes_the_same_wheel(built):
    direct, through = wheel_files(built / "direct"), wheel_files(built / "dist")
    assert {k for k in direct if not k.endswith("RECORD")} == {
        k for k in through if not k.endswith("RECORD")
    }
    (archive,) = (built / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        assert all(member.isfile() or member.isdir() for member in files)


def test_metadata(built):
    files = wheel_files(built / "direct")
    (metadata,) = (v for k, v in files.items() if k.endswith("/METADATA"))
    fields = Parser().parsestr(metadata.decode())
    assert fields["Name"] == "memcache_jax"
    assert fields["Requires-Python"] == ">=3.11"
    assert fields["License-Expression"] == "Apache-2.0"
    extras = {"tpu", "cuda12", "cuda13", "train", "data", "eval", "pretrained", "tensorboard"}
    extras |= {"serve", "test", "dev", "docs"}
    assert set(fields.get_all("Provides-Extra") or ()) == extras
    assert any(k.endswith("licenses/LICENSE") for k in files)


def test_the_layer_alone_needs_four_packages(built):
    (metadata,) = (v for k, v in wheel_files(built / "direct").items() if k.endswith("/METADATA"))
    required = Parser().parsestr(metadata.decode()).get_all("Requires-Dist") or ()
    always = {name for name in required if "extra ==" not in name}
    assert always == {"jax>=0.10", "flax>=0.12.7", "jaxtyping", "numpy"}


def test_only_training_imports_what_training_needs():
    out = run(sys.executable, "-c", LAYER_ALONE, cwd=ROOT, PYTHONPATH="").splitlines()
    shape, message = out
    assert shape == "(1, 7)"
    assert re.fullmatch(
        r"memcache_jax.training needs \w+: pip install '\.\[train\]' in a checkout of memcache_jax",
        message,
    )


def test_the_wheel_works_without_the_repository(built, tmp_path):
    (wheel,) = (built / "direct").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    out = run(sys.executable, "-c", PROGRAM, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    package, kernel, shape = out.splitlines()
    assert package == str(tmp_path / "site" / "memcache_jax" / "__init__.py")
    assert kernel == str(tmp_path / "site/memcache_jax/kernels/bank_read/__init__.py")
    assert shape == "(1, 5, 1, 4)"


def test_the_repository_works_uninstalled():
    package, kernel, shape = run(
        sys.executable, "-c", PROGRAM, cwd=ROOT, PYTHONPATH=""
    ).splitlines()
    assert package == str(ROOT / "memcache_jax" / "__init__.py")
    assert kernel == str(ROOT / "memcache_jax/kernels/bank_read/__init__.py")
    assert shape == "(1, 5, 1, 4)"
