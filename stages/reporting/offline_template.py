"""Make the page frame that lets `dvc plots show` work without network: Vega's three scripts stand in it.

`python -m stages.reporting.offline_template vega.min.js vega-lite.min.js vega-embed.min.js LICENSE` writes
`.dvc/plots/offline.html`, which `.dvc/config` names as `[plots] html_template = plots/offline.html`. The scripts
are the `build/*.min.js` of the npm packages vega 5, vega-lite 5 and vega-embed 6
(`npm pack vega@5 vega-lite@5 vega-embed@6`);
the licence, the same for all three, is vega-lite's `LICENSE`.
"""

import sys
from pathlib import Path

from stages.common.errors import UserError, run_stage
from stages.common.files import write_text

TEMPLATE = Path(".dvc/plots/offline.html")
LARGEST = 1_000_000
"""Bytes: the file is kept in git."""
NAMES = ("vega", "vega-lite", "vega-embed")
HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh_tag}
<title>DVC plots</title>
<style>
body { margin: 1.5rem auto; max-width: 80rem; padding: 0 1rem; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; }
table { border-spacing: 15px; }
img { max-width: 100%; height: auto; }
.vega-embed { margin-bottom: 2rem; }
</style>
"""
TAIL = """\
</head>
<body>
{plot_divs}
</body>
</html>
"""


def offline_template(scripts: dict[str, str], licence: str) -> str:
    """The frame, with DVC's placeholders `{refresh_tag}` and `{plot_divs}` and without `{scripts}`, its CDN links.

    Args:
        scripts: minified source by package name, in the order in which they must run.
        licence: of the scripts, which a copy must carry.

    Raises:
        UserError: if a script would end its own element, or holds one of DVC's placeholders.
    """
    parts = [HEAD, f"<!--\n{', '.join(scripts)}:\n\n{licence.strip()}\n-->\n"]
    for name, source in scripts.items():
        for forbidden in ("</script", "<!--", "{plot_divs}", "{refresh_tag}", "{scripts}"):
            if forbidden in source:
                raise UserError(f"{name}: holds {forbidden!r} and cannot stand in a page as it is")
        source = "\n".join(line for line in source.splitlines() if not line.startswith("//# sourceMappingURL"))
        parts.append(f"<script>/* {name} */\n{source}\n</script>\n")
    return "".join([*parts, TAIL])


def main() -> None:
    if len(sys.argv) != 2 + len(NAMES):
        raise UserError(f"give the paths of {', '.join(f'{name}.min.js' for name in NAMES)} and their LICENSE")
    *sources, licence = (Path(path).read_text(encoding="utf-8") for path in sys.argv[1:])
    page = offline_template(dict(zip(NAMES, sources, strict=True)), licence)
    if len(page.encode()) >= LARGEST:
        raise UserError(
            f"the page would be {len(page.encode()):,} bytes, the limit is {LARGEST:,}: take smaller builds"
        )
    write_text(TEMPLATE, page)


if __name__ == "__main__":
    run_stage(main)
