"""Writes every label of DSLINE_POINT under a folder as lines of a C++ array.

``list_labels.py FOLDER OUTPUT``
"""

import re
import sys
from pathlib import Path

folder, output = Path(sys.argv[1]), Path(sys.argv[2])
labels: set[str] = set()
for path in sorted(folder.rglob("*.?pp")):
    labels.update(re.findall(r'DSLINE_POINT\("([^"]+)"\)', path.read_text()))
text = "".join(f'"{label}",\n' for label in sorted(labels))
if not output.exists() or output.read_text() != text:
    output.write_text(text)
