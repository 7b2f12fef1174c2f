"""The import direction is downwards only, and `import mfm_ray` stays light: the promises of the library's layout."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Layer 0 is the paper: torch and layer 0. Layer 2 knows clusters. Layer 3 are entry points. All else is layer 1.
LAYER_0_PACKAGES = ("mfm_ray.objectives", "mfm_ray.steering")
LAYER_0_MODULES = {
    "mfm_ray.data_space",
    "mfm_ray.decoding",
    "mfm_ray.errors",
    "mfm_ray.interpolants",
    "mfm_ray.noise",
    "mfm_ray.dynamics",
    "mfm_ray.flow_map",
    "mfm_ray.glass",
    "mfm_ray.tangents",
    "mfm_ray.values",
    "mfm_ray.padding",
    "mfm_ray.presets",
    "mfm_ray.samplers",
}
LAYER_2 = ("mfm_ray.training", "mfm_ray.tuning", "mfm_ray.config", "mfm_ray.conf")
LAYER_3 = ("jobs", "serve")
CLUSTER = {"ray", "deepspeed", "hydra", "omegaconf"}
HEAVY = sorted(CLUSTER | {"pyarrow", "sklearn", "matplotlib", "tensorboard", "pandas", "scipy"})

# The one door to each library that shapes everything it touches.
ONLY_IMPORTERS = {
    "peft": {"mfm_ray.finetuning.adapters"},
    "deepspeed": {"mfm_ray.training.zero", "mfm_ray.training.comm_op"},
    "hydra": {"mfm_ray.config", "jobs.contract", "jobs.command_line"},
    "omegaconf": {"mfm_ray.config", "jobs.contract", "jobs.command_line"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for package in ("mfm_ray", "jobs", "serve")
    for path in sorted((ROOT / package).rglob("*.py"))
}


LAYER_0 = LAYER_0_MODULES | {
    name for name in SOURCES if name in LAYER_0_PACKAGES or name.startswith(tuple(f"{p}." for p in LAYER_0_PACKAGES))
}


def imports(path: Path, *, inside_functions: bool = True) -> Iterator[str]:
    """Dotted names of everything that the file imports, `from package import module` resolved to the module."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                ancestors = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*ancestors, *([node.module] if node.module else [])])
            submodules = [f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in SOURCES]
            yield from submodules
            if len(submodules) < len(node.names):
                yield base
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending.extend(ast.iter_child_nodes(node))


def top_level(name: str) -> str:
    return name.partition(".")[0]


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def layer(name: str) -> int:
    if name in LAYER_0:
        return 0
    if within(name, LAYER_3):
        return 3
    return 2 if within(name, LAYER_2) else 1


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh process after the statement."""
    code = f"{statement}\nimport sys\nprint(' '.join(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_library_loads_neither_a_cluster_nor_a_data_library():
    loaded = loaded_by("import mfm_ray")
    assert "torch" in loaded
    assert loaded & set(HEAVY) == set()


@pytest.mark.parametrize("name", sorted(LAYER_0 & set(SOURCES)))
def test_layer_0_imports_torch_and_layer_0_alone(name):
    allowed = sys.stdlib_module_names | {"torch"}
    foreign = {n for n in imports(SOURCES[name]) if top_level(n) not in allowed and n not in LAYER_0}
    assert foreign == set()


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_point_downwards(name):
    # the package itself gathers the public names of the layers that need no cluster
    own = 1 if name == "mfm_ray" else layer(name)
    upwards = {n for n in imports(SOURCES[name]) if top_level(n) in ("mfm_ray", "jobs", "serve") and layer(n) > own}
    assert upwards == set()


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if layer(n) <= 1))
def test_the_layers_below_training_know_no_cluster(name):
    assert {n for n in imports(SOURCES[name]) if top_level(n) in CLUSTER} == set()


@pytest.mark.parametrize(("library", "doors"), ONLY_IMPORTERS.items())
def test_one_door_to_each_framework(library, doors):
    importers = {name for name, path in SOURCES.items() if library in {top_level(n) for n in imports(path)}}
    assert importers <= doors


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if within(n, ("mfm_ray.training",))))
def test_training_modules_import_without_deepspeed(name):
    """The driver's pure functions (batch split, ZeRO settings) serve a machine that trains nothing."""
    at_import = {top_level(n) for n in imports(SOURCES[name], inside_functions=False)}
    assert "deepspeed" not in at_import
