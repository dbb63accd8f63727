"""Write `docs/parameters.md` from the fields of the sections and their docstrings.

Run: python -m stages.params.document
"""

import ast
import inspect
import itertools
import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic_core import PydanticUndefined

from stages.common.errors import run_stage
from stages.common.files import write_text
from stages.params import edge_benchmark, finetune, pruners, quantizers, variants
from stages.params.base import Base
from stages.params.data import Data
from stages.params.export import Export
from stages.params.models import Model
from stages.params.profile import Profile
from stages.params.report import Report
from stages.params.section import Section

PAGE = Path("docs/parameters.md")
INTRODUCTION = """\
# Parameters

All settings are in `params.yaml`, one section for each part of the pipeline. Each stage checks the sections that it
reads and refuses unknown keys, wrong types and impossible values before its work; `edgewise check` checks the whole
file. A key that would do nothing beside another setting is refused too. `python -m stages.params.document` writes this
page from `stages/params/`, and a test compares it.
"""
CHAPTERS: list[tuple[str, str, list[type[Section]]]] = [
    ("base", "What all stages share.", [Base]),
    ("data", "Where the images come from and how they are stored.", [Data]),
    ("finetune", "The training recipe, which pruning and quantization use too.", [finetune.Finetune]),
    (
        "finetune.progressive_resize",
        "Smaller images in the first part of a training from random weights.",
        [finetune.ProgressiveResize],
    ),
    (
        "finetune.pretrained",
        "Settings for models with `weights`, whose tensors need fewer and smaller steps than random ones.",
        [finetune.Pretrained],
    ),
    ("models.<name>", "The networks that are fine-tuned.", [Model]),
    (
        "pruners.<name>",
        "How a network is made smaller, or trained on without pruning. `method` selects the pruner.",
        list(get_args(get_args(pruners.Pruner)[0])),
    ),
    (
        "pruners.<name>.importance",
        "Weights of the importance scores of `oto`. A score that is not named has weight 0; without the key, each of"
        " the five has 0.2.",
        [pruners.Importance],
    ),
    (
        "quantizers.<name>",
        "How weights and activations are stored and computed. `method` selects the quantizer.",
        list(get_args(get_args(quantizers.Quantizer)[0])),
    ),
    ("pruned.<model>-<pruner>", "The networks that are pruned.", [variants.PrunedModel]),
    ("variants.<model>-<pruner>-<quantizer>", "The networks that are compressed and measured.", [variants.Variant]),
    ("export", "How `model.onnx` is written.", [Export]),
    ("profile", "Counts and accuracy on the test images.", [Profile]),
    ("edge_benchmark", "The timing protocol, the device and its runtimes.", [edge_benchmark.EdgeBenchmark]),
    ("edge_benchmark.soak", "A long run of one variant.", [edge_benchmark.Soak]),
    ("edge_benchmark.printed", "Printed and filmed test images.", [edge_benchmark.Printed]),
    ("report", "What the report shows.", [Report]),
]


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([INTRODUCTION, *(_chapter(*chapter) for chapter in CHAPTERS)])


def _chapter(title: str, introduction: str, kinds: list[type[Section]]) -> str:
    lines = [f"## `{title}`", "", introduction, ""]
    if len(kinds) > 1:
        lines += ["| `method` | meaning |", "|---|---|"]
        lines += [f"| {_methods(kind)} | {_flat(inspect.getdoc(kind) or '')} |" for kind in kinds] + [""]
    rows: dict[tuple[str, ...], list[str]] = {}
    for kind in kinds:
        for name, field in kind.model_fields.items():
            if name == "method":
                continue
            meaning, unit, condition = _parts(_docstrings(kind)[name])
            default = "required" if field.default is PydanticUndefined else _value(field.default)
            row = (f"`{name}`", _type(field.annotation, field.metadata), unit, default, meaning, condition)
            rows.setdefault(row, []).append(_methods(kind) if len(kinds) > 1 else "")
    lines += ["| key | type | unit | default | meaning | applies to |", "|---|---|---|---|---|---|"]
    everywhere = sum(len(kind.model_fields) > 1 for kind in kinds)
    for (key, type_, unit, default, meaning, condition), methods in rows.items():
        where = "" if len(kinds) == 1 else "all that train" if len(methods) == everywhere else ", ".join(methods)
        applies = "; ".join(part for part in (where, condition) if part) or "always"
        lines.append(f"| {key} | {type_} | {unit} | {default} | {meaning} | {applies} |")
    return "\n".join([*lines, ""])


def _methods(kind: type[Section]) -> str:
    return ", ".join(f"`{method}`" for method in get_args(kind.model_fields["method"].annotation))


def _docstrings(kind: type[Section]) -> dict[str, str]:
    """The docstring that follows each field, those of inherited fields included.

    Raises:
        ValueError: for a field without one.
    """
    found: dict[str, str] = {"method": ""}
    for base in reversed(kind.__mro__):
        if not (issubclass(base, Section) if isinstance(base, type) else False) or base is Section:
            continue
        body = ast.parse(inspect.getsource(base)).body[0].body  # type: ignore[attr-defined]
        for field, after in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(field.target, ast.Name):
                found[field.target.id] = _flat(ast.literal_eval(after.value))
    if missing := kind.model_fields.keys() - found.keys():
        raise ValueError(f"{kind.__name__} has fields without a docstring: {', '.join(sorted(missing))}")
    return found


def _parts(docstring: str) -> tuple[str, str, str]:
    """A docstring as its meaning, its unit and the setting that it needs."""
    unit = re.search(r" Unit: ([^.]+)\.", docstring)
    condition = re.search(r" (?:Only|Applies) with (.+?)\.$", docstring)
    for found in (unit, condition):
        docstring = docstring.replace(found[0], "") if found else docstring
    return docstring, unit[1] if unit else "", condition[1] if condition else ""


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _value(value: Any) -> str:
    if isinstance(value, Section):
        return "see below"
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    return f"`{value}`".replace("'", "")


def _type(annotation: Any, metadata: list[Any]) -> str:
    """The type with its limits, as a person writes it."""
    limits = _limits(metadata)
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        fields = [m for one in more for m in getattr(one, "metadata", [one])]
        return _type(inner, [*fields, *metadata])
    if get_origin(annotation) is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type(one, metadata if one is not type(None) else []) for one in get_args(annotation))
    if get_origin(annotation) is list:
        return " ".join(part for part in (f"list of {_type(get_args(annotation)[0], [])}", limits) if part)
    if get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, Section)):
        return "mapping"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return " ".join(part for part in (names.get(annotation, str(annotation)), limits) if part)


def _limits(metadata: list[Any]) -> str:
    found = []
    for one in metadata:
        for kind, sign in [
            (annotated_types.Ge, "≥"),
            (annotated_types.Gt, ">"),
            (annotated_types.Le, "≤"),
            (annotated_types.Lt, "<"),
        ]:
            if isinstance(one, kind):
                limit = getattr(one, kind.__name__.lower())
                found.append(f"{sign} {limit:,}" if limit < 2**32 else f"{sign} 2³²")
    return ", ".join(found)


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    write_text(PAGE, page())


if __name__ == "__main__":
    run_stage(main)
