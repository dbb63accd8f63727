"""Read the sections of `params.yaml` that a stage needs."""

import sys
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML, YAMLError

from stages.common import paths
from stages.common.errors import UserError
from stages.params.section import Section

Sections = TypeVar("Sections", bound=Section)


def load_params(kind: type[Sections], path: Path = paths.PARAMS, *, whole: bool = False) -> Sections:
    """Read and check the sections that `kind` names. Other sections are ignored, or refused if the file is `whole`.

    Raises:
        UserError: with one line for each problem: the key's path, its value, what is allowed.
    """
    raw = read_yaml(path)
    try:
        params = kind.model_validate({name: raw[name] for name in raw if whole or name in kind.model_fields})
    except ValidationError as error:
        from stages.params.messages import readable  # only on a failure: wording changes no result

        refuse(path, readable(error, kind, raw))
        raise
    from stages.params.rules import problems_in  # only refuses: changes no result

    refuse(path, problems_in(params))
    return params


def read_yaml(path: Path) -> dict[str, Any]:
    """The file as a mapping of sections, in YAML 1.2, as DVC reads and writes it (in YAML 1.1 `5e-05` is a string).

    Raises:
        UserError: if the file is missing, unreadable or no mapping.
    """
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.absolute()} is missing: run from the top folder or from profiles/<name>") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_reason(error)}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: no setting is") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold sections (a mapping), not {type(raw).__name__}")
    return raw


def _reason(error: YAMLError) -> str:
    """The parser's reason and its line, without its advice."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem.splitlines()[0]}"


def refuse(path: Path, problems: list[str]) -> None:
    """Raise one `UserError` for all problems of a file; nothing happens if there are none."""
    if problems:
        raise UserError(f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)}\n  " + "\n  ".join(problems))


def listed(section: str, known: dict[str, Any], name: str) -> str:
    """The name, if it is an entry of `section`.

    Raises:
        UserError: if it is not, or is empty.
    """
    if name in known:
        return name
    given = f"{name!r}: " if name else ""
    raise UserError(f"{given}give one entry of {section}: {', '.join(known)}")


def key_argument(section: str, known: dict[str, Any]) -> str:
    """The entry of `section` that is the only argument of the command line; see `listed`."""
    return listed(section, known, " ".join(sys.argv[1:]))
