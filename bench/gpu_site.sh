#!/usr/bin/env bash
# On a GPU host without package registries: make `hogwild` visible as an installed package (vLLM finds its plugin by
# entry point) in a site directory that holds everything else. Run from the repository's root: bench/gpu_site.sh SITE
set -euo pipefail
site=${1:?usage: bench/gpu_site.sh SITE}
info="$site/hogwild-0.1.0.dist-info"
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: hogwild\nVersion: 0.1.0\n' > "$info/METADATA"
python3 - "$info/entry_points.txt" <<'PY'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
with open(sys.argv[1], "w") as out:
    for group, names in {"console_scripts": project["scripts"], **project["entry-points"]}.items():
        print(f"[{group}]", *(f"{k} = {v}" for k, v in names.items()), sep="\n", file=out)
PY
mkdir -p "$site/bin"
printf '#!/usr/bin/env python3\nfrom hogwild.cli import main\nmain()\n' > "$site/bin/hogwild"
chmod +x "$site/bin/hogwild"
