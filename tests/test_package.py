"""What is built and installed is what the checkout holds, and importing it is cheap and silent."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Everything that a build reads; a copy of it is built, so that the checkout stays as it is.
BUILD_INPUTS = ("fastprob", "kernels", "pyproject.toml", "README.md", "LICENSE")
LONGEST_IMPORT = 0.1  # seconds of CPU, over `import tensordict`


def run_python(code: str, *, cwd: Path, path: Path) -> str:
    """Runs `code` in a fresh interpreter that sees fastprob nowhere but under `path`."""
    lines = [
        "import sys",
        # An editable install of the checkout in this environment must not lend its files.
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]",
        "sys.path[:] = [p for p in sys.path if 'editable' not in p]",
        f"sys.path.insert(0, {str(path)!r})",
        code,
    ]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(lines)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """Builds a `wheel` or an `sdist` of the tree at `source` with the backend that pip calls."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


def copy_tree(target: Path) -> Path:
    for name in BUILD_INPUTS:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target / name, ignore=ignore)
        else:
            shutil.copy(source, target / name)
    return target


def names_in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def expected_names() -> set[str]:
    """Names in a wheel of all that the checkout has to ship."""
    names = {f"kernels/{p.relative_to(ROOT / 'kernels')}" for p in (ROOT / "kernels").rglob("*.py")}
    names |= {f"{p.relative_to(ROOT / 'fastprob')}" for p in (ROOT / "fastprob").rglob("*.py")}
    names |= {"py.typed", "kernels/README.md"}
    return {f"fastprob/{name}" for name in names}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the checkout with one kernel module more, which is there before any real one."""
    copied = copy_tree(tmp_path_factory.mktemp("tree"))
    (copied / "kernels" / "_probe.py").write_text("ANSWER = 42\n", "utf-8")
    return copied


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel unpacked as an installer would; it is pure Python."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_wheel_holds_every_module_and_nothing_else(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert names_in_wheel(wheel) == expected_names() | {"fastprob/kernels/_probe.py"}


def test_wheel_holds_no_tests_no_benchmark_and_no_package_kernels(wheel):
    assert {name.split("/")[0] for name in names_in_wheel(wheel)} == {"fastprob"}
    assert "fastprob/kernels/__init__.py" not in names_in_wheel(wheel)


def test_a_package_left_out_of_the_list_is_noticed(tree, tmp_path):
    """Shows that the comparison of file lists can fail."""
    shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    settings = tmp_path / "tree" / "pyproject.toml"
    shortened = settings.read_text("utf-8").replace('    "fastprob.ops",\n', "")
    assert shortened != settings.read_text("utf-8")
    settings.write_text(shortened, "utf-8")
    names = names_in_wheel(build("wheel", tmp_path / "tree", tmp_path / "out"))
    assert "fastprob/ops/__init__.py" in expected_names() - names


def test_wheel_from_sdist_holds_the_same(wheel, tree, tmp_path):
    sdist = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(tmp_path, filter="data")
        else:  # Python 3.10 before 3.10.12
            archive.extractall(tmp_path)
    again = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "wheel")
    assert names_in_wheel(again) == names_in_wheel(wheel)


def test_installed_copy_imports_outside_the_checkout(installed, tmp_path):
    code = """
        import json, importlib.metadata
        import fastprob, fastprob.distributions, fastprob.ops, fastprob.reference
        import fastprob.kernels._probe as probe
        files = [fastprob.__file__, probe.__file__, *fastprob.__path__]
        print(json.dumps([files, probe.ANSWER, fastprob.__version__]))
    """
    files, answer, version = json.loads(
        run_python(textwrap.dedent(code), cwd=tmp_path, path=installed)
    )
    assert all(Path(file).is_relative_to(installed / "fastprob") for file in files)
    assert answer == 42
    metadata = next(installed.glob("*.dist-info/METADATA")).read_text("utf-8")
    assert f"\nVersion: {version}\n" in metadata


def test_source_checkout_finds_its_kernels(tree, tmp_path):
    code = "import fastprob.kernels._probe as probe; print(probe.__file__)"
    assert Path(run_python(code, cwd=tmp_path, path=tree).strip()) == tree / "kernels/_probe.py"


def test_installed_copy_without_kernels_takes_no_other_package_of_that_name(installed, tmp_path):
    shutil.copytree(installed / "fastprob", tmp_path / "fastprob")
    shutil.rmtree(tmp_path / "fastprob" / "kernels")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("", "utf-8")
    code = """
        import importlib, fastprob
        assert len(fastprob.__path__) == 1, fastprob.__path__
        try:
            found = importlib.import_module("fastprob.kernels")
        except ModuleNotFoundError:
            print("none")
        else:
            print(found.__path__)
    """
    (tmp_path / "cwd").mkdir()
    found = run_python(textwrap.dedent(code), cwd=tmp_path / "cwd", path=tmp_path)
    assert found.strip() == "none"


def test_import_brings_neither_torchrl_nor_triton(installed, tmp_path):
    # tensordict and torch may import triton themselves; what they bring is not fastprob's doing.
    code = """
        import json, tensordict, tensordict.nn
        before = set(sys.modules)
        import fastprob
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        print(json.dumps(sorted(new)))
    """
    new = json.loads(run_python(textwrap.dedent(code), cwd=tmp_path, path=installed))
    assert "fastprob" in new
    assert not {"torchrl", "triton", "gymnasium", "scipy", "kernels"} & set(new)


def test_import_touches_no_global_of_torch(installed, tmp_path):
    code = """
        import json, os, warnings, tensordict, tensordict.nn, torch
        from tensordict.nn.probabilistic import interaction_type
        from torch.distributions import Distribution

        def globals_of_torch():
            return {
                "default dtype": str(torch.get_default_dtype()),
                "default device": str(torch.get_default_device()),
                "validate_args": Distribution._validate_args,
                "random state": torch.random.get_rng_state().tolist(),
                "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
                "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "matmul": torch.get_float32_matmul_precision(),
                "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
                "cuda": torch.cuda.is_initialized(),
                "interaction": str(interaction_type()),
                "environment": dict(os.environ),
                "warning filters": [str(entry) for entry in warnings.filters],
            }

        torch.manual_seed(3)
        before = globals_of_torch()
        import fastprob
        after = globals_of_torch()
        print(json.dumps([key for key in before if before[key] != after[key]]))
    """
    assert json.loads(run_python(textwrap.dedent(code), cwd=tmp_path, path=installed)) == []


def test_import_takes_little_over_tensordict(installed, tmp_path, monkeypatch):
    # An installed package has byte code: the first run writes it, the next one reads it. Compiling
    # the sources takes twice as long as all the rest.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    code = """
        import time, tensordict
        began = time.process_time()
        import fastprob
        print(time.process_time() - began)
    """
    # The best of several: with other work on the machine, one run measures that work.
    seconds = []
    while len(seconds) < 5 and min(seconds, default=1.0) > LONGEST_IMPORT:
        out = run_python(textwrap.dedent(code), cwd=tmp_path, path=installed)
        seconds.append(float(out))
    assert min(seconds) <= LONGEST_IMPORT, seconds
