"""dvc.yaml and the imports agree: a stage depends on the code that it imports and lists the params that it loads."""

import ast
import importlib
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from miniature import committed

TOP = Path(__file__).parents[1]
STAGES = yaml.safe_load((TOP / "dvc.yaml").read_text())["stages"]
PROFILES = sorted(path.parent for path in TOP.glob("profiles/*/params.yaml"))
# They find and word problems in a file that is then refused, so they cannot change a result: a better message retrains
# nothing.
EXEMPT = {"stages.params.messages", "stages.params.rules"}
TORCH = {"torch", "torchvision", "timm"}  # seconds to import
in_git = pytest.mark.skipif(not (TOP / ".git").exists(), reason="needs a git checkout")


def definition(stage: str) -> dict:
    return STAGES[stage].get("do", STAGES[stage])


def module_of(stage: str) -> str:
    return f"stages.{stage.replace('-', '_')}"


def file_of(module: str) -> Path:
    path = TOP / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def nodes(tree: ast.AST, at_startup: bool) -> Iterator[ast.AST]:
    """All nodes, or only those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if not (at_startup and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            yield node
            yield from nodes(node, at_startup)


@cache
def imports(module: str, at_startup: bool = False) -> frozenset[str]:
    """The names that one module imports, with `from a import b` as both `a` and `a.b`."""
    found = set()
    for node in nodes(ast.parse(file_of(module).read_text()), at_startup):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide what is reached"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def own(names: frozenset[str]) -> set[str]:
    """The project's modules among some names, without attributes of modules."""
    return {name for name in names if name.startswith("stages.") and file_of(name).exists()}


def reached(module: str, at_startup: bool = False) -> set[str]:
    todo, seen = [module], set()
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += own(imports(name, at_startup)) - EXEMPT
    return seen


def dependency(module: str) -> str:
    """A stage's script and a module of params are dependencies as files; all other code as folders."""
    _, folder, *rest = module.split(".")
    if (folder == "params" and rest) or not (TOP / "stages" / folder).is_dir():
        return str(file_of(module).relative_to(TOP))
    return f"stages/{folder}"


def modules_in(*folders: str) -> list[str]:
    paths = [path for folder in folders for path in sorted((TOP / folder).rglob("*.py"))]
    return [".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__") for path in paths]


def test_there_are_exactly_the_seven_stages():
    assert list(STAGES) == ["download", "finetune", "prune", "quantize", "profile", "edge-benchmark", "report"]
    assert {path.stem for path in (TOP / "stages").glob("*.py")} == {"__init__", "cli"} | {
        stage.replace("-", "_") for stage in STAGES
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_it_reaches_and_on_no_other(stage):
    assert definition(stage)["cmd"].removesuffix(" ${key}") == f"python -m {module_of(stage)}"
    listed = [dep for dep in definition(stage)["deps"] if dep.startswith("stages/")]
    expected = {dependency(module) for module in reached(module_of(stage))} - {"stages/params"}
    assert listed == [f"{module_of(stage).replace('.', '/')}.py", *sorted(expected - {listed[0]})]


@in_git
def test_committed_locks_hold_exactly_the_stages_that_their_params_make():
    listed = ["git", "ls-files", "dvc.lock", "profiles/*/dvc.lock"]
    locks = subprocess.run(listed, cwd=TOP, capture_output=True, text=True, check=True).stdout.split()
    assert "dvc.lock" in locks
    for lock in locks:
        params = yaml.safe_load(committed(lock.replace("dvc.lock", "params.yaml")))
        expected: set[str] = set()
        for name, stage in STAGES.items():
            keys = params[stage["foreach"].strip("${}")] if "foreach" in stage else ()
            expected |= {f"{name}@{key}" for key in keys} or {name}
        assert set(yaml.safe_load(committed(lock))["stages"]) == expected, lock


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_lists_the_params_sections_that_it_loads(stage):
    loaded = importlib.import_module(module_of(stage)).Params.model_fields
    assert {name.split(".")[0] for name in definition(stage)["params"]} == set(loaded)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_lists_one_key_of_the_report_cannot_read_another(stage):
    """So that a new key of the report retrains nothing."""
    listed = [name for name in definition(stage)["params"] if name.split(".")[0] == "report"]
    if listed and listed != ["report"]:
        fields = importlib.import_module(module_of(stage)).Params.model_fields["report"].annotation.model_fields
        assert listed == [f"report.{key}" for key in fields]


def test_no_folder_imports_a_stage_and_domain_folders_stand_side_by_side():
    ground = {"common", "networks", "params"}
    lower = ground | {"artifacts", "export", "datasets"}
    allowed = {
        "common": {"common"},
        "networks": ground,
        "params": ground,
        "artifacts": ground | {"artifacts"},
        "export": ground | {"export"},
        "datasets": {"common", "params", "datasets"},
        "training": lower | {"training"},
        "pruning": lower | {"training", "pruning"},  # pruners train
        "quantization": lower | {"training", "quantization"},  # some quantizers train
    }
    for folder in (path.name for path in (TOP / "stages").iterdir() if path.is_dir()):
        for module in modules_in(f"stages/{folder}"):
            known = {name.split(".")[1] for name in own(imports(module))}
            if module == "stages.params.check":  # a command, which no stage imports
                known -= {"artifacts"}
            assert known <= allowed.get(folder, lower | {folder}), f"{module} imports {known}"


def test_stages_know_neither_studies_nor_benchmarks_and_studies_only_the_report():
    for module in modules_in("stages"):
        assert not {name.split(".")[0] for name in imports(module)} & {"studies", "benchmarks"}, module
    for module in modules_in("studies"):
        known = {name.split(".")[1] for name in own(imports(module))}
        assert known <= {"common", "params", "reporting"}, f"{module} imports {known}"


@pytest.mark.parametrize("module", ["stages.report", "stages.cli", *modules_in("stages/reporting")])
def test_the_report_and_the_command_start_without_torch(module):
    for name in reached(module, at_startup=True):
        assert not {imported.split(".")[0] for imported in imports(name, at_startup=True)} & TORCH, name


def test_packages_hold_no_code_of_their_own():
    for path in (TOP / "stages").glob("**/__init__.py"):
        (docstring,) = ast.parse(path.read_text()).body
        assert isinstance(docstring.value, ast.Constant), path


@pytest.mark.parametrize("profile", PROFILES, ids=lambda folder: folder.name)
def test_a_profile_is_a_dvc_repository_with_the_one_pipeline_code_and_cache(profile):
    copy = profile / "dvc.yaml"
    assert not copy.is_symlink()  # DVC does not follow links in committed revisions, and then compares nothing
    assert copy.read_text() == (TOP / "dvc.yaml").read_text(), "cp dvc.yaml profiles/<name>/"
    # With the link, dependencies lie inside the sub-repository, whose .dvcignore leaves out __pycache__
    assert (profile / "stages").readlink() == Path("../../stages")
    assert "__pycache__/" in (profile / ".dvcignore").read_text().split()
    assert "dir = ../../../.dvc/cache" in (profile / ".dvc/config").read_text()


@in_git
@pytest.mark.parametrize(
    "folder",
    [
        *("dvc_plots", "profiles/mine/dvc_plots", "profiles/mine/reports/edge", "profiles/mine/data/images"),
        *("profiles/mine/models/dense/a", "profiles/mine/models/pruned/a", "profiles/mine/models/compressed/a"),
    ],
)
def test_git_ignores_the_outputs_of_dvc(folder):
    assert subprocess.run(["git", "check-ignore", "-q", f"{folder}/index.html"], cwd=TOP).returncode == 0


@in_git
def test_git_tracks_no_data_no_weights_and_no_large_file():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=TOP, capture_output=True, text=True, check=True).stdout
    paths = [TOP / name for name in tracked.split("\0") if name]
    assert paths
    assert not [path for path in paths if path.suffix in (".npy", ".safetensors", ".onnx")]
    assert not [path for path in paths if path.is_file() and path.stat().st_size > 1_000_000]
