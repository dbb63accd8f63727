"""Readable messages for what pydantic refuses: one line each, with the key's path as it stands in the file.

No stage's result depends on this module, so `dvc.yaml` does not list it: a better message retrains nothing.
"""

import difflib
from typing import Annotated, Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from stages.params.section import Section

RENAMED = {
    "prune": "pruners",
    "prunings": "pruned",
    "quantize": "quantizers",
    "finetune.average_decay": "finetune.ema_decay",
    "finetune.early_input_size": "finetune.progressive_resize.input_size",
    "finetune.early_fraction": "finetune.progressive_resize.fraction",
    "variants.*.pruning": "variants.*.pruned",
    "pruners.*.prunings": "pruners.*.pruning_periods",
}
"""Keys of older params files, and their names now."""
REMOVED = {
    "root": "a profile finds the code through its link `stages`",
    "quantizers.*.objective": "searches always minimize the loss",
}
VALUES = {
    "none_continued": "is now called continued",
    "integer_programme": "is now called ilp",
    "exact_matmul": "was removed: use exact",
    "executorch": "was removed: this runtime is no longer offered",
}
"""Values of older params files, and what became of them."""


def readable(error: ValidationError, kind: type[Section], raw: dict[str, Any]) -> list[str]:
    """One line for each problem, and one for each old name at the top of the file."""
    old = [name for name in raw if RENAMED.get(str(name)) in kind.model_fields]
    replaced = {RENAMED[name] for name in old}
    lines = [f"{name}: this section is now called {RENAMED[name]}" for name in old]
    for detail in error.errors():
        where, value = _locate(detail, raw)
        parent, last = where[:-1], where[-1] if where else ""
        renamed = [key for key, new in RENAMED.items() if new == _pattern(where)]
        if detail["type"] == "missing" and (last in replaced or any(_holds(raw, parent, key) for key in renamed)):
            continue  # the line of the old name says it
        if detail["type"] == "extra_forbidden" and not parent and last in old:
            continue
        line = _line(detail, where, value, kind, raw)
        begin, must, allowed = line.rpartition(": must be ")
        if lines and must and lines[-1].startswith(begin + must):  # the next member of a union
            lines[-1] += f", or {allowed}"
        else:
            lines.append(line)
    return lines


def _locate(detail: ErrorDetails, raw: Any) -> tuple[list[str], Any]:
    """The path in the file (pydantic adds its own tags to it), and the value there."""
    where, value = [], raw
    for position, part in enumerate(detail["loc"]):
        last = position == len(detail["loc"]) - 1
        in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if in_list or (isinstance(value, dict) and part in value):
            value = value[part]
        elif part == "[key]" or not last or detail["type"] != "missing":
            continue
        where.append(str(part))
    return where, value


def _pattern(where: list[str]) -> str:
    """The path with `*` for the name of an entry, as in `RENAMED`."""
    entry = len(where) > 2 and where[0] in ("models", "pruners", "pruned", "quantizers", "variants")
    return ".".join([where[0], "*", *where[2:]] if entry else where)


def _holds(raw: Any, parent: list[str], key: str) -> bool:
    for part in parent:
        raw = raw.get(part) if isinstance(raw, dict) else None
    return isinstance(raw, dict) and key.rpartition(".")[2] in raw


def _line(detail: ErrorDetails, where: list[str], value: Any, kind: type[Section], raw: Any) -> str:
    key = ".".join(where) or "the file"
    shown, context = _shown(value), detail.get("ctx", {})
    if isinstance(value, str) and value in VALUES:
        return f"{key} = {shown}: {VALUES[value]}"
    match detail["type"]:
        case "missing":
            return f"{key}: is required and missing"
        case "extra_forbidden":
            pattern = _pattern(where)
            if pattern in RENAMED:
                new = RENAMED[pattern].replace("*", where[1])
                return f"{key} = {shown}: unknown key; it is now called {new}"
            if pattern in REMOVED:
                return f"{key} = {shown}: was removed: {REMOVED[pattern]}"
            return f"{key} = {shown}: unknown key{_known_keys(where, kind, raw)}"
        case "string_type" if "[key]" in detail["loc"]:
            return f"{key}: the name {detail['input']!r} is no text: put it in quotes"
        case "string_pattern_mismatch":  # only names have a pattern
            given = "" if "[key]" in detail["loc"] else f" = {value!r}"
            return (
                f"{key}{given}: names hold letters, digits, _ and - only, and begin with a letter or digit, since they"
                " become folders and keys of DVC"
            )
        case "union_tag_invalid":
            method = value.get("method")
            known = VALUES.get(str(method)) or f"must be one of {context['expected_tags']}"
            return f"{key}.method = {method!r}: {known}"
        case "union_tag_not_found":
            return f"{key}.method: is required and missing"
        case "dict_type" | "model_type" | "model_attributes_type":
            if value is None:
                return f"{key}: is empty: its keys are missing"
            section = _section_at(kind, where, raw)
            keys = f" with the keys {', '.join(section.model_fields)}" if section else ""
            return f"{key} = {shown}: must be a mapping{keys}"
        case "too_short":
            return f"{key}: needs at least {context['min_length']} entries"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    must = "must be " if detail["msg"].startswith("Input should be") else ""
    return f"{key}{'' if isinstance(value, dict) else f' = {shown}'}: {must}{message}"


def _shown(value: Any) -> str:
    """The value as it stands in the file, if it is short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _known_keys(where: list[str], kind: type[Section], raw: Any) -> str:
    """The nearest known key, or all known keys, at the place of an unknown one."""
    section = _section_at(kind, where[:-1], raw)
    if section is None:
        return ""
    near = difflib.get_close_matches(where[-1], section.model_fields, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(section.model_fields)}"


def _section_at(annotation: Any, where: list[str], raw: Any) -> type[Section] | None:
    """The typed section at a place in the file; None if the file does not show which one it is."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        if not where:
            return annotation
        field = annotation.model_fields.get(where[0])
        return field and _section_at(field.annotation, where[1:], raw[where[0]])
    if get_origin(annotation) is dict:
        return _section_at(get_args(annotation)[1], where[1:], raw[where[0]]) if where else None
    if get_origin(annotation) is Annotated:
        return _section_at(get_args(annotation)[0], where, raw)
    members = [one for one in get_args(annotation) if isinstance(one, type) and issubclass(one, Section)]
    if len(members) == 1:  # a section or null
        return _section_at(members[0], where, raw)
    for one in members:  # a union, told apart by the method
        if raw.get("method") in get_args(one.model_fields["method"].annotation):
            return _section_at(one, where, raw)
    return None
