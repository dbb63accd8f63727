"""Copy the committed reports of the profiles into the pages beside this file, between the comments that name them.

Run: python docs/results/refresh.py
"""

import re
from pathlib import Path

TOP = Path(__file__).parents[2]


def refreshed(page: str) -> str:
    """The page's text; each `<!-- summary: FILE -->` ... `<!-- /summary -->` holds that file, relative to the top."""
    block = r"(<!-- summary: (\S+) -->\n).*?(?=<!-- /summary -->)"
    return re.sub(block, lambda found: found[1] + (TOP / found[2]).read_text(), page, flags=re.DOTALL)


if __name__ == "__main__":
    for path in Path(__file__).parent.glob("*.md"):
        path.write_text(refreshed(path.read_text()))
