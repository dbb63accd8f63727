"""dvc.yaml tells the truth: what a stage imports is what it depends on, and the params it reads are those it lists."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

TOP = Path(__file__).parents[1]
STAGES = yaml.safe_load((TOP / "dvc.yaml").read_text())["stages"]
# What a method of Params reads, so that calling it needs these sections in the stage's params.
METHODS = {
    "seed_of": {"base", "models"},
    "model_of": {"variants", "pruned"},
    "pruner_of": {"variants", "pruned"},
    "baseline_of": {"variants", "pruned"},
    "pruning_benchmarks": {"root"},
}


def definition(stage: str) -> dict:
    return STAGES[stage].get("do", STAGES[stage])


def module_of(stage: str) -> str:
    return re.fullmatch(r"PYTHONPATH=\$\{root\} python -m (stages\.\w+)( \$\{key\})?", definition(stage)["cmd"])[1]


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of `stages` that one module imports, wherever in the file, packages' own `__init__` aside."""
    found = set()
    for node in ast.walk(ast.parse(file_of(module).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide what is reached"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    if module == "stages.common.params":  # its check of the models names problems and changes no stage's result
        found -= {"stages.networks.architectures", "stages.networks"}
    return frozenset(name for name in found if name.startswith("stages.") and file_of(name).exists())


def file_of(module: str) -> Path:
    path = TOP / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def reached(module: str) -> set[str]:
    todo, seen = [module], set()
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += imports(name)
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_it_reaches_and_on_no_other(stage):
    module = module_of(stage)
    assert module == f"stages.{stage.replace('-', '_')}"
    folders = {name.split(".")[1] for name in reached(module)} - {module.split(".")[1]}
    expected = {f"${{root}}/stages/{module.split('.')[1]}.py"} | {f"${{root}}/stages/{folder}" for folder in folders}
    assert {dep for dep in definition(stage)["deps"] if "/stages/" in dep} == expected


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_lists_the_params_that_it_reads(stage):
    own = module_of(stage)
    rooms = {name for name in reached(own) if name != "stages.common.params"}
    read = set()
    for module in rooms:
        for node in ast.walk(ast.parse(file_of(module).read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value
                if (
                    getattr(owner, "id", None) == "params" or getattr(owner, "attr", None) == "params"
                ):  # params.x, self.params.x
                    read |= METHODS.get(node.attr, {node.attr})
    listed = {name.split(".")[0] for name in definition(stage)["params"]}
    assert read == listed


def test_there_are_exactly_the_seven_stages():
    assert list(STAGES) == ["download", "finetune", "prune", "quantize", "profile", "edge-benchmark", "report"]
    scripts = {path.stem for path in (TOP / "stages").glob("*.py")} - {"__init__"}
    assert scripts == {stage.replace("-", "_") for stage in STAGES}


def test_no_folder_imports_a_stage_and_domain_folders_stand_side_by_side():
    ground = {"common", "networks"}
    lower = ground | {"artifacts", "export", "datasets"}
    allowed = {
        "common": {"common"},
        "networks": ground,
        "artifacts": ground | {"artifacts"},
        "export": ground | {"export"},
        "datasets": {"common", "datasets"},
        "training": lower | {"training"},
        "pruning": lower | {"training", "pruning"},  # pruners train
        "quantization": lower | {"training", "quantization"},  # some quantizers train
    }
    for path in (TOP / "stages").glob("*/**/*.py"):
        room = path.relative_to(TOP / "stages").parts[0]
        module = ".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__")
        known = {name.split(".")[1] for name in imports(module)}
        assert known <= allowed.get(room, lower | {room}), f"{path.name} in {room} imports {known}"


def test_the_report_never_reaches_torch():
    for module in reached("stages.report"):
        for node in ast.walk(ast.parse(file_of(module).read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            assert not {str(name).split(".")[0] for name in names} & {"torch", "torchvision", "timm"}


def test_packages_hold_no_code_of_their_own():
    for path in (TOP / "stages").glob("**/__init__.py"):
        (docstring,) = ast.parse(path.read_text()).body
        assert isinstance(docstring.value, ast.Constant), path


@pytest.mark.parametrize("copy", sorted(TOP.glob("profiles/*/dvc.yaml")), ids=lambda p: p.parent.name)
def test_every_profile_runs_the_one_pipeline_from_its_own_folder(copy):
    assert not copy.is_symlink()  # DVC does not follow links in committed revisions, and then compares nothing
    assert copy.read_text() == (TOP / "dvc.yaml").read_text(), "cp dvc.yaml profiles/<name>/"
    assert yaml.safe_load((copy.parent / "params.yaml").read_text())["root"] == "../.."


@pytest.mark.parametrize(
    "folder",
    [
        *("dvc_plots", "profiles/mine/dvc_plots", "profiles/mine/reports/edge", "profiles/mine/data/images"),
        *("profiles/mine/models/dense/a", "profiles/mine/models/pruned/a", "profiles/mine/models/compressed/a"),
    ],
)
def test_what_dvc_writes_and_git_must_not_track_is_ignored(folder):
    assert subprocess.run(["git", "check-ignore", "-q", f"{folder}/index.html"], cwd=TOP).returncode == 0


def test_git_tracks_no_data_no_weights_and_no_large_file():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=TOP, capture_output=True, text=True, check=True).stdout
    paths = [TOP / name for name in tracked.split("\0") if name]
    assert paths
    assert not [path for path in paths if path.suffix in (".npy", ".safetensors", ".onnx")]
    assert not [path for path in paths if path.is_file() and path.stat().st_size > 1_000_000]
